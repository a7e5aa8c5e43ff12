"""How well a model predicts given text: the mean negative log-likelihood of a token.

Legend: B rows in a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from trl.data_utils import common_prefix_length

from instruct_trl.data.encoding import encode_prompt, encode_text, tokenize_pair
from instruct_trl.models.context import refuse_long_row

IGNORED = -100
CUTS = "(max_text_length of the evaluate recipe), by which rows are cut."

Pair = tuple[str, str] | tuple[list[dict[str, Any]], list[dict[str, Any]]]


def encode_scored(tokenizer: Any, item: str | list[int] | Pair) -> tuple[list[int], list[int]]:
    """Token ids and labels (T,) of a text (all tokens scored), of ids (the same), or of a (prompt, completion) pair.

    A pair is tokenised as `trl.SFTTrainer` does: jointly, EOS after a plain-text completion, the chat template for
    messages; only the completion's tokens are scored. A text is taken as it is, since a passage cut from a longer
    document does not end there.

    Raises:
        ValueError: the item is of none of these forms.
    """
    if isinstance(item, str):
        ids = encode_text(tokenizer, item)
        return ids, list(ids)
    if isinstance(item, tuple) and len(item) == 2:
        return _encode_pair(tokenizer, *item)
    if isinstance(item, list) and all(isinstance(i, int) for i in item):
        return item, list(item)
    raise ValueError(f"Expected a text, a list of token ids or a (prompt, completion) tuple, got {item!r}.")


def _encode_pair(tokenizer: Any, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
    prompt_ids = encode_prompt(tokenizer, prompt)
    ids = tokenize_pair(tokenizer, prompt, completion, truncated=tokenizer.eos_token is None)
    start = common_prefix_length(prompt_ids, ids)
    return ids, [IGNORED] * start + ids[start:]


def mean_token_loss(
    model: Any,
    tokenizer: Any,
    texts_or_pairs: Sequence[str | list[int] | Pair],
    *,
    batch_size: int = 8,
    max_length: int | None = 2048,
) -> tuple[float, int]:
    """Mean over all scored tokens of −log p(token | those before it), in nats, in eval mode.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        texts_or_pairs: texts, lists of token ids, or (prompt, completion) tuples, text or messages: `encode_scored`.
        batch_size: rows a forward pass.
        max_length: rows are cut to their first `max_length` tokens; None cuts nothing.

    Returns:
        The mean, and the number of tokens it is over (the first token of a row has no prediction).

    Raises:
        ValueError: no rows; no scored token within `max_length` in any of them; or a row that, cut at `max_length`, is
            longer than the model's context.
    """
    rows = [encode_scored(tokenizer, item) for item in texts_or_pairs]
    for index, (ids, _) in enumerate(rows):
        refuse_long_row(
            len(ids[:max_length]), f"Row {index}", model, "the model", f"Pass max_length={{context}} {CUTS}"
        )
    rows = sorted(((ids[:max_length], labels[:max_length]) for ids, labels in rows), key=lambda r: -len(r[0]))
    rows = [(ids, labels) for ids, labels in rows if any(label != IGNORED for label in labels[1:])]
    if not rows:
        raise ValueError(
            f"No token to score in {len(texts_or_pairs)} rows: they are empty, or their prompts alone fill "
            f"max_length={max_length}."
        )
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        with torch.no_grad():
            for start in range(0, len(rows), batch_size):
                loss, tokens = _batch_loss(model, rows[start : start + batch_size], device)
                total, count = total + loss, count + tokens
    finally:
        model.train(was_training)
    return total / count, count


def _batch_loss(model: Any, rows: list[tuple[list[int], list[int]]], device: torch.device) -> tuple[float, int]:
    """Sum of the negative log-likelihoods of B rows, and the number of tokens in it."""
    width = max(len(ids) for ids, _ in rows)
    # What the padding ids are does not matter: they come after every real token and are masked.
    input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows], device=device)
    labels = torch.tensor([lab + [IGNORED] * (width - len(lab)) for _, lab in rows], device=device)[:, 1:]
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows], device=device)
    scored = labels != IGNORED
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]  # (B, T-1, V)
    # Only scored positions in float32: the prompt's share of (B, T, V) is never copied.
    loss = F.cross_entropy(logits[scored].float(), labels[scored], reduction="sum")
    return loss.item(), int(scored.sum())
