"""The rows of a user's data that a stage takes, and whether held-out rows were trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainingArguments

from instruct_trl.data.encoding import prompt_keys
from instruct_trl.data.rows import check_pretraining_row, check_rows, require_columns
from instruct_trl.pipeline.arguments import RunArguments
from instruct_trl.pipeline.loading import held_out_split, load_split, load_splits, pick_split
from instruct_trl.pipeline.stage import finished_summary

HELD_OUT_TEXTS = 2000  # for the pretraining loss


def dataset_of(run: RunArguments) -> str:
    """The name of the run's dataset."""
    if not run.dataset_name:
        raise ValueError("No dataset is given. Set --dataset_name, or dataset_name in the config.")
    return run.dataset_name


def rankings_of(run: RunArguments) -> str:
    """The dataset of rankings: the run's own, or those that recipes/sample.py wrote into the run."""
    folder = run.run / "rankings"
    if not run.dataset_name and not (folder / "train.jsonl").exists():
        raise ValueError(f"{folder} holds no rankings yet. Run recipes/sample.py first, or name a --dataset_name.")
    return run.dataset_name or str(folder)


def train_and_test(run: RunArguments, name: str | None = None) -> tuple[Any, Any]:
    """(train, test) of the run's dataset, or of `name`; test is None if nothing is held out.

    Lines say which split is held out, or that none is, and how many of its prompts are trained on.
    """
    name = name or dataset_of(run)
    splits, split = load_splits(name, run.dataset_config), run.dataset_train_split
    train = pick_split(splits, split, name)
    found = held_out_split(splits, run.dataset_test_split, split, name)
    if found is None:
        PartialState().print(
            f"== Data: There is no test split in {name} (only {', '.join(splits)}), so nothing will be evaluated. Put "
            "rows aside as a split test, or name a split: --dataset_test_split."
        )
        return train, None
    if found == split:
        raise ValueError(f"--dataset_test_split {found} is the split that is trained on. Name another one, or none.")
    _say_held_out(run, name, found)
    test = pick_split(splits, found, name)
    if repeated := overlap(train, test):
        PartialState().print(
            f"== Data: {repeated:,} of {len(test):,} rows of the test split have prompts that are also in the training "
            "rows. They are not held out: put other prompts there."
        )
    return train, test


def further_rows(run: RunArguments, name: str) -> tuple[Any, Any]:
    """The same of a dataset beside the run's own; no line is printed.

    Its splits are those of the main one if it has them, else those of the usual names, else its only one.
    """
    splits = load_splits(name, run.dataset_config)
    names = [run.dataset_train_split, "train", *(splits if len(splits) == 1 else [])]
    split = next((split for split in names if split in splits), run.dataset_train_split)
    asked = run.dataset_test_split if run.dataset_test_split in splits else None
    found = held_out_split(splits, asked, split, name)
    train = pick_split(splits, split, name)
    return train, None if found in (None, split) else pick_split(splits, found, name)


def prompts_to_judge(run: RunArguments, name: str) -> Any:
    """Rows of a dataset to answer and judge: its held-out split; if it has one split only (as a file has), that."""
    splits = load_splits(name, run.dataset_config)
    asked = run.dataset_test_split if name == run.dataset_name else None
    found = held_out_split(splits, asked, run.dataset_train_split, name)
    if found is None and len(splits) > 1:
        there = ", ".join(splits)
        raise ValueError(f"There is no test split in {name}, only {there}. Name the one to use: --dataset_test_split.")
    if found is None:
        (found,) = splits
        if Path(name).expanduser().is_dir():
            PartialState().print(f"== Prompts: {name} has no test split; its only split, {found!r}, is used.")
    elif name == run.dataset_name:
        _say_held_out(run, name, found)
    return pick_split(splits, found, name)


def _say_held_out(run: RunArguments, name: str, found: str) -> None:
    """A line if the held-out split was not asked for and is not called test."""
    if run.dataset_test_split is None and found != "test":
        PartialState().print(f"== Data: {name} has no split 'test'; its split {found!r} is held out.")


def rl_prompts(run: RunArguments) -> Any:
    """Rows with a `prompt` column to sample from in PPO: the train split."""
    return load_split(dataset_of(run), run.dataset_train_split, run.dataset_config)


def pretraining_texts(run: RunArguments, name: str | None, setting: str, weight: float) -> Any:
    """Texts of the γ term or of SFT's mix (`text` or `input_ids`); None if `setting` gives them no weight."""
    if not weight:
        return None
    if name is None:
        raise ValueError(f"{setting} > 0 needs --pretraining_dataset_name (a `text` column); or set --{setting} 0.")
    return further_rows(run, name)[0]


