"""The sentences of a run's report follow its numbers, whichever way they go."""

import pytest
from report_example import estimate, example_report, win_of

from instruct_trl.report import findings, findings_reward
from instruct_trl.report.data import ModelResult, ReportData


def plain(text):
    return text.replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("win", "verdict", "start", "end"),
    [
        (win_of(63, 37), "better", "PPO-ptx beats SFT: it wins 63 % of 100 prompts", "lies above one half."),
        (win_of(37, 63), "worse", "PPO-ptx does worse than SFT: it wins 37 % of 100 prompts", "lies below one half."),
        (win_of(52, 48), "unclear", "Whether PPO-ptx beats SFT is open: it wins 52 %", "holds one half."),
    ],
)
def test_verdict_follows_the_interval(win, verdict, start, end):
    data = example_report(win)
    kind, sentence = findings.headline(data)
    assert kind == verdict
    assert plain(sentence).startswith(start)
    assert sentence.endswith(end)
    assert "wins" in findings.win(data).split(";")[0]


@pytest.mark.parametrize(
    ("accuracy", "length", "words", "says"),
    [
        (0.02, 0.1, 0.1, "cannot be told from a coin, so the win cannot be put down to the rankings."),
        (-0.2, 0.1, 0.1, "does worse than a coin, so the win cannot be put down to the rankings."),
        (0.2, -0.06, 0.1, "shows no more than length, so the win cannot be put down to more in the rankings."),
        (0.2, 0.1, -0.05, "shows no more than words, so the win cannot be put down to more in the rankings."),
        (0.2, -0.01, 0.1, "cannot be told from a rule of length, so it is open whether the win comes from more than"),
        (
            0.2,
            0.1,
            0.01,
            "cannot be told from a bag of words, so it is open whether the win comes from more than words",
        ),
        (0.2, 0.0, 0.0, "cannot be told from a rule of length or a bag of words, so it is open"),
    ],
)
def test_a_win_on_a_reward_model_that_does_not_beat_its_floors_is_no_yes(accuracy, length, words, says):
    rates = {**estimate(0.5 + accuracy, 0.05), "n_pairs": 900}
    floors = {
        name: {"rule": name, "accuracy": rates, "lead": estimate(lead, 0.05)}
        for name, lead in (("length", length), ("bag_of_words", words))
    }
    figures = {"pair_accuracy": rates, "floors": floors | {"missing": None}}
    kind, text = findings.headline(example_report(win_of(63, 37), reward_model=figures))
    assert kind == "doubtful"
    assert plain(text).startswith("PPO-ptx beats SFT: it wins 63 % of 100 prompts")
    assert says in text
    # A loss stays a loss, and a reward model above its floors takes nothing from a win.
    assert findings.headline(example_report(win_of(37, 63), reward_model=figures))[0] == "worse"
    sure = {name: {**floor, "lead": estimate(0.1, 0.05)} for name, floor in floors.items()}
    figures = {"pair_accuracy": {**estimate(0.7, 0.05), "n_pairs": 900}, "floors": sure | {"missing": None}}
    assert findings.headline(example_report(win_of(63, 37), reward_model=figures))[0] == "better"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"trained_on": {"rows": 30, "of": 100}},
            "30 of the 100 rows that its reward model was tested on have prompts",
        ),
        ({"pair_accuracy": {"mean": 1.0, "low": None, "high": None, "n": 9, "n_pairs": 27}}, "only 9 prompts, too few"),
        ({"trained_on": {"rows": 1, "of": 100}}, None),
    ],
)
def test_a_win_on_a_reward_model_that_was_not_properly_tested_is_no_yes(more, says):
    figures = {"pair_accuracy": {**estimate(0.7, 0.05), "n_pairs": 900}, "floors": {}} | more
    kind, text = findings.headline(example_report(win_of(63, 37), reward_model=figures))
    assert kind == ("doubtful" if says else "better")
    assert (says or "") in text


@pytest.mark.parametrize(
    ("lead", "verdict", "says"),
    [
        (0.1, "better", "knows more than words"),
        (0.01, "unclear", "cannot be told from a bag of words"),
        (-0.1, "worse", "shows no more than words"),
    ],
)
def test_the_page_claims_no_more_than_the_interval_of_the_lead(lead, verdict, says):
    rate = {**estimate(0.7, 0.05), "n_pairs": 900}
    floor = {"rule": "a bag of words", "accuracy": rate, "lead": estimate(lead, 0.05)}
    kind, text = findings_reward.headline({"pair_accuracy": rate, "floors": {"bag_of_words": floor}})
    assert (kind, says in text) == (verdict, True)


