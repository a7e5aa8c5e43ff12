"""Pretraining text: the stream behind the γ term of Eq. 2, and the share of it among demonstrations.

Legend: N examples, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets

from instruct_trl.data.encoding import drop_own_bos, pad_rows
from instruct_trl.data.rows import check_pretraining_row, require_columns

IGNORED_LABEL = -100
BATCH = 100  # texts that are tokenised at once; a tokenizer takes a hundred bytes for a token meanwhile
BUFFER = 1000  # texts of a stream that are mixed at a time


class PretrainingStream:
    """Deals out pretraining examples in a seeded order that repeats none before all have been dealt.

    Every process holds the same order and takes its own share of each draw, so that no example goes to two of them.
    The tokens of a `Dataset` lie in Arrow, in at most 4 bytes each: where the dataset lies on disk, in its cache there,
    which the processes share. An `IterableDataset` is read and tokenised as it is dealt; its order is mixed within a
    buffer, and a resumed run reads it again up to its position.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset` with a `text` or an `input_ids` column.
        tokenizer: tokenizes `text`; its pad token fills the batches.
        max_length: tokens an example keeps; longer ones are cut and counted in `truncated`.
        seed: of the order; pass k over the data uses `seed + k`.
        rank, world_size: which share of every draw is this process's.

    Attributes:
        size: how many examples there are, None for an `IterableDataset`.
        position: how many were dealt to all processes; set it to go on from there.
        truncated: how many are cut; of an `IterableDataset`, how many were among those dealt to this process.

    Raises:
        ValueError: neither column is there, there is no row, or one that is not text or has fewer than two tokens. Of
            an `IterableDataset` a row is judged when it is dealt.
    """

    def __init__(
        self, dataset: Any, tokenizer: Any, *, max_length: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ):
        streamed = isinstance(dataset, IterableDataset)
        self._rows = (_Streamed if streamed else _Stored)(dataset, tokenizer, max_length, seed)
        self.pad_token_id, self.max_length = tokenizer.pad_token_id, max_length
        self.rank, self.world_size = rank, world_size
        self.position = 0

    @property
    def size(self) -> int | None:
        return self._rows.size

    @property
    def truncated(self) -> int:
        return self._rows.truncated

    def draw(self, count: int) -> list[list[int]]:
        """The next `count` examples of this process (and as many for each other process), as token lists."""
        start = self.position + self.rank * count
        self.position += count * self.world_size
        return self._rows.take(start, count)

    def collate(self, rows: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
        """Right-padded `input_ids`, `attention_mask`, `labels`, each (N, T); padding is ignored in the labels."""
        batch = pad_rows(rows, self.pad_token_id or 0)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
        return {name: tensor.to(device) for name, tensor in batch.items()}


class _Stored:
    """Rows of a `Dataset`, tokenised once."""

    def __init__(self, dataset: Any, tokenizer: Any, max_length: int, seed: int):
        column = _column(dataset.column_names, dataset)
        if len(dataset) == 0:
            raise ValueError("pretraining_dataset has no rows. Pass texts, or set ptx_coef=0.")
        # The narrowest integer that holds the vocabulary. Ids that come tokenised may be of any.
        kind = "int32" if column == "input_ids" else str(np.min_scalar_type(max(tokenizer.get_vocab().values())))
        self.tokens = dataset.map(
            _tokenize,
            with_indices=True,
            batched=True,
            batch_size=BATCH,
            remove_columns=dataset.column_names,
            features=Features({"input_ids": List(Value(kind)), "cut": Value("bool")}),
            fn_kwargs={"tokenizer": tokenizer, "max_length": max_length},
            desc="Tokenizing the pretraining texts",
        )
        self.size, self._seed, self._epoch = len(self.tokens), seed, -1
        self.truncated = pyarrow.compute.sum(self.tokens.data.column("cut")).as_py()

    def take(self, start: int, count: int) -> list[list[int]]:
        """The examples at `start`, ..., `start + count - 1` of the order."""
        return self.tokens[[self._index(position) for position in range(start, start + count)]]["input_ids"]

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self.size)
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.size, generator=generator)
        return int(self._order[offset])


class _Streamed:
    """Rows of an `IterableDataset`, tokenised as they are dealt."""

    size = None

    def __init__(self, dataset: Any, tokenizer: Any, max_length: int, seed: int):
        first: Mapping[str, Any] = next(iter(dataset), {})
        if not first:
            raise ValueError("pretraining_dataset has no rows. Pass texts, or set ptx_coef=0.")
        _column(dataset.column_names or list(first), dataset)
        self._dataset = dataset.map(_numbered, with_indices=True).shuffle(seed=seed, buffer_size=BUFFER)
        self._tokenizer, self._max_length, self.truncated = tokenizer, max_length, 0
        self._begin()

    def _begin(self) -> None:
        self._position, self._ahead = 0, self._read()

    def _read(self) -> Iterator[Mapping[str, Any]]:
        """The rows of pass 0, 1, 2, ..., each in an order of its own."""
        epoch = 0
        while True:
            self._dataset.set_epoch(epoch)
            rows = iter(self._dataset)
            first = next(rows, None)
            if first is None:
                raise ValueError(
                    f"pretraining_dataset gave no row when it was read for pass {epoch} (from 0): it can be read only "
                    "once. Make it from a function that begins anew at each call (IterableDataset.from_generator)."
                )
            yield first
            yield from rows
            epoch += 1

    def take(self, start: int, count: int) -> list[list[int]]:
        """The examples at `start`, ..., `start + count - 1` of the order."""
        if start < self._position:
            self._begin()
        for _ in range(start - self._position):
            next(self._ahead)
        self._position = start + count
        return [self._tokens(next(self._ahead)) for _ in range(count)]

    def _tokens(self, row: Mapping[str, Any]) -> list[int]:
        batch = {name: [value] for name, value in row.items()}
        tokenized = _tokenize(batch, batch.pop("_row"), self._tokenizer, self._max_length)
        self.truncated += tokenized["cut"][0]
        return tokenized["input_ids"][0]


def _column(present: list[str], dataset: Any) -> str:
    """The column that examples are read from: ids where they are given.

    Raises:
        ValueError: neither is there.
    """
    if "input_ids" in present:
        return "input_ids"
    require_columns(dataset, [("text", "input_ids")], "pretraining_dataset")
    return "text"


def _numbered(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    return {**row, "_row": index}


def _tokenize(batch: Mapping[str, list], indices: list[int], tokenizer: Any, max_length: int | None) -> dict[str, list]:
    """Rows of a dataset as `input_ids`, cut to `max_length` tokens, and whether each was `cut`.

    Raises:
        ValueError: one is no text, or has fewer than two tokens.
    """
    column = "input_ids" if "input_ids" in batch else "text"
    for value, index in zip(batch[column], indices, strict=True):
        check_pretraining_row({column: value}, index)
    rows = (
        batch["input_ids"]
        if column == "input_ids"
        else tokenizer([drop_own_bos(tokenizer, text) for text in batch["text"]])["input_ids"]
    )
    for value, row, index in zip(batch[column], rows, indices, strict=True):
        if len(row) < 2:
            raise ValueError(
                f"pretraining_dataset: column {column!r}, row {index} ({value!r}) has fewer than 2 tokens, so there is "
                "no next token to predict. Filter such rows out."
            )
    return {
        "input_ids": [row[:max_length] for row in rows],
        "cut": [max_length is not None and len(row) > max_length for row in rows],
    }


def check_pretraining_mix(fraction: float, pretraining_dataset: Any, train_dataset: Any, packing: bool) -> None:
    """Refuse settings under which `fraction` could not be what is trained on.

    Raises:
        ValueError: fraction outside [0, 1), without data, with data but 0, with packing, or with streamed data.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"pretraining_fraction must be in [0, 1), got {fraction}; the paper's RL initialisation: 0.1.")
    if fraction == 0:
        if pretraining_dataset is not None:
            raise ValueError(
                "pretraining_dataset was given, but pretraining_fraction is 0, so none of it would be used. Set "
                "pretraining_fraction (0.1 in the paper's RL initialisation) or leave the dataset out."
            )
        return
    if pretraining_dataset is None:
        raise ValueError(
            f"pretraining_fraction is {fraction}, but there is no pretraining_dataset. Pass one with a `text` or an "
            "`input_ids` column, or set pretraining_fraction to 0."
        )
    for name, dataset in (("pretraining_dataset", pretraining_dataset), ("train_dataset", train_dataset)):
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"pretraining_fraction needs to count rows: {name} must be a `datasets.Dataset`, got "
                f"{type(dataset).__name__}."
            )
    if packing:
        raise ValueError("pretraining_fraction counts examples, and packing merges them: set packing to false.")


def tokenize_pretraining(dataset: Dataset, tokenizer: Any) -> Dataset:
    """The rows as `input_ids` and `labels`, every token scored.

    A text is taken as it is, without EOS: a passage cut from a longer document does not end there.

    Raises:
        ValueError: no rows; neither column; a text or a list of ids that is missing, or too short to hold a next token.
    """
    column = _column(dataset.column_names, dataset)
    if len(dataset) == 0:
        raise ValueError("pretraining_dataset has no rows.")
    rows = _tokenize({column: list(dataset[column])}, list(range(len(dataset))), tokenizer, max_length=None)
    return Dataset.from_dict({"input_ids": rows["input_ids"], "labels": rows["input_ids"]})


def pretraining_count(demonstrations: int, fraction: float) -> int:
    """How many pretraining examples make up `fraction` of the whole: M with M / (N + M) nearest to it."""
    return round(fraction * demonstrations / (1 - fraction))


def mix_pretraining(demonstrations: Dataset, pretraining: Dataset, fraction: float, seed: int) -> Dataset:
    """Tokenised demonstrations and as many pretraining rows as make up `fraction` of the result, in random order.

    Pretraining rows are drawn without repetition until all have been used, then again.

    Args:
        demonstrations: with `input_ids` and `labels`.
        pretraining: the same, from `tokenize_pretraining`.
        fraction: of all rows, in (0, 1).
        seed: of the choice and the order.

    Raises:
        ValueError: so few demonstrations that the fraction comes to no row at all.
    """
    needed = pretraining_count(len(demonstrations), fraction)
    if needed == 0:
        raise ValueError(
            f"pretraining_fraction {fraction} of {len(demonstrations)} demonstrations is less than one example. Raise "
            "it, or set it to 0."
        )
    rng = random.Random(seed)
    picked: list[int] = []
    while len(picked) < needed:
        order = list(range(len(pretraining)))
        rng.shuffle(order)
        picked += order[: needed - len(picked)]
    columns = ["input_ids", "labels"]
    drawn = pretraining.select(picked).select_columns(columns).cast(demonstrations.select_columns(columns).features)
    return concatenate_datasets([demonstrations.select_columns(columns), drawn]).shuffle(seed=seed)
