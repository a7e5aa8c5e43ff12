"""Shuffled ranks say nothing of the answers, and nothing else of the data changes: the control's training rankings."""

import pytest
from datasets import Dataset
from scipy import stats

from instruct_trl.data.ranking import parse_ranking, shuffle_ranks

ANSWERS = ["a", "bb", "ccc", "dddd"]
KINDS = {
    "ranks": {"completions": ANSWERS, "ranks": [1, 2, 2, 9], "truncated": [True, False, False, True]},
    "scores": {"completions": ANSWERS, "scores": [0.5, -1.0, 0.5, 2.0], "weight": 2.0},
    "pairs": {"completions": ANSWERS, "pairs": [[3, 2], [2, 0]], "labeler": "ann"},
    "chosen": {"chosen": "yes", "rejected": "no", "margin": 0.5, "truncated": [True, False]},
}


def data(row, count=40):
    return Dataset.from_list([{"prompt": f"q{i}", **row} for i in range(count)])


@pytest.mark.parametrize("row", KINDS.values(), ids=KINDS)
def test_only_the_order_changes(row):
    before = data(row)
    after = shuffle_ranks(before, seed=0)
    assert after.features == before.features
    assert after.to_list() != before.to_list()
    for old, new in zip(before, after, strict=True):
        old_ranking, new_ranking = (parse_ranking(r, "margin" in row) for r in (old, new))
        assert sorted(new_ranking.ranks) == sorted(old_ranking.ranks)  # so the same ties
        assert len(new_ranking.pairs) == len(old_ranking.pairs)
        said_of = dict(zip(new_ranking.completions, new_ranking.truncated, strict=True))
        assert said_of == dict(zip(old_ranking.completions, old_ranking.truncated, strict=True))
        assert new_ranking.margins == old_ranking.margins
        changing = {"ranks", "scores", "pairs", "chosen", "rejected", "truncated"}
        assert {k: v for k, v in new.items() if k not in changing} == {
            k: v for k, v in old.items() if k not in changing
        }
        if "completions" in row:
            assert new.get("truncated") == old.get("truncated")


def test_a_chain_of_pairs_stays_a_chain():
    for row in shuffle_ranks(data(KINDS["pairs"]), seed=0):
        (_, middle), (again, _) = row["pairs"]
        assert middle == again


def test_a_seed_decides():
    rows = data(KINDS["ranks"])
    first, same, other = (shuffle_ranks(rows, seed=seed).to_list() for seed in (3, 3, 4))
    assert first == same
    assert first != other


@pytest.mark.parametrize("kind", ["ranks", "scores", "pairs", "chosen"])
def test_no_rule_orders_the_pairs_any_more(kind):
    """The labels follow length: before, the rule "longer is better" is always right, afterwards it is a coin."""
    row = {
        "ranks": {"completions": ANSWERS, "ranks": [4, 3, 2, 1]},
        "scores": {"completions": ANSWERS, "scores": [1.0, 2.0, 3.0, 4.0]},
        "pairs": {"completions": ANSWERS, "pairs": [[3, 0], [2, 1]]},
        "chosen": {"chosen": "longer", "rejected": "long"},
    }[kind]

    def longer_won(rows):  # one pair per row, since pairs of one row hang together
        for ranking in map(parse_ranking, rows):
            given = ranking.pairs[0] if kind == "pairs" else None
            winner, loser = given or next(p for p in ranking.pairs if set(p) == {0, len(ranking.completions) - 1})
            yield len(ranking.completions[winner]) > len(ranking.completions[loser])

    rows = data(row, 400)
    assert all(longer_won(rows))
    rights = sum(longer_won(shuffle_ranks(rows, seed=0)))
    assert stats.binomtest(rights, 400).pvalue > 0.01


def test_messages_are_shuffled_as_text_is():
    def said(text):
        return [{"role": "assistant", "content": text}]

    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": said("yes"), "rejected": said("no")}
    rows = shuffle_ranks(Dataset.from_list([row] * 20), seed=0)
    assert {row["chosen"][0]["content"] for row in rows} == {"yes", "no"}
    assert all({row["chosen"][0]["content"], row["rejected"][0]["content"]} == {"yes", "no"} for row in rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "q", "completions": ["a", "b"]}], "the train dataset .*ranks"),
        ([{"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2]}] * 2
         + [{"prompt": "q", "completions": ["a", "b"], "ranks": [1]}], "the train dataset, row 2: .* 1 ranks"),
        ([{"prompt": "q", "completions": ["a", "b"], "pairs": [[0, 2]]}], "the train dataset, row 0: pairs"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_as_in_training(rows, message):
    with pytest.raises(ValueError, match=message):
        shuffle_ranks(Dataset.from_list(rows), seed=0, where="the train dataset")
