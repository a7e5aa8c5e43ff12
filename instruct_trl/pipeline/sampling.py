"""K answers per prompt from the SFT model, ranked by a labeler: the reward model's data (the paper's step 2)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from instruct_trl.evaluation.selection import as_prompts, score_answers
from instruct_trl.judges.base import Answer, as_completion
from instruct_trl.models.generation import Completion, generate_completions
from instruct_trl.models.loading import load_policy_and_tokenizer
from instruct_trl.models.model_files import check_model_path
from instruct_trl.pipeline.arguments import SamplingArguments, require_at_least, setting
from instruct_trl.pipeline.functions import load_labeler, try_labeler
from instruct_trl.pipeline.loading import held_out_split, load_splits, pick_split
from instruct_trl.pipeline.rows import dataset_of


@dataclass
class SampleArguments(SamplingArguments):
    """The sampler, and who ranks."""

    model_name_or_path: str | None = setting(None, "The sampler. Default: <run_dir>/sft.")
    num_completions: int = setting(4, "K: answers per prompt (paper: 4 to 9).")
    labeler: str | None = setting(None, "'module:function' of your own, or 'none'.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, num_completions=2)  # one answer has nothing to be ranked against


def ranks_of(scores: Sequence[float]) -> list[int]:
    """1 for the best; equal scores tie, and the next rank is skipped (1, 2, 2, 4)."""
    return [1 + sum(other > score for other in scores) for score in scores]


def load_causal_lm(path: str) -> tuple[Any, Any]:
    """(model, tokenizer) for sampling, in float32 on the accelerator if there is one; also of an adapter's folder."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model, tokenizer = load_policy_and_tokenizer(path)
    tokenizer.padding_side = "left"
    return model.to(device), tokenizer


def sample_answers(
    model: Any, tokenizer: Any, prompts: list, run: SamplingArguments, *, seed: int, desc: str, count: int = 1
) -> list[Completion]:
    """`count` answers per prompt, prompt by prompt, with the run's length, temperature, batch and precision."""
    how = run.drawn | {"seed": seed, "num_return_sequences": count, "desc": desc}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=run.bf16):
        return generate_completions(model, tokenizer, prompts, **how)


def sample_rankings(run: SampleArguments, folder: Path) -> dict[str, Any]:
    """Write `train.jsonl`, and `test.jsonl` if there are held-out prompts.

    Rows have `prompt`, `completions`, `truncated` and, with a labeler, `ranks`.
    """
    if run.temperature == 0:
        raise ValueError(
            "--temperature is 0, which gives the same answer every time: nothing to rank. Set it to 1, for example."
        )
    labeler = None if run.labeler == "none" else load_labeler(run.labeler, run)
    path, name = run.model_name_or_path or str(run.run / "sft"), dataset_of(run)
    check_model_path(path)
    splits, train = load_splits(name, run.dataset_config), run.dataset_train_split
    chosen = {"train": train, "test": held_out_split(splits, run.dataset_test_split, train, name)}
    prompts = {
        part: as_prompts(pick_split(splits, split, name), f"The {split} split", least=1)
        for part, split in chosen.items()
        if split is not None
    }
    model, tokenizer = load_causal_lm(path)
    if labeler is not None:
        try_labeler(labeler, prompts["train"], tokenizer, str(run.labeler))
    summary: dict[str, Any] = {}
    ranked: dict[str, list[dict]] = {}  # written when all are: a labeler that fails leaves an empty folder
    for offset, (part, asked) in enumerate(prompts.items()):
        count, seed = run.num_completions, run.seed + offset
        answers = sample_answers(model, tokenizer, asked, run, seed=seed, desc=f"sampling {part}", count=count)
        by_prompt = [answers[i * count : (i + 1) * count] for i in range(len(asked))]
        groups = [(p, [a for a in group if a.text.strip()]) for p, group in zip(asked, by_prompt, strict=True)]
        groups = [(prompt, group) for prompt, group in groups if len(group) > 1]  # one answer has no rank
        ranked[part] = _rows(groups, labeler, folder.with_name(f"{folder.name}_unranked_{part}.jsonl"))
        empty = sum(not answer.text.strip() for answer in answers)
        summary |= {f"{part} prompts": len(groups), f"{part} answers": sum(len(group) for _, group in groups)}
        summary[f"{part} empty answers left out"] = empty
    for part, rows in ranked.items():
        _write(folder / f"{part}.jsonl", rows)
    return summary


def _rows(groups: list[tuple[Any, list[Completion]]], labeler: Any, kept: Path) -> list[dict]:
    """A row per prompt, with `ranks` by the labeler. If it fails, the rows are written to `kept` without them."""
    rows: list[dict] = [
        {
            "prompt": prompt,
            "completions": [as_completion(Answer(prompt, answer.text)) for answer in group],
            "truncated": [answer.truncated for answer in group],
        }
        for prompt, group in groups
    ]
    if labeler is None:
        return rows
    try:
        ranks = [ranks_of(score_answers(labeler, [p] * len(group), group, "The labeler")) for p, group in groups]
    except Exception as error:
        _write(kept, rows)
        raise ValueError(
            f"{error} The answers are kept without ranks in {kept}: add `ranks` to each row and hand the file to "
            "recipes/reward_model.py, or fix the labeler and run this again, which samples new answers."
        ) from error
    return [{**row, "ranks": places} for row, places in zip(rows, ranks, strict=True)]


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
