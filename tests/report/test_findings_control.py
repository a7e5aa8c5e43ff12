"""The control's sentences: no Yes where a policy without feedback wins as much, and the numbers beside each other."""

import re

import pytest
from report_example import estimate, example_models, example_report, win_of

from instruct_trl.report import findings, findings_control
from instruct_trl.report.data import ModelResult, load_report_data, save_report_data
from instruct_trl.report.pages import write_report


def plain(text):
    return text.replace("\u00a0", " ")


def with_control(won, lead, win=None, **more):
    """A report whose headline model wins 63 of 100, and its control so many."""
    *others, last = example_models(win or win_of(63, 37))
    models = [*others, ModelResult("shuffled ranks", win_of(won, 100 - won)), last]
    return example_report(models=models, control={"name": "shuffled ranks", "lead": lead, **more})


@pytest.mark.parametrize(
    ("won", "lead", "verdict", "end"),
    [
        (51, estimate(0.12, 0.05), "better", "wins 51 % (41 to 61); PPO-ptx's lead over it on the same prompts is "
         "12.0 points (7.0 to 17.0)."),
        (61, estimate(0.02, 0.05), "doubtful", "wins 61 % (51 to 70); PPO-ptx's lead over it on the same prompts is "
         "2.0 points (−3.0 to 7.0), so this win need not come from the feedback."),
        (70, estimate(-0.07, 0.05), "doubtful", "is −7.0 points (−12.0 to −2.0), so this win does not come from the "
         "feedback."),
    ],
)  # fmt: skip
def test_a_win_counts_as_far_as_it_leads_the_control(won, lead, verdict, end):
    data = with_control(won, lead)
    kind, sentence = findings_control.headline(data)
    assert kind == verdict
    assert plain(sentence).startswith("PPO-ptx beats SFT: it wins 63 % of 100 prompts")
    assert plain(sentence).endswith(end)


@pytest.mark.parametrize(("win", "verdict"), [(win_of(37, 63), "worse"), (win_of(52, 48), "unclear")])
def test_no_win_needs_no_reason(win, verdict):
    kind, sentence = findings_control.headline(with_control(51, estimate(0.01, 0.05), win))
    assert kind == verdict
    assert "The control, with shuffled ranks, wins 51" in plain(sentence)
    assert "feedback" not in sentence


def test_without_a_control_or_a_verdict_the_headline_is_as_it_was():
    data = example_report(win_of(63, 37))
    assert findings_control.headline(data) == findings.headline(data)
    seen = with_control(51, estimate(0.12, 0.05))
    seen.trained_on = {"rows": 50, "of": 100, "note": "half"}
    assert findings_control.headline(seen) == findings.headline(seen)
    assert findings.headline(seen)[0] == "missing"


def test_the_page_shows_both_win_rates_and_says_what_the_control_is(tmp_path):
    accuracy = {**estimate(0.49, 0.05), "n_pairs": 287}
    data = with_control(61, estimate(0.02, 0.05), pair_accuracy=accuracy)
    data = load_report_data(save_report_data(data, tmp_path / "report.json"))
    write_report(data, tmp_path)
    page = plain((tmp_path / "report.md").read_text())
    assert "**In doubt. PPO-ptx beats SFT" in page
    assert "- **61 %** won by the control, with shuffled ranks" in page
    assert "What is left of a win there does not come from the feedback." in page
    assert "Its reward model orders 49 % of 287 held-out pairs (95 % interval 44 to 54) as the labeler does." in page
    assert re.search(r"\| win rate against SFT .*\| 61.0 %", page)
    assert "shuffled ranks" in (tmp_path / "report.html").read_text()
