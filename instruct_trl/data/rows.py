"""Rows as users bring them, checked before training."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from instruct_trl.data.encoding import (
    TEMPLATE_REFUSALS,
    check_same_kind,
    encode_prompt,
    in_row,
    kind_of,
    render,
    template_kwargs,
    without_padding,
)

logger = logging.getLogger(__name__)

Check = Callable[[Mapping[str, Any], int], None]  # raises on a bad row; the int is its number

_OTHER_CONTENT = ("tool_calls", "function_call", "reasoning_content", "thinking")  # of a message, in place of `content`
_A_MESSAGE = "A message is a dictionary like {'role': 'user', 'content': 'Hi'}."
_SHOWN = 80  # characters of a value in an error
# What a trainer itself hands to reward functions beside a row's own columns.
_HANDED_OVER = (
    *("prompts", "completions", "completion_ids", "prompt_ids", "truncated"),
    *("trainer_state", "log_extra", "log_metric"),
)


def shown(value: Any) -> str:
    """A value as an error shows it: strings in quotes, and no more than the beginning of a long one."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def read_json(path: Path) -> Any:
    """The content of a json file that a run wrote; a ValueError names a file that is broken or cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is broken or cut short: {error}. Restore it, or move it away and run again what writes it."
        ) from error


# -- columns -----------------------------------------------------------------------------------------------------------


def column_names(dataset: Any) -> list[str]:
    """The columns of a Dataset or IterableDataset; of a stream that does not know them, those of its first row."""
    return list(dataset.column_names or next(iter(dataset), {}))


def require_columns(dataset: Any, names: Sequence[str | tuple[str, ...]], where: str) -> None:
    """Refuse a dataset that lacks a column, and point at the one that was probably meant.

    Args:
        names: required columns; a tuple stands for alternatives, of which exactly one must be there.
        where: the name of the dataset in the message, e.g. "the train dataset".
    """
    present = column_names(dataset)
    groups = [(name,) if isinstance(name, str) else name for name in names]
    for alternatives in groups:
        found = [column for column in alternatives if column in present]
        if len(found) > 1:
            raise ValueError(f"{where} has the columns {_quoted(found)}, which mean the same. Remove all but one.")
        if not found:
            spare = [column for column in present if column not in {name for group in groups for name in group}]
            raise ValueError(
                f"{where} has no column {_quoted(alternatives, ' or ')}; it has {_quoted(present)}. "
                f"{_suggestion(alternatives, spare)}"
            )


def _suggestion(wanted: Sequence[str], spare: Sequence[str]) -> str:
    """A sentence that names the spare column to rename, or what to add."""
    lower = {column.lower(): column for column in spare}
    for column in wanted:
        for close in get_close_matches(column.lower(), list(lower), n=1):
            return f"Did you mean {lower[close]!r}? Rename it: dataset.rename_column({lower[close]!r}, {column!r})."
    return f"Add {_quoted(wanted, ' or ')} or rename the column that holds it."


def _quoted(names: Sequence[str], joint: str = ", ") -> str:
    return joint.join(repr(name) for name in names)


# -- rows --------------------------------------------------------------------------------------------------------------


def check_rows(dataset: Any, check: Check, columns: Sequence[str] = ()) -> Any:
    """The dataset, with `check` called for all rows: at once, or while a stream is read.

    Of a Dataset `check` sees `columns` alone, if any are named: others may hold pictures, which take long to decode.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_passes, with_indices=True, fn_kwargs={"check": check})
    seen = dataset.select_columns(list(columns)) if columns and isinstance(dataset, Dataset) else dataset
    for index, row in enumerate(seen):
        check(row, index)
    return dataset


def _passes(row: Mapping[str, Any], index: int, check: Check) -> bool:
    check(row, index)
    return True


def check_pretraining_row(row: Mapping[str, Any], index: int) -> None:
    """Refuse a row of pretraining data without a text, or without ids where it has `input_ids`; see `check_text`."""
    column = "input_ids" if "input_ids" in row else "text"
    place, value = f"pretraining_dataset: column {column!r}, row {index}", row.get(column)
    if column == "text":
        check_text(value, place, messages=False)
    elif not isinstance(value, Iterable) or isinstance(value, str) or (isinstance(value, list) and None in value):
        raise ValueError(f"{place} is {shown(value)}, and a list of token ids belongs there. Drop the row or fix it.")


def check_demonstration(row: Mapping[str, Any], index: int, where: str) -> None:
    """Refuse a row whose `prompt` or `completion` fails `check_text`, or of which one is text and one messages."""
    for column in ("prompt", "completion"):
        check_text(row.get(column), f"{where}: column {column!r}, row {index}")
    check_same_kind(row["prompt"], f"{where}, row {index}: the prompt", row["completion"], "the completion")


