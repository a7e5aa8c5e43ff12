"""How well a model predicts given tokens: its loss on text, and how far its answers have moved from another model's.

Legend: N rows, B rows in a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from trl.data_utils import common_prefix_length

from instruct_trl.data.encoding import encode_prompt, encode_text, pad_rows, tokenize_pair
from instruct_trl.models.context import refuse_long_row

IGNORED = -100

Pair = tuple[str, str] | tuple[list[dict[str, Any]], list[dict[str, Any]]]


def encode_scored(tokenizer: Any, item: str | list[int] | Pair) -> tuple[list[int], list[int]]:
    """Token ids and labels (T,) of a text or of ids (all tokens scored), or of a (prompt, completion) pair.

    A pair is tokenised as `trl.SFTTrainer` does: jointly, EOS after a plain-text completion, the chat template for
    messages; only the completion's tokens are scored. A text gets no EOS: a passage cut from a longer document does
    not end there.

    Raises:
        ValueError: the item is of none of these forms.
    """
    if isinstance(item, tuple) and len(item) == 2:
        ids = tokenize_pair(tokenizer, *item, truncated=tokenizer.eos_token is None)
        start = common_prefix_length(encode_prompt(tokenizer, item[0]), ids)
        return ids, [IGNORED] * start + ids[start:]
    ids = encode_text(tokenizer, item) if isinstance(item, str) else item
    if isinstance(ids, list) and all(isinstance(i, int) for i in ids):
        return ids, list(ids)
    raise ValueError(f"Expected a text, a list of token ids or a (prompt, completion) tuple, got {item!r}.")


@torch.no_grad()
def row_losses(model: Any, rows: Sequence[tuple[list[int], list[int]]], batch_size: int) -> list[float]:
    """Σ −log p(token | those before it) over the scored tokens of each row (ids, labels), (N,), nats, in eval mode."""
    device, was_training = next(model.parameters()).device, model.training
    losses: list[float] = []
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            ids, labels = zip(*rows[start : start + batch_size], strict=True)
            # Which ids the padding has does not matter: it follows every real token and is masked.
            inputs = {name: tensor.to(device) for name, tensor in pad_rows(ids, 0).items()}
            # The first token of a row has nothing before it to be predicted from.
            targets = pad_rows(labels, IGNORED)["input_ids"][:, 1:].to(device)
            logits = model(**inputs, use_cache=False).logits[:, :-1]  # (B, T-1, V)
            scored = targets != IGNORED
            # Only scored positions in float32: the prompt's share of (B, T, V) is never copied.
            found = F.cross_entropy(logits[scored].float(), targets[scored], reduction="none")
            losses += found.new_zeros(scored.shape).masked_scatter(scored, found).sum(dim=1).tolist()
    finally:
        model.train(was_training)
    return losses


def mean_token_loss(
    model: Any,
    tokenizer: Any,
    texts_or_pairs: Sequence[str | list[int] | Pair],
    *,
    batch_size: int = 8,
    max_length: int | None = 2048,
) -> tuple[float, int]:
    """Mean loss of a causal LM over all scored tokens, in nats per token, and the number of these tokens.

    Args:
        texts_or_pairs: see `encode_scored`.
        batch_size: rows per forward pass.
        max_length: rows are cut to their first `max_length` tokens; None cuts nothing.

    Raises:
        ValueError: no scored token within `max_length` in any row; or a row that, cut at `max_length`, is longer than
            the model's context.
    """
    rows = []
    remedy = "Pass max_length={context} (max_text_length of the evaluate recipe), by which rows are cut."
    for index, item in enumerate(texts_or_pairs):
        ids, labels = (part[:max_length] for part in encode_scored(tokenizer, item))
        refuse_long_row(len(ids), f"Row {index}", model, "the model", remedy)
        rows.append((ids, labels))
    count = sum(label != IGNORED for _, labels in rows for label in labels[1:])
    if count == 0:
        raise ValueError(
            f"No token to score in {len(rows)} rows: they are empty, or their prompts alone fill "
            f"max_length={max_length}."
        )
    # Longest first: little padding in a batch, and a batch that does not fit in memory fails at the start.
    rows = sorted((row for row in rows if any(x != IGNORED for x in row[1][1:])), key=lambda row: -len(row[0]))
    return sum(row_losses(model, rows, batch_size)) / count, count


def answer_logprobs(model: Any, rows: Sequence[tuple[list[int], list[int]]], batch_size: int = 16) -> list[float]:
    """log π(answer | prompt) in nats, (N,), at temperature 1; `rows` are (prompt ids, answer ids)."""
    scored = [([*prompt, *answer], [IGNORED] * len(prompt) + answer) for prompt, answer in rows]
    return [-loss for loss in row_losses(model, scored, batch_size)]


def mean_answer_kl(model: Any, reference: Any, rows: Sequence[tuple[list[int], list[int]]]) -> float:
    """KL(π ‖ π_ref) in nats per answer, estimated without bias on answers that `model` sampled (k1)."""
    own, other = answer_logprobs(model, rows), answer_logprobs(reference, rows)
    return sum(a - b for a, b in zip(own, other, strict=True)) / len(rows)