def held_out_texts(run: RunArguments, name: str | None) -> list | None:
    """Texts for the held-out pretraining loss, at most `HELD_OUT_TEXTS`; None if no dataset is named.

    They are its test split, or all of it if it has none. A line says if a stage was trained on them.
    """
    if name is None:
        return None
    train, test = further_rows(run, name)
    rows = train if test is None else test
    require_columns(rows, [("text", "input_ids")], f"--pretraining_dataset_name {name}")
    stages = {stage: finished_summary(run.run / stage) or {} for stage in ("sft", "rl_init", "ppo_ptx")}
    taught = [s for s, made in stages.items() if made.get("settings", {}).get("pretraining_dataset_name") == name]
    if taught and test is None:
        PartialState().print(f"== Pretraining loss: {name} holds the texts that {', '.join(taught)} was trained on.")
    if len(rows) > HELD_OUT_TEXTS:
        PartialState().print(f"== Pretraining loss: taken on the first {HELD_OUT_TEXTS:,} of {len(rows):,} texts.")
        rows = rows.select(range(HELD_OUT_TEXTS))
    check_rows(rows, check_pretraining_row)
    return list(rows["text" if "text" in rows.column_names else "input_ids"])


def evaluate_held_out(args: TrainingArguments, test: Any) -> None:
    """Switch evaluation during training off if nothing is held out."""
    if test is not None:
        return
    if args.load_best_model_at_end or args.save_strategy == "best":
        raise ValueError(
            "There is no test split, so no rows are held out to choose the best checkpoint by "
            "(load_best_model_at_end, save_strategy 'best'). Give a test split, or switch these off."
        )
    args.eval_strategy, args.eval_on_start = "no", False


# -- whether held-out prompts were trained on --------------------------------------------------------------------------


def rows_digest(rows: Iterable[Any]) -> str:
    """A name for these rows, the same for the same rows in the same order."""
    # whole, as runs have it on record: another name would have every ranking scored again
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True, default=str).encode()).hexdigest()


def _keys(rows: Any) -> list[str]:
    """Each row's prompt by name: of `messages` all but the last, of `text` the whole; [] without one."""
    if "messages" in rows.column_names and "prompt" not in rows.column_names:
        asked = (value[:-1] if isinstance(value, list) else value for value in rows["messages"])
        return prompt_keys(asked, loosely=True)
    column = next((name for name in ("prompt", "text") if name in rows.column_names), None)
    return prompt_keys(rows[column], loosely=True) if column else []


def overlap(train: Any, test: Any) -> int:
    """How many rows of `test` have a prompt that a row of `train` also has; 0 without one of the two."""
    if train is None or test is None:
        return 0
    trained = set(_keys(train))
    return sum(key in trained for key in _keys(test))


def trained_on(run: RunArguments, prompts: Sequence[Any], folders: Iterable[str | Path | None] = ()) -> dict | None:
    """Count the prompts that this run was trained on, and print that; None if none are known to be.

    Known are the datasets that the run's stages, and the stages in `folders`, were trained on, if they can still be
    read.

    Returns:
        `rows`, so many `of` all prompts, and a sentence, `note`.
    """
    keys = prompt_keys(prompts, loosely=True)
    stages = {(run.run / stage).resolve(): stage for stage in ("sft", "reward_model", "rl_init", "ppo_ptx")}
    for folder in [Path(folder) for folder in folders if folder is not None]:
        stages.setdefault(folder.resolve(), str(folder))
    shared = {name: _trained_keys(folder) & set(keys) for folder, name in stages.items()}
    found = set().union(*shared.values())
    if not found:
        return None
    count, names = sum(key in found for key in keys), [name for name, some in shared.items() if some]
    note = (
        f"{count:,} of {len(keys):,} prompts are also in the training rows of {', '.join(names)}, so the results "
        "on them do not hold for new prompts. Name held-out ones: --dataset_name, or --dataset_test_split."
    )
    PartialState().print(f"== Prompts: {note}")
    return {"rows": count, "of": len(keys), "note": note}


def _trained_keys(stage: Path) -> set[str]:
    """Keys of the prompts that the finished stage in a folder was trained on; none if its data moved since."""
    settings = (finished_summary(stage) or {}).get("settings", {})
    if not settings.get("dataset_name"):
        return set()
    split, config = settings.get("dataset_train_split", "train"), settings.get("dataset_config")
    try:
        return set(_keys(load_split(settings["dataset_name"], split, config)))
    except ValueError:
        return set()
