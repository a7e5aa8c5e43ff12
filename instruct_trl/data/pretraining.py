"""The stream of pretraining text behind the γ term of Eq. 2.

Legend: N examples, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from instruct_trl.data.checks import require_columns

IGNORED_LABEL = -100


class PretrainingStream:
    """Deals out pretraining examples in a seeded order that repeats none before all have been dealt.

    Every process holds the same order and takes its own share of each draw, so that no example goes to two of them.

    Args:
        dataset: a `datasets.Dataset` with a `text` or an `input_ids` column.
        tokenizer: tokenizes `text`; its pad token fills the batches.
        max_length: tokens an example keeps; longer ones are cut and counted in `truncated`.
        seed: of the order; pass k over the data uses `seed + k`.
        rank, world_size: which share of every draw is this process's.

    Raises:
        ValueError: neither column is there, or an example has fewer than two tokens.
    """

    def __init__(
        self, dataset: Any, tokenizer: Any, *, max_length: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ):
        rows = self._token_rows(dataset, tokenizer)
        short = [i for i, row in enumerate(rows) if len(row) < 2]
        if short:
            raise ValueError(
                f"pretraining_dataset: row {short[0]} (and {len(short) - 1} more) has fewer than 2 tokens, so there is "
                "no next token to predict. Filter empty texts out."
            )
        self.truncated = sum(len(row) > max_length for row in rows)
        self.rows = [row[:max_length] for row in rows]
        self.pad_token_id = tokenizer.pad_token_id
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.position = 0

    @staticmethod
    def _token_rows(dataset: Any, tokenizer: Any) -> list[list[int]]:
        if "input_ids" in dataset.column_names:
            return [list(row) for row in dataset["input_ids"]]
        require_columns(dataset, [("text", "input_ids")], "pretraining_dataset")
        return tokenizer(list(dataset["text"]))["input_ids"] if len(dataset) else []

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, count: int) -> list[list[int]]:
        """The next `count` examples of this process (and as many for each other process), as token lists."""
        start = self.position + self.rank * count
        self.position += count * self.world_size
        return [self.rows[self._index(start + i)] for i in range(count)]

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.rows))
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.rows), generator=generator).tolist()
        return self._order[offset]

    def collate(self, rows: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
        """Right-padded `input_ids`, `attention_mask`, `labels`, each (N, T); padding is ignored in the labels."""
        length = max(len(row) for row in rows)
        ids = torch.full((len(rows), length), self.pad_token_id or 0)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        labels = ids.masked_fill(mask == 0, IGNORED_LABEL)
        return {k: v.to(device) for k, v in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()}
