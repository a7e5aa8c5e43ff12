"""The usual hacks are measured as counting by hand does."""

import numpy as np
import pytest
from scipy import stats

from instruct_trl.evaluation.hacks import (
    common_opening,
    duplicate_rate,
    favourite_word,
    like_length_win_rate,
    rank_correlation,
)


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
