"""The report's further parts: judges, tasks, hacks, gold score; sentences follow the numbers, whichever way they go."""

import numpy as np
import pytest
from report_example import example_report, task, win_of
from scipy import stats

from instruct_trl.evaluation.gold import best_checkpoint, turning_point
from instruct_trl.evaluation.hacks import (
    common_opening,
    duplicate_rate,
    favourite_word,
    like_length_win_rate,
    rank_correlation,
)
from instruct_trl.judges.base import Reply
from instruct_trl.judges.tally import judged_row, tally_pairs
from instruct_trl.report import more_plots
from instruct_trl.report import parts as report_parts
from instruct_trl.report import pictures_run as plots
from instruct_trl.report.pages import ModelResult, write_report
from instruct_trl.report.pictures import LIGHT


def plain(text):
    return text.replace("\u00a0", " ")


def test_rank_correlation_equals_scipy():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, 60)  # with ties
    scores = lengths + rng.normal(0, 4, 60)
    ours = rank_correlation(scores.tolist(), lengths.tolist())
    assert ours == pytest.approx(stats.spearmanr(scores, lengths).statistic)
    assert rank_correlation([1.0, 1.0], [1.0, 2.0]) is None


def test_like_length_keeps_the_prompts_whose_answers_are_equally_long():
    # Lengths 10 and 11 (10 % more), 10 and 12, 5 and 5, 0 and 0, 0 and 1.
    win = like_length_win_rate([1, 1, 0, 3, 1], [0, 0, 2, 3, 0], [10, 12, 5, 0, 1], [11, 10, 5, 0, 0])
    assert (win.wins, win.ties, win.losses) == (1, 1, 1)
    assert like_length_win_rate([1], [0], [9], [3]) is None


def test_duplicates_and_openings_by_counting():
    texts = ["A very fun film", "a very  fun FILM", "a very fun one", "dull", ""]
    assert duplicate_rate(texts) == pytest.approx(1 / 5)
    assert common_opening(texts) == ("a very fun", 3 / 5)
    assert common_opening(["", " "]) == ("", 0.0)
    assert duplicate_rate([]) == 0.0


def test_the_favourite_word_by_counting():
    """ "and" is in 3 of 4 answers against 1 of 2, "fun" in 2 of 4 against none: twice in one answer counts once."""
    texts = ["dull and fun", "Fun fun and", "and so", "so"]
    assert favourite_word(texts, ["so and", "so dull"]) == ("fun", 0.5, 0.0)
    assert favourite_word(["so"], ["so so", "SO"]) is None
    assert favourite_word(["", ""], ["so"]) is None
    assert favourite_word(["one two"], ["so"]) == ("two", 1.0, 0.0)  # of equals always the same one


def test_hacks_are_named_with_their_numbers():
    text = plain(report_parts.hacks_caption(example_report()))
    assert "answers are 2.00 times as long as SFT's" in text
    assert "distinct word pairs fell from 86 % to 30 %" in text
    assert "among answers of like length it wins 52 %, not 64 %" in text
    assert "answers that begin “a very fun”: 40 %, SFT 5 %" in text
    assert "“very” is in 90 % of the answers, SFT 20 %" in text
    same = [ModelResult("SFT", mean_length=10.0), ModelResult("PPO-ptx", win_of(60, 40), mean_length=11.0)]
    assert "None of the usual signs" in report_parts.hacks_caption(example_report(models=same))


def test_a_report_says_whether_people_judged():
    assert report_parts.who_judged(example_report(judged=[])).startswith("No person judged these answers.")
    assert report_parts.who_judged(example_report()).endswith("What people said is below.")


def test_judges_that_disagree_are_named():
    text = plain(report_parts.judges_caption(example_report()))
    assert "judge-1 40 % (34 to 46)" in text
    assert "the labeler 64 %" in text
    assert text.endswith("Not as the labeler says: judge-1.")
    assert "Not as" not in report_parts.judges_caption(example_report(win_of(40, 60)))


def test_tasks_that_fall_and_rise_are_named():
    text = report_parts.tasks_caption(example_report())
    assert text == (
        "Against base, PPO-ptx falls on boolq; rises on hellaswag; on 1 of 3 tasks it cannot be told from base."
    )


