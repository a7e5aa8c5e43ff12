"""Where an answer ends: the one place that knows the ending ids."""

from __future__ import annotations

from typing import Any

from instruct_trl.data.pairs import turn_end


def require_eos(tokenizer: Any) -> int:
    """The id of the EOS token.

    Raises:
        ValueError: the tokenizer has none, so that an answer could neither end nor be seen to be cut.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no EOS token, so an answer could never end. Set `tokenizer.eos_token` to a token of "
            "its vocabulary before passing it (or `eos_token` in the config)."
        )
    return tokenizer.eos_token_id


def ending_ids(tokenizer: Any, model: Any = None) -> list[int]:
    """The ids of which any ends an answer, the tokenizer's EOS first.

    They are the tokenizer's EOS, those that the model's generation config and config name, and the special token with
    which the chat template closes an assistant's turn. A chat model often ends its turn with another token than EOS.

    Args:
        tokenizer: with an EOS token.
        model: a causal LM or a classifier, wrapped by PEFT or not; None leaves its configs out.

    Raises:
        ValueError: no EOS token.
    """
    ids: list[int | None] = [require_eos(tokenizer)]
    configs = [] if model is None else [getattr(model, "generation_config", None), model.config.get_text_config()]
    for config in configs:
        named = getattr(config, "eos_token_id", None)
        ids += named if isinstance(named, list) else [named]
    ids.append(_end_of_turn(tokenizer))
    return list(dict.fromkeys(int(i) for i in ids if i is not None))


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template writes after an assistant's words, blanks left out; None without one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        end = turn_end(tokenizer, [{"role": "user", "content": "x"}]).lstrip()
    except Exception:  # whatever a template raises: it is applied, and its error shown, where rows are read
        return None
    ids = tokenizer(text=end, add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids[0] if ids and ids[0] in special else None
