"""Before answers are sampled and scored: do prompt and answer fit into the models that read them?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from instruct_trl.data.encoding import encode_prompt
from instruct_trl.models.context import context_length, describe


def check_answer_room(
    model: Any, tokenizer: Any, role: str, prompts: Sequence[Any], max_new_tokens: int, setting: str
) -> None:
    """Refuse prompts that, with an answer of `max_new_tokens`, exceed the context of `model`.

    Args:
        role: names the model, e.g. "the reward model".
        setting: the name of `max_new_tokens` where the user sets it.

    Raises:
        ValueError: naming the model, its context, the prompt, both lengths and what to set.
    """
    context = context_length(model)
    if context is None:
        return
    for row, prompt in enumerate(prompts):
        tokens = len(encode_prompt(tokenizer, prompt))
        if tokens + max_new_tokens > context:
            raise ValueError(
                f"{describe(model, role)} reads at most {context} tokens at once (its context): too few for prompt "
                f"{row} of {tokens} tokens and an answer of {setting}={max_new_tokens}, {tokens + max_new_tokens} "
                f"together. Set {setting} to at most {max(context - tokens, 0)}, or drop or shorten the prompt."
            )


def check_scorer_room(scorer: Any, prompts: Sequence[Any], max_new_tokens: int, setting: str) -> None:
    """The same for a scorer, where it is a reward model; what another function reads is its own affair."""
    from instruct_trl.models.reward import RewardScorer

    if isinstance(scorer, RewardScorer):
        parts = (scorer.model, scorer.processing_class, "The reward model")
        check_answer_room(*parts, prompts, max_new_tokens, setting)
