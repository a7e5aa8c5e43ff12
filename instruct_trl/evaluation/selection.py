"""Which SFT checkpoint to keep: the one whose answers the reward model likes best (section 3.5, appendix C.1).

The validation loss rises after the first epoch, yet reward and human preference go on rising. So the paper selects by
the RM score on the validation prompts.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from instruct_trl._upstream import get_callable_name
from instruct_trl.data.encoding import as_written, prompt_keys
from instruct_trl.data.rows import check_demonstration, check_rows, check_text, read_json, require_columns
from instruct_trl.evaluation.estimates import Estimate, mean_interval
from instruct_trl.evaluation.language_modeling import mean_token_loss
from instruct_trl.models.generation import Completion, generate_completions
from instruct_trl.models.loading import load_policy_and_tokenizer
from instruct_trl.models.reward import RewardScorer, check_scorer_room
from instruct_trl.models.reward_functions import one_number_each

Prompt = str | list[dict[str, Any]]
Scorer = Callable[..., list[float]]


@dataclass(frozen=True)
class CheckpointRow:
    """The measurements of one checkpoint.

    Attributes:
        checkpoint: its folder.
        step, epoch: from its trainer_state.json; without one, the step is that of the folder's name.
        rm_score: mean RM score of one answer per prompt.
        validation_loss: of the demonstrations, in nats per token; None without validation data.
        truncated: share of the answers cut at the length limit.
        scores: RM score of each answer, in the order of the prompts.
    """

    checkpoint: str
    step: int | None
    epoch: float | None
    rm_score: Estimate
    validation_loss: float | None
    truncated: float
    scores: list[float] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Difference(Estimate):
    """RM score of the chosen checkpoint less that of the other `checkpoint`, on the same prompts and noise."""

    checkpoint: str

    @property
    def is_clear(self) -> bool | None:
        """Whether the interval leaves out 0, so that the two can be told apart. None without an interval."""
        return None if self.low is None else self.side_of(0.0) != "unclear"


@dataclass(frozen=True)
class SelectionResult:
    """The choice, and the numbers it rests on.

    Attributes:
        best: folder of the checkpoint with the highest RM score (the earlier one of two equals).
        best_by_loss: folder of the one with the lowest validation loss; None without validation data.
        rows: one for each checkpoint, by step.
        runner_up: the choice against the checkpoint with the next highest RM score; None without another.
        last: the choice against the last checkpoint; None if it is the last one itself.
    """

    best: str
    best_by_loss: str | None
    rows: list[CheckpointRow]
    runner_up: Difference | None = None
    last: Difference | None = None


def as_scorer(reward_model: Any, processing_class: Any = None, batch_size: int = 8) -> Scorer:
    """A TRL reward function: `reward_model` itself if it is one, else a model or its path as `RewardScorer`."""
    if isinstance(reward_model, (str, Path, torch.nn.Module)):
        return RewardScorer(reward_model, processing_class, batch_size=batch_size)
    if not callable(reward_model):
        raise ValueError(
            f"reward_model must be a path, a model, a RewardScorer or a function (prompts, completions) -> scores; got "
            f"{type(reward_model).__name__}."
        )
    return reward_model


def as_prompts(prompts: Any, name: str = "prompts", least: int = 2) -> list[Prompt]:
    """The prompts of a list, or of a dataset's `prompt` column.

    Raises:
        ValueError: no such column; a prompt that is empty or no text; fewer than `least` prompts, or all the same (one
            prompt has no standard error).
    """
    if hasattr(prompts, "column_names"):
        require_columns(prompts, ["prompt"], name)
        prompts = [row["prompt"] for row in prompts]
    prompts = [as_written(prompt) for prompt in prompts]
    if len(prompts) < least:
        why = " for a mean with a standard error" if least > 1 else ""
        raise ValueError(f"{name} has {len(prompts)} rows; at least {least} are needed{why}.")
    for row, prompt in enumerate(prompts):
        check_text(prompt, f"{name}: column 'prompt', row {row}")
    if least > 1 and all(prompt == prompts[0] for prompt in prompts):
        raise ValueError(
            f"All {len(prompts)} rows of {name} are the same prompt, {prompts[0]!r:.60}: that gives no standard error. "
            "Give at least 2 different ones."
        )
    return prompts


def score_answers(
    scorer: Scorer, prompts: Sequence[Prompt], answers: Sequence[Completion], name: str | None = None
) -> list[float]:
    """The scores of one answer per prompt; `scorer` is called as TRL calls a reward function.

    Errors call it `name`, by default its own name.

    Raises:
        ValueError: not one finite number for each answer.
    """
    name = name or f"The reward function {get_callable_name(scorer)!r}"
    completions = [
        answer.text if isinstance(prompt, str) else [{"role": "assistant", "content": answer.text}]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    scores = scorer(
        prompts=list(prompts),
        completions=completions,
        completion_ids=[answer.token_ids for answer in answers],
        truncated=[answer.truncated for answer in answers],
    )
    finite: list[float] = []
    for row, score in enumerate(one_number_each(scores, len(prompts), name)):
        if score is None or not math.isfinite(score):
            asked, answer = (f"{str(text):.60}" for text in (prompts[row], answers[row].text))
            raise ValueError(
                f"{name} gave {score} for prompt {row} ({asked!r}), answer {answer!r}: it must give a finite number."
            )
        finite.append(score)
    return finite


def find_checkpoints(checkpoints: Any) -> list[Path]:
    """The folders of a list, or the checkpoint-* folders of a run, by step.

    Raises:
        ValueError: one does not exist, or there is none; says where it looked.
    """
    if isinstance(checkpoints, (str, Path)):
        found = [path for path in Path(checkpoints).glob("checkpoint-*") if path.is_dir()]
        if not found:
            raise ValueError(
                f"No checkpoints in {str(Path(checkpoints).resolve())!r}: looked for checkpoint-* folders. Train with "
                "save_strategy 'epoch' and save_total_limit null, or pass the folders as a list."
            )
    else:
        found = [Path(path) for path in checkpoints]
        if not found:
            raise ValueError("checkpoints is an empty list: pass a run's folder or the checkpoints' folders.")
        if missing := [path for path in found if not path.is_dir()]:
            raise ValueError(f"No checkpoint at {str(missing[0].resolve())!r}: there is no such folder.")
    return sorted(found, key=lambda path: (_step_and_epoch(path)[0] or 0, str(path)))


def _step_and_epoch(path: Path) -> tuple[int | None, float | None]:
    state = read_json(path / "trainer_state.json") if (path / "trainer_state.json").is_file() else None
    if isinstance(state, dict) and "global_step" in state:
        return state["global_step"], state.get("epoch")
    number = path.name.rpartition("-")[2]
    return (int(number) if number.isdigit() else None), None


def _validation_pairs(dataset: Any) -> list[Any]:
    if hasattr(dataset, "column_names"):
        require_columns(dataset, ["prompt", "completion"], "validation_dataset")
    dataset = check_rows(dataset, partial(check_demonstration, where="validation_dataset"))
    return [(row["prompt"], row["completion"]) for row in dataset]


def select_checkpoint(
    checkpoints: Any,
    reward_model: Any,
    prompts: Any,
    *,
    validation_dataset: Any = None,
    processing_class: Any = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
    max_length: int | None = 2048,
    output_dir: str | Path | None = None,
) -> SelectionResult:
    """Answer the prompts with every checkpoint of a run, under the same noise, and pick the best by mean RM score.

    Args:
        checkpoints: a run's folder with checkpoint-* in it, or a list of folders.
        reward_model: a path, a sequence classifier with one label, a `RewardScorer`, or any TRL reward function.
        prompts: validation prompts, a list or a dataset with a `prompt` column; one answer each.
        validation_dataset: rows with `prompt` and `completion`, for the validation loss.
        processing_class: tokenizer of the checkpoints; default: each one's own.
        max_new_tokens, temperature, batch_size, seed: as in `generate_completions`.
        max_length: tokens that a validation row keeps.
        output_dir: where selection.json goes; None writes nothing. `report.selection_report` draws a page from the
            result.

    Raises:
        ValueError: no checkpoints (says where it looked), missing columns, empty prompts, a tokenizer without EOS, or
            scores that are not finite.
    """
    paths = find_checkpoints(checkpoints)
    questions = as_prompts(prompts)
    pairs = None if validation_dataset is None else _validation_pairs(validation_dataset)
    scorer = as_scorer(reward_model, batch_size=batch_size)
    keys = prompt_keys(questions)
    check_scorer_room(scorer, questions, max_new_tokens, "max_new_tokens")
    rows = []
    for number, path in enumerate(paths, start=1):
        model, tokenizer = load_policy_and_tokenizer(path, processing_class)
        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        # The same seed for every checkpoint: shared noise cancels in their differences.
        answers = generate_completions(
            model, tokenizer, questions, max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size,
            seed=seed, desc=f"{path.name} ({number}/{len(paths)})",
        )  # fmt: skip
        scores = score_answers(scorer, questions, answers)
        loss = None
        if pairs:
            loss, _ = mean_token_loss(model, tokenizer, pairs, batch_size=batch_size, max_length=max_length)
        cut = statistics.fmean(answer.truncated for answer in answers)
        rows.append(CheckpointRow(str(path), *_step_and_epoch(path), mean_interval(scores, keys), loss, cut, scores))
    result = _choose(rows, keys)
    if output_dir is not None:
        save_selection(result, Path(output_dir))
    return result


def _choose(rows: list[CheckpointRow], prompts: Sequence[str]) -> SelectionResult:
    best, *others = sorted(rows, key=lambda row: -row.rm_score.mean)
    losses = {row.checkpoint: row.validation_loss for row in rows if row.validation_loss is not None}

    def lead_over(other: CheckpointRow) -> Difference:
        # Prompt by prompt: what makes one prompt score higher than another cancels.
        found = mean_interval(np.subtract(best.scores, other.scores), prompts)
        return Difference(**asdict(found), checkpoint=other.checkpoint)

    return SelectionResult(
        best.checkpoint,
        min(losses, key=losses.__getitem__, default=None),
        rows,
        runner_up=lead_over(others[0]) if others else None,
        last=lead_over(rows[-1]) if rows[-1] is not best else None,
    )


def save_selection(result: SelectionResult, folder: Path, **more: Any) -> None:
    """Write `more` and the result as <folder>/selection.json, with one line per checkpoint."""
    table = {**more, **asdict(result)}
    # Indented throughout, the scores would take thousands of lines.
    rows = ",\n    ".join(json.dumps(row) for row in table.pop("rows"))
    text = json.dumps(table, indent=2).removesuffix("\n}") + f',\n  "rows": [\n    {rows}\n  ]\n}}\n'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "selection.json").write_text(text, encoding="utf-8")


def score_checkpoints(
    folder: str | Path, labeler: Callable[..., list[float]], reward_model: Any, prompts: Any, **kwargs: Any
) -> list[dict[str, Any]]:
    """Labeler's and RM score of every checkpoint of a run, on the same answers.

    Args:
        folder: the run's, with its checkpoint-* folders.
        labeler, reward_model: TRL reward functions.
        prompts: of a validation set: neither trained on nor used in the final comparison.
        kwargs: of `select_checkpoint` (`max_new_tokens`, `temperature`, `batch_size`, `seed`, ...).

    Returns:
        One row per checkpoint, by step: `step`, `checkpoint`, `labeler_score` (an `Estimate` as a dict) and `score`.
        If another checkpoint is best, the last row has `behind_best`, the labeler's estimate of its lead.
    """
    proxies: list[float] = []

    def both(**columns: Any) -> list[float]:
        scores = one_number_each(reward_model(**columns), len(columns["prompts"]), "The reward model")
        proxies.append(float(np.mean(np.array(scores, dtype=float))))  # None: NaN
        return labeler(**columns)

    result = select_checkpoint(folder, both, prompts, **kwargs)
    rows: list[dict[str, Any]] = [
        {"step": row.step, "checkpoint": Path(row.checkpoint).name, "labeler_score": asdict(row.rm_score), "score": of}
        for row, of in zip(result.rows, proxies, strict=True)
    ]
    if result.last is not None:
        rows[-1]["behind_best"] = {name: value for name, value in asdict(result.last).items() if name != "checkpoint"}
    return rows
