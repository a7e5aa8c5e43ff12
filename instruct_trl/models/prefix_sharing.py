"""Scores of K completions with their prompt computed once (Ouyang et al. 2022, section 3.5: K completions, one batch).

All tokens of a batch go through the network as one packed row: each prompt's shared prefix once, each completion once,
no padding. Only attention has to know: there the row is cut into prompts, which see themselves, and completions, which
see their prompt and themselves; each part is computed by the attention that the model has anyway.

Legend: as in `instruct_trl.data.prefix_layout`; Hq query heads, Hk key heads, D width of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from instruct_trl._upstream import score_head
from instruct_trl.data.prefix_layout import GroupedRows, PrefixLayout
from instruct_trl.models.adapters import without_adapters
from instruct_trl.models.scores import head_outputs, score_rows


def prefix_attention(
    attention: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    prefix_layout: PrefixLayout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a packed row, by prompts and by completions, in the form of transformers' AttentionInterface.

    Args:
        attention: the implementation that computes each part, "sdpa" or "eager".
        query, key, value: (1, Hq, L, D), (1, Hk, L, D), (1, Hk, L, D).
        prefix_layout: says who sees whom, in place of `attention_mask`; None for rows that are not packed.

    Returns:
        (1, L, Hq, D), and None in place of the weights.
    """
    # "eager" is not one function: each architecture has its own, beside its attention class.
    if attention == "eager":
        inner: Callable = sys.modules[type(module).__module__].eager_attention_forward
    else:
        inner = AttentionInterface()[attention]
    # Not packed: gradient checkpointing calls again, in the backward pass, what was called without sharing.
    if prefix_layout is None:
        return inner(module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs)
    layout = prefix_layout
    layout.layers += 1
    prompt_mask, completion_mask = layout.masks(sliding_window, query.dtype)
    packed = [states.squeeze(0).transpose(0, 1) for states in (query, key, value)]
    prompts = [layout.prompts.pad(states[: layout.cut]).transpose(1, 2) for states in packed]
    completions = [layout.completions.pad(states[layout.cut :]).transpose(1, 2) for states in packed]
    # A completion sees the keys of its prompt, which were computed once. Autograd adds up what comes back for them
    # from all K completions, as it would from K copies.
    keys, values = (
        torch.cat([of_prompt.index_select(0, layout.owner), own], dim=2)
        for of_prompt, own in zip(prompts[1:], completions[1:], strict=True)
    )
    outputs = []
    if layout.cut:
        outputs.append(layout.prompts.unpad(inner(module, *prompts, prompt_mask, **kwargs)[0]))
    outputs.append(layout.completions.unpad(inner(module, completions[0], keys, values, completion_mask, **kwargs)[0]))
    return torch.cat(outputs).unsqueeze(0), None


_NAMES = {attention: f"prefix_sharing_{attention}" for attention in ("sdpa", "eager")}
for _attention, _name in _NAMES.items():
    AttentionInterface.register(_name, partial(prefix_attention, _attention))


