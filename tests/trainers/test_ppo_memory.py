"""200 iterations do not grow memory: neither tensors, nor anything that a Python container holds, nor the process."""

import gc
import resource
import sys
from collections import deque
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from ppo_helpers import PROMPTS, make
from torch._subclasses import FakeTensor
from transformers import TrainerCallback

from instruct_trl import value_model_from_reward_model

EARLY, LATE = 80, 200  # iterations; from 64 on the running median of the value loss has all that it keeps
EVERY = 20  # an evaluation and a checkpoint; a measurement comes just before them
LEAKS = ("a number", "a name", "a tensor")  # planted after LATE, one after the other, one thing an iteration
MEBIBYTE = 2**20


class Holdings(NamedTuple):
    """What is alive in the process."""

    tensors: int
    tensor_bytes: int
    items: int  # of all lists, dicts, sets and deques, the log's lines left out: Trainer keeps one a log, on purpose
    peak: int  # bytes that the process ever took

    @classmethod
    def of(cls, trainer):
        gc.collect()
        tracked = gc.get_objects()
        # A fake tensor, of a test of the dry run, holds no memory.
        real = [each for each in tracked if type(each) is not FakeTensor]
        tensors = [each for each in real if issubclass(type(each), torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        containers = [each for each in tracked if issubclass(type(each), list | dict | set | deque)]
        # The collector does not track a dict of plain numbers and strings, only who holds it.
        containers += [each for each in gc.get_referents(*containers) if type(each) is dict]
        history = trainer.state.log_history
        sizes = {id(each): len(each) for each in containers}
        for own in (tracked, tensors, history, *history):
            sizes.pop(id(own), None)
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return cls(len(tensors), sum(storages.values()), sum(sizes.values()), peak)


def assert_no_growth(early, late, iterations):
    """Not one tensor more, and fewer items than one every second iteration."""
    assert (late.tensors, late.tensor_bytes) == (early.tensors, early.tensor_bytes)
    assert late.items - early.items < iterations / 2
    assert late.peak - early.peak < 16 * MEBIBYTE


class Watch(TrainerCallback):
    """Measures every `EVERY` iterations, and leaks after `LATE`."""

    def __init__(self, trainer):
        self.trainer, self.seen = trainer, {}
        trainer.kept, trainer.seconds = [], {}

    def on_step_end(self, args, state, control, **kwargs):
        leak = LEAKS[(state.global_step - LATE - 1) // EVERY] if state.global_step > LATE else None
        if leak == "a name":
            self.trainer.seconds[str(state.global_step)] = 1.0
        elif leak is not None:
            self.trainer.kept.append(torch.zeros(1) if leak == "a tensor" else 1.0)
        if state.global_step % EVERY == 0:
            self.seen[state.global_step] = Holdings.of(self.trainer)


def noted(completions, log_extra, log_metric, **_):
    log_extra("length", [len(text) for text in completions])
    log_metric("characters", float(sum(map(len, completions))))
    return [float(len(set(text))) if len(text) % 5 else None for text in completions]


async def waiting(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


@pytest.mark.slow
def test_200_iterations_do_not_grow_memory(tmp_path, policy, reward_model, tokenizer):
    """One optimizer step an iteration, with all that keeps something: average, texts, tables, evaluation, files."""
    iterations = LATE + EVERY * len(LEAKS)
    trainer = make(
        tmp_path, policy, [noted, waiting], tokenizer, value_model=value_model_from_reward_model(reward_model),
        generation_batch_size=4, total_episodes=4 * iterations, max_completion_length=4, ptx_ratio=1, ptx_coef=0.1,
        prompts=Dataset.from_dict({"prompt": [f"prompt {i}" for i in range(280)]}), learning_rate=1e-4,
        eval_prompts=PROMPTS.select(range(4)), per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=EVERY,
        save_strategy="steps", save_steps=EVERY, save_total_limit=1,
    )  # fmt: skip
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    assert trainer.state.global_step == iterations
    assert_no_growth(watch.seen[EARLY], watch.seen[LATE], LATE - EARLY)
    for start in range(LATE, iterations, EVERY):  # what was planted is seen, so nothing else was there to see
        with pytest.raises(AssertionError):
            assert_no_growth(watch.seen[start], watch.seen[start + EVERY], EVERY)
