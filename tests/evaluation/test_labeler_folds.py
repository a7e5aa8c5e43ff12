"""Cross validation over labelers: balanced groups, no prompt on both sides, means by hand."""

import math
from collections import Counter

import pytest
from datasets import Dataset
from scipy import stats

from instruct_trl.evaluation.labeler_folds import cross_validate_labelers, labeler_folds


def rows(n=120, labelers=6, prompts=None):
    """`n` rankings by `labelers` in turn, over `prompts` different prompts (default: all different)."""
    columns = {
        "prompt": [f"prompt {i % (prompts or n)}" for i in range(n)],
        "labeler": [f"labeler {i % labelers}" for i in range(n)],
        "completions": [["a", "b"]] * n,
    }
    return Dataset.from_dict(columns)


def records(right, wrong):
    """So many prompts with one pair each."""
    return [{"rewards": [1.0, 0.0], "pairs": [[0, 1]]}] * right + [{"rewards": [0.0, 1.0], "pairs": [[0, 1]]}] * wrong


def test_folds_part_the_labelers_and_balance_rows():
    labelers = ["a"] * 50 + ["b"] * 30 + ["c"] * 20 + ["d"] * 20 + ["e"] * 18 + ["f"] * 12
    folds = labeler_folds(labelers, 3)
    assert sorted(name for fold in folds for name in fold) == list("abcdef")
    # a alone (50); b with f or e (30 + 12 or 18); the greatest and least group differ by less than the last one added.
    sizes = [sum(Counter(labelers)[name] for name in fold) for fold in folds]
    assert sum(sizes) == 150
    assert max(sizes) - min(sizes) <= 12


def test_folds_of_equal_labelers_are_equal_and_follow_the_seed():
    labelers = [f"l{i}" for i in range(20)] * 3
    folds = labeler_folds(labelers, 5, seed=1)
    assert [len(fold) for fold in folds] == [4] * 5
    assert folds == labeler_folds(labelers[::-1], 5, seed=1)
    assert folds != labeler_folds(labelers, 5, seed=2)


@pytest.mark.parametrize(
    ("labelers", "n_folds", "message"),
    [
        (["a", "b"], 3, "2 labelers for 3 folds; ask for n_folds=2"),
        (["a", None, "b"], 2, "Row 1 has labeler None"),
        (["a", "b"], 1, "n_folds is 1"),
    ],
)
def test_folds_refuse(labelers, n_folds, message):
    with pytest.raises(ValueError, match=message):
        labeler_folds(labelers, n_folds)


@pytest.mark.parametrize("prompts", [None, 40])
def test_no_prompt_and_no_held_out_labeler_is_trained_on(prompts):
    dataset, seen = rows(prompts=prompts), []

    def train_and_evaluate(train, sets):
        trained, out = set(train["prompt"]), set(sets["held_out"]["labeler"])
        assert not trained & {*sets["held_in"]["prompt"], *sets["held_out"]["prompt"]}
        assert not out & {*train["labeler"], *sets["held_in"]["labeler"]}
        seen.append((out, len(train), len(sets["held_in"]), len(sets["held_out"])))
        return {"held_in": records(3, 1), "held_out": records(1, 1)}

    found = cross_validate_labelers(dataset, train_and_evaluate, n_folds=3, held_in=0.25)
    assert sorted(name for out, *_ in seen for name in out) == [f"labeler {i}" for i in range(6)]
    for (_, *sizes), fold in zip(seen, found["folds"], strict=True):
        assert sum(sizes) + fold["n_overlap"] == 120  # every row has its place
        assert fold["n_train"] == sizes[0]
    if prompts is None:  # 80 prompts of four labelers: a quarter of them held in
        assert [sizes for _, *sizes in seen] == [[60, 20, 40]] * 3
        assert all(fold["n_overlap"] == 0 for fold in found["folds"])


def test_means_and_intervals_over_folds_by_hand():
    answers = iter([(0.8, 0.6), (0.7, 0.7), (0.9, 0.5)])

    def train_and_evaluate(train, sets):
        seen, new = next(answers)
        return {
            "held_in": records(round(10 * seen), round(10 - 10 * seen)),
            "held_out": records(round(10 * new), 10 - round(10 * new)),
        }

    found = cross_validate_labelers(rows(), train_and_evaluate, n_folds=3)
    # Deviations 0, −0.1, 0.1: variance 0.02 / 2, standard error √(0.01 / 3). The differences are −0.2, 0, −0.4.
    t = stats.t.ppf(0.975, 2)
    for name, mean, error in (("held_in", 0.8, math.sqrt(0.01 / 3)), ("difference", -0.2, math.sqrt(0.04 / 3))):
        expected = {"mean": mean, "low": mean - t * error, "high": mean + t * error, "n": 3}
        assert found[name] == pytest.approx(expected)
    assert found["held_out"]["mean"] == pytest.approx(0.6)


def test_messages_are_compared_as_prompts_and_rows_without_prompt_stand_alone():
    chat = rows(12, 2).map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    for dataset in (chat, chat.remove_columns("prompt")):
        found = cross_validate_labelers(
            dataset, lambda train, sets: dict.fromkeys(sets, records(2, 1)), n_folds=2, held_in=0.5
        )
        assert [fold["n_train"] for fold in found["folds"]] == [3, 3]


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (rows().remove_columns("labeler"), {}, "no `labeler` column, only prompt, completions"),
        (rows(), {"held_in": 1.0}, "held_in is 1.0"),
        (rows(), {"n_folds": 7}, "6 labelers for 7 folds"),
        (rows(6, 6, prompts=1), {"n_folds": 3}, "has no rows for 'held_in'"),
    ],
)
def test_cross_validation_refuses(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        cross_validate_labelers(dataset, lambda train, sets: dict.fromkeys(sets, records(1, 1)), **options)


def test_missing_records_are_named():
    with pytest.raises(ValueError, match="no records for 'held_out'"):
        cross_validate_labelers(rows(), lambda train, sets: {"held_in": records(1, 1)})
