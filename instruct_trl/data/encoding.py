"""Prompts and answers as tokens: one way, shared by training, scoring and RL.

A reward model reads what a policy reads and draws: the prompt up to where the answer begins, the answer as it is, and
what ends an answer (`ending_ids`). A chat template that drops or adds words in an answer does not get to do so here.

Legend: N rows (one per completion), T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset, Features, Json, LargeList, List, Value
from jinja2 import TemplateError
from trl.trainer.utils import pad, remove_none_values

Text = str | list[dict[str, Any]]  # plain text, or TRL's conversational messages

# What a template's own code can raise: raise_exception, and Python's errors on values that it does not expect.
TEMPLATE_REFUSALS = (TemplateError, TypeError, LookupError, AttributeError)
_KWARGS = "chat_template_kwargs"
_CHAT_COLUMNS = (
    *("prompt", "completion", "completions", "chosen", "rejected", "messages", "conversations"),
    *("tools", _KWARGS),
)
_JSON_TYPES = ("string", "large_string", "bool", "null", "int", "uint", "float", "double")
_PROBE = "some answer to be found again"


class TemplateRefusal(ValueError):
    """A chat template cannot render some messages. `in_row` adds the place."""


@contextmanager
def in_row(where: str) -> Iterator[None]:
    """Context manager: puts `where` before the text of a ValueError, e.g. "the train dataset, row 3"."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def kind_of(value: Any) -> str:
    """How to call the kind of a value: "plain text", "a list of messages", "an int"."""
    if isinstance(value, str | list):
        return "plain text" if isinstance(value, str) else "a list of messages"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def check_same_kind(one: Any, name: str, other: Any, other_name: str) -> None:
    """Refuse plain text beside messages."""
    if isinstance(one, str) != isinstance(other, str):
        raise ValueError(
            f"{name} is {kind_of(one)} and {other_name} is {kind_of(other)}. Make both plain text, or both lists of "
            "messages."
        )


def prompt_key(prompt: Any) -> str:
    """A short name of a prompt (text, messages or token ids) by its content, the same on every machine."""
    text = json.dumps(prompt, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def prompt_keys(prompts: Iterable[Any], loosely: bool = False) -> list[str]:
    """The names of several; equal prompts have equal names.

    `loosely`: blanks around a prompt do not count, nor whether a lone message or its text is given.
    """
    return [prompt_key(_bare(prompt) if loosely else prompt) for prompt in prompts]


def _bare(prompt: Any) -> Any:
    prompt = _without_nulls(prompt)
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], Mapping):
        prompt = prompt[0].get("content")
    return prompt.strip() if isinstance(prompt, str) else prompt


# -- messages as they were written -------------------------------------------------------------------------------------


def as_written(value: Any) -> Any:
    """Messages, tools or template arguments held in memory, without the nulls that Arrow adds; anything else as it is.

    Arrow gives all dictionaries of a list the same keys. A list of which two differ in theirs was not padded, so that
    a null in it is its user's.
    """
    if isinstance(value, list) and len({frozenset(item) for item in value if isinstance(item, Mapping)}) > 1:
        return value
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    return remove_none_values(value) if isinstance(value, list | Mapping) else value  # type: ignore[type-var]


def without_padding(dataset: Any) -> Any:
    """The dataset with messages, tools and template arguments as their user wrote them.

    Arrow's structs hold every key of every row, and null where a row lacks it, which a chat template would render. The
    columns that hold such structs come back as `datasets.Json`, without the nulls. Columns that are Json already (what
    json lines are loaded as) keep theirs: those were written.
    """
    features = getattr(dataset, "features", None)
    # Rows of the format "custom" are made by the user's own function as they are read; a map would read through it.
    if features is None or (isinstance(dataset, Dataset) and dataset.format["type"] == "custom"):
        return dataset
    made = {name: _as_json(features.get(name)) for name in _CHAT_COLUMNS}
    as_json = {name: feature for name, feature in made.items() if feature is not None}
    if isinstance(features.get(_KWARGS), Json):
        as_json[_KWARGS] = Json()  # for the rows that have none: see `_drop_nulls`
    if not as_json:
        return dataset
    options = {"desc": "Taking out Arrow's nulls"} if isinstance(dataset, Dataset) else {}
    features = Features({**features, **as_json})
    return dataset.map(_drop_nulls, fn_kwargs={"columns": list(as_json)}, features=features, **options)


