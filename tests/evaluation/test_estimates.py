"""Intervals over prompts: against SciPy, closed forms, and how often they hold the truth in simulated data sets."""

import json

import numpy as np
import pytest
from scipy import stats

from instruct_trl.data.encoding import prompt_key, prompt_keys
from instruct_trl.evaluation.estimates import mean_interval, rate_interval, standard_error, wilson_interval
from instruct_trl.evaluation.reward_metrics import reward_metrics
from instruct_trl.evaluation.win_rate import win_rate
from instruct_trl.judges import find_questions
from instruct_trl.judges.base import Reply
from instruct_trl.judges.tally import tally_pairs, tally_question, win_rate_difference
from instruct_trl.report import findings_reward as reward_captions
from instruct_trl.report.pages import reward_warnings


def test_standard_error_of_one_row_a_prompt_and_of_equal_prompts():
    values = np.random.default_rng(0).normal(size=24)
    assert standard_error(values) == pytest.approx(stats.sem(values))
    # Prompts with equally many rows: that of the prompts' means.
    prompts = np.repeat(np.arange(6), 4)
    assert standard_error(values, prompts) == pytest.approx(stats.sem(values.reshape(6, 4).mean(axis=1)))
    assert standard_error(values, ["the same"] * 24) is None


def test_rows_that_repeat_say_nothing_new():
    """Each row ten times over, in any order: the interval is that of the rows once."""
    rng = np.random.default_rng(1)
    values, order = rng.normal(size=30), rng.permutation(300)
    tenfold, prompts = np.repeat(values, 10)[order], np.repeat(np.arange(30), 10)[order]
    once, again = mean_interval(np.sort(values)), mean_interval(tenfold, prompts)
    assert (again.mean, again.n) == (pytest.approx(once.mean), 30)
    assert again.high - again.low == pytest.approx(once.high - once.low, rel=0.05)  # another order, other draws
    assert mean_interval(tenfold).high - mean_interval(tenfold).low < 0.4 * (once.high - once.low)


def simulated(rng, prompts=40, rows=36):
    """Outcomes of (prompts × rows) pairs with a rate of 0.7, which from prompt to prompt varies by 0.1."""
    rates = rng.beta(0.7 * 20, 0.3 * 20, size=prompts)  # its standard deviation is √(0.7 · 0.3 / 21)
    return (rng.random((prompts, rows)) < rates[:, None]).astype(float)


def test_nominal_95_per_cent_cover_95_and_rows_far_less():
    """400 data sets of 40 prompts with 36 pairs each, as rows of their own: how many intervals hold 0.7?"""
    rng = np.random.default_rng(7)
    prompts = np.repeat(np.arange(40), 36)
    held = {"prompts": 0, "rows": 0}
    for _ in range(400):
        outcomes = simulated(rng)
        for name, found in (
            ("prompts", rate_interval(outcomes.ravel(), prompts, n_boot=1_000)),
            ("rows", rate_interval(outcomes.ravel())),
        ):
            held[name] += found.low <= 0.7 <= found.high
    assert 0.92 * 400 <= held["prompts"] <= 0.98 * 400
    assert held["rows"] < 0.85 * 400


