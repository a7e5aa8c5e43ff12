"""The formulas of memory: sizes in, bytes out. Legend: B rows, S scored tokens, T tokens, H hidden units, V vocabulary.

`width` is the number of bytes of a logit as the head computes it. A logit of fewer than 4 bytes is copied to float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from instruct_trl.models.logprobs import BLOCK as LOGPS_BLOCK

NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256  # bitsandbytes' block sizes
FUSED_TOKENS, FUSED_VOCABULARY = 4096, 32768  # the tile of TRL's fused head


def nf4_bytes(sizes: Sequence[int], double_quant: bool = True) -> int:
    """Bytes of 4-bit matrices with these numbers of parameters: about 0.5625 per parameter, 0.5159 with `double_quant`.

    Each block of 64 numbers has a scale of 4 bytes. Double quantisation (Dettmers et al. 2023, section 3) keeps 1 byte
    per scale, and 4 more for each block of 256 scales.
    """
    total = 0
    for size in sizes:
        blocks = math.ceil(size / NF4_BLOCK)
        # Double quantisation keeps a table of 256 float32 levels and an offset per matrix as well.
        scales = blocks + 4 * math.ceil(blocks / NF4_NESTED_BLOCK) + 1024 + 4 if double_quant else 4 * blocks
        total += math.ceil(size / 2) + scales + 64  # two numbers per byte, and a table of 16 float32 levels
    return total


def sampling_bytes(rows: int, vocabulary: int) -> int:
    """16 · B · V: the next token's logits, the same over the temperature, their softmax and its copy, in float32."""
    return 16 * rows * vocabulary


def logps_bytes(scored: int, vocabulary: int, width: int = 4, update: bool = False) -> int:
    """Log-probs of S scored tokens from full logits, with their entropy in an `update`."""
    block = min(scored, LOGPS_BLOCK)
    converted = (width + 4 if width < 4 else 4) * scored
    if update:
        # Logits, log-softmax and, per block, the probabilities and their product for the entropy; then, in the
        # backward, the log-softmax and the gradients that enter and leave it.
        return max(converted, 8 * scored + 8 * block, 12 * scored) * vocabulary
    return max(converted, 4 * scored + 4 * block) * vocabulary  # the log-softmax of one block of tokens at a time


def cross_entropy_bytes(rows: int, tokens: int, vocabulary: int, width: int = 4) -> int:
    """max(b + 8, 12) · B · T · V: the cross-entropy of all tokens from full logits.

    The forward holds logits, their float32 copy and the log-softmax; the backward holds the log-softmax and the
    gradients that enter and leave it.
    """
    forward = width + (4 if width < 4 else 0) + 4
    return max(forward, 12) * rows * tokens * vocabulary


def fused_head_bytes(scored: int, hidden: int, vocabulary: int, trained_head: bool = False) -> int:
    """TRL's fused head on S tokens: 4 · min(S, 4096) · min(V, 32768) + 8 · S · H, and 4 · V · H for a trained head.

    A tile of logits, the hidden states of the tokens and their gradient, and the gradient of the head's weight.
    """
    tile = 4 * min(scored, FUSED_TOKENS) * min(vocabulary, FUSED_VOCABULARY)
    return tile + 8 * scored * hidden + 4 * vocabulary * hidden * trained_head
