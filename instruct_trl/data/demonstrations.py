"""Rows for SFT, checked before `trl.SFTTrainer` tokenises them: text, messages, or prompt and completion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from datasets import Dataset

from instruct_trl.data.chat import TEMPLATE_REFUSALS, in_row, render, without_padding
from instruct_trl.data.checks import (
    check_demonstration,
    check_rows,
    check_text,
    column_names,
    kind_of,
    require_columns,
    shown,
)
from instruct_trl.data.pairs import template_kwargs


def check_sft_dataset(dataset: Any, tokenizer: Any, chat_template: str | None, text_field: str, where: str) -> Any:
    """Refuse rows without text, at once or as a stream flows; take Arrow's nulls out of messages.

    Args:
        dataset: with `prompt` and `completion`, `messages`, `conversations` or the column `text_field`. One that holds
            `input_ids` comes back as it is.
        tokenizer, chat_template: render the messages of a stream; those of a Dataset: `refusals_named`.
        text_field: the column of plain text, as `SFTConfig.dataset_text_field` names it.
        where: how to call the dataset in the message, e.g. "the train dataset".

    Raises:
        ValueError: none of the columns; a row with null, a number or nothing where text belongs, or of another kind
            than the first row; says which.
    """
    columns = column_names(dataset)
    if not columns or "input_ids" in columns or (isinstance(dataset, Dataset) and dataset.format["type"] == "custom"):
        return dataset
    column = _column_of(dataset, columns, text_field, where)
    dataset = without_padding(dataset)
    first = next(iter(dataset), None)
    if first is None:
        return dataset
    kind = type(first.get(column))
    read = ("prompt", "completion") if column == "prompt" else (column,)
    dataset = check_rows(dataset, partial(_check_row, column=column, kind=kind, where=where), read)
    if isinstance(dataset, Dataset) or kind is not list:
        return dataset
    return check_rows(dataset, _renderer(tokenizer, chat_template, column, where))


def checked_formatting(formatting_func: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    """The user's function, which makes the text of a row, with what it makes checked as `check_text` does."""
    return partial(_format, formatting_func=formatting_func)


def _format(row: dict[str, Any], formatting_func: Callable[[dict[str, Any]], str]) -> str:
    text = formatting_func(row)
    check_text(text, f"What formatting_func makes of the row {shown(row)}", messages=False)
    return text


@contextmanager
def refusals_named(dataset: Any, tokenizer: Any, chat_template: str | None, where: str) -> Iterator[None]:
    """Inside, rows are tokenised elsewhere; where a chat template refuses one, the error names it.

    The rows are rendered again only after an error, to find the one that made it.
    """
    try:
        yield
    except TEMPLATE_REFUSALS:
        column = next((name for name in ("prompt", "messages", "conversations") if name in dataset.column_names), None)
        if isinstance(dataset, Dataset) and column and isinstance(dataset[0][column], list):
            check_rows(dataset, _renderer(tokenizer, chat_template, column, where))
        raise


def _column_of(dataset: Any, columns: list[str], text_field: str, where: str) -> str:
    """The column that upstream would read, `prompt` for a pair."""
    if "prompt" in columns or "completion" in columns:
        require_columns(dataset, ["prompt", "completion"], where)
        return "prompt"
    for column in ("messages", "conversations", text_field):
        if column in columns:
            return column
    require_columns(dataset, [("prompt", "messages", text_field)], where)
    return text_field


def _check_row(row: Mapping[str, Any], index: int, column: str, kind: type, where: str) -> None:
    place = f"{where}: column {column!r}, row {index}"
    value = row.get(column)
    if column == "prompt":
        check_demonstration(row, index, where)
    else:
        check_text(_as_messages(value), place)
        if column in ("messages", "conversations") and not isinstance(value, list):
            raise ValueError(f"{place} is {kind_of(value)}. Give a list of messages, or call the column 'text'.")
    if type(value) is not kind:  # upstream looks at the first row to see what all of them are
        raise ValueError(
            f"{place} is {kind_of(value)}, unlike row 0. Make all rows plain text, or all of them lists of messages."
        )


def _as_messages(value: Any) -> Any:
    """The value with `from` and `value` called `role` and `content`, as upstream calls them."""
    names = {"from": "role", "value": "content"}
    if not isinstance(value, list):
        return value
    return [
        {names.get(key, key): entry for key, entry in item.items()} if isinstance(item, Mapping) else item
        for item in value
    ]


def _renderer(
    tokenizer: Any, chat_template: str | None, column: str, where: str
) -> Callable[[Mapping[str, Any], int], None]:
    return partial(_render, tokenizer=tokenizer, chat_template=chat_template, column=column, where=where)


def _render(
    row: Mapping[str, Any], index: int, tokenizer: Any, chat_template: str | None, column: str, where: str
) -> None:
    """Render a row as upstream does, for the error that its template raises."""
    kwargs = {"chat_template": chat_template, **template_kwargs(row)}
    messages = _as_messages(row[column])
    if column == "prompt":
        with in_row(f"{where}: column 'prompt', row {index}"):
            render(tokenizer, messages, add_generation_prompt=True, **kwargs)
        messages, column = [*messages, *_as_messages(row["completion"])], "completion"
    with in_row(f"{where}: column {column!r}, row {index}"):
        render(tokenizer, messages, **kwargs)