def test_few_prompts_have_students_t_and_two_have_no_interval():
    values = [1.0, 2.0, 4.0, 9.0]
    found, expected = mean_interval(values), stats.t.interval(0.95, 3, loc=4.0, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    assert mean_interval(values, scale=(1.0, 7.0)).bounds == (1.0, 7.0)
    assert mean_interval([1.0, 5.0]).bounds is None
    assert mean_interval([3.0] * 9).bounds is None  # all the same: no width, which nine prompts do not prove
    assert mean_interval([1.0, 2.0, 3.0] * 20, ["a", "b"] * 30).bounds is None
    assert mean_interval([0.25]).mean == 0.25


def test_a_rate_with_one_row_a_prompt_is_wilsons_and_few_prompts_count_once_each():
    assert rate_interval([1, 0, 1, 1], "abcd").bounds == wilson_interval(3, 4)
    assert rate_interval([1, 0, 1, 1] * 5, "abcd" * 5).bounds == wilson_interval(3, 4)
    assert rate_interval([1.0] * 60, np.repeat(np.arange(20), 3)).bounds == wilson_interval(20, 20)
    # Each prompt half won: no spread, and no proof of one half either.
    assert rate_interval([0.0, 1.0] * 12, np.repeat(np.arange(12), 2)).bounds == wilson_interval(6, 12)


def test_prompts_are_known_by_their_content():
    chat = [{"role": "user", "content": "hé"}]
    assert prompt_key(chat) == prompt_key([{"content": "hé", "role": "user"}])
    assert len(set(prompt_keys(["a", "a ", chat, [1, 2], [12], "b"]))) == 6


def test_win_rates_and_ratings_of_repeated_prompts_count_prompts():
    """Three answers to each of 20 prompts that all end alike are 20 trials, by the labeler and by a judge."""
    won, prompts = np.repeat(np.arange(20) < 15, 3).astype(float), np.repeat(np.arange(20), 3)
    keys = prompt_keys(prompts.tolist())
    by_labeler = win_rate(won, np.full(60, 0.5), prompts=keys)
    assert (by_labeler.wins, by_labeler.rows, by_labeler.n) == (45, 60, 20)
    once = stats.binom.ppf([0.025, 0.975], 20, 0.75) / 20
    assert (by_labeler.low, by_labeler.high) == pytest.approx(tuple(once), abs=0.051)  # one prompt
    replies = [Reply(value) for value in won]
    judged = tally_pairs(replies, "judge", "m", "SFT", keys)
    assert judged.win == by_labeler
    rating = tally_question(replies, "judge", "m", find_questions(["violent_content"])[0], keys)
    assert (rating.low, rating.high) == (by_labeler.low, by_labeler.high)
    gap = win_rate_difference(judged, tally_pairs([Reply(0.5)] * 60, "judge", "other", "SFT", keys))
    assert gap.mean == pytest.approx(0.25)
    assert (gap.low, gap.high, gap.n) == pytest.approx((by_labeler.low - 0.5, by_labeler.high - 0.5, 20))


def pairs_as_rows(prompts, rows, seed=3, labelers=("ann", "bob")):
    """Records of one pair each, `rows` of every prompt, which go right or wrong together for most part."""
    rng = np.random.default_rng(seed)
    records = []
    for prompt in range(prompts):
        rate = rng.choice([0.95, 0.35])
        for row in range(rows):
            size = [0.3, 2.0][row % 2] * (1 if rng.random() < rate else -1)
            records.append(
                {
                    "rewards": [size, 0.0],
                    "pairs": [[0, 1]],
                    "ranks": [],
                    "lengths": [3 + row % 2, 4],
                    "prompt_length": 5 + prompt,
                    "labeler": labelers[row // 2 % len(labelers)],
                    "prompt_key": str(prompt),
                }
            )
    return records


def test_records_of_one_prompt_are_one_cluster_in_every_number_of_the_page():
    records = pairs_as_rows(48, 12)
    apart = [{**record, "prompt_key": None} for record in records]
    found, rows = (reward_metrics(kind, n_boot=400) for kind in (records, apart))
    overall, apart = found["pair_accuracy"], rows["pair_accuracy"]
    assert (overall["n"], apart["n"], overall["mean"]) == (48, 576, apart["mean"])

    def width(row):
        return row["high"] - row["low"]

    assert width(overall) > 1.8 * width(apart)
    for name in ("by_labeler", "by_prompt_length"):
        for row, other in zip(found[name].values(), rows[name].values(), strict=True):
            assert width(row) > 1.3 * width(other)
    for row, other in zip(found["calibration"]["bins"], rows["calibration"]["bins"], strict=True):
        assert width(row["accuracy"]) > 1.3 * width(other["accuracy"])
    assert found["calibration"]["ece_by_chance"] > 1.3 * rows["calibration"]["ece_by_chance"]
    assert width(found["floors"]["length"]["lead"]) > 1.3 * width(rows["floors"]["length"]["lead"])


def test_the_headline_follows_the_prompts():
    """Half of ten prompts all right, four of ten all wrong: 36 rows of each know no more than ten coins."""
    records = [
        {"rewards": [1.0, 0.0], "pairs": [[0, 1] if prompt < 6 else [1, 0]], "prompt_key": str(prompt)}
        for prompt in range(10)
        for _ in range(36)
    ]
    verdict, text = reward_captions.headline(reward_metrics(records, n_boot=400))
    assert (verdict, "cannot be told from a coin" in text) == ("unclear", True)
    apart = [{**record, "prompt_key": None} for record in records]
    assert reward_captions.headline(reward_metrics(apart, n_boot=400))[0] == "better"


@pytest.mark.parametrize("prompts", [1, 2])
def test_a_page_on_one_or_two_prompts_says_that_there_is_no_interval(prompts):
    for rows in (1, 12):
        metrics = {**reward_metrics(pairs_as_rows(prompts, rows)), "labeler_folds": None}
        overall = metrics["pair_accuracy"]
        assert (overall["low"], overall["high"], overall["n"]) == (None, None, prompts)
        verdict, text = reward_captions.headline(metrics)
        few = "1 prompt is too few" if prompts == 1 else "2 prompts are too few"
        assert (verdict, text.startswith(f"{few} for an interval")) == ("missing", True)
        assert any(f"Only {prompts} prompt" in warning for warning in reward_warnings(metrics))
        json.dumps(metrics, allow_nan=False)
