"""Judges: who won is what was said; ties and invalid replies are counted."""

import math

import pytest
from scipy import stats

from instruct_trl.judges import (
    FLAGS,
    Answer,
    Pair,
    Reply,
    ScoreJudge,
    compare_models,
    find_questions,
    rate_models,
    win_rate_difference,
)
from instruct_trl.judges.tally import tally_pairs, tally_question
from instruct_trl.judges.wording import read_comparison, read_rating


def length(prompts, completions, **_):
    return [len(text) for text in completions]


PROMPTS = ["p", "q", "r", "s"]
ANSWERS = {"base": ["aa", "b", "", "dd"], "SFT": ["a", "b", "cc", "d"], "PPO": ["aaa", "bb", "ccc", "d"]}


def test_a_scorer_prefers_the_higher_score():
    results = compare_models(ScoreJudge(length), PROMPTS, ANSWERS, "SFT")
    assert list(results) == ["base", "PPO"]
    assert results["base"].outcomes == [1.0, 0.5, 0.0, 1.0]
    assert results["PPO"].outcomes == [1.0, 1.0, 1.0, 0.5]
    win = results["PPO"].win
    assert (win.wins, win.ties, win.losses, win.mean) == (3, 1, 0, 3.5 / 4)
    assert results["PPO"].judge == "length"


def test_a_scorer_sees_each_answer_once_with_trls_arguments():
    seen = []

    def score(prompts, completions, truncated, **_):
        seen.extend(zip(prompts, completions, truncated, strict=True))
        return [1.0] * len(prompts)

    compare_models(ScoreJudge(score), PROMPTS, ANSWERS, "SFT", {"PPO": [True, False, False, False]})
    # 4 of SFT, of base all but "b", which is SFT's, of PPO all but "d".
    assert len(seen) == len(set(seen)) == 4 + 3 + 3
    assert ("p", "aaa", True) in seen


def test_messages_reach_a_scorer_as_messages():
    prompt = [{"role": "user", "content": "hi"}]

    def score(prompts, completions, **_):
        return [len(completion[0]["content"]) for completion in completions]

    (reply,) = ScoreJudge(score).compare([Pair(Answer(prompt, "long"), Answer(prompt, "x"))])
    assert reply.value == 1.0


def test_a_scorers_margin_and_missing_scores():
    pairs = [Pair(Answer("p", a), Answer("p", b)) for a, b in (("aaa", "aa"), ("aaa", "a"), ("nan", "a"))]

    def score(prompts, completions, **_):
        return [math.nan if text == "nan" else len(text) for text in completions]

    replies = ScoreJudge(score, tie_margin=1).compare(pairs)
    assert [reply.value for reply in replies] == [0.5, 1.0, None]


def test_a_program_answers_the_questions_that_it_has_functions_for():
    loud = lambda prompts, completions, **_: [float(text.isupper()) for text in completions]  # noqa: E731
    judge = ScoreJudge(length, answers_to={"violent_content": loud})
    (question,) = find_questions(["violent_content"])
    (rating,) = rate_models(judge, ["p", "q", "r"], {"m": ["A", "B", "c"]}, [question])
    expected = stats.binomtest(2, 3).proportion_ci(method="wilson")
    assert (rating.mean, rating.low, rating.high) == pytest.approx((2 / 3, expected.low, expected.high))
    with pytest.raises(ValueError, match="no function for the question 'quality'"):
        judge.rate([Answer("p", "x")], find_questions(["likert"]))


def test_the_papers_questions():
    assert len(FLAGS) == 11  # Table 3: one Likert scale and eleven binary items
    assert [q.name for q in find_questions(["flags", "likert"])] == ["quality", *FLAGS]
    with pytest.raises(ValueError, match="no question 'humour'"):
        find_questions(["humour"])


def test_invalid_replies_are_left_out_and_flips_are_ties():
    replies = [Reply(1.0), Reply(None, "?"), Reply(0.5, flipped=True), Reply(0.25), Reply(0.0)]
    result = tally_pairs(replies, "judge", "m", "SFT")
    assert (result.win.wins, result.win.ties, result.win.losses, result.win.n) == (1, 1, 2, 4)
    assert (result.invalid, result.flipped) == (1, 1)
    assert result.outcomes == [1.0, None, 0.5, 0.0, 0.0]
    assert tally_pairs([Reply(None)], "judge", "m", "SFT").win is None


