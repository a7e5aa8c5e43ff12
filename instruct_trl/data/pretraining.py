"""Pretraining text: the stream behind the γ term of Eq. 2, and the share of it among demonstrations.

Legend: N examples, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets

from instruct_trl.data.encoding import drop_own_bos, pad_rows
from instruct_trl.data.rows import check_pretraining_row, column_names, require_columns

IGNORED_LABEL = -100
BATCH = 100  # texts that are tokenised at once; a tokenizer takes a hundred bytes for a token meanwhile
BUFFER = 1000  # texts of a stream that are mixed at a time


class PretrainingStream:
    """Deals out pretraining examples in a seeded order that repeats none before all have been dealt.

    Every process holds the same order and takes its own share of each draw, so that no example goes to two of them.
    A `Dataset` is tokenised once, into Arrow: where it lies on disk, into its cache there, which processes share. An
    `IterableDataset` is read and tokenised as it is dealt; its order is mixed within a buffer, and a resumed run reads
    it again up to its position.

    Args:
        dataset: with a `text` or an `input_ids` column.
        tokenizer: tokenizes `text`; its pad token fills the batches.
        max_length: tokens an example keeps; longer ones are cut and counted in `truncated`.
        seed: of the order; pass k over the data uses `seed + k`.
        rank, world_size: which share of every draw is this process's.

    Attributes:
        position: how many were dealt to all processes; set it to go on from there.

    Raises:
        ValueError: neither column is there, there is no row, or one that is not text or has fewer than two tokens. A
            row of an `IterableDataset` is judged when it is dealt.
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
        """How many examples there are; None for an `IterableDataset`."""
        return self._rows.size

    @property
    def truncated(self) -> int:
        """How many examples are cut; of an `IterableDataset`, how many were among those dealt to this process."""
        return self._rows.truncated

    def draw(self, count: int) -> list[list[int]]:
        """The next `count` examples of this process (and as many for each other process), as token lists."""
        # The position counts for all processes, so that it says where to resume on any number of them.
        start = self.position + self.rank * count
        self.position += count * self.world_size
        return self._rows.take(start, count)

    def collate(self, rows: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
        """Right-padded `input_ids`, `attention_mask`, `labels`, each (N, T); padding is ignored in the labels."""
        batch = pad_rows(rows, self.pad_token_id or 0)
        # By the mask, not by the pad id: a text may hold the token that pads.
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
        return {name: tensor.to(device) for name, tensor in batch.items()}


class _Stored:
    """Rows of a `Dataset`, tokenised once."""

    def __init__(self, dataset: Any, tokenizer: Any, max_length: int, seed: int):
        column = _column_of(dataset)
        # The narrowest integer that holds the vocabulary. Ids that come tokenised may be of any.
        kind = "int32" if column == "input_ids" else str(np.min_scalar_type(max(tokenizer.get_vocab().values())))
        self.tokens = dataset.map(
            _tokenize,
            with_indices=True,
            batched=True,
            batch_size=BATCH,
            remove_columns=dataset.column_names,
            features=Features({"input_ids": List(Value(kind)), "cut": Value("bool")}),
            fn_kwargs={"column": column, "tokenizer": tokenizer, "max_length": max_length},
            desc="Tokenizing the pretraining texts",
        )
        self.size, self._seed, self._epoch = len(self.tokens), seed, -1
        self.truncated = pyarrow.compute.sum(self.tokens.data.column("cut")).as_py()

    def take(self, start: int, count: int) -> list[list[int]]:
        """The examples at `start`, ..., `start + count - 1` of the order."""
        return self.tokens[[self._index(position) for position in range(start, start + count)]]["input_ids"]

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self.size)
        if self._epoch != epoch:  # a pass's order follows from seed and pass alone, so that resuming needs no state
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.size, generator=generator)
        return int(self._order[offset])


