"""Diversity and the usual hacks are measured as counting by hand does."""

import pytest

from instruct_trl.evaluation.answers import (
    common_opening,
    distinct_n,
    duplicate_rate,
    favourite_word,
    like_length_win_rate,
    repetition_rate,
)


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


def test_distinct_n_by_counting():
    # a b, b a, a b | A B: pairs ab, ba, ab, ab → 2 different of 4; words a b a b a b → 2 of 6.
    texts = ["a b a b", "A  B", "c"]
    assert distinct_n(texts, 2) == 2 / 4
    assert distinct_n(texts, 1) == 3 / 7
    assert distinct_n(["one", ""], 2) == 0.0


def test_repetition_by_counting():
    assert repetition_rate(["good good good good good"], 3) == pytest.approx(2 / 3)
    assert repetition_rate(["every word here is new"], 3) == 0.0
    # a b a b a: triples aba, bab, aba → 1 of 3 repeated; the second text is too short to count.
    assert repetition_rate(["a b a b a", "a b"], 3) == pytest.approx(1 / 3)
    assert repetition_rate([], 3) == 0.0


@pytest.mark.parametrize("function", [distinct_n, repetition_rate])
def test_ngram_length_is_checked(function):
    with pytest.raises(ValueError, match="n must be 1 or more"):
        function(["a b"], 0)
