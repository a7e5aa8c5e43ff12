"""The floors of a reward model: right by construction, whatever a reward model knows beyond them."""

import random

import numpy as np
import pytest

from instruct_trl.evaluation import floors
from instruct_trl.evaluation.floors import (
    BagOfWords,
    TextRanking,
    add_bag_of_words,
    bag_of_words,
    text_rankings,
    training_texts,
)
from instruct_trl.evaluation.reward_metrics import credit, floor_rates, reward_metrics
from instruct_trl.report.findings import floor_text, not_told_from
from instruct_trl.report.findings_reward import headline

WORDS = [
    "the",
    "film",
    "was",
    "a",
    "story",
    "of",
    "people",
    "who",
    "go",
    "to",
    "some",
    "place",
    "and",
    "come",
    "back",
    "in",
    "the",
    "end",
]


def texts(n, quality, k=3, seed=0, words=WORDS):
    """`n` rankings of random words, ranked by `quality(prompt number, words of an answer)`; equal qualities tie."""
    rng = random.Random(seed)
    rankings = []
    for number in range(n):
        answers = [rng.choices(words, k=rng.randint(3, 8)) for _ in range(k)]
        value = [quality(number, answer) for answer in answers]
        pairs = [[i, j] for i in range(k) for j in range(k) if value[i] > value[j]]
        rankings.append(TextRanking([" ".join(answer) for answer in answers], pairs, f"prompt {seed} {number}"))
    return rankings


def records_of(held_out, rewards, bag):
    """Records of a reward model that gives `rewards(prompt number, answer)`."""
    records = [
        {
            "rewards": [float(rewards(number, answer)) for answer in ranking.answers],
            "pairs": ranking.pairs,
            "lengths": [len(answer.split()) for answer in ranking.answers],
            "prompt_key": ranking.prompt,
        }
        for number, ranking in enumerate(held_out)
    ]
    if bag is not None:
        add_bag_of_words(records, bag, held_out)
    return records


def by_length(number, answer):
    return len(answer)


def test_rankings_by_length_give_the_length_floor_everything_and_no_lead():
    train, held_out = texts(60, by_length), texts(60, by_length, seed=1)
    records = records_of(held_out, lambda number, answer: len(answer.split()), BagOfWords(train))
    found = reward_metrics(records, n_boot=200)
    assert found["pair_accuracy"]["mean"] == 1
    floor = found["floors"]["length"]
    assert (floor["rule"], floor["accuracy"]["mean"]) == ("the longer answer", 1)
    assert (floor["lead"]["mean"], floor["lead"]["low"], floor["lead"]["high"]) == (0, 0, 0)
    assert "length" in not_told_from(found)
    verdict, text = headline(found)
    assert verdict == "unclear"
    assert "shows no more than length" in text


def test_where_the_shorter_answer_wins_the_rule_is_the_shorter():
    held_out = texts(40, lambda number, answer: -len(answer))
    floor = reward_metrics(records_of(held_out, lambda *_: 0, None), n_boot=50)["floors"]["length"]
    assert (floor["rule"], floor["accuracy"]["mean"]) == ("the shorter answer", 1)
    assert floor_rates(records_of(held_out, lambda *_: 0, None)) == {"length": 1}


def test_one_word_decides_and_the_bag_of_words_knows_it():
    def praised(number, answer):
        return "story" in answer

    train, held_out = texts(80, praised), texts(60, praised, seed=1)
    found = reward_metrics(
        records_of(held_out, lambda number, answer: "story" in answer, BagOfWords(train)), n_boot=200
    )
    assert found["floors"]["bag_of_words"]["accuracy"]["mean"] == 1
    assert found["floors"]["missing"] is None
    assert not_told_from(found) == ["words"]
    assert "shows no more than words" in headline(found)[1]


def test_a_word_pair_is_known_too():
    """Which of two words comes first: each alone says nothing."""

    def ordered(number, answer):
        return answer.index("not") < answer.index("good") if {"not", "good"} <= set(answer) else 0.5

    rng = random.Random(0)
    made = [
        TextRanking([f"{rng.choice(WORDS)} not good", f"{rng.choice(WORDS)} good not"], [[0, 1]], str(number))
        for number in range(60)
    ]
    bag = BagOfWords(made[:40])
    assert all(first > second for first, second in (bag.scores(row.answers) for row in made[40:]))


def test_shuffled_ranks_give_no_lead_and_the_headline_says_a_coin():
    coin = random.Random(5)

    def noise(number, answer):
        return coin.random()

    train, held_out = texts(120, noise), texts(120, noise, seed=1)
    rng = np.random.default_rng(0)
    found = reward_metrics(records_of(held_out, lambda *_: rng.normal(), BagOfWords(train)), n_boot=400)
    for floor in (found["floors"]["length"], found["floors"]["bag_of_words"]):
        assert floor["lead"]["low"] < 0 < floor["lead"]["high"]
    verdict, text = headline(found)
    assert (verdict, "cannot be told from a coin" in text) == ("unclear", True)


def test_a_reward_model_that_reads_the_prompt_beats_the_bag():
    """Prompts of even number want "story", the others want none: no weight of a word is right for both."""

    def fits(number, answer):
        return ("story" in answer) == (number % 2 == 0)

    train, held_out = texts(120, fits), texts(120, fits, seed=1)
    records = records_of(held_out, lambda number, answer: fits(number, answer.split()), BagOfWords(train))
    found = reward_metrics(records, n_boot=400)
    floor = found["floors"]["bag_of_words"]
    assert found["pair_accuracy"]["mean"] == 1
    assert floor["accuracy"]["mean"] < 0.7
    assert floor["lead"]["mean"] == pytest.approx(1 - floor["accuracy"]["mean"])
    assert floor["lead"]["low"] > 0.2
    assert not_told_from(found) == []
    verdict, text = headline(found)
    assert (verdict, "knows more than length and words" in text) == ("better", True)