def test_pictures_of_tasks_and_judges_show_the_numbers():
    axes = more_plots.draw_tasks(example_report(), LIGHT).axes[0]
    marks = [line for line in axes.lines if line.get_marker() in ("o", "s")]
    values = sorted(
        float(line.get_xdata()) if np.ndim(line.get_xdata()) == 0 else float(line.get_xdata()[0]) for line in marks
    )
    assert values == pytest.approx([-5.0, -2.0, -0.1, 4.0])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["boolq", "hellaswag", "squad"]
    axes = more_plots.draw_judges(example_report(), LIGHT).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["labeler", "judge-1"]


def test_the_report_shows_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "save_picture", lambda draw, theme, path: path.write_bytes(b""))
    text = plain(write_report(example_report(), tmp_path).with_name("report.md").read_text(encoding="utf-8"))
    for expected in (
        "| judge-1: PPO-ptx | 40 % (34 to 46) | 90 / 20 / 140 | 17 | 6 |",
        "| 3 people: PPO-ptx | – | – | 0 | 3 |",
        "| quality | 4.00<br>(2.00 to 4.40)<br>of 250, 6 left out |",
        "| boolq<br>(acc, 1,000 items) | 60.0 (57 to 63) | 58.0 (55 to 61)<br>−2.0 (−4.0 to +0.0) |",
        "validation prompts, step 80 is best (0.90); the last, step 120, has 0.40, clearly less.",
        "1,024 requests now.",
    ):
        assert expected in text


def noisy(levels, seed=0):
    return (np.asarray(levels) + np.random.default_rng(seed).normal(0, 0.3, len(levels))).tolist()


def test_a_turning_point_is_found_where_gold_rises_and_falls():
    up_and_down = np.concatenate([np.linspace(0, 4, 60), np.linspace(4, 1, 60)])
    rising = np.linspace(0, 5, 120)
    turn = turning_point(noisy(up_and_down), noisy(rising, 1))
    assert 50 <= turn.index <= 72
    assert turn.gold == pytest.approx(4.0, abs=0.4)
    assert turn.last == pytest.approx(1.1, abs=0.4)
    assert turn.proxy_rose
    assert not turning_point(noisy(up_and_down), noisy(up_and_down, 1)).proxy_rose
    assert turning_point(noisy(rising), noisy(rising, 1)) is None
    assert turning_point([1.0] * 20, [1.0] * 20) is None


def test_noise_alone_has_seldom_a_turning_point():
    """Whatever peak noise has, other noise judges it: at most about one run in twenty is called a fall."""
    found = sum(turning_point(noisy([0.0] * 120, seed), [0.0] * 120) is not None for seed in range(200))
    assert found <= 14


@pytest.mark.parametrize(
    ("low", "says"), [(0.01, "clearly less."), (-0.01, "cannot be told from it."), (None, "cannot be told from it.")]
)
def test_best_and_last_checkpoint_are_told_apart_by_their_paired_difference(low, says):
    """The two errors alone, 0.2 each, would not tell 0.1 apart."""
    rows = [{"step": step, "labeler_score": score, "labeler_se": 0.2} for step, score in ((1, 0.5), (2, 0.4))]
    rows[-1]["behind_best"] = {"mean": 0.1, "low": low, "high": None if low is None else 0.2}
    assert report_parts.checkpoints_caption(example_report(checkpoints=rows)).endswith(says)


def test_the_best_checkpoint_is_the_first_of_the_highest():
    rows = [{"step": i, "labeler_score": s} for i, s in enumerate([0.1, 0.9, 0.9, None, float("nan")])]
    assert best_checkpoint(rows)["step"] == 1
    with pytest.raises(ValueError, match="No checkpoint has a labeler's score"):
        best_checkpoint(rows[3:])


def test_a_judged_row_holds_what_was_counted():
    row = judged_row(tally_pairs([Reply(1.0), Reply(0.5), Reply(None)], "j", "PPO", "SFT"))
    assert (row["judge"], row["wins"], row["ties"], row["losses"], row["n"], row["invalid"]) == ("j", 1, 1, 0, 2, 1)
    assert row["rate"] == 0.75
    assert judged_row(tally_pairs([Reply(None)], "j", "PPO", "SFT"))["rate"] is None


def test_tasks_without_a_change_draw_no_picture():
    data = example_report(models=[ModelResult("base", tasks={"boolq": task(0.5)}), ModelResult("SFT")])
    assert not more_plots.has_tasks(data)
    assert report_parts.task_blocks(data)
