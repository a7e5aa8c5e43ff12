"""Which way rows are scored: with shared prefixes where that is exact, else one row a completion.

Legend: as in `instruct_trl.data.prefix_layout`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from instruct_trl.data.prefix_layout import GroupedRows
from instruct_trl.models.prefix_sharing import PrefixSharing
from instruct_trl.models.scores import score_rows


class ScoringRoute:
    """Scores rows with shared prefixes where the model can, and one row a completion where it cannot.

    The first batch that has something to share is scored both ways. Where they differ, "auto" goes on without
    sharing and says so once, and "on" raises.

    Args:
        model: as for `PrefixSharing`.
        mode: "auto", "on" (never falls back) or "off".
        say: gets the one line that explains a fallback.

    Attributes:
        shares: whether prefixes are shared.

    Raises:
        ValueError: mode "on" and a model that cannot share.
    """

    def __init__(self, model: Any, mode: str, say: Callable[[str], None]):
        self.sharing = PrefixSharing(model)
        self.mode = mode
        self._say = say
        self._verified = False
        self._counts = {"computed": 0, "padding": 0}
        self.shares = mode != "off"
        if self.shares and self.sharing.obstacle is not None:
            self._fall_back(self.sharing.obstacle)

    def _fall_back(self, reason: str) -> None:
        if self.mode == "on":
            raise ValueError(
                f"prefix_sharing='on', but the model cannot share prefixes: {reason}. Use 'auto' to score it one row a "
                "completion."
            )
        self.shares = False
        self._say(f"Prompts are computed once a completion, not shared: {reason}. prefix_sharing='off' says the same.")

    def take_counts(self) -> dict[str, int]:
        """Places that went through the network since the last call (`computed`), and how many were `padding`."""
        counts, self._counts = self._counts, {"computed": 0, "padding": 0}
        return counts

    def put_counts(self, counts: dict[str, int]) -> None:
        """Go on counting from `counts`."""
        self._counts = dict(counts)

    def active(self) -> AbstractContextManager[None]:
        """To be held over a backward pass through `__call__`; see `PrefixSharing.active`."""
        return self.sharing.active() if self.shares else nullcontext()

    def __call__(self, model: nn.Module, rows: GroupedRows) -> torch.Tensor:
        """Scores (N,) in float32, without bias; `model` may be wrapped.

        Raises:
            ValueError: mode "on", and the first batch shows that the model cannot share.
        """
        if self.shares and int(rows.prefix_lengths.max()) > 0:
            if not self._verified:
                self._verify(model, rows)
            if self.shares:
                scores, tokens = self.sharing.score(model, rows)
                self._counts["computed"] += tokens
                return scores
        self._counts["computed"] += rows.input_ids.numel()
        self._counts["padding"] += rows.input_ids.numel() - int(rows.attention_mask.sum())
        with self.sharing.inactive():
            return score_rows(model, rows.input_ids, rows.attention_mask, self.sharing.head)

    @torch.no_grad()
    def _verify(self, model: nn.Module, rows: GroupedRows) -> None:
        """Score the prompt with the longest prefix both ways.

        Tolerance: 1e-3 of the largest score in float32; a tenth in half precision, which rounds differently by route.
        """
        prompt = int(rows.prefix_lengths.argmax())
        own = slice(int(rows.group_sizes[:prompt].sum()), int(rows.group_sizes[: prompt + 1].sum()))
        chosen = GroupedRows(
            rows.input_ids[own],
            rows.attention_mask[own],
            rows.group_sizes[prompt : prompt + 1],
            rows.prefix_lengths[prompt : prompt + 1],
        )
        # What the network computes in shows at its head: accelerate's autocast is not visible from outside the model.
        dtypes: list[torch.dtype] = []
        hook = self.sharing.head.register_forward_hook(lambda module, args, output: dtypes.append(_precision(args[0])))
        was_training = model.training
        model.eval()
        try:
            with self.sharing.inactive():
                plain = score_rows(model, chosen.input_ids, chosen.attention_mask, self.sharing.head)
            shared, _ = self.sharing.score(model, chosen)
        except (RuntimeError, TypeError) as error:
            self._fall_back(str(error).strip().split("\n")[0])
        else:
            gap, scale = (plain - shared).abs().max().item(), max(1.0, plain.abs().max().item())
            if gap > (1e-3 if dtypes[-1] == torch.float32 else 0.1) * scale:
                self._fall_back(f"with sharing, scores of one prompt differ by {gap:.2g} from those without")
        finally:
            hook.remove()
            model.train(was_training)
        self._verified = True


def _precision(hidden: torch.Tensor) -> torch.dtype:
    """What the network computes in where it hands over `hidden`."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
