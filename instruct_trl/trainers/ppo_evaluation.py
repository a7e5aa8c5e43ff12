"""Evaluation during PPO: means over rows, and how often the policy's answer scores higher than the reference's.

Legend: B rows of a batch of one process, N rows of the evaluation, on all processes.
"""

from __future__ import annotations

import copy
import logging
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import gather_object
from datasets.fingerprint import Hasher
from transformers import set_seed
from trl import GRPOTrainer
from trl.trainer.utils import use_adapter

from instruct_trl.data.encoding import prompt_key
from instruct_trl.evaluation.estimates import rate_interval
from instruct_trl.maths.masking import masked_mean
from instruct_trl.models.role_adapters import ReferenceRole
from instruct_trl.trainers.minibatches import Batch
from instruct_trl.trainers.ppo_ptx_config import PPOPtxConfig
from instruct_trl.trainers.ppo_rollout import ends_in
from instruct_trl.trainers.run_checks import metric_and_set

logger = logging.getLogger(__name__)

# The same answer, scored in another batch, differs by the rounding of float32. That is a tie.
ROUNDING = {"rel_tol": 1e-5, "abs_tol": 1e-6}
Place = tuple[str, int]  # of a row in an evaluation: its content, and how often that came before
Numbers = dict[str, float | None]


def check_win_rate(args: PPOPtxConfig, eval_dataset: Any, rollout_func: Any) -> bool:
    """True if `eval_win_rate` can be logged; if it is wanted and cannot, one line says why.

    Raises:
        ValueError: it cannot, and is the `metric_for_best_model`.
    """
    generators = {
        "use_vllm=True": args.use_vllm,
        "use_transformers_continuous_batching=True": args.use_transformers_continuous_batching,
        "rollout_func": rollout_func is not None,
    }
    obstacles = [name for name, present in generators.items() if present]
    reason = f"{obstacles[0]} samples from the policy only" if obstacles else "it is switched off"
    possible = args.eval_win_rate and not obstacles
    metric, _ = metric_and_set(args.metric_for_best_model or "", eval_dataset)
    if not possible and metric.startswith("win_rate"):
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} is not logged: {reason}. Set eval_win_rate=True and "
            "sample with transformers, or choose 'eval_score'."
        )
    if obstacles and args.eval_win_rate and eval_dataset is not None:
        logger.warning("PPO-ptx: eval_win_rate is left out: %s, and needs the reference's answers.", reason)
    return possible


# One evaluation -------------------------------------------------------------------------------------------------------


