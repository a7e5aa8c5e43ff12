"""What a reward function may give back, and what is refused wherever one scores."""

import asyncio
import functools

import numpy as np
import pytest
import torch
from ppo_helpers import make

from instruct_trl._upstream import get_callable_name, is_async_callable
from instruct_trl.evaluation.selection import score_answers
from instruct_trl.models.generation import Completion
from instruct_trl.models.reward_functions import checked, one_number_each

GOOD = {
    "list": [1, 0.5, True],
    "tuple": (1.0, 0.5, 1.0),
    "array": np.array([1, 0.5, 1]),
    "array of bools": np.array([True, False, True]),
    "list of tensors": [torch.tensor(1.0), torch.tensor(0.5), np.float32(1)],
    "bf16": torch.tensor([1, 0.5, 1], dtype=torch.bfloat16),
    "with a graph": torch.tensor([1.0, 0.5, 1.0], requires_grad=True),
    "generator": (score for score in (1.0, 0.5, 1.0)),
}
BAD = {
    "one for all": ([1.0], "gave 1 scores for 3 answers"),
    "too many": ([1.0] * 5, "gave 5 scores for 3 answers"),
    "scalar": (1.0, r"gave 1.0 \(float\) for 3 answers"),
    "tensor without a dimension": (torch.tensor(1.0), r"gave 1.0 \(Tensor\) for 3 answers"),
    "nothing": (None, "gave None for 3 answers"),
    "a word": ("abc", r"gave 'abc' \(str\) for 3 answers"),
    "a dictionary": ({"a": 1, "b": 2, "c": 3}, r"\(dict\) for 3 answers"),
    "nested": ([1.0, [1.0], 1.0], r"gave \[1.0\] \(list\) for answer 1, among 3 scores for 3 answers"),
    "words": (["1.0", 1, 1], r"gave '1.0' \(str\) for answer 0, among 3"),
    "a row of two": (np.ones((3, 2)), r"gave \[1.0, 1.0\] \(list\) for answer 0, among 3"),
    "complex": ([1, 1, 1j], r"gave 1j \(complex\) for answer 2"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_one_number_for_each_answer_in_any_form(kind):
    scores = one_number_each(GOOD[kind], 3, "f")
    assert scores == ([1.0, 0.0, 1.0] if kind == "array of bools" else [1.0, 0.5, 1.0])
    assert {type(score) for score in scores} == {float}


def test_no_score_for_an_answer_is_none():
    assert one_number_each([None, 2], 2, "f") == [None, 2.0]


@pytest.mark.parametrize("kind", BAD)
def test_another_number_of_scores_or_no_numbers_are_refused_by_name(kind):
    scores, message = BAD[kind]
    with pytest.raises(
        ValueError, match=f"The reward function 'mine' {'' if message.startswith('gave') else '.*'}{message}"
    ):
        one_number_each(scores, 3, "The reward function 'mine'")


class Scorer:
    def __init__(self, scores):
        self.scores = scores

    def __call__(self, prompts, completions, **kwargs):
        return self.scores


class AsyncScorer(Scorer):
    async def __call__(self, prompts, completions, **kwargs):
        return self.scores


def give(prompts, completions, scores, **kwargs):
    return scores


def test_a_checked_function_keeps_its_name_and_stays_async():
    call = {"prompts": ["a", "b"], "completions": ["c", "d"]}
    for function in (Scorer([1, 2]), functools.partial(give, scores=[1, 2])):
        wrapped = checked(function)
        assert wrapped.__name__ == get_callable_name(wrapped) == get_callable_name(function)
        assert not is_async_callable(wrapped)
        assert wrapped(**call) == [1.0, 2.0]
    wrapped = checked(AsyncScorer([1]))
    assert is_async_callable(wrapped)
    with pytest.raises(ValueError, match="The reward function 'AsyncScorer' gave 1 scores for 2 answers"):
        asyncio.run(wrapped(**call))


def test_selection_names_the_function():
    answers = [Completion("x", [1], False)] * 2
    with pytest.raises(ValueError, match="The reward function 'Scorer' gave 1 scores for 2 answers"):
        score_answers(Scorer([1.0]), ["a", "b"], answers)
    with pytest.raises(ValueError, match=r"The labeler gave '7' \(str\) for answer 1"):
        score_answers(Scorer([1.0, "7"]), ["a", "b"], answers, "The labeler")
    assert score_answers(Scorer(torch.tensor([1, 0], dtype=torch.bfloat16)), ["a", "b"], answers) == [1.0, 0.0]


@pytest.mark.parametrize("kind", [Scorer, AsyncScorer])
def test_ppo_refuses_what_a_function_gives_in_training(tmp_path, policy, reward_model, tokenizer, kind):
    trainer = make(tmp_path, policy, kind("good"), tokenizer, value_model=reward_model, ptx_coef=0.0)
    with pytest.raises(ValueError, match=rf"The reward function '{kind.__name__}' gave 'good' \(str\) for 16 answers"):
        trainer.train()
