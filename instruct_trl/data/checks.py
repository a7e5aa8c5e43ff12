"""Checks that any dataset of ours goes through before training starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

# What a message may hold in place of `content`.
_OTHER_CONTENT = ("tool_calls", "function_call", "reasoning_content", "thinking")
_SHOWN = 80  # characters of a value in an error


def column_names(dataset: Any) -> list[str]:
    """The columns of a Dataset or IterableDataset; of a stream that does not know them, those of its first row."""
    return list(dataset.column_names or next(iter(dataset), {}))


def require_columns(dataset: Any, names: Sequence[str | tuple[str, ...]], where: str) -> None:
    """Refuse a dataset that lacks a column, and point at the one that was probably meant.

    Args:
        dataset: a Dataset or IterableDataset.
        names: required columns; a tuple stands for alternatives, of which exactly one must be there.
        where: how to call the dataset in the message, e.g. "the train dataset".

    Raises:
        ValueError: a column is missing, or two alternatives are both there.
    """
    present = column_names(dataset)
    for name in names:
        alternatives = (name,) if isinstance(name, str) else name
        found = [column for column in alternatives if column in present]
        if len(found) > 1:
            raise ValueError(f"{where} has the columns {_quoted(found)}, which mean the same. Remove all but one.")
        if not found:
            raise ValueError(
                f"{where} has no column {_quoted(alternatives, ' or ')}; it has {_quoted(present)}."
                f"{_suggestion(alternatives, present, names)}"
            )


def check_rows(dataset: Any, check: Callable[[Mapping[str, Any], int], None], columns: Sequence[str] = ()) -> Any:
    """Call `check(row, index)`, which raises on a bad row, for all rows: at once, or as a stream flows.

    Of a Dataset `check` sees `columns` alone, if any are named: others may hold pictures, which take long to decode.

    Returns:
        The dataset; for an IterableDataset one that is checked while it is read.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_passes, with_indices=True, fn_kwargs={"check": check})
    seen = dataset.select_columns(list(columns)) if columns and isinstance(dataset, Dataset) else dataset
    for index, row in enumerate(seen):
        check(row, index)
    return dataset


def _passes(row: Mapping[str, Any], index: int, check: Callable[[Mapping[str, Any], int], None]) -> bool:
    check(row, index)
    return True


def check_pretraining_row(row: Mapping[str, Any], index: int) -> None:
    """Refuse a row of pretraining data without a text, or without ids where it has `input_ids`; see `check_text`."""
    column = "input_ids" if "input_ids" in row else "text"
    place = f"pretraining_dataset: column {column!r}, row {index}"
    value = row.get(column)
    if column == "text":
        check_text(value, place, messages=False)
    elif not isinstance(value, Iterable) or isinstance(value, str) or (isinstance(value, list) and None in value):
        raise ValueError(f"{place} is {shown(value)}, and a list of token ids belongs there. Drop the row or mend it.")


def check_demonstration(row: Mapping[str, Any], index: int, where: str) -> None:
    """Refuse a row whose `prompt` or `completion` is no text, or of which one is text and the other is messages."""
    columns = ("prompt", "completion")
    for column in columns:
        check_text(row.get(column), f"{where}: column {column!r}, row {index}")
    if isinstance(row["prompt"], str) != isinstance(row["completion"], str):
        prompt, completion = (kind_of(row[column]) for column in columns)
        raise ValueError(
            f"{where}, row {index}: the prompt is {prompt} and the completion is {completion}. Make both plain text, "
            "or both lists of messages."
        )