def check_text(value: Any, place: str, messages: bool = True) -> None:
    """Refuse what is neither text nor, if `messages` may stand there, a list of messages; and what holds no word.

    Numbers are refused as well: how one would be written out (7, 7.0, 007) only its user knows.

    `place` begins the error: "the train dataset: column 'text', row 3".
    """
    wanted = "text or a list of messages" if messages else "text"
    if value is None or (isinstance(value, str) and not value.strip()) or (messages and value == []):
        raise ValueError(f"{place} is empty ({value!r}), and {wanted} belongs there. Drop the row, or fill it in.")
    if isinstance(value, str):
        _check_characters(value, place)
    elif messages and isinstance(value, list):
        for number, message in enumerate(value):
            _check_message(message, f"{place}: message {number}")
        last, content = value[-1], value[-1].get("content")
        blank = not content.strip() if isinstance(content, str) else not content
        if blank and not any(last.get(name) for name in _OTHER_CONTENT):
            raise ValueError(
                f"{place} is empty: the last message's 'content' is {content!r}. Drop the row, or fill it in."
            )
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
        raise ValueError(
            f"{place} holds {text[error.start]!r} at character {error.start}: half of a character, which no tokenizer "
            "can read. Decode the file as it was encoded, or take it out: text.encode(errors='ignore').decode()."
        ) from error


def _check_message(message: Any, place: str) -> None:
    if not isinstance(message, Mapping):
        raise ValueError(f"{place} is {shown(message)}. {_A_MESSAGE}")
    role, content = message.get("role"), message.get("content")
    other = any(message.get(name) for name in _OTHER_CONTENT)
    for name, there in (("role", isinstance(role, str) and role), ("content", content is not None or other)):
        if not there:
            raise ValueError(f"{place} has no {name!r} (it is {shown(message)}). {_A_MESSAGE}")
    if isinstance(content, str):
        _check_characters(content, place)
    elif content is not None and not isinstance(content, list):
        raise ValueError(
            f"{place}: 'content' is {kind_of(content)} ({shown(content)}), and text belongs there. Put it in quotes."
        )


# -- demonstrations ----------------------------------------------------------------------------------------------------


def check_sft_dataset(dataset: Any, tokenizer: Any, chat_template: str | None, text_field: str, where: str) -> Any:
    """Refuse rows without text, at once or as a stream flows; take Arrow's nulls out of messages.

    Args:
        dataset: with `prompt` and `completion`, `messages`, `conversations` or the column `text_field`. One that holds
            `input_ids` comes back as it is.
        tokenizer, chat_template: render the messages of a stream; those of a Dataset: `refusals_named`.
        text_field: the column of plain text, as `SFTConfig.dataset_text_field` names it.
        where: the name of the dataset in an error, e.g. "the train dataset".
    """
    columns = column_names(dataset)
    if not columns or "input_ids" in columns or (isinstance(dataset, Dataset) and dataset.format["type"] == "custom"):
        return dataset
    # The column that upstream would read, in its order; `prompt` stands for the pair.
    pair = "prompt" in columns or "completion" in columns
    column = "prompt" if pair else next((c for c in ("messages", "conversations", text_field) if c in columns), "")
    if pair or not column:
        require_columns(dataset, ["prompt", "completion"] if pair else [("prompt", "messages", text_field)], where)
    dataset = without_padding(dataset)
    first = next(iter(dataset), None)
    if first is None:
        return dataset
    check = partial(_check_row, column=column, first=first.get(column), where=where)
    if isinstance(dataset, IterableDataset) and isinstance(first.get(column), list):
        check = partial(check, tokenizer=tokenizer, chat_template=chat_template)
    return check_rows(dataset, check, ("prompt", "completion") if pair else (column,))


@contextmanager
def refusals_named(dataset: Any, tokenizer: Any, chat_template: str | None, where: str) -> Iterator[None]:
    """Context manager: while rows are tokenised elsewhere, an error of the chat template names its row.

    The rows are rendered again only after an error, to find the one that made it.
    """
    try:
        yield
    except TEMPLATE_REFUSALS:
        column = next((name for name in ("prompt", "messages", "conversations") if name in dataset.column_names), None)
        if isinstance(dataset, Dataset) and column and isinstance(first := dataset[0][column], list):
            options = {"tokenizer": tokenizer, "chat_template": chat_template}
            check_rows(dataset, partial(_check_row, column=column, first=first, where=where, **options))
        raise


