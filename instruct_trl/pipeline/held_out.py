"""Whether held-out rows are held out: prompts to judge on, and how many of them stand in the training rows, too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from instruct_trl.pipeline.arguments import RunArguments
from instruct_trl.pipeline.loading import held_out_split, load_split, load_splits, pick_split
from instruct_trl.pipeline.stage import finished_summary

TRAINED = ("sft", "reward_model", "rl_init", "ppo_ptx")
"""Stages that train on rows with prompts."""


def rows_digest(rows: Iterable[Any]) -> str:
    """A name for these rows, the same for the same rows in the same order."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True, default=str).encode()).hexdigest()


def prompts_to_judge(run: RunArguments, name: str) -> Any:
    """Rows of a user's dataset to answer and judge: its held-out split; of one split (a file, too), that.

    Raises:
        ValueError: the split asked for is not there; several splits, and none of a held-out one's name.
    """
    splits = load_splits(name, run.dataset_config)
    asked = run.dataset_test_split if name == run.dataset_name else None
    found = held_out_split(splits, asked, run.dataset_train_split, name)
    if found is None and len(splits) > 1:
        raise ValueError(
            f"There is no test split in {name}, only {', '.join(splits)}. Name the one with held-out prompts: "
            "--dataset_test_split."
        )
    if found is None:
        (found,) = splits
        if Path(name).expanduser().is_dir():
            PartialState().print(f"== Prompts: There is no test split in {name}: its one split, {found!r}, is taken.")
    elif name == run.dataset_name:
        say_held_out(run, found)
    return pick_split(splits, found, name)


def say_held_out(run: RunArguments, found: str) -> None:
    """A line where the held-out split was not asked for and is not called test."""
    if run.dataset_test_split is None and found != "test":
        PartialState().print(f"== Data: {run.dataset_name} has no split 'test'; its split {found!r} is held out.")


def prompt_keys(rows: Any) -> list[str]:
    """Each row's prompt as text to compare by; [] where rows have none.

    Blanks around it play no part, nor whether a lone message or its text is written. Of `messages` it is all but the
    last, of `text` the whole.
    """
    if "prompt" in rows.column_names:
        return _keys(rows["prompt"])
    if "messages" in rows.column_names:
        return _keys(value[:-1] if isinstance(value, list) else value for value in rows["messages"])
    return _keys(rows["text"]) if "text" in rows.column_names else []


def _keys(prompts: Iterable[Any]) -> list[str]:
    return [_key(prompt) for prompt in prompts]


def _key(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], dict):
        prompt = prompt[0].get("content")
    if isinstance(prompt, str):
        return prompt.strip()
    if isinstance(prompt, list):  # Arrow adds nulls to messages
        prompt = [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in prompt]
    return json.dumps(prompt, sort_keys=True, default=str)


def overlap(train: Any, test: Any) -> int:
    """How many rows of `test` have a prompt that a row of `train` has, too; 0 where there is no test."""
    if test is None:
        return 0
    trained = set(prompt_keys(train))
    return sum(key in trained for key in prompt_keys(test))


def overlap_note(count: int, rows: int) -> str | None:
    """A sentence on `count` of `rows` held-out rows whose prompt is trained on; None if there are none."""
    if not count:
        return None
    return (
        f"{count:,} of {rows:,} rows of the test split have prompts that are also in the training rows, so they are "
        "not held out. Put other prompts into the test split."
    )


def trained_on(run: Any, prompts: Sequence[Any]) -> dict[str, Any] | None:
    """How many of the user's prompts this run was trained on, which a line says; None if none are known to be.

    Known are the datasets that the run's stages, and the models given in their place, were trained on, where they can
    still be read.

    Returns:
        `rows`, so many `of` all prompts, and a sentence, `note`.
    """
    if run.dataset_name is None:
        return None  # the demo parts its own data
    keys = _keys(prompts)
    shared = {name: _trained_keys(settings) & set(keys) for name, settings in _trainings(run).items()}
    found = set().union(*shared.values())
    if not found:
        return None
    count, names = sum(key in found for key in keys), [name for name, some in shared.items() if some]
    note = (
        f"{count:,} of {len(keys):,} prompts are also in the training rows of {', '.join(names)}, so what is said of "
        "them is not said of new prompts. Name held-out ones: --dataset_name, or --dataset_test_split."
    )
    PartialState().print(f"== Prompts: {note}")
    return {"rows": count, "of": len(keys), "note": note}


def _trainings(run: Any) -> dict[str, dict[str, Any]]:
    """Name → settings of each training on a user's own data that this run, or a model given to it, comes from."""
    folders = {(run.run / stage).resolve(): stage for stage in TRAINED}
    for name in ("sft_path", "sft_model", "reward_model_path", "ppo_model"):
        path = getattr(run, name, None)
        if path:
            folder = Path(path).parent if name == "ppo_model" else Path(path)
            folders.setdefault(folder.resolve(), path)
    found = {name: (finished_summary(folder) or {}).get("settings", {}) for folder, name in folders.items()}
    return {name: settings for name, settings in found.items() if settings.get("dataset_name")}


def _trained_keys(settings: dict[str, Any]) -> set[str]:
    split, config = settings.get("dataset_train_split", "train"), settings.get("dataset_config")
    try:
        return set(prompt_keys(load_split(settings["dataset_name"], split, config)))
    except ValueError:  # moved or deleted since
        return set()
