"""The rows of an evaluation: its means are over all of them, however they were batched, and each counts once.

Legend: B rows of a batch of one process, N rows of the evaluation.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard


class EvaluationRows:
    """One number per row and metric, of all processes, in the order of the data. NaN: the row does not count."""

    def __init__(self) -> None:
        self._rows: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._batches: dict[str, list[tuple[float, int]]] = defaultdict(list)

    def start(self) -> None:
        """Begin an evaluation."""
        self._rows.clear()
        self._batches.clear()

    def add(self, accelerator: Accelerator, columns: dict[str, torch.Tensor]) -> None:
        """Note columns (B,) of this process; every process calls this at the same batch, with as many rows."""
        table = torch.stack([column.detach().float() for column in columns.values()], dim=1)
        for name, column in zip(columns, accelerator.gather(table).cpu().double().unbind(dim=1), strict=True):
            self._rows[name].append(column)

    def add_batch(self, metrics: dict[str, float], rows: int) -> None:
        """Note what is known of a batch as a whole, of `rows` rows on all processes."""
        for name, value in metrics.items():
            if not math.isnan(value):
                self._batches[name].append((value, rows))

    def column(self, name: str, count: int | None) -> torch.Tensor:
        """The first `count` rows, (N,): what follows only filled the last batch. None: nothing did."""
        return torch.cat(self._rows[name])[:count]

    def means(self, count: int | None) -> dict[str, float | None]:
        """The mean of each metric over the rows that count, None where none does; not of names that begin with _."""
        metrics = {name: _over_batches(name, values) for name, values in self._batches.items()}
        return metrics | {name: mean(self.column(name, count)) for name in self._rows if name[0] != "_"}


def mean(rows: torch.Tensor) -> float | None:
    """The mean of (N,) without its NaN, None where nothing is left."""
    return _or_none(rows.nanmean())


def answer_statistics(lengths: torch.Tensor, ended: torch.Tensor) -> dict[str, float | None]:
    """TRL's `completions/...` over N answers: their tokens, (N,), and which of them ended, (N,) of 0 and 1."""
    metrics: dict[str, float | None] = {"completions/clipped_ratio": mean(1 - ended)}
    terminated = lengths[ended.bool()] if ended.any() else lengths.new_zeros(1)
    for kind, values in (("", lengths), ("terminated_", terminated)):
        metrics |= {
            f"completions/{name}_{kind}length": _or_none(take(values))
            for name, take in (("mean", torch.mean), ("min", torch.min), ("max", torch.max))
        }
    return metrics


def reward_statistics(rewards: dict[str, torch.Tensor], weights: torch.Tensor) -> dict[str, float | None]:
    """TRL's `rewards/...` and `reward` over N answers, from each function's rewards (N,), NaN where it gave none."""
    table = torch.stack(list(rewards.values()), dim=1)
    total = (table * weights.to(table)).nansum(dim=1).masked_fill(table.isnan().all(dim=1), float("nan"))
    metrics = {"reward": mean(total), "reward_std": _deviation(total)}
    for name, column in rewards.items():
        metrics |= {f"rewards/{name}/mean": mean(column), f"rewards/{name}/std": _deviation(column)}
    return metrics


def count_rows(dataloader: Any, repeats: int) -> Callable[[], int | None]:
    """A function that says, after `dataloader` was read, how many rows were the data's own.

    The others are copies that fill the last batch, so that every process has one. None: there are none.
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
        self._stream = stream
        self.rows = 0

    def __iter__(self) -> Iterator[Any]:
        self.rows = 0
        for row in self._stream:
            self.rows += 1
            yield row

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _over_batches(name: str, values: list[tuple[float, int]]) -> float:
    if name.endswith(("/min", "/max")):
        return (min if name.endswith("/min") else max)(value for value, _ in values)
    return sum(value * rows for value, rows in values) / sum(rows for _, rows in values)


def _deviation(rows: torch.Tensor) -> float | None:
    rows = rows[~rows.isnan()]
    return _or_none(rows.std()) if len(rows) > 1 else None


def _or_none(value: torch.Tensor) -> float | None:
    return None if value.isnan() else value.item()
