"""Streamed datasets: prompts to train on and to evaluate on, on one process and on two (DDP, gloo, CPU)."""

import json
import sys
from pathlib import Path

import conftest
import pytest
import torch
from datasets import Dataset
from launch_helpers import leave_process_group, processes
from ppo_helpers import make
from ppo_killed import fresh

from instruct_trl import value_model_from_reward_model

TRAINED = [f"train {i}" * (1 + i % 3) for i in range(16)]
EVALUATED = {
    "whole": [f"eval {i}" * (1 + i % 4) for i in range(8)],
    "ragged": [f"eval {i}" * (1 + i % 4) for i in range(7)],
}


def stream(prompts):
    return Dataset.from_dict({"prompt": prompts}).to_iterable_dataset()


def run(folder, eval_prompts, rows, **kwargs):
    """Two iterations over streams; the score is the prompt's length alone, so that every mean is known.

    Returns the logs, the prompts scored in training, and the evaluation of a smaller stream, and of rows, by hand.
    """
    tokenizer, seen = fresh(conftest.tokenizer), []

    def length(prompts, **_):
        if trainer.model.training:
            seen.append(sorted(prompts))
        return [float(len(prompt)) for prompt in prompts]

    trainer = make(
        folder, fresh(conftest.policy), length, tokenizer, prompts=stream(TRAINED), eval_prompts=stream(eval_prompts),
        value_model=value_model_from_reward_model(fresh(conftest.reward_model)), ptx_coef=0.0, use_cpu=True,
        per_device_train_batch_size=rows, gradient_accumulation_steps=1, per_device_eval_batch_size=2,
        eval_strategy="steps", eval_steps=16 // rows, **kwargs,
    )  # fmt: skip
    trainer.train()
    history = list(trainer.state.log_history)
    rows = trainer.evaluate({"rows": Dataset.from_dict({"prompt": eval_prompts[:5]})})
    return history, seen, trainer.evaluate(stream(eval_prompts[:4])) | rows


def check(history, by_hand, name):
    prompts = EVALUATED[name]
    found = [row for row in history if "eval_score" in row]
    assert found
    for row in found:
        assert row["eval_win_rate_prompts"] == len(set(prompts))  # once each, whatever was padded
        assert row["eval_win_rate"] == 0.5  # the same prompts score the same
        assert row["eval_score"] == pytest.approx(sum(map(len, prompts)) / len(prompts))
    assert by_hand["eval_win_rate_prompts"] == 4
    assert by_hand["eval_score"] == pytest.approx(sum(map(len, prompts[:4])) / 4)
    assert by_hand["eval_rows_score"] == pytest.approx(sum(map(len, prompts[:5])) / 5)


@pytest.mark.parametrize("name", EVALUATED)
def test_streams_on_one_process(tmp_path, name):
    history, seen, by_hand = run(tmp_path, EVALUATED[name], 4)
    assert seen == [sorted(TRAINED)] * 2
    check(history, by_hand, name)


@pytest.mark.slow
def test_streams_on_two_processes(tmp_path):
    processes(2, __file__, tmp_path)
    for name in EVALUATED:
        results = [json.loads((tmp_path / f"{name}_{rank}.json").read_text()) for rank in (0, 1)]
        for result in results:
            assert result["processes"] == 2
            check(result["history"], result["by_hand"], name)
        mine, others = (result["seen"] for result in results)
        assert len(mine) == len(others) == 2
        for one, two in zip(mine, others, strict=True):
            assert sorted(one + two) == sorted(TRAINED)  # each prompt on one process, and none twice


def main(root):
    torch.set_num_threads(1)
    for name, prompts in EVALUATED.items():
        history, seen, by_hand = run(root / name, prompts, 2)
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        result = {"history": history, "seen": seen, "by_hand": by_hand, "processes": size}
        (root / f"{name}_{rank}.json").write_text(json.dumps(result))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_process_group()
