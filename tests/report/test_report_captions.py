"""The report's sentences follow its numbers, whichever way they go."""

import numpy as np
import pytest
from report_example import example_report, win_of

from instruct_trl.report import findings as captions
from instruct_trl.report.pages import ModelResult, ReportData


@pytest.mark.parametrize(
    ("win", "verdict", "start", "caption"),
    [
        (win_of(63, 37), "better", "PPO-ptx beats SFT: it wins 63 % of 100 prompts", "above one half"),
        (win_of(37, 63), "worse", "PPO-ptx does worse than SFT: it wins 37 % of 100 prompts", "below one half"),
        (win_of(52, 48), "unclear", "Whether PPO-ptx beats SFT is open: it wins 52 %", "cannot tell from one half"),
    ],
)
def test_verdict_follows_the_interval(win, verdict, start, caption):
    data = example_report(win)
    kind, sentence = captions.headline(data)
    assert kind == verdict
    assert sentence.replace("\u00a0", " ").startswith(start)
    assert captions.win_caption(data).split(";")[0].endswith(caption)


def test_headline_interval_is_wilsons():
    # SciPy: binomtest(63, 100).proportion_ci(method="wilson") is 0.5322 to 0.7182.
    assert "(95 % interval 53 to 72)" in captions.headline(example_report(win_of(63, 37)))[1].replace("\u00a0", " ")


def test_subject_and_no_comparison():
    models = [ModelResult("SFT"), ModelResult("PPO", win_of(1, 99)), ModelResult("PPO-ptx", win_of(99, 1))]
    assert captions.headline(ReportData("r", models, subject="PPO"))[0] == "worse"
    assert captions.headline(ReportData("r", models))[0] == "better"
    assert captions.headline(ReportData("r", [ModelResult("SFT")]))[0] == "missing"


def test_direction_of_a_noisy_series():
    noise = [0.0, 1.0, -1.0] * 10
    # Of the 29 differences of neighbours 20 are 1 and 9 are 2: σ = 1.483/√2 = 1.0486. Six values an end have median 0:
    # two standard errors are 2 · 1.253 · 1.0486 · √(2/6) = 1.5172.
    shifted = lambda step: [*noise[:-6], *(v + step for v in noise[-6:])]  # noqa: E731
    assert captions.direction(shifted(1.53)) == "rose"
    assert captions.direction(shifted(-1.53)) == "fell"
    assert captions.direction(shifted(1.50)) == "did not clearly move"
    assert captions.direction([1.0, 2.0, 3.0] * 4) == ""
    # One wild step does not hide a clear change.
    assert captions.direction([1e6, *shifted(5)[1:]]) == "rose"


@pytest.mark.parametrize("n", [15, 19, 24, 30, 45, 60])
def test_direction_calls_noise_a_move_in_one_series_of_twenty(n):
    """Two standard errors: 4.6 % for normal noise; medians of 3 to 12 values and 1,000 series come near it."""
    noise = np.random.default_rng(n).normal(size=(1000, n))
    false = np.mean([captions.direction(row.tolist()) != "did not clearly move" for row in noise])
    assert 0.02 <= false <= 0.08
    trend = noise + np.linspace(0, 4, n)
    assert np.mean([captions.direction(row.tolist()) == "rose" for row in trend]) > 0.8


def test_over_optimisation_is_said():
    flat = example_report()
    for i, row in enumerate(flat.training):
        row["labeler_score"] = 0.3 + 0.05 * (-1) ** i
    assert "over-optimisation" in captions.frontier_caption(flat)
    assert "over-optimisation" not in captions.frontier_caption(example_report())


def test_captions_state_the_data():
    data = example_report()
    assert captions.training_caption(data) == (
        "RM score, labeler score and KL rose; value loss fell; pretraining loss and explained variance did not "
        "clearly move."
    )
    pretraining = captions.pretraining_caption(data)
    assert "base 3.412, SFT 3.458, PPO-ptx 3.470 nats a token" in pretraining
    assert "PPO-ptx is 0.058 worse than base and 0.012 worse than SFT" in pretraining
    rm = captions.reward_model_caption(data).replace("\u00a0", " ")
    assert "71 % of 1,204 held-out pairs" in rm
    assert "(95 % interval 68 to 74), above a coin's 50 %" in rm
    assert "from 62 % when they are 1 rank apart to 86 % when they are 2 apart" in rm


def test_path_means_keep_the_mean_and_the_order():
    # 6 values in 4 groups: edges 0, 1, 3, 4, 6.
    assert captions.path_means([1, 2, 4, 8, 16, 32], points=4) == [1, 3, 8, 24]
    assert captions.path_means([5.0], points=16) == [5.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00"), (-0.0842, "−0.08"), (1.005e-3, "0.0010"), (12.34, "12.3"), (1234.5, "1,234"), (-3e-6, "−3.0e−06")],
)
def test_numbers_read_well(value, text):
    assert captions.number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (59, "59 s"), (75, "1 min 15 s"), (7260, "2 h 1 min")])
def test_durations_read_well(seconds, text):
    assert captions.duration(seconds).replace("\u00a0", " ") == text
