"""The layout of shared prefixes: each prompt once, then each completion once, in one packed row without padding.

Legend: B prompts, N completions of all of them, T tokens of the longest row, S tokens of all prefixes, L tokens packed
(S and all completions), P tokens of the longest prefix, C tokens of the longest completion.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch


def common_prefix_length(rows: Sequence[list[int]]) -> int:
    """Tokens that all `rows` begin with, at most all but the last token of the shortest: each keeps one of its own.

    >>> common_prefix_length([[5, 6, 7, 8], [5, 6, 9]]), common_prefix_length([[5, 6], [5, 6]])
    (2, 1)
    """
    shared: Sequence[int] = os.path.commonprefix(rows)  # type: ignore[type-var]  # it compares any sequences
    return min(len(shared), min(len(row) for row in rows) - 1)


class GroupedRows(NamedTuple):
    """Token rows, the rows of a prompt side by side.

    Attributes:
        input_ids, attention_mask: (N, T), padded on the right.
        group_sizes: (B,) rows of each prompt.
        prefix_lengths: (B,) tokens that the rows of a prompt begin with, as `common_prefix_length` counts them.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    group_sizes: torch.Tensor
    prefix_lengths: torch.Tensor


class Grid:
    """Sequences of different lengths as rows of a rectangle, filled from the left, and back.

    Args:
        lengths: (n,) tokens of each sequence.
    """

    def __init__(self, lengths: torch.Tensor):
        self.shape = (len(lengths), int(lengths.max()) if len(lengths) else 0)
        self.real = torch.arange(self.shape[1], device=lengths.device) < lengths.unsqueeze(1)
        self.full = bool(self.real.all())
        flat = self.real.flatten()
        self._places = flat.nonzero().squeeze(1)  # of each token in the rectangle
        self._tokens = (flat.cumsum(0) - 1).clamp(min=0)  # in each place; padding repeats a neighbour

    def pad(self, tokens: torch.Tensor) -> torch.Tensor:
        """(sum of lengths, ...) to (n, longest, ...). What stands in the padding is for the caller to mask."""
        rows = tokens if self.full else tokens.index_select(0, self._tokens)
        return rows.reshape(*self.shape, *tokens.shape[1:])

    def unpad(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, longest, ...) to (sum of lengths, ...)."""
        tokens = rows.flatten(0, 1)
        return tokens if self.full else tokens.index_select(0, self._places)


@dataclass
class PrefixLayout:
    """B prompts with N completions as one row of L tokens: all prefixes first, then all completions.

    Attributes:
        input_ids, position_ids: (1, L); a completion's positions go on from its prefix, as if it stood alone.
        last: (N,) the place of each completion's last token, where its reward is read.
        owner: (N,) the prompt of each completion.
        prefix_lengths: (B,).
        prompts, completions: (B, P) and (N, C) rectangles for attention, the only place where padding comes in.
        attention: of the model, "sdpa" or "eager".
        layers: how many layers have attended by this layout.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    last: torch.Tensor
    owner: torch.Tensor
    prefix_lengths: torch.Tensor
    prompts: Grid
    completions: Grid
    attention: str = "sdpa"
    layers: int = 0
    _masks: dict = field(default_factory=dict)

    @classmethod
    def of(cls, rows: GroupedRows, attention: str = "sdpa") -> PrefixLayout:
        """Pack the rows of B prompts."""
        input_ids, attention_mask, group_sizes, prefix_lengths = rows
        device = input_ids.device
        owner = torch.repeat_interleave(torch.arange(len(group_sizes), device=device), group_sizes)
        # All rows of a prompt begin with its prefix, so that the first one's copy stands for all.
        first = group_sizes.cumsum(0) - group_sizes
        starts, ends = prefix_lengths[owner], attention_mask.sum(1)
        places = torch.arange(input_ids.shape[1], device=device)
        in_prompt = places < prefix_lengths.unsqueeze(1)
        in_completion = (places >= starts.unsqueeze(1)) & (places < ends.unsqueeze(1))
        return cls(
            input_ids=torch.cat([input_ids[first][in_prompt], input_ids[in_completion]]).unsqueeze(0),
            position_ids=torch.cat([mask.nonzero()[:, 1] for mask in (in_prompt, in_completion)]).unsqueeze(0),
            last=prefix_lengths.sum() + (ends - starts).cumsum(0) - 1,
            owner=owner,
            prefix_lengths=prefix_lengths,
            prompts=Grid(prefix_lengths),
            completions=Grid(ends - starts),
            attention=attention,
        )

    @cached_property
    def cut(self) -> int:
        """S: the place in the row where the completions begin."""
        return int(self.prefix_lengths.sum())

    def masks(self, window: int | None, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The keys that a prompt's tokens see in it, and those that a completion's see in prompt and completion.

        Args:
            window: sliding window in tokens of position; None sees everything before.
            dtype: of the queries; "eager" takes additive masks of it, "sdpa" boolean ones.

        Returns:
            ((1, 1, P, P) or None for plainly causal, (N, 1, C, P + C)), True (or 0) where a query sees a key.
        """
        # A window that no row can leave is none, and sdpa is faster without one.
        if window is not None and window >= self.prompts.shape[1] + self.completions.shape[1]:
            window = None
        if (window, dtype) not in self._masks:  # the layers of a model ask for the same few again and again
            prompt, completion = self._visible(window)
            if self.attention == "eager":
                self._masks[window, dtype] = _additive(prompt, dtype), _additive(completion, dtype)
            else:  # sdpa is causal by itself, and faster so
                self._masks[window, dtype] = None if window is None else prompt, completion
        return self._masks[window, dtype]

    def _visible(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        device, (prompt_width, width) = self.owner.device, (self.prompts.shape[1], self.completions.shape[1])
        prompt = torch.arange(prompt_width, device=device)
        within = torch.arange(width, device=device)
        # The padding of a shorter prompt is the only part of it that a completion must not see.
        see_prompt = self.prompts.real[self.owner].unsqueeze(1).expand(-1, width, -1)
        see_own = (within.unsqueeze(1) >= within).expand(len(self.owner), -1, -1)
        see_before = prompt.unsqueeze(1) >= prompt
        if window is not None:
            # A window counts positions as if the row stood alone, so a completion's go on from its own prefix.
            position = self.prefix_lengths[self.owner].unsqueeze(1) + within
            see_prompt = see_prompt & (position.unsqueeze(2) - prompt < window)
            see_own = see_own & (within.unsqueeze(1) - within < window)
            see_before = see_before & (prompt.unsqueeze(1) - prompt < window)
        return see_before[None, None], torch.cat([see_prompt, see_own], dim=2).unsqueeze(1)

    def block_mask(self, window: int | None) -> Any:
        """The same visibility as FlexAttention's BlockMask over the packed row (1, 1, L, L)."""
        from torch.nn.attention.flex_attention import create_block_mask

        length, device = self.input_ids.shape[1], self.owner.device
        position = self.position_ids.squeeze(0)
        # Who owns a token: its prompt, and its completion, which is −1 for the tokens of a prefix.
        rows, prefixes = (grid.real.nonzero()[:, 0] for grid in (self.completions, self.prompts))
        prompt = torch.cat([prefixes, self.owner[rows]])
        completion = torch.cat([rows.new_full((self.cut,), -1), rows])

        def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
            # A completion sees its prompt and itself, never its siblings, though they stand before it in the row.
            same = (prompt[query] == prompt[key]) & ((completion[key] == -1) | (completion[query] == completion[key]))
            distance = position[query] - position[key]
            return same & (distance >= 0) & (distance < (length if window is None else window))

        return create_block_mask(visible, None, None, length, length, device=str(device))


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
