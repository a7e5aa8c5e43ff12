"""Messages on their way to a chat template: errors that name their row, and no nulls that Arrow added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, IterableDataset, Json, LargeList, List, Value
from jinja2 import TemplateError
from trl.trainer.utils import remove_none_values

_KWARGS = "chat_template_kwargs"
CHAT_COLUMNS = (
    *("prompt", "completion", "completions", "chosen", "rejected", "messages", "conversations"),
    "tools",
    _KWARGS,
)
# What a template's own code can raise: raise_exception, and Python's errors on values that it does not expect.
TEMPLATE_REFUSALS = (TemplateError, TypeError, LookupError, AttributeError)
_JSON_TYPES = ("string", "large_string", "bool", "null", "int", "uint", "float", "double")


class TemplateRefusal(ValueError):
    """A chat template cannot render some messages. `in_row` adds the place."""


def render(tokenizer: Any, messages: Sequence[dict[str, Any]], **kwargs: Any) -> str:
    """Messages as the tokenizer's chat template writes them; `kwargs` go to `apply_chat_template`.

    Raises:
        TemplateRefusal: the tokenizer has no chat template, or its template refuses the messages.
    """
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


@contextmanager
def in_row(where: str) -> Iterator[None]:
    """Inside, a ValueError gets `where` put before it, e.g. "the train dataset, row 3"."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def as_written(value: Any) -> Any:
    """Messages, tools or template arguments held in memory, without the nulls that Arrow adds; anything else as it is.

    Arrow gives all dictionaries of a list the same keys. A list of which two differ in theirs was not padded, so that
    a null in it is its user's.
    """
    if isinstance(value, list) and len({frozenset(item) for item in value if isinstance(item, Mapping)}) > 1:
        return value
    return _without_nulls(value)


def without_padding(dataset: Any) -> Any:
    """The dataset with messages, tools and template arguments as their user wrote them.

    Arrow's structs hold every key of every row, and null where a row lacks it, which a chat template would render. The
    columns of `CHAT_COLUMNS` that hold such structs come back as `datasets.Json`, without the nulls. Columns that are
    Json already (what json lines are loaded as) keep theirs: those were written.
    """
    features = getattr(dataset, "features", None)
    if not isinstance(dataset, Dataset | IterableDataset) or features is None or _transforms(dataset):
        return dataset
    padded = [name for name in CHAT_COLUMNS if name in features and _needs_care(name, features[name])]
    if not padded:
        return dataset
    as_json = features.copy()
    for name in padded:
        as_json[name] = _with_json(features[name])
    options: dict[str, Any] = {"features": as_json}
    if isinstance(dataset, Dataset):
        options["desc"] = "Taking out Arrow's nulls"
    return dataset.map(_drop_nulls, fn_kwargs={"columns": padded}, **options)


def _drop_nulls(example: Mapping[str, Any], columns: list[str]) -> dict[str, Any]:
    rows = {name: _without_nulls(example[name]) for name in columns}
    if _KWARGS in rows:
        rows[_KWARGS] = rows[_KWARGS] or {}
    return rows


def _needs_care(name: str, feature: Any) -> bool:
    """Whether a column holds padded structs, or template arguments: a row without any has a null, upstream needs {}."""
    return _has_struct(feature) or (name == _KWARGS and isinstance(feature, Json))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return remove_none_values(value)
    return remove_none_values(value) if isinstance(value, Mapping) else value


def _transforms(dataset: Any) -> bool:
    """Whether rows are made by the user's own function as they are read; a map would read through it, once."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def _has_struct(feature: Any) -> bool:
    """Whether a column holds structs, and nothing in them that JSON cannot hold (an image, say)."""
    if isinstance(feature, List | LargeList):
        return _has_struct(feature.feature)
    return isinstance(feature, dict) and all(_is_plain(inner) for inner in feature.values())


def _is_plain(feature: Any) -> bool:
    if isinstance(feature, List | LargeList):
        return _is_plain(feature.feature)
    if isinstance(feature, dict):
        return all(_is_plain(inner) for inner in feature.values())
    return isinstance(feature, Json) or (isinstance(feature, Value) and feature.dtype.startswith(_JSON_TYPES))


def _with_json(feature: Any) -> Any:
    return type(feature)(_with_json(feature.feature)) if isinstance(feature, List | LargeList) else Json()
