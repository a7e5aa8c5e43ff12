"""The arithmetic of memory: one function a kind, bytes in and bytes out.

Legend: N parameters, L layers, B rows, T tokens, H hidden units, V vocabulary, b bytes of a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from instruct_trl.models.logprobs import BLOCK as LOGPS_BLOCK

GiB = 2**30
NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256  # bitsandbytes' block sizes
FUSED_TOKENS, FUSED_VOCABULARY = 4096, 32768  # the tile of TRL's fused head


def weight_bytes(parameters: int, width: int = 4) -> int:
    """N · b: `parameters` numbers of `width` bytes."""
    return parameters * width


def nf4_bytes(sizes: Sequence[int], double_quant: bool = True) -> int:
    """Bytes of 4-bit matrices: N/2 of codes, and a scale (absmax) for each block of 64 numbers.

    A scale takes 4 bytes, or, quantised itself (double quantisation, Dettmers et al. 2023, section 3), 1 byte and
    another 4 for each block of 256 scales. Each matrix has a table of 16 levels (64 bytes); a nested one has a table of
    256 (1024 bytes) and an offset (4 bytes) more. So 0.5 + 4/64 = 0.5625 bytes a parameter, or
    0.5 + 1/64 + 4/(64 · 256) ≈ 0.5159.

    Args:
        sizes: the number of parameters of each matrix.
    """
    total = 0
    for size in sizes:
        blocks = math.ceil(size / NF4_BLOCK)
        scales = blocks + 4 * math.ceil(blocks / NF4_NESTED_BLOCK) + 1024 + 4 if double_quant else 4 * blocks
        total += math.ceil(size / 2) + scales + 64
    return total


def lora_parameters(matrices: Sequence[tuple[int, int]], rank: int) -> int:
    """Σ r · (in + out) over the adapted matrices: A is (r, in) and B is (out, r) (Hu et al. 2022, section 4.1)."""
    return sum(rank * (inputs + outputs) for inputs, outputs in matrices)


def gradient_bytes(trainable: int, width: int = 4) -> int:
    """N · b: one gradient a trained parameter, in the parameter's dtype."""
    return trainable * width


def adam_bytes(trainable: int, width: int = 4) -> int:
    """2 · N · b: AdamW's two moments, in the parameter's dtype: 8 bytes a float32 parameter."""
    return 2 * trainable * width


def average_bytes(trainable: int, width: int = 4) -> int:
    """N · b: the moving average of the trained weights (`ema_decay`)."""
    return trainable * width


def autocast_copy_bytes(parameters: int) -> int:
    """2 · N: bf16 copies of float32 matrices that are trained under autocast, kept from forward to backward."""
    return 2 * parameters


def kv_cache_bytes(
    rows: int,
    tokens: int,
    layers: int,
    kv_heads: int,
    head_dim: int,
    width: int = 2,
    windows: Sequence[int | None] | None = None,
) -> int:
    """2 · B · Σ_layer T · heads · dim · b: keys and values of every token, or of the last `window` of a sliding layer.

    Args:
        kv_heads: heads that have keys and values of their own (fewer than query heads in grouped-query attention).
        windows: for each layer its sliding window in tokens, or None; None: no layer slides.
    """
    kept = [tokens] * layers if windows is None else [tokens if w is None else min(tokens, w - 1) for w in windows]
    return 2 * rows * sum(kept) * kv_heads * head_dim * width


def sampling_bytes(rows: int, vocabulary: int) -> int:
    """16 · B · V: the next token's logits, divided by the temperature, their softmax and its copy, in float32."""
    return 16 * rows * vocabulary


def logps_bytes(scored: int, vocabulary: int, width: int = 4, update: bool = False) -> int:
    """Log-probs of S scored tokens from full logits, `LOGPS_BLOCK` tokens at a time where that can be.

    Scoring: max(b + 4 · (b < 4), 4 + 4 · block / S) · S · V: the logits in the head's dtype (b), in float32 (4 where b
    is less), and the log-softmax of a block (4). Update: max(8 + 8 · block / S, 12) · S · V: logits (4) and log-softmax
    (4) with a block's probabilities and their product for the entropy (8); or, in the backward, the log-softmax, the
    gradient that reaches it and the one that leaves it (4 each).
    """
    block = min(scored, LOGPS_BLOCK)
    converted = (width + 4 if width < 4 else 4) * scored
    if update:
        return max(converted, 8 * scored + 8 * block, 12 * scored) * vocabulary
    return max(converted, 4 * scored + 4 * block) * vocabulary


def cross_entropy_bytes(rows: int, tokens: int, vocabulary: int, width: int = 4) -> int:
    """max(b + 8, 12) · B · T · V: cross-entropy of all tokens from full logits.

    Forward: the logits (b), in float32 (4 where b is less), their log-softmax (4). Backward: the log-softmax (4), the
    gradient that reaches it (4) and the one that leaves it (4).
    """
    forward = width + (4 if width < 4 else 0) + 4
    return max(forward, 12) * rows * tokens * vocabulary


def fused_head_bytes(scored: int, hidden: int, vocabulary: int, trained_head: bool = False) -> int:
    """4 · min(S, 4096) · min(V, 32768) + 8 · S · H + 4 · V · H · trained: TRL's fused head on S scored tokens.

    A tile of logits; the hidden states of the scored tokens and their gradient; in float32 the gradient of the head's
    weight where it is trained.
    """
    tile = 4 * min(scored, FUSED_TOKENS) * min(vocabulary, FUSED_VOCABULARY)
    return tile + 8 * scored * hidden + 4 * vocabulary * hidden * trained_head


def activation_bytes(forward: int, kept: int, at_the_end: int, copies: int = 0) -> int:
    """max(forward, kept + end) − copies: the most that a forward holds for its backward, and the head on top of it.

    Args:
        forward: peak within the transformer.
        kept: alive at its end: with gradient checkpointing B · T · H · b a layer, without it all that autograd saves.
        at_the_end: logits and the like, which come on top of `kept`.
        copies: bf16 copies of weights in both, counted under their own kind.
    """
    return max(forward, kept + at_the_end) - copies
