"""K answers a prompt from the SFT model, ranked by a labeler: the reward model's data (the paper's step 2)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from instruct_trl.evaluation.judges.base import Answer, as_completion
from instruct_trl.evaluation.selection import score_answers
from instruct_trl.pipeline.loading import load_split
from instruct_trl.pipeline.run import demo_folder, load_labeler


def ranks_of(scores: Sequence[float]) -> list[int]:
    """1 for the best; equal scores tie, and the next rank is skipped (1, 2, 2, 4)."""
    return [1 + sum(other > score for other in scores) for score in scores]


def load_causal_lm(path: str) -> tuple[Any, Any]:
    """(model, tokenizer) for sampling, in float32 on the accelerator if there is one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(path, padding_side="left")


def sample_rankings(run: Any, folder: Path) -> dict[str, Any]:
    """Write `train.jsonl` and `test.jsonl` with `prompt`, `completions`, `truncated` and, with a labeler, `ranks`."""
    model, tokenizer = load_causal_lm(run.model_name_or_path or str(run.run / "sft"))
    labeler = None if run.labeler == "none" else load_labeler(run, run.labeler)
    if run.dataset_name is None:
        data = demo_folder(run)
        splits = {part: load_split(data / f"reward_prompts_{part}.jsonl") for part in ("train", "test")}
    else:
        splits = {"train": load_split(run.dataset_name, run.dataset_train_split, run.dataset_config)}
    summary: dict[str, Any] = {}
    for offset, (part, dataset) in enumerate(splits.items()):
        rows, empty = _rank(model, tokenizer, labeler, list(dataset["prompt"]), run, run.seed + offset, part)
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        answers = sum(len(row["completions"]) for row in rows)
        summary |= {f"{part} prompts": len(rows), f"{part} answers": answers, f"{part} empty answers left out": empty}
    return summary


def sample_answers(
    model: Any, tokenizer: Any, prompts: list, run: Any, *, seed: int, desc: str, count: int = 1
) -> list:
    """`count` answers a prompt, prompt by prompt, under the recipe's length, temperature, batch size and precision."""
    from instruct_trl.models.generation import generate_completions

    with torch.autocast(model.device.type, torch.bfloat16, enabled=run.bf16):
        return generate_completions(
            model,
            tokenizer,
            prompts,
            max_new_tokens=run.max_completion_length,
            temperature=run.temperature,
            batch_size=run.batch_size,
            seed=seed,
            num_return_sequences=count,
            desc=desc,
        )


def _rank(model: Any, tokenizer: Any, labeler: Any, prompts: list, run: Any, seed: int, part: str) -> tuple[list, int]:
    """(rows, number of empty answers left out); a prompt with fewer than two answers left is left out with them."""
    count = run.num_completions
    answers = sample_answers(model, tokenizer, prompts, run, seed=seed, desc=f"sampling {part}", count=count)
    rows, empty = [], 0
    for i, prompt in enumerate(prompts):
        group = [answer for answer in answers[i * count : (i + 1) * count] if answer.text.strip()]
        empty += count - len(group)
        if len(group) < 2:
            continue
        completions = [as_completion(Answer(prompt, answer.text)) for answer in group]
        row = {"prompt": prompt, "completions": completions, "truncated": [a.truncated for a in group]}
        if labeler is not None:
            row["ranks"] = ranks_of(score_answers(labeler, [prompt] * len(group), group, "The labeler"))
        rows.append(row)
    return rows, empty