class PrefixSharing:
    """Scores with shared prefixes from one reward model, also under PEFT, not yet wrapped by DDP and the like.

    `obstacle` says in half a sentence why this model cannot share prefixes; None if it can.
    """

    def __init__(self, model: Any):
        self.head = score_head(model)
        configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
        self._configs = [config for config in configs.values() if hasattr(config, "_attn_implementation")]
        self._text_config = model.config.get_text_config()
        self.attention = self._text_config._attn_implementation
        self.obstacle = _obstacle(model, self.attention)

    def active(self) -> AbstractContextManager[None]:
        """While active, the model's layers attend by `prefix_attention`; run the backward pass in it, too."""
        # Gradient checkpointing runs layers again in the backward pass, by the attention that is set then.
        return self._attending_by(_NAMES.get(self.attention, self.attention))

    def inactive(self) -> AbstractContextManager[None]:
        """While active, also inside `active`, the model's layers attend as if nothing were shared."""
        inside = any(config._attn_implementation in _NAMES.values() for config in self._configs)
        return self._attending_by(self.attention) if inside else nullcontext()

    @contextmanager
    def _attending_by(self, name: str) -> Iterator[None]:
        before = [config._attn_implementation for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation = name
            yield
        finally:
            for config, previous in zip(self._configs, before, strict=True):
                config._attn_implementation = previous

    def score(self, model: nn.Module, rows: GroupedRows) -> tuple[torch.Tensor, int]:
        """Scores (N,) in float32, without bias, as `score_rows` gives them, and how many tokens were computed.

        Raises:
            RuntimeError: not every layer of `model` (which may be wrapped) went through the shared attention.
        """
        layout, config = PrefixLayout.of(rows, self.attention), self._text_config
        flex = self.attention == "flex_attention"
        inputs: dict[str, Any] = {"position_ids": layout.position_ids}
        if flex:  # it takes any mask, so a block mask of the whole row does; a model that mixes windows takes two
            window = getattr(config, "sliding_window", None)
            kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
            masks = {kind: layout.block_mask(window if kind == "sliding_attention" else None) for kind in kinds}
            inputs["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
        else:
            inputs["prefix_layout"] = layout
        with self.active():
            scores = head_outputs(model, self.head, layout.input_ids, **inputs)
        # A layer with an attention of its own would have let completions see each other, without an error.
        if not flex and layout.layers != config.num_hidden_layers:
            raise RuntimeError(
                f"{layout.layers} of {config.num_hidden_layers} layers went through the shared attention"
            )
        return scores.squeeze(0).index_select(0, layout.last).float(), layout.input_ids.numel()


def _obstacle(model: Any, attention: str) -> str | None:
    base = without_adapters(model)
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    kinds -= {"full_attention", "sliding_attention"}
    if getattr(base, "_is_stateful", False):
        return "its layers carry a recurrent state"
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    if not getattr(base, "_supports_attention_backend", False):
        return "its attention does not go through transformers' AttentionInterface"
    if attention not in ("sdpa", "eager", "flex_attention"):
        return f"its attn_implementation is {attention!r}; 'sdpa', 'eager' and 'flex_attention' can share"
    return None


class ScoringRoute:
    """Scores rows with shared prefixes if the model can, and else one row per completion.

    The first batch that has something to share is scored both ways. If they differ, "auto" goes on without sharing and
    says so once, and "on" raises.

    Args:
        model: as for `PrefixSharing`; `shares` says whether prefixes are shared.
        mode: "auto", "on" (raises ValueError in place of a fallback) or "off".
        say: gets the one line that explains a fallback.
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
                f"prefix_sharing='on', but the model cannot share prefixes: {reason}. Use 'auto' to score it one row "
                "per completion."
            )
        self.shares = False
        self._say(
            f"Every completion is scored with its own copy of the prompt: {reason}. prefix_sharing='off' silences this."
        )

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
        """Scores (N,) in float32, without bias; `model` may be wrapped."""
        if self.shares and int(rows.prefix_lengths.max()) > 0:
            if not self._verified:
                self._verify(model, rows)
            if self.shares:
                scores, tokens = self.sharing.score(model, rows)
                self._counts["computed"] += tokens
                return scores
        # One row per completion: a prompt is computed K times, and rows are padded to the longest.
        self._counts["computed"] += rows.input_ids.numel()
        self._counts["padding"] += rows.input_ids.numel() - int(rows.attention_mask.sum())
        with self.sharing.inactive():
            return score_rows(model, rows.input_ids, rows.attention_mask, self.sharing.head)

    @torch.no_grad()
    def _verify(self, model: nn.Module, rows: GroupedRows) -> None:
        """Score the prompt with the longest prefix both ways, and fall back if the scores differ."""
        # One prompt is enough to see a wrong mask, and the longest prefix shows it best.
        prompt = int(rows.prefix_lengths.argmax())
        own = slice(int(rows.group_sizes[:prompt].sum()), int(rows.group_sizes[: prompt + 1].sum()))
        chosen = GroupedRows(*(part[own] for part in rows[:2]), *(part[prompt : prompt + 1] for part in rows[2:]))
        half = False

        def look(head: nn.Module, args: tuple) -> None:
            # The network's precision shows at its head: accelerate's autocast is not visible from outside the model.
            nonlocal half
            half = torch.is_autocast_enabled(args[0].device.type) or args[0].dtype != torch.float32

        was_training = model.training
        model.eval()  # dropout would differ from one route to the other
        try:
            with self.sharing.inactive(), self.sharing.head.register_forward_pre_hook(look):
                plain = score_rows(model, chosen.input_ids, chosen.attention_mask, self.sharing.head)
            shared, _ = self.sharing.score(model, chosen)
        except (RuntimeError, TypeError) as error:
            self._fall_back(str(error).strip().split("\n")[0])
        else:
            gap, scale = (plain - shared).abs().max().item(), max(1.0, plain.abs().max().item())
            # Half precision rounds differently by route: there a tenth is allowed, and 1e-3 in float32.
            if gap > (0.1 if half else 1e-3) * scale:
                self._fall_back(f"with sharing, scores of one prompt differ by {gap:.2g} from those without")
        finally:
            model.train(was_training)
        self._verified = True
