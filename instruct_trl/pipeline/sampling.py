"""K answers a prompt from the SFT model, ranked by a labeler: the reward model's data (the paper's step 2)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from instruct_trl.evaluation.selection import as_prompts, score_answers
from instruct_trl.judges.base import Answer, as_completion
from instruct_trl.models.generation import Completion
from instruct_trl.models.model_files import check_model_path
from instruct_trl.pipeline.loading import load_split
from instruct_trl.pipeline.run import demo_folder, load_labeler
from instruct_trl.pipeline.trying import try_labeler


def ranks_of(scores: Sequence[float]) -> list[int]:
    """1 for the best; equal scores tie, and the next rank is skipped (1, 2, 2, 4)."""
    return [1 + sum(other > score for other in scores) for score in scores]


def load_causal_lm(path: str) -> tuple[Any, Any]:
    """(model, tokenizer) for sampling, in float32 on the accelerator if there is one; also of an adapter's folder."""
    from instruct_trl.models.loading import load_policy_and_tokenizer

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model, tokenizer = load_policy_and_tokenizer(path)
    tokenizer.padding_side = "left"
    return model.to(device), tokenizer


def sample_rankings(run: Any, folder: Path) -> dict[str, Any]:
    """Write `train.jsonl` and `test.jsonl` with `prompt`, `completions`, `truncated` and, with a labeler, `ranks`."""
    if run.temperature == 0:
        raise ValueError("--temperature is 0, which gives the same answer every time: nothing to rank. Give 1, say.")
    labeler = None if run.labeler == "none" else load_labeler(run, run.labeler)
    path = run.model_name_or_path or str(run.run / "sft")
    check_model_path(path)
    if run.dataset_name is None:
        data = demo_folder(run)
        splits = {part: load_split(data / f"reward_prompts_{part}.jsonl") for part in ("train", "test")}
    else:
        splits = {"train": load_split(run.dataset_name, run.dataset_train_split, run.dataset_config)}
    prompts = {part: as_prompts(dataset, f"The {part} split", least=1) for part, dataset in splits.items()}
    model, tokenizer = load_causal_lm(path)
    if labeler is not None:
        try_labeler(labeler, prompts["train"], tokenizer, run.labeler)
    summary: dict[str, Any] = {}
    ranked: dict[str, list[dict]] = {}  # written when all are: a labeler that fails leaves an empty folder
    for offset, (part, asked) in enumerate(prompts.items()):
        rows, groups, empty = _answer(model, tokenizer, asked, run, run.seed + offset, part)
        if labeler is not None:
            _rank(labeler, rows, groups, folder.with_name(f"{folder.name}_unranked_{part}.jsonl"))
        ranked[part] = rows
        answers = sum(len(row["completions"]) for row in rows)
        summary |= {f"{part} prompts": len(rows), f"{part} answers": answers, f"{part} empty answers left out": empty}
    for part, rows in ranked.items():
        _write(folder / f"{part}.jsonl", rows)
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


def _answer(
    model: Any, tokenizer: Any, prompts: list, run: Any, seed: int, part: str
) -> tuple[list[dict], list[list[Completion]], int]:
    """(rows, each one's answers, number of empty ones left out); a prompt with fewer than two left is left out, too."""
    count = run.num_completions
    answers = sample_answers(model, tokenizer, prompts, run, seed=seed, desc=f"sampling {part}", count=count)
    rows, groups, empty = [], [], 0
    for i, prompt in enumerate(prompts):
        group = [answer for answer in answers[i * count : (i + 1) * count] if answer.text.strip()]
        empty += count - len(group)
        if len(group) > 1:
            completions = [as_completion(Answer(prompt, answer.text)) for answer in group]
            rows.append({"prompt": prompt, "completions": completions, "truncated": [a.truncated for a in group]})
            groups.append(group)
    return rows, groups, empty


def _rank(labeler: Any, rows: list[dict], groups: list[list[Completion]], kept: Path) -> None:
    """Add `ranks` by the labeler to every row; where it fails, write the rows without them to `kept`.

    Raises:
        ValueError: the labeler failed, or did not give one finite number an answer; says where the answers are.
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