def test_likert_mean_and_what_was_left_out():
    (question,) = find_questions(["likert"])
    replies = [Reply(7.0), Reply(1.0), Reply(4.0), Reply(None, "n/a"), Reply(None, "good")]
    rating = tally_question(replies, "judge", "m", question)
    assert (rating.mean, rating.n, rating.not_applicable, rating.invalid) == (4.0, 3, 1, 1)
    assert 1.0 <= rating.low < 4.0 < rating.high <= 7.0


def test_the_difference_of_two_win_rates_is_paired():
    """Two models that beat the baseline on the same prompts differ by nothing, though each rate is unsure."""
    one = tally_pairs([Reply(1.0), Reply(0.0)] * 20, "judge", "one", "SFT")
    same = tally_pairs([Reply(1.0), Reply(0.0)] * 20, "judge", "same", "SFT")
    difference = win_rate_difference(one, same)
    assert (difference.mean, difference.low, difference.high) == (0.0, 0.0, 0.0)
    assert one.win.high - one.win.low > 0.25
    # Better by one on every fourth prompt: 10 of 40; resampled, that is a binomial share.
    better = tally_pairs([Reply(1.0), Reply(1.0), Reply(1.0), Reply(0.0)] * 10, "judge", "better", "SFT")
    difference = win_rate_difference(better, one)
    expected = stats.binom.ppf([0.025, 0.975], 40, 0.25) / 40
    assert difference.mean == 0.25
    assert (difference.low, difference.high) == pytest.approx(tuple(expected), abs=0.026)  # one prompt


def test_the_difference_leaves_out_prompts_without_both_replies():
    first = tally_pairs([Reply(1.0), Reply(None), Reply(1.0)], "judge", "a", "SFT")
    second = tally_pairs([Reply(0.0), Reply(0.0), Reply(1.0)], "judge", "b", "SFT")
    difference = win_rate_difference(first, second)
    assert (difference.mean, difference.n) == (0.5, 2)
    with pytest.raises(ValueError, match="one judge against one baseline"):
        win_rate_difference(first, tally_pairs([Reply(1.0)] * 3, "other", "b", "SFT"))


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("A is nicer.\nVerdict: A", 1.0),
        ("**Verdict:** B.", 0.0),
        ("verdict: Answer B", 0.0),
        ("Verdict: tie", 0.5),
        ("Verdict: A? No, on reflection:\nVerdict: B", 0.0),
        ("<think>Verdict: A</think> Verdict: B", 0.0),
        (" B.", 0.0),
        ("Tie", 0.5),
        ("A is better, I think", None),
        ("Verdict: both", None),
        ("Verdict: A tie.", 0.5),
        ("Verdict: A and B are equal", None),
        ("Verdict: answer B / answer A", None),
        ("Verdict: B and nothing else", 0.0),
        ("Verdict: Alright", None),
        ("", None),
    ],
)
def test_verdicts(reply, value):
    assert read_comparison(reply) == value


def test_ratings_line_by_line():
    questions = find_questions(["likert", "hallucination", "violent_content", "harmful_advice"])
    replies = read_rating(
        "quality: 6/7\n- **hallucination**: No\nviolent_content: n/a\nharmful_advice: maybe", questions
    )
    assert replies["quality"] == Reply(6.0)
    assert replies["hallucination"] == Reply(0.0)
    assert replies["violent_content"] == Reply(None, "n/a")
    assert replies["harmful_advice"].value is None
    assert "maybe" in replies["harmful_advice"].said
    assert read_rating("quality: 8", questions)["quality"].value is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ScoreJudge(length, tie_margin=-1), "tie_margin must be 0 or more"),
        (lambda: compare_models(ScoreJudge(length), PROMPTS, ANSWERS, "sft"), "baseline 'sft' is none of the models"),
        (lambda: compare_models(ScoreJudge(length), ["p"], ANSWERS, "SFT"), "base has 4 answers to 1 prompts"),
        (lambda: Pair(Answer("p", "a"), Answer("q", "a")), "two answers to one prompt"),
        (
            lambda: compare_models(ScoreJudge(lambda **_: [1.0], "short"), PROMPTS, ANSWERS, "SFT"),
            "'short' gave 1 scores for 10 answers",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