class Evaluation:
    """The rows of the evaluation under way, each counted once however they were batched, and the reference's scores.

    Args:
        accelerator: the trainer's.
        reward_names: of the reward functions.
        with_win_rate: compare with the reference's answers.
    """

    def __init__(self, accelerator: Accelerator, reward_names: list[str], with_win_rate: bool):
        self.accelerator, self.reward_names = accelerator, reward_names
        self.reference = ReferenceScores() if with_win_rate else None
        self._rows: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._batches: dict[str, list[tuple[float, int]]] = defaultdict(list)

    def start(self) -> None:
        """Begin an evaluation; the reference's scores are kept for the run."""
        self._rows.clear()
        self._batches.clear()
        if self.reference is not None:
            self.reference.start()

    def note(self, columns: dict[str, torch.Tensor], counted: torch.Tensor | None = None) -> None:
        """Note a number per row, (B,), in each column; only rows `counted` (B,) count. All processes call it alike."""
        table = torch.stack([column.detach().float() for column in columns.values()], dim=1)
        if counted is not None:
            table = table.masked_fill(~counted.unsqueeze(1), math.nan)
        for name, column in zip(columns, self.accelerator.gather(table).cpu().double().unbind(dim=1), strict=True):
            self._rows[name].append(column)

    def note_batch(self, metrics: dict[str, float], rows: int) -> None:
        """Note numbers of a batch as a whole, of `rows` rows on all processes."""
        for name, value in metrics.items():
            if not math.isnan(value):
                self._batches[name].append((value, rows))

    def note_answers(
        self, places: list[Place], inputs: Batch, rewards: torch.Tensor, endings: list[int], of_batch: Any
    ) -> None:
        """Note who won, length, end and rewards of B answers; and take what GRPO knows of the batch as a whole."""
        size, mask = len(inputs["completion_ids"]), inputs["completion_mask"]
        scored = inputs["loss_mask"].any(dim=1)
        if self.reference is not None:
            self.reference.compare(places, inputs["scores"].masked_fill(~scored, math.nan))
        own = torch.where(scored.unsqueeze(1), inputs["loss_mask"], mask)  # no tool's words
        columns = {"_length": own.sum(dim=1), "_ended": ends_in(endings, inputs["completion_ids"], mask)}
        mine = rewards.view(self.accelerator.num_processes, size, -1)[self.accelerator.process_index].unbind(dim=1)
        self.note(columns | {f"_reward/{name}": column for name, column in zip(self.reward_names, mine, strict=True)})
        self.note_batch({name: values[-1] for name, values in of_batch.items()}, size * self.accelerator.num_processes)
        of_batch.clear()

    def loss(self, inputs: Batch, beta: float) -> torch.Tensor:
        """The first bracket of Eq. 2, negated, averaged over the B answers that have a score."""
        mask = inputs["loss_mask"]
        objective, scored = inputs["scores"] - beta * (inputs["kl"] * mask).sum(dim=1), mask.any(dim=1)
        self.note({"loss": -objective}, counted=scored)
        return -masked_mean(objective, scored)

    def means(self, count: int | None) -> Numbers:
        """The mean of each metric over the first `count` rows, None if none counts; not of names that begin with _."""
        metrics: Numbers = {}
        for name, values in self._batches.items():
            if name.endswith(("/min", "/max")):
                metrics[name] = (min if name.endswith("/min") else max)(value for value, _ in values)
            else:
                metrics[name] = sum(value * rows for value, rows in values) / sum(rows for _, rows in values)
        return metrics | {name: mean(self.column(name, count)) for name in self._rows if name[0] != "_"}

    def column(self, name: str, count: int | None) -> torch.Tensor:
        """The first `count` rows, (N,): the others only filled the last batch. None: all."""
        return torch.cat(self._rows[name])[:count]

    def metrics(self, count: int | None, weights: torch.Tensor) -> Numbers:
        """All metrics over the first `count` rows, None for all, under TRL's names; `weights`: of reward functions."""
        metrics = self.means(count)
        metrics |= answer_statistics(self.column("_length", count), self.column("_ended", count))
        metrics["missing_rewards"] = self.column("unscored_fraction", count).sum().item()
        table = torch.stack([self.column(f"_reward/{name}", count) for name in self.reward_names], dim=1)
        total = (table * weights.to(table)).nansum(dim=1).masked_fill(table.isnan().all(dim=1), math.nan)
        metrics |= {"reward": mean(total), "reward_std": _deviation(total)}
        for name, column in zip(self.reward_names, table.unbind(dim=1), strict=True):
            metrics |= {f"rewards/{name}/mean": mean(column), f"rewards/{name}/std": _deviation(column)}
        metrics |= {} if self.reference is None else self.reference.metrics()
        return metrics


def mean(rows: torch.Tensor) -> float | None:
    """The mean of (N,) without its NaN, None if nothing is left."""
    found = rows.nanmean()
    return None if found.isnan() else found.item()


def _deviation(rows: torch.Tensor) -> float | None:
    rows = rows[~rows.isnan()]
    return rows.std().item() if len(rows) > 1 else None


def answer_statistics(lengths: torch.Tensor, ended: torch.Tensor) -> Numbers:
    """TRL's `completions/...` over N answers: their tokens, (N,), and which of them ended, (N,) of 0 and 1."""
    metrics: Numbers = {"completions/clipped_ratio": mean(1 - ended)}
    terminated = lengths[ended.bool()] if ended.any() else lengths.new_zeros(1)
    for kind, values in (("", lengths), ("terminated_", terminated)):
        for name, take in (("mean", torch.mean), ("min", torch.min), ("max", torch.max)):
            metrics[f"completions/{name}_{kind}length"] = take(values).item()
    return metrics


def count_rows(dataloader: Any, repeats: int) -> Callable[[], int | None]:
    """A function that tells, after `dataloader` was read, how many rows were the data's own; None: all.

    The others are copies that fill the last batch, so that every process has one.
    """
    data = dataloader.dataset
    if isinstance(data, IterableDatasetShard):
        data.dataset = counted = _Counted(data.dataset)
        return lambda: counted.rows
    size = len(data) * repeats if hasattr(data, "__len__") else None
    return lambda: size


class _Counted:
    """A stream that counts what is read of it."""

    def __init__(self, stream: Any):
        self._stream, self.rows = stream, 0

    def __iter__(self) -> Iterator[Any]:
        self.rows = 0
        for row in self._stream:
            self.rows += 1
            yield row

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# Against the reference ------------------------------------------------------------------------------------------------