class _Streamed:
    """Rows of an `IterableDataset`, tokenised as they are dealt."""

    size = None

    def __init__(self, dataset: Any, tokenizer: Any, max_length: int, seed: int):
        self._column, self._tokenizer, self._max_length = _column_of(dataset), tokenizer, max_length
        # Numbered before they are mixed, so that an error names the row of the user's file.
        self._dataset = dataset.map(_numbered, with_indices=True).shuffle(seed=seed, buffer_size=BUFFER)
        self._position, self._ahead, self.truncated = 0, self._read(), 0

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
        if start < self._position:  # a stream cannot go back
            self._position, self._ahead = 0, self._read()
        skipped, self._position = start - self._position, start + count
        rows = list(islice(self._ahead, skipped, skipped + count))
        values, indices = [row.get(self._column) for row in rows], [row["_row"] for row in rows]
        made = _tokenize({self._column: values}, indices, self._column, self._tokenizer, self._max_length)
        self.truncated += sum(made["cut"])
        return made["input_ids"]


def _column_of(dataset: Any) -> str:
    """The column that examples are read from: ids where they are given."""
    if next(iter(dataset), None) is None:
        raise ValueError("pretraining_dataset has no rows. Pass texts, or leave it out and set its weight to 0.")
    if "input_ids" in column_names(dataset):
        return "input_ids"
    require_columns(dataset, [("text", "input_ids")], "pretraining_dataset")
    return "text"


def _numbered(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    return {**row, "_row": index}


def _tokenize(
    batch: Mapping[str, list], indices: list[int], column: str, tokenizer: Any, max_length: int | None
) -> dict[str, list]:
    """Rows of a dataset as `input_ids`, cut to `max_length` tokens, and whether each was `cut`.

    A text gets no EOS: a passage cut from a longer document does not end there.
    """
    rows = batch[column]
    for value, index in zip(rows, indices, strict=True):
        check_pretraining_row({column: value}, index)
    if column == "text":
        rows = tokenizer([drop_own_bos(tokenizer, text) for text in rows])["input_ids"]
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
    """Refuse settings under which `fraction` could not be what is trained on."""
    if (fraction > 0) != (pretraining_dataset is not None):
        given = "no pretraining_dataset is given" if fraction else "a pretraining_dataset is given"
        raise ValueError(
            f"pretraining_fraction is {fraction}, but {given}. Set the fraction (0.1 in the paper's RL initialisation) "
            "and pass a dataset with a `text` or an `input_ids` column, or leave both out."
        )
    if fraction == 0:
        return
    for name, dataset in (("pretraining_dataset", pretraining_dataset), ("train_dataset", train_dataset)):
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"pretraining_fraction needs to count rows: {name} must be a `datasets.Dataset`, got "
                f"{type(dataset).__name__}."
            )
    if packing:
        raise ValueError("pretraining_fraction counts examples, and packing merges them: set packing to false.")


def tokenize_pretraining(dataset: Dataset, tokenizer: Any) -> Dataset:
    """The rows as `input_ids` and `labels`, every token scored."""
    column = _column_of(dataset)
    batch = {column: list(dataset[column])}
    rows = _tokenize(batch, list(range(len(dataset))), column, tokenizer, max_length=None)["input_ids"]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def mix_pretraining(demonstrations: Dataset, pretraining: Dataset, fraction: float, seed: int) -> Dataset:
    """Tokenised demonstrations and as many pretraining rows as make up `fraction` of the result, in random order.

    Both have `input_ids` and `labels`. Pretraining rows are drawn without repetition until all have been used, then
    again. A ValueError says if there are so few demonstrations that the fraction (in (0, 1)) comes to no row at all.
    """
    # M of the whole N + M: fraction = M / (N + M), solved for M.
    needed = round(fraction * len(demonstrations) / (1 - fraction))
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
    columns = ["input_ids", "labels"]  # what else the rows hold is not trained on, and differs between the two
    demonstrations = demonstrations.select_columns(columns)
    drawn = pretraining.select(picked).select_columns(columns).cast(demonstrations.features)
    return concatenate_datasets([demonstrations, drawn]).shuffle(seed=seed)