def test_headline_interval_is_wilsons():
    # SciPy: binomtest(63, 100).proportion_ci(method="wilson") is 0.5322 to 0.7182.
    assert "(95 % interval 53 to 72)" in findings.headline(example_report(win_of(63, 37)))[1].replace("\u00a0", " ")


def test_subject_and_no_comparison():
    models = [ModelResult("SFT"), ModelResult("PPO", win_of(1, 99)), ModelResult("PPO-ptx", win_of(99, 1))]
    assert findings.headline(ReportData("r", models, subject="PPO"))[0] == "worse"
    assert findings.headline(ReportData("r", models))[0] == "better"
    assert findings.headline(ReportData("r", [ModelResult("SFT")]))[0] == "missing"


def test_over_optimisation_is_said():
    flat = example_report()
    for i, row in enumerate(flat.training):
        row["labeler_score"] = 0.3 + 0.05 * (-1) ** i
    assert "over-optimisation" in findings.frontier(flat)
    assert "over-optimisation" not in findings.frontier(example_report())


def test_captions_state_the_data():
    data = example_report()
    assert findings.training(data) == (
        "RM score, labeler score and KL rose; value loss fell; pretraining loss and explained variance did not "
        "clearly move."
    )
    pretraining = findings.pretraining(data)
    assert "base 3.412, SFT 3.458, PPO-ptx 3.470" in pretraining
    assert "PPO-ptx is 0.058 worse than base and 0.012 worse than SFT" in pretraining
    rm = findings.reward_model(data).replace("\u00a0", " ")
    assert "71 % of 1,204 held-out pairs" in rm
    assert rm.endswith("(95 % interval 68 to 74) as the labeler does, above a coin's 50 %.")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00"), (-0.0842, "−0.08"), (1.005e-3, "0.0010"), (12.34, "12.3"), (1234.5, "1,234"), (-3e-6, "−3.0e−06")],
)
def test_numbers_read_well(value, text):
    assert findings.number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (59, "59 s"), (75, "1 min 15 s"), (7260, "2 h 1 min")])
def test_durations_read_well(seconds, text):
    assert findings.duration(seconds).replace("\u00a0", " ") == text


def test_hacks_are_named_with_their_numbers():
    text = plain(findings.hacks(example_report()))
    assert "answers are 2.00 times as long as SFT's" in text
    assert "distinct word pairs: 30 %, SFT 86 %" in text
    assert "among answers of like length it wins 52 %, not 64 %" in text
    assert "answers that begin “a very fun”: 40 %, SFT 5 %" in text
    assert "answers with “very”: 90 %, SFT 20 %" in text
    same = [ModelResult("SFT", mean_length=10.0), ModelResult("PPO-ptx", win_of(60, 40), mean_length=11.0)]
    assert "None of the usual signs" in findings.hacks(example_report(models=same))


def test_judges_that_disagree_are_named():
    text = plain(findings.judges(example_report()))
    assert "judge-1 40 % (34 to 46)" in text
    assert "the labeler 64 %" in text
    assert text.endswith("Not as the labeler says: judge-1.")
    assert "Not as" not in findings.judges(example_report(win_of(40, 60)))


def test_tasks_that_fall_and_rise_are_named():
    text = findings.tasks(example_report())
    assert text == (
        "Against base, PPO-ptx falls on boolq; rises on hellaswag; on 1 of 3 tasks it cannot be told from base."
    )


@pytest.mark.parametrize(
    ("low", "says"), [(0.01, "clearly less."), (-0.01, "cannot be told from it."), (None, "cannot be told from it.")]
)
def test_best_and_last_checkpoint_are_told_apart_by_their_paired_difference(low, says):
    rows = [{"step": step, "labeler_score": estimate(score, 0.4)} for step, score in ((1, 0.5), (2, 0.4))]
    rows[-1]["behind_best"] = {"mean": 0.1, "low": low, "high": None if low is None else 0.2, "n": 130}
    assert findings.checkpoints(example_report(checkpoints=rows)).endswith(says)
