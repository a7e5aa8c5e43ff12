"""The reward model's metrics against hand arithmetic, brute force, identities and scipy."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from instruct_trl.evaluation.reward_metrics import (
    PairTable,
    _length_quartiles,
    calibration,
    centred,
    correlations,
    fit_temperature,
    floors,
    length_bias,
    pair_accuracy,
    pair_rate,
    pair_table,
    reward_metrics,
    score_groups,
)
from instruct_trl.report.findings_reward import differs


def record(rewards, ranks=None, lengths=None, pairs=None, prompt_length=10, labeler=None):
    """A record of `RankingRewardTrainer.evaluation_records`; `pairs` are all untied ones of `ranks`."""
    if pairs is None:
        k = range(len(rewards))
        pairs = [[i, j] for i in k for j in k if ranks[i] < ranks[j]]
    return {
        "rewards": list(rewards),
        "pairs": pairs,
        "ranks": list(ranks or []),
        "lengths": list(lengths or [5] * len(rewards)),
        "prompt_length": prompt_length,
        "labeler": labeler,
    }


def random_records(n=40, seed=0, labelers=("ann", "bob")):
    rng = np.random.default_rng(seed)
    records = []
    for i in range(n):
        k = int(rng.integers(2, 6))
        quality = rng.normal(size=k)
        ranks = [int(r) for r in np.round(-quality)]  # with ties
        rewards = [float(q + e) for q, e in zip(quality, rng.normal(size=k), strict=True)]
        lengths = [int(x) for x in rng.integers(1, 9, size=k)]
        records.append(record(rewards, ranks, lengths, None, int(rng.integers(5, 50)), labelers[i % len(labelers)]))
    return records


def table_of(differences, prompts=None):
    n = len(differences)
    zeros = np.zeros(n)
    return PairTable(np.arange(n) if prompts is None else np.array(prompts), np.array(differences, float), zeros, zeros)


def test_pair_table_of_a_ranking_with_a_tie_and_a_gap():
    # Ranks 1, 4, 4, 9 are dense 0, 1, 1, 2: five untied pairs.
    table = pair_table([record([3.0, 1.0, 2.0, 2.0], [1, 4, 4, 9], [7, 5, 9, 9])])
    assert table.difference.tolist() == [2.0, 1.0, 1.0, -1.0, 0.0]
    assert table.extra_length.tolist() == [2, -2, -2, -4, 0]
    assert table.distance.tolist() == [1, 1, 2, 1, 1]
    assert table.correct.tolist() == [True, True, True, False, False]  # equal rewards order no pair


def test_accuracy_equals_a_loop_over_everything():
    records = random_records()
    right = total = 0
    for row in records:
        for i, first in enumerate(row["rewards"]):
            for j, second in enumerate(row["rewards"]):
                if row["ranks"][i] < row["ranks"][j]:
                    right, total = right + (first > second), total + 1
    found = pair_accuracy(records)
    assert (found.mean, found.n_pairs) == (right / total, total)
    assert found.n == sum(bool(row["pairs"]) for row in records)
    assert found.low < found.mean < found.high


def test_interval_resamples_prompts_not_pairs():
    """Ten equal pairs a prompt say no more than one: the interval is that of the 50 prompts."""
    outcomes = np.arange(50) % 5 > 0  # 80 %
    once = pair_rate(outcomes, np.arange(50))
    tenfold = pair_rate(np.repeat(outcomes, 10), np.repeat(np.arange(50), 10))
    assert (tenfold.low, tenfold.high, tenfold.n) == (once.low, once.high, 50)
    # Normal approximation: 0.8 ± 1.96 √(0.8 · 0.2 / 50), within what the binomial's steps of 0.02 allow.
    half = 1.96 * math.sqrt(0.8 * 0.2 / 50)
    assert once.low == pytest.approx(0.8 - half, abs=0.02)
    assert once.high == pytest.approx(0.8 + half, abs=0.02)


def test_interval_where_all_agree_is_wilsons_over_prompts_and_absent_for_few():
    # Wilson's bounds at n of n are n / (n + z²) and 1.
    found = pair_rate(np.ones(40), np.repeat(np.arange(20), 2))
    assert (found.low, found.high) == (pytest.approx(20 / (20 + 1.959964**2)), 1.0)
    assert pair_rate(np.ones(9), np.arange(9)).bounds is None


def test_ece_by_hand():
    """σ(log 3) = 3/4 and σ(log 9) = 9/10: two bins, three of four right and one of two right."""
    differences = [math.log(3)] * 3 + [-math.log(3)] + [math.log(9), -math.log(9)]
    found = calibration(table_of(differences), n_bins=10)
    assert [b["accuracy"].n_pairs for b in found["bins"]] == [4, 2]
    assert [b["confidence"] for b in found["bins"]] == pytest.approx([0.75, 0.9])
    assert [b["accuracy"].mean for b in found["bins"]] == pytest.approx([0.75, 0.5])
    # 4/6 · |0.75 − 0.75| + 2/6 · |0.5 − 0.9|
    assert found["ece"] == pytest.approx(0.4 / 3)
    # mean confidence (4 · 0.75 + 2 · 0.9) / 6 = 0.8, mean outcome 4/6
    assert found["overconfidence"] == pytest.approx(0.8 - 4 / 6)


def test_equal_rewards_say_one_half_and_are_right_half_the_time():
    found = calibration(table_of([0.0, 0.0, 0.0]))
    assert (found["ece"], found["overconfidence"], found["temperature"]) == (0.0, 0.0, None)


def test_ece_equals_both_orientations_over_the_whole_unit_interval():
    rng = np.random.default_rng(3)
    differences = rng.normal(0.4, 1.5, size=500)
    p = 1 / (1 + np.exp(-np.concatenate([differences, -differences])))
    y = np.concatenate([np.ones(500), np.zeros(500)])
    ece = 0.0
    for b in range(20):
        rows = [i for i in range(1000) if b / 20 <= p[i] < (b + 1) / 20]
        if rows:
            ece += len(rows) / 1000 * abs(y[rows].mean() - p[rows].mean())
    assert calibration(table_of(differences), n_bins=10, n_boot=10)["ece"] == pytest.approx(ece)


def test_ece_does_not_depend_on_the_order_of_the_completions():
    """`chosen`/`rejected` data put the winner first everywhere; the mirrored records must measure the same."""
    records = random_records()
    mirrored = []
    for row in records:
        k = len(row["rewards"])
        turned = {name: row[name][::-1] for name in ("rewards", "ranks", "lengths")}
        mirrored.append({**row, **turned, "pairs": [[k - 1 - w, k - 1 - x] for w, x in row["pairs"]]})
    ece = [calibration(pair_table(rows), n_boot=10)["ece"] for rows in (records, mirrored)]
    assert ece[0] == pytest.approx(ece[1], abs=1e-12)


def test_calibrated_rewards_have_ece_of_chance_and_temperature_one():
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(0, 1.5, size=20_000))
    right = rng.random(20_000) < 1 / (1 + np.exp(-size))
    found = calibration(table_of(np.where(right, size, -size)), n_boot=10)
    assert found["ece"] < 3 * found["ece_by_chance"] < 0.03
    assert found["temperature"] == pytest.approx(1, abs=0.05)
    doubled = calibration(table_of(np.where(right, size, -size) * 2), n_boot=10)
    assert doubled["overconfidence"] > 0.05
    assert doubled["temperature"] == pytest.approx(2 * found["temperature"])


def test_temperature_in_closed_form():
    """Pairs of one size d, a share a of them right: σ(d / T) = a, so T = d / log(a / (1 − a))."""
    assert fit_temperature(np.array([2.0, 2.0, 2.0, -2.0])) == pytest.approx(2 / math.log(3))
    assert fit_temperature(np.array([1.0, 2.0])) is None  # all right: the smaller T, the better
    assert fit_temperature(np.array([1.0, -2.0])) is None


def test_correlations_of_ties_and_of_a_constant():
    # y is x² but for a tie: the order is the same, so Spearman's is 1; Pearson's of (1, 2, 2, 3), (1, 4, 4, 9) by hand.
    found = correlations(np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 4.0, 4.0, 9.0]))
    assert found == {"pearson": pytest.approx(8 / math.sqrt(2 * 33)), "spearman": pytest.approx(1)}
    assert correlations(np.arange(8.0), np.ones(8)) == {"pearson": None, "spearman": None}


def test_length_within_prompts_can_have_the_other_sign():
    """Prompts that call for longer answers score higher, but within each the longer answer scores lower."""
    records = [record([i + 0.2, i, i - 0.2], [1, 2, 3], [10 * i, 10 * i + 1, 10 * i + 2]) for i in range(1, 21)]
    found = length_bias(records, pair_table(records), n_boot=200)
    assert found["pearson"] > 0.9
    within = found["within_prompt"]["pearson"]
    assert (within.mean, within.low, within.high) == pytest.approx((-1, -1, -1))
    assert found["shorter_is_better"].mean == 1.0
    assert found["longer_is_better"].mean == 0.0
    assert found["model_picks_longer"].mean == 0.0
    assert found["if_longer_wins"] is None


def test_length_rules_by_hand():
    # Pairs: (0,1) longer and right, (0,2) equal length and right, (1,2) shorter and wrong. Equal lengths count half.
    found = length_bias(rows := [record([2.0, 0.0, 1.0], [1, 2, 3], [9, 4, 9])], pair_table(rows))
    assert found["longer_is_better"].mean == pytest.approx(1.5 / 3)
    assert found["shorter_is_better"].mean == pytest.approx(1.5 / 3)
    assert found["if_longer_wins"].mean == 1.0
    assert found["if_shorter_wins"].mean == 0.0
    assert found["model_picks_longer"].mean == 1.0
    assert found["labeler_picks_longer"].mean == 0.5
    lead = floors(pair_table(rows), has_lengths=True)["length"]["lead"]
    assert (lead.mean, lead.bounds) == (pytest.approx(2 / 3 - 1.5 / 3), None)


def test_groups_count_every_pair_once():
    metrics = reward_metrics(random_records(), n_boot=50)
    overall = metrics["pair_accuracy"]
    for name in ("by_k", "by_rank_distance", "by_prompt_length", "by_labeler"):
        rows = metrics[name].values()
        assert sum(row["n_pairs"] for row in rows) == overall["n_pairs"]
        right = sum(row["mean"] * row["n_pairs"] for row in rows)
        assert right == pytest.approx(overall["mean"] * overall["n_pairs"])
    assert list(metrics["by_labeler"]) == ["ann", "bob"]
    json.dumps(metrics, allow_nan=False)


def test_groups_that_the_data_lack_are_empty():
    records = [record([1.0, 0.0], pairs=[[0, 1]]) for _ in range(12)]
    for row in records:
        del row["lengths"], row["prompt_length"]
    metrics = reward_metrics(records)
    assert not any(metrics[name] for name in ("by_k", "by_rank_distance", "by_prompt_length", "by_labeler", "length"))
    json.dumps(metrics, allow_nan=False)


def test_quartiles_are_named_by_their_own_bounds():
    bounds = _length_quartiles(dict(enumerate([4, 1, 2, 3, 8, 7, 6, 15])))
    assert list(bounds.values()) == [(3, 4), (1, 2), (1, 2), (3, 4), (8, 15), (6, 7), (6, 7), (8, 15)]
    assert set(_length_quartiles({3: 5, 7: 5}).values()) == {(5, 5)}
    lengths = [*range(6, 16), *range(96, 106)]  # in order as numbers, not as texts: "96 to" after "11 to"
    metrics = reward_metrics([record([1.0, 0.0], [1, 2], prompt_length=n) for n in lengths], n_boot=10)
    assert list(metrics["by_prompt_length"]) == ["6 to 10", "11 to 15", "96 to 100", "101 to 105"]
    alike = reward_metrics([record([1.0, 0.0], [1, 2], prompt_length=5 + n // 10) for n in range(20)], n_boot=10)
    assert list(alike["by_prompt_length"]) == ["5", "6"]


def test_kendalls_tau_equals_scipys():
    records = random_records()
    taus = [stats.kendalltau(row["rewards"], [-r for r in row["ranks"]]).statistic for row in records if row["pairs"]]
    assert reward_metrics(records, n_boot=50)["kendall_tau"]["mean"] == pytest.approx(np.mean(taus))


def test_scores_of_best_and_worst():
    groups = score_groups([record([1.0, 2.0, 3.0, 4.0], [2, 1, 1, 3]), record([9.0, 8.0], [1, 1])])
    assert {name: values.tolist() for name, values in groups.items()} == {
        "all": [1.0, 2.0, 3.0, 4.0, 9.0, 8.0],
        "best": [2.0, 3.0],
        "worst": [4.0],
    }
    assert [x.tolist() for x in centred([record([1.0, 3.0], [1, 2])], "rewards")] == [[-1.0, 1.0]]


def test_differs_at_five_per_cent():
    """Two groups, each with standard error s: the difference's is s √2, and 1.96 of those is 5 %."""

    def rows(difference):
        return {name: {"mean": a, "low": a - 0.0196, "high": a + 0.0196} for name, a in (("a", 0.6), ("b", difference))}

    assert not differs(rows(0.6 + 0.01 * math.sqrt(2) * 1.90))
    assert differs(rows(0.6 + 0.01 * math.sqrt(2) * 2.02))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "no evaluation records"),
        ([record([1.0, math.nan], [1, 2])], r"records\[0\]\['rewards'\]\[1\] is nan"),
        ([record([1.0, 2.0], [1, 2]), record([1.0, 2.0], pairs=[[0, 2]])], r"records\[1\]\['pairs'\] holds \[0, 2\]"),
        ([record([1.0, 2.0], pairs=[[1, 1]])], "two different numbers"),
        ([record([1.0, 2.0], [1, 2], [3])], "2 rewards but 1 lengths"),
        ([record([1.0, 2.0], [1, 1])], "all completions are tied"),
    ],
)
def test_bad_records_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        reward_metrics(bad)