def test_ties_count_half_on_both_sides_of_a_lead():
    # Three pairs: the floor ties on the first, is right on the second, wrong on the third; the model ties on the last.
    assert credit(np.array([0.0, 2.0, -1.0])).tolist() == [0.5, 1, 0]
    records = [{"rewards": [3.0, 2.0, 2.0], "pairs": [[0, 1], [0, 2], [1, 2]], "lengths": [5, 5, 7]}]
    floor = reward_metrics(records, n_boot=10)["floors"]["length"]
    # longer: ½, 0, 0, so that the rule is "shorter": ½, 1, 1. The model: 1, 1, ½.
    assert (floor["rule"], floor["accuracy"]["mean"]) == ("the shorter answer", pytest.approx(2.5 / 3))
    assert (floor["lead"]["mean"], floor["lead"]["low"]) == (0, None)  # one prompt has no interval


def test_the_lead_is_paired_over_prompts():
    """Model and floor err on the same half of prompts: each rate is unsure, their difference is not."""
    records = []
    for number in range(100):
        pairs = [[0, 1]] if number % 2 else [[1, 0]]
        records.append({"rewards": [1.0, 0.0], "pairs": pairs, "lengths": [9, 2]})
    found = reward_metrics(records, n_boot=200)
    assert found["pair_accuracy"]["high"] - found["pair_accuracy"]["low"] > 0.15
    assert found["floors"]["length"]["lead"] == {"mean": 0, "low": 0, "high": 0, "n": 100}


def test_the_penalty_is_chosen_without_the_held_out_pairs_and_prompts_stay_together(monkeypatch):
    from sklearn import model_selection

    seen = []

    class Watched(model_selection.GroupKFold):
        def split(self, x, y=None, groups=None):
            for train, test in super().split(x, y, groups):
                seen.append(set(groups[train]) & set(groups[test]))
                yield train, test

    monkeypatch.setattr(model_selection, "GroupKFold", Watched)
    BagOfWords(texts(20, by_length))
    assert seen
    assert not any(seen)


def test_without_enough_prompts_words_or_scikit_learn_there_is_no_bag(monkeypatch):
    assert bag_of_words(texts(floors.MIN_TRAINING_PROMPTS - 1, by_length)) is None
    assert bag_of_words([TextRanking(["", ""], [[0, 1]], str(number)) for number in range(20)]) is None
    found = reward_metrics(records_of(texts(20, by_length), lambda *_: 0, None), n_boot=10)["floors"]
    assert found["bag_of_words"] is None
    assert "fewer than 10 prompts" in found["missing"]
    assert "no word in two answers" in found["missing"]
    monkeypatch.setattr(floors, "find_spec", lambda name: None)
    assert bag_of_words(texts(20, by_length)) is None
    found = reward_metrics(records_of(texts(20, by_length), lambda *_: 0, None), n_boot=10)
    assert "pip install instruct-trl[report]" in found["floors"]["missing"]
    assert "pip install instruct-trl[report]" in floor_text(found)


def test_most_pairs_are_enough(monkeypatch):
    """Pairs beyond the limit are left out at random over prompts, not at the end."""
    monkeypatch.setattr(floors, "MOST_PAIRS", 60)

    def praised(number, answer):
        return "story" in answer

    bag = BagOfWords(texts(200, praised))
    assert floor_rates(records_of(texts(50, praised, seed=1), lambda *_: 0, bag))["bag_of_words"] > 0.9


def test_answers_without_a_drawn_pair_are_not_read(tokenizer, monkeypatch):
    """Of six rows with two pairs each, one pair is drawn: its two answers alone are text, the better one first."""
    monkeypatch.setattr(floors, "MOST_PAIRS", 1)
    rows = [
        {"input_ids": [tokenizer(f"{row} {a}")["input_ids"] for a in ("bad", "x", "good")], "pairs": [[2, 0], [2, 1]]}
        for row in range(6)
    ]
    (found,) = training_texts(rows, tokenizer)
    ((winner, loser),) = found.pairs
    assert len(found.answers) == 2
    assert found.answers[winner] == "good"
    assert found.answers[loser] in ("bad", "x")
    monkeypatch.setattr(floors, "MOST_PAIRS", 12)
    assert list(training_texts(rows, tokenizer)) == list(text_rankings(rows, tokenizer))


def test_an_error_of_another_kind_is_not_taken_for_too_few_rankings(monkeypatch):
    def broken(*args):
        raise ValueError("something else")

    monkeypatch.setattr(BagOfWords, "__init__", broken)
    with pytest.raises(ValueError, match="something else"):
        bag_of_words([])


def test_text_begins_with_the_first_word_in_which_answers_differ(tokenizer):
    prompt = "Tell me. It is "
    rows = [{"input_ids": [tokenizer(prompt + a)["input_ids"] for a in ("green", "great")], "ranks": [2, 1]}]
    (found,) = text_rankings(rows, tokenizer)
    assert found.answers == ["green", "great"]  # of bytes they share "gre"
    assert found.pairs == [[1, 0]]
    rows = [{"input_ids": [tokenizer(a)["input_ids"] for a in ("Hi", "Hi there")], "pairs": [[0, 1]]}]
    assert next(iter(text_rankings(rows, tokenizer))).answers == ["Hi", "Hi there"]


def test_characters_stand_alone_where_words_have_no_blanks():
    made = [TextRanking(["这部电影很好", "这部电影很坏"], [[0, 1]], str(number)) for number in range(12)]
    first, second = BagOfWords(made).scores(["好", "坏"])
    assert first > second
