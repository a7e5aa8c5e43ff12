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
    encode_prompt,
    in_row,
    render,
    template_kwargs,
    without_padding,
)

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
    check_same_kind(row["prompt"], f"{where}, row {index}: the prompt", row["completion"], "the completion")


def check_same_kind(one: Any, name: str, other: Any, other_name: str) -> None:
    """Refuse plain text beside messages."""
    if isinstance(one, str) != isinstance(other, str):
        raise ValueError(
            f"{name} is {kind_of(one)} and {other_name} is {kind_of(other)}. Make both plain text, or both lists of "
            "messages."
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


logger = logging.getLogger(__name__)

# What a trainer itself hands to reward functions beside a row's own columns.
_HANDED_OVER = (
    *("prompts", "completions", "completion_ids", "prompt_ids", "truncated"),
    *("trainer_state", "log_extra", "log_metric"),
)


def filter_prompts(dataset: Any, tokenizer: Any, max_prompt_length: int | None, name: str) -> Any:
    """Check the `prompt` column; drop prompts of more than `max_prompt_length` tokens, with one line that counts them.

    Columns with a name under which reward functions get something of the trainer's (`completions`, `truncated`, ...)
    are left out, and a line says so. A streamed dataset is checked and filtered as it flows, so its drops cannot be
    counted beforehand. Messages come back without the nulls that Arrow added.

    Raises:
        ValueError: no `prompt` column, a prompt that is empty or no text, one that the chat template refuses, text
            among messages, or none short enough.
    """
    if isinstance(dataset, dict):
        return {k: filter_prompts(part, tokenizer, max_prompt_length, f"{name}[{k}]") for k, part in dataset.items()}
    if not isinstance(dataset, Dataset | IterableDataset):
        return dataset
    require_columns(dataset, ["prompt"], name)
    dataset = without_padding(_without_handed_over(dataset, name))
    if isinstance(dataset, IterableDataset):
        kwargs = {"tokenizer": tokenizer, "limit": max_prompt_length, "name": name}
        return dataset.filter(_fits, with_indices=True, fn_kwargs=kwargs)
    return _filter_rows(dataset, tokenizer, max_prompt_length, name)


def _without_handed_over(dataset: Any, name: str) -> Any:
    taken = [column for column in column_names(dataset) if column in _HANDED_OVER]
    if not taken:
        return dataset
    logger.warning(
        "%s: left out its %s: reward functions get the trainer's own under these names. Rename a column that they are "
        "to read.", name, ", ".join(map(repr, taken)),
    )  # fmt: skip
    return dataset.remove_columns(taken)


def _fits(row: Mapping[str, Any], index: int, tokenizer: Any, limit: int | None, name: str) -> bool:
    length = _checked_length(row.get("prompt"), tokenizer, f"{name}: column 'prompt', row {index}")
    return limit is None or length <= limit


def _checked_length(prompt: Any, tokenizer: Any, place: str) -> int:
    """Tokens of a prompt, which is refused if it is no text, or if the chat template refuses it."""
    check_text(prompt, place)
    with in_row(place):
        return len(encode_prompt(tokenizer, prompt))


def _filter_rows(dataset: Dataset, tokenizer: Any, max_prompt_length: int | None, name: str) -> Dataset:
    prompts = list(dataset["prompt"])
    lengths = []
    for row, prompt in enumerate(prompts):
        place = f"{name}: column 'prompt', row {row}"
        lengths.append(_checked_length(prompt, tokenizer, place))
        if type(prompt) is not type(prompts[0]):
            raise ValueError(
                f"{place} is {kind_of(prompt)}, and row 0 is {kind_of(prompts[0])}. Make all of them plain text, or "
                "all of them lists of messages."
            )
    if max_prompt_length is None or not prompts:
        return dataset
    kept = [row for row, length in enumerate(lengths) if length <= max_prompt_length]
    if not kept:
        raise ValueError(
            f"{name}: all {len(prompts)} prompts are longer than max_prompt_length={max_prompt_length} tokens "
            f"(the shortest has {min(lengths)}). Raise max_prompt_length."
        )
    if len(kept) < len(prompts):
        logger.warning(
            "%s: dropped %d of %d prompts longer than max_prompt_length=%d tokens.",
            name, len(prompts) - len(kept), len(prompts), max_prompt_length,
        )  # fmt: skip
    return dataset.select(kept) if len(kept) < len(prompts) else dataset