def check_text(value: Any, place: str, messages: bool = True) -> None:
    """Refuse what is neither text nor, if `messages` may stand there, a list of messages; and what holds no word.

    Numbers are refused as well: how one would be written out (7, 7.0, 007) only its user knows.

    Args:
        value: what stands there.
        place: names dataset, column and row, and begins the error: "the train dataset: column 'text', row 3".
        messages: whether a list of messages is as good as a text.

    Raises:
        ValueError: null, number, empty, blank, half a character, or a message without role or content.
    """
    wanted = "text or a list of messages" if messages else "text"
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{place} is empty ({value!r}), and {wanted} belongs there. Drop the row, or fill it in.")
    if isinstance(value, str):
        _check_characters(value, place)
    elif messages and isinstance(value, list):
        _check_messages(value, place)
    elif isinstance(value, int | float):
        raise ValueError(
            f"{place} is {kind_of(value)} ({value!r}), and {wanted} belongs there. Read the column as text: "
            "dataset.cast_column(name, datasets.Value('string')), or give json lines with quotes around the values."
        )
    else:
        raise ValueError(f"{place} is {kind_of(value)}, and {wanted} belongs there, got {shown(value)}.")


def _check_characters(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(
            f"{place} holds {half!r} at character {error.start}: half of a character, which no tokenizer can read. "
            "Decode the file as it was encoded, or take it out: text.encode(errors='ignore').decode()."
        ) from error


def _check_messages(messages: list[Any], place: str) -> None:
    if not messages:
        raise ValueError(f"{place} is empty ([]), and messages belong there. Drop the row, or fill it in.")
    for number, message in enumerate(messages):
        _check_message(message, f"{place}: message {number}")
    last = messages[-1]
    if not (_has_words(last.get("content")) or any(last.get(name) for name in _OTHER_CONTENT)):
        raise ValueError(
            f"{place} is empty: the last message's 'content' is {last['content']!r}. Drop the row, or fill it in."
        )


def _check_message(message: Any, place: str) -> None:
    example = "{'role': 'user', 'content': 'Hi'}"
    if not isinstance(message, Mapping):
        raise ValueError(f"{place} is {shown(message)}. A message is a dictionary like {example}.")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{place} has no 'role' (it is {shown(message)}). A message is a dictionary like {example}.")
    if content is None and not any(message.get(name) for name in _OTHER_CONTENT):
        raise ValueError(
            f"{place} has no 'content' (it is {shown(message)}). A message is a dictionary like {example}."
        )
    if isinstance(content, str):
        _check_characters(content, place)
    elif content is not None and not isinstance(content, list):
        raise ValueError(
            f"{place}: 'content' is {kind_of(content)} ({shown(content)}), and text belongs there. Put it in quotes."
        )


def _has_words(content: Any) -> bool:
    return bool(content.strip()) if isinstance(content, str) else bool(content)


def kind_of(value: Any) -> str:
    """How to call the kind of a value: "plain text", "a list of messages", "an int"."""
    if isinstance(value, str | list):
        return "plain text" if isinstance(value, str) else "a list of messages"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def shown(value: Any) -> str:
    """A value as an error shows it: strings in quotes, and no more than the beginning of a long one."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _suggestion(wanted: Sequence[str], present: list[str], names: Sequence[str | tuple[str, ...]]) -> str:
    """A sentence that names the column to rename, among those not needed under their own name; or what to add."""
    needed = {column for name in names for column in ((name,) if isinstance(name, str) else name)}
    spare = {column.lower(): column for column in present if column not in needed}
    for column in wanted:
        close = get_close_matches(column.lower(), list(spare), n=1)
        if close:
            meant = spare[close[0]]
            return f" Did you mean {meant!r}? Rename it: dataset.rename_column({meant!r}, {column!r})."
    return f" Add {_quoted(wanted, ' or ')} or rename the column that holds it."


def _quoted(names: Sequence[str], joint: str = ", ") -> str:
    return joint.join(repr(name) for name in names)


def read_json(path: Path) -> Any:
    """What a json file says that a run wrote.

    Raises:
        ValueError: it is broken or cut short; names the file and the remedy.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is broken or cut short: {error}. Restore it, or move it away and run again what writes it."
        ) from error
