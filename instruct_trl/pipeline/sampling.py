"""K answers per prompt from the SFT model, ranked by a labeler: the reward model's data (the paper's step 2)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from instruct_trl.evaluation.selection import as_prompts, score_answers
from instruct_trl.judges.base import Answer, as_completion
from instruct_trl.models.generation import Completion, generate_completions
from instruct_trl.models.loading import load_policy_and_tokenizer
from instruct_trl.models.model_files import check_model_path
from instruct_trl.pipeline.arguments import SamplingArguments, require_at_least
from instruct_trl.pipeline.functions import load_labeler, try_labeler
from instruct_trl.pipeline.loading import held_out_split, load_splits, pick_split
from instruct_trl.pipeline.rows import dataset_of


@dataclass
class SampleArguments(SamplingArguments):
    """What to sample, and who ranks."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The sampler. Default: <run_dir>/sft."})
    num_completions: int = field(default=4, metadata={"help": "K: answers per prompt (paper: 4 to 9)."})
    labeler: str | None = field(default=None, metadata={"help": "'module:function' of your own, or 'none'."})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, num_completions=2)  # of one answer there is nothing to rank


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


def sample_rankings(run: SampleArguments, folder: Path) -> dict[str, Any]:
    """Write `train.jsonl`, and `test.jsonl` if there are held-out prompts.

    Rows have `prompt`, `completions`, `truncated` and, with a labeler, `ranks`.
    """
    if run.temperature == 0:
        raise ValueError("--temperature is 0, which gives the same answer every time: nothing to rank. Give 1, say.")
    labeler = None if run.labeler == "none" else load_labeler(run.labeler, run)
    path, name = run.model_name_or_path or str(run.run / "sft"), dataset_of(run)
    check_model_path(path)
    splits = load_splits(name, run.dataset_config)
    chosen = {
        "train": run.dataset_train_split,
        "test": held_out_split(splits, run.dataset_test_split, run.dataset_train_split, name),
    }
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
        rows, groups = _rows_of(asked, answers, count)
        if labeler is not None:
            _rank(labeler, rows, groups, folder.with_name(f"{folder.name}_unranked_{part}.jsonl"))
        ranked[part], kept = rows, sum(map(len, groups))
        empty = sum(not answer.text.strip() for answer in answers)
        summary |= {f"{part} prompts": len(rows), f"{part} answers": kept, f"{part} empty answers left out": empty}
    for part, rows in ranked.items():
        _write(folder / f"{part}.jsonl", rows)
    return summary


def _rows_of(prompts: list, answers: list[Completion], count: int) -> tuple[list[dict], list[list[Completion]]]:
    """(rows, each one's answers); empty answers are left out, and prompts with fewer than two others."""
    rows, groups = [], []
    for i, prompt in enumerate(prompts):
        group = [answer for answer in answers[i * count : (i + 1) * count] if answer.text.strip()]
        if len(group) > 1:
            completions = [as_completion(Answer(prompt, answer.text)) for answer in group]
            rows.append({"prompt": prompt, "completions": completions, "truncated": [a.truncated for a in group]})
            groups.append(group)
    return rows, groups


def _rank(labeler: Any, rows: list[dict], groups: list[list[Completion]], kept: Path) -> None:
    """Add `ranks` by the labeler to every row. If it fails, write the rows without them to `kept`.

    Raises:
        ValueError: the labeler failed, or did not give one finite number per answer; says where the answers are.
    """
    try:
        for row, group in zip(rows, groups, strict=True):
            row["ranks"] = ranks_of(score_answers(labeler, [row["prompt"]] * len(group), group, "The labeler"))
    except Exception as error:
        _write(kept, [{name: value for name, value in row.items() if name != "ranks"} for row in rows])
        raise ValueError(
            f"{error} The answers are kept without ranks in {kept}: add `ranks` to each row and hand the file to "
            "recipes/reward_model.py, or mend the labeler and run this again, which samples anew."
        ) from error


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