def _drop_nulls(example: Mapping[str, Any], columns: list[str]) -> dict[str, Any]:
    rows = {name: _without_nulls(example[name]) for name in columns}
    # A row without arguments has a null there, and upstream unpacks it as a dictionary.
    return {**rows, _KWARGS: rows[_KWARGS] or {}} if _KWARGS in rows else rows


def _as_json(feature: Any) -> Any:
    """A column's type with Json for its structs; None if it has none, or one that JSON cannot hold (an image, say)."""
    if isinstance(feature, List | LargeList):
        inner = _as_json(feature.feature)
        return None if inner is None else type(feature)(inner)
    return Json() if isinstance(feature, dict) and _is_plain(feature) else None


def _is_plain(feature: Any) -> bool:
    if isinstance(feature, List | LargeList):
        return _is_plain(feature.feature)
    if isinstance(feature, dict):
        return all(_is_plain(inner) for inner in feature.values())
    return isinstance(feature, Json) or (isinstance(feature, Value) and feature.dtype.startswith(_JSON_TYPES))


def template_kwargs(example: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the chat template from a row's `tools` and `chat_template_kwargs`, as in TRL's RewardTrainer.

    Nulls are Arrow's and go, except in tools that are a JSON string.
    """
    tools, kwargs = example.get("tools"), as_written(example.get(_KWARGS)) or {}
    try:
        tools = json.loads(tools) if isinstance(tools, str) else as_written(tools)
    except ValueError as error:
        raise ValueError(
            f"'tools' is {tools!r:.80}, which is not valid JSON: {error}. Fix it, or give a list."
        ) from error
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"{_KWARGS!r} is {kwargs!r:.80}; give a dictionary of settings of the template.")
    return {**({"tools": tools} if tools else {}), **kwargs}


def plain_answer(completion: Text) -> str | None:
    """The words of a completion that is a text or one assistant message of text; None for tool calls and dialogues."""
    if isinstance(completion, str):
        return completion
    if len(completion) != 1 or completion[0].get("role") != "assistant":
        return None
    message = {name: value for name, value in completion[0].items() if value is not None}
    return message["content"] if message.keys() == {"role", "content"} and isinstance(message["content"], str) else None


# -- chat templates ----------------------------------------------------------------------------------------------------


def render(tokenizer: Any, messages: Sequence[dict[str, Any]], **kwargs: Any) -> str:
    """Messages as the tokenizer's chat template writes them, or a `TemplateRefusal` that says why it does not."""
    if not (kwargs.get("chat_template") or getattr(tokenizer, "chat_template", None)):
        raise TemplateRefusal(
            "these are messages, and the tokenizer has no chat template to render them with. Set "
            "tokenizer.chat_template, or give plain text."
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **kwargs)
    except TEMPLATE_REFUSALS as error:
        roles = [message.get("role") for message in messages if isinstance(message, Mapping)]
        raise TemplateRefusal(
            f"the chat template refuses messages with the roles {roles}: {error} Give roles, and an order, that "
            "the template accepts; drop the row; or set another tokenizer.chat_template."
        ) from error


def turn_end(tokenizer: Any, prompt: Sequence[dict[str, Any]], **kwargs: Any) -> str:
    """The text that the chat template writes after an answer to `prompt`."""
    text = render(tokenizer, _answered(prompt, _PROBE), **kwargs)
    if _PROBE not in text:
        raise ValueError(
            "The chat template does not show the content of an assistant's message, so there is no answer to score. "
            "Set `tokenizer.chat_template` to one that does."
        )
    return text[text.rindex(_PROBE) + len(_PROBE) :]


def _opening(tokenizer: Any, prompt: Sequence[dict[str, Any]], kwargs: dict) -> str:
    """The rendered prompt, with the opening of the answer's turn or, if the prompt opened it, as far as it went."""
    if not _is_open(prompt):
        return render(tokenizer, prompt, **{**kwargs, "add_generation_prompt": True})
    try:
        return render(tokenizer, prompt, **{**kwargs, "continue_final_message": True})
    except TemplateRefusal:
        raise
    except ValueError as error:
        raise ValueError(
            f"The prompt ends in an assistant message, {prompt[-1]['content']!r:.80}, which the answer is to continue, "
            "but the chat template rewrites that message. End the prompt with the user's message, or set a chat "
            "template that keeps an assistant's words."
        ) from error


def _is_open(prompt: Sequence[dict[str, Any]]) -> bool:
    """Whether the last message of a prompt is the beginning of the answer."""
    return len(prompt) > 0 and prompt[-1].get("role") == "assistant" and plain_answer([prompt[-1]]) is not None


def _answered(prompt: Sequence[dict[str, Any]], answer: str) -> list[dict[str, Any]]:
    return [*(prompt[:-1] if _is_open(prompt) else prompt), {"role": "assistant", "content": answer}]


def _as_template_writes(
    tokenizer: Any, prompt: list[dict[str, Any]], answer: str, kwargs: dict
) -> tuple[str, str] | None:
    """(up to the answer's end, what follows) as the template renders them; None where it changes the answer's words."""
    if not answer:  # of an empty answer nothing can be found
        return None
    start = _opening(tokenizer, prompt, kwargs)
    opened = prompt[-1]["content"] if _is_open(prompt) else ""
    whole = render(tokenizer, _answered(prompt, opened + answer), **kwargs)
    rest = whole.removeprefix(start)
    # The template may put blanks before an answer, as older ones do; it may not take any away.
    blanks = 0 if rest.startswith(answer) else len(rest) - len(rest.lstrip())
    if not whole.startswith(start) or not rest.startswith(answer, blanks):
        return None
    end = len(start) + blanks + len(answer)
    return whole[:end], whole[end:]


def what_template_rewrites(tokenizer: Any) -> str | None:
    """One line that says how the chat template changes answers, which rows here keep; None where it does not."""
    answers = {"thoughts before </think>": "<think>\nx\n</think>\n\ny", "blanks around an answer": " y "}
    prompt = [{"role": "user", "content": "x"}]
    changed = [
        name
        for name, answer in answers.items()
        if tokenizer.chat_template and _as_template_writes(tokenizer, prompt, answer, {}) is None
    ]
    if not changed:
        return None
    return (
        f"The chat template drops or rewrites {' and '.join(changed)}. The reward model reads answers as they are: the "
        "template's opening of the turn, the answer, the template's end of the turn."
    )


# -- tokens ------------------------------------------------------------------------------------------------------------


def drop_own_bos(tokenizer: Any, text: str) -> str:
    """`text` less the BOS token that it begins with, as a rendered chat may, where the tokenizer adds one itself."""
    bos = tokenizer.bos_token
    if not bos or not text.startswith(bos) or text.startswith(2 * bos):
        return text
    doubled = list(tokenizer(text=text)["input_ids"][:2]) == 2 * [tokenizer.bos_token_id]
    return text.removeprefix(bos) if doubled else text


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer adds, and never a second BOS."""
    return list(tokenizer(text=drop_own_bos(tokenizer, text))["input_ids"])


def _encode_rendered(tokenizer: Any, text: str) -> list[int]:
    """Token ids of what a template rendered, which brings its own special tokens."""
    return list(tokenizer(text=text, add_special_tokens=False)["input_ids"])


def encode_prompt(tokenizer: Any, prompt: Text, **kwargs: Any) -> list[int]:
    """Token ids of a prompt up to where the answer begins, as the policy reads it; `kwargs` go to the chat template."""
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt)
    return _encode_rendered(tokenizer, _opening(tokenizer, as_written(prompt), kwargs))


def tokenize_pair(
    tokenizer: Any, prompt: Text, completion: Text, *, truncated: bool = False, **kwargs: Any
) -> list[int]:
    """Token ids of prompt and completion, tokenised jointly as TRL's RewardTrainer does.

    Plain text ends in the EOS token, conversations in whatever the chat template puts there; a completion that was
    cut at a length limit (`truncated`) ends in its last own token. `kwargs` go to the chat template. Where the template
    would change the words of an answer, the row holds them as they are.
    """
    check_same_kind(prompt, "the prompt", completion, "the completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if truncated:
            return encode_text(tokenizer, prompt + completion)
        require_eos(tokenizer)
        eos = tokenizer.eos_token
        return encode_text(tokenizer, prompt + completion.removesuffix(eos) + eos)  # once, also where the user put one
    asked, said = as_written(prompt), as_written(completion)
    answer = plain_answer(said)
    if answer is None:  # tool calls and dialogues have words that only the template can write
        text = render(tokenizer, [*asked, *said], **kwargs)
        if truncated:
            text = text.removesuffix(turn_end(tokenizer, asked, **kwargs))
        return _encode_rendered(tokenizer, text)
    # A template that rewrites the answer still says how a turn opens and ends; the answer goes between as it is.
    if written := _as_template_writes(tokenizer, asked, answer, kwargs):
        begun, end = written
    else:
        begun = _opening(tokenizer, asked, kwargs) + answer
        end = "" if truncated else turn_end(tokenizer, asked, **kwargs)
    return _encode_rendered(tokenizer, begun if truncated else begun + end)


def tokenize_drawn(
    tokenizer: Any,
    prompt: Text,
    answer_ids: Sequence[int],
    *,
    truncated: bool = False,
    prompt_ids: Sequence[int] | None = None,
    **kwargs: Any,
) -> list[int]:
    """Token ids of a prompt and of the answer that a policy drew to it, which are those that it drew.

    Args:
        answer_ids: those drawn, less the one that ended the answer.
        truncated: the answer was cut at a length limit, so nothing ends the row.
        prompt_ids: those that the policy read; encoded from `prompt` if None.
    """
    start = encode_prompt(tokenizer, prompt, **kwargs) if prompt_ids is None else prompt_ids
    row = [*start, *answer_ids]  # not by way of the text: a policy may spell it by other tokens than the tokenizer
    if truncated:
        return row
    if isinstance(prompt, str):
        return [*row, require_eos(tokenizer)]
    return [*row, *_encode_rendered(tokenizer, turn_end(tokenizer, as_written(prompt), **kwargs))]


def pad_rows(rows: Sequence[Sequence[int]], pad_token_id: int, multiple: int | None = None) -> dict[str, torch.Tensor]:
    """Rows of token ids as `input_ids` and `attention_mask`, (N, T) long each, padded on the right.

    >>> pad_rows([[5, 6, 7], [8]], pad_token_id=0)["input_ids"]
    tensor([[5, 6, 7],
            [8, 0, 0]])
    """
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    return {
        "input_ids": pad(ids, pad_token_id, pad_to_multiple_of=multiple),
        # From the lengths: where pad and EOS are one token, the ids do not tell padding from an ending.
        "attention_mask": pad([torch.ones_like(row) for row in ids], 0, pad_to_multiple_of=multiple),
    }


def require_eos(tokenizer: Any) -> int:
    """The id of the EOS token; a ValueError where there is none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no EOS token, so an answer could never end. Set `tokenizer.eos_token` to a token of "
            "its vocabulary before passing it (or `eos_token` in the config)."
        )
    return tokenizer.eos_token_id


def ending_ids(tokenizer: Any, model: Any = None) -> list[int]:
    """Token ids that end an answer; the tokenizer's EOS comes first.

    They are the tokenizer's EOS, those that the model's generation config and config name, and the special token with
    which the chat template closes an assistant's turn. A chat model often ends its turn with another token than EOS.

    Args:
        model: a causal LM or a classifier, wrapped by PEFT or not; None leaves its configs out.
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
    ids = _encode_rendered(tokenizer, end)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    # Words that follow every answer do not end it: the policy may say them in the middle of one.
    return ids[0] if ids and ids[0] in special else None


def same_tokens(first: Any, second: Any) -> bool:
    """True if every token that both tokenizers know has the same id, and they share all but added special ones."""
    one, two = first.get_vocab(), second.get_vocab()
    if first.pad_token_id == second.pad_token_id is not None:  # by whatever name, it is never read
        for vocabulary, tokenizer in ((one, first), (two, second)):
            vocabulary.pop(tokenizer.pad_token, None)
    small, large = sorted((one, two), key=len)
    return all(large.get(token) == index for token, index in small.items()) and len(large) - len(small) <= 16