def checked_formatting(formatting_func: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    """The user's function, which makes the text of a row, with what it makes checked as `check_text` does."""

    def checked(row: dict[str, Any]) -> str:
        text = formatting_func(row)
        check_text(text, f"The text that formatting_func makes of the row {shown(row)}", messages=False)
        return text

    return checked


def _check_row(
    row: Mapping[str, Any],
    index: int,
    column: str,
    first: Any,
    where: str,
    tokenizer: Any = None,
    chat_template: str | None = None,
) -> None:
    """Check one demonstration; with a tokenizer also render it as upstream does, for the error of its template."""
    place, value = f"{where}: column {column!r}, row {index}", row.get(column)
    messages = _as_messages(value)
    if column == "prompt":
        check_demonstration(row, index, where)
    else:
        check_text(messages, place)
        if column in ("messages", "conversations") and not isinstance(value, list):
            raise ValueError(f"{place} is {kind_of(value)}. Give a list of messages, or call the column 'text'.")
    # Upstream looks at the first row to see what all of them are.
    check_same_kind(value, place, first, "row 0")
    if tokenizer is None:
        return
    with in_row(place):
        kwargs = {"chat_template": chat_template, **template_kwargs(row)}
        render(tokenizer, messages, **kwargs, **({"add_generation_prompt": True} if column == "prompt" else {}))
    if column == "prompt":
        with in_row(f"{where}: column 'completion', row {index}"):
            render(tokenizer, [*messages, *_as_messages(row["completion"])], **kwargs)


def _as_messages(value: Any) -> Any:
    """The value with `from` and `value` called `role` and `content`, as upstream calls them."""
    if isinstance(value, list):
        return [_as_messages(item) for item in value]
    names = {"from": "role", "value": "content"}
    return {names.get(key, key): entry for key, entry in value.items()} if isinstance(value, Mapping) else value


# -- prompts -----------------------------------------------------------------------------------------------------------


def filter_prompts(dataset: Any, tokenizer: Any, max_prompt_length: int | None, name: str) -> Any:
    """Check the `prompt` column; drop prompts of more than `max_prompt_length` tokens, with one line that counts them.

    Columns with a name under which reward functions get something of the trainer's (`completions`, `truncated`, ...)
    are left out, and a line says so. A streamed dataset is checked and filtered as it flows, so its drops cannot be
    counted beforehand. Messages come back without the nulls that Arrow added.
    """
    if isinstance(dataset, dict):
        return {k: filter_prompts(part, tokenizer, max_prompt_length, f"{name}[{k}]") for k, part in dataset.items()}
    if not isinstance(dataset, Dataset | IterableDataset):
        return dataset
    require_columns(dataset, ["prompt"], name)
    taken = [column for column in column_names(dataset) if column in _HANDED_OVER]
    if taken:
        logger.warning(
            "%s: left out its %s: reward functions get the trainer's own under these names. Rename a column that they "
            "are to read.", name, _quoted(taken),
        )  # fmt: skip
        dataset = dataset.remove_columns(taken)
    dataset = without_padding(dataset)
    if isinstance(dataset, IterableDataset):
        kwargs = {"tokenizer": tokenizer, "limit": max_prompt_length, "name": name}
        return dataset.filter(_fits, with_indices=True, fn_kwargs=kwargs)
    lengths, first = [], None
    for row, prompt in enumerate(dataset["prompt"]):
        lengths.append(_prompt_length(prompt, row, tokenizer, name))
        first = prompt if row == 0 else first
        check_same_kind(prompt, f"{name}: column 'prompt', row {row}", first, "row 0")
    if max_prompt_length is None or not lengths:
        return dataset
    kept = [row for row, length in enumerate(lengths) if length <= max_prompt_length]
    if not kept:
        raise ValueError(
            f"{name}: all {len(lengths)} prompts are longer than max_prompt_length={max_prompt_length} tokens "
            f"(the shortest has {min(lengths)}). Raise max_prompt_length."
        )
    if len(kept) == len(lengths):
        return dataset
    logger.warning(
        "%s: dropped %d of %d prompts longer than max_prompt_length=%d tokens.",
        name, len(lengths) - len(kept), len(lengths), max_prompt_length,
    )  # fmt: skip
    return dataset.select(kept)


def _prompt_length(prompt: Any, row: int, tokenizer: Any, name: str) -> int:
    """Tokens of a prompt, which is refused if it is no text, or if the chat template refuses it."""
    place = f"{name}: column 'prompt', row {row}"
    check_text(prompt, place)
    with in_row(place):
        return len(encode_prompt(tokenizer, prompt))


def _fits(row: Mapping[str, Any], index: int, tokenizer: Any, limit: int | None, name: str) -> bool:
    length = _prompt_length(row.get("prompt"), index, tokenizer, name)
    return limit is None or length <= limit