class ReferenceScores:
    """The scores of the reference's answers, kept for the run, and who won in the evaluation under way.

    A row's place is its content and how often that came before. So prompts may come in any order, from several
    datasets, and more than once (`num_generations_eval`).
    """

    def __init__(self) -> None:
        self._scores: dict[Place, float] = {}
        self._outcomes: list[tuple[str, str, float]] = []  # of a row: its digest, its prompt's key, who won
        self._prompts: dict[str, str] = {}
        self._seen: Counter[str] = Counter()

    def start(self) -> None:
        """Begin an evaluation; scores are kept."""
        self._outcomes.clear()
        self._seen.clear()

    def places(self, rows: list[dict[str, Any]]) -> list[Place]:
        """The places of B rows of a dataset, counted as seen."""
        places = []
        for row in rows:
            digest = Hasher.hash(row)
            self._prompts[digest] = prompt_key(row.get("prompt"))
            places.append((digest, self._seen[digest]))
            self._seen[digest] += 1
        return places

    def lacks(self, places: list[Place]) -> bool:
        """True if one of B places has no score yet."""
        return not self._scores.keys() >= set(places)

    def keep(self, places: list[Place], scores: torch.Tensor) -> None:
        """Keep the reference's scores, (B,), NaN if missing."""
        self._scores |= dict(zip(places, scores.tolist(), strict=True))

    def compare(self, places: list[Place], scores: torch.Tensor) -> None:
        """Note who won: 1 the policy, with scores (B,), 0 the reference, ½ a tie. A missing score (NaN) is no game."""
        for place, score in zip(places, scores.tolist(), strict=True):
            reference = self._scores[place]
            if not math.isnan(score - reference):
                tie = math.isclose(score, reference, **ROUNDING)
                self._outcomes.append((place[0], self._prompts[place[0]], 0.5 if tie else float(score > reference)))

    def metrics(self) -> dict[str, float]:
        """Win rate over the rows of all processes, its 95 % interval over prompts, and the rows that it counts.

        A row that came several times counts once, with the mean of its outcomes. If no row has both scores, there is no
        rate. The interval is Wilson's, or that of `rate_interval` if rows of the dataset share a prompt.
        """
        rows: dict[tuple[str, str], list[float]] = defaultdict(list)
        for digest, prompt, outcome in gather_object(self._outcomes):
            rows[digest, prompt].append(outcome)
        metrics = {"win_rate_prompts": float(len(rows))}
        if rows:
            found = rate_interval([fmean(outcomes) for outcomes in rows.values()], [prompt for _, prompt in rows])
            low, high = found.bounds or (0.0, 1.0)
            metrics |= {"win_rate": found.mean, "win_rate_low": low, "win_rate_high": high}
        return metrics


def score_reference(trainer: Any, rows: list[dict[str, Any]], sample: Callable[[], torch.Tensor]) -> list[Place]:
    """The places of B rows. For new ones `sample` gives, and we keep, the scores of the reference's answers."""
    reference, accelerator = trainer.evaluation.reference, trainer.accelerator
    if reference is None:
        return []
    places = reference.places(rows)
    lacking = torch.tensor(float(reference.lacks(places)), device=accelerator.device)
    if accelerator.reduce(lacking, "sum").item():  # all processes sample, or none
        # Seeded by the prompts: a resumed run, too, compares with the same answers.
        with own_randomness(accelerator.device, trainer.args.seed, "reference", places), as_reference(trainer):
            reference.keep(places, sample())
    return places


@contextmanager
def own_randomness(device: torch.device, seed: int, *purpose: Any) -> Iterator[None]:
    """While active, every generator is seeded by `seed` and `purpose`; afterwards each goes on where it was."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  reward functions may draw from it
    devices = [] if device.type in ("cpu", "mps") else [device]  # torch.mps has no generator by device
    try:
        with torch.random.fork_rng(devices, device_type=device.type):
            set_seed((seed + int(Hasher.hash(purpose), 16)) % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def as_reference(trainer: GRPOTrainer) -> Iterator[None]:
    """While active, GRPO's own rollout samples from the reference, and what it logs is thrown away."""
    kept = {name: getattr(trainer, name) for name in ("model_wrapped", "_metrics", "_logs", "beta")}
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._logs, trainer.beta = copy.deepcopy(trainer._logs), 0.0
    reference: Any = trainer.ref_model
    adapters: Any = nullcontext()
    if isinstance(reference, ReferenceRole):
        adapters = reference.active()
    elif reference is not None:
        trainer.model_wrapped = reference
    else:  # as GRPO does for the reference's log-probs
        policy: Any = trainer.accelerator.unwrap_model(trainer.model)
        adapters = use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
    try:
        with adapters:
            yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)
