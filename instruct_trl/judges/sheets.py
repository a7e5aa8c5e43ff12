"""Files that people fill in: CSV for spreadsheets, JSON lines for labeling tools. Bad cells are all named at once."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from instruct_trl.judges.cells import decode, inert, letters_of, read_csv, was_cut

Columns = Mapping[str, Sequence[str]]  # column to fill in → valid values
Rows = Mapping[str, Mapping[str, str]]  # id → column to read → text

_SHOWN = 10


def write_sheet(path: Path, rows: Rows, fill: Columns) -> None:
    """Write rows with their `id`, what is to be read, and empty columns to fill in; never over a file that exists.

    Raises:
        FileExistsError: the file is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"id": key, **row, **dict.fromkeys(fill, "")} for key, row in rows.items()]
    # The signature makes spreadsheets read the file as UTF-8; half a surrogate pair, which it has not, becomes "?".
    encoding = "utf-8-sig" if path.suffix == ".csv" else "utf-8"
    with path.open("x", encoding=encoding, errors="replace", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, fieldnames=list(lines[0]) if lines else ["id", *fill])
            writer.writeheader()
            writer.writerows({name: inert(cell) for name, cell in line.items()} for line in lines)
        else:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def read_sheet(path: Path, rows: Rows, fill: Columns, allow_unfilled: bool = False) -> dict[str, dict[str, str]] | None:
    """What was filled in: id → column → value in lower case, "" where it was left empty and that is allowed.

    Args:
        path: the file that came back.
        rows: what was written; ids of hexadecimal digits, as older sheets have, are read as well.
        fill: the columns to fill in.
        allow_unfilled: whether cells may be empty.

    Returns:
        None where no cell of the file is filled in yet.

    Raises:
        ValueError: missing columns, rows that are missing, twice there or not of `rows`, texts that the spreadsheet
            cut, empty cells, unknown values; each with its row, column, value and remedy, the first ten of them.
    """
    lines = _lines(path)
    missing = [name for name in ("id", *fill) if lines and name not in lines[0][1]]
    if missing:
        raise ValueError(
            f"{path}: there is no column {missing[0]!r}, only {', '.join(lines[0][1])}. Restore its header, or fill in "
            "a fresh copy of the file."
        )
    problems, found = _check_ids(lines, rows)
    if not problems and not any(_value(line.get(name)) for _, line in lines for name in fill):
        return None
    for key, (number, line) in found.items():
        problems += _check_texts(number, line, rows[key])
    for number, line in lines:
        problems += _check_cells(number, line, fill, allow_unfilled)
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"{path} cannot be read yet:\n{shown}{more}")
    return {key: {name: _value(line.get(name)) for name in fill} for key, (_, line) in found.items()}


def _lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(row number as an editor shows it, cells)."""
    text = decode(path.read_bytes())
    return list(read_csv(text)) if path.suffix == ".csv" else list(_read_jsonl(path, text))


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}). Mend the line.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: {line.strip()!r:.80} is no JSON object. Mend the line.")
        yield number, row


def _check_ids(
    lines: list[tuple[int, dict[str, Any]]], rows: Rows
) -> tuple[list[str], dict[str, tuple[int, dict[str, Any]]]]:
    """(problems, id → its row)."""
    problems: list[str] = []
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    for number, line in lines:
        shown = str(line.get("id") or "").strip()
        key = next((key for key in (shown.lower(), letters_of(shown)) if key in rows), None)
        if key is None:
            problems.append(
                f"row {number}, column 'id': {shown!r} is none of this evaluation's. {_REMEDY[_is_number(shown)]}"
            )
        elif key in found:
            problems.append(f"row {number}, column 'id': {shown!r} is there twice. Remove one of the two rows.")
        else:
            found[key] = number, line
    lost = [key for key in rows if key not in found]
    if lost:
        problems.insert(
            0,
            f"{len(lost)} of {len(rows)} rows are missing, such as id {min(lost)!r}. Put them back from a fresh file, "
            "or evaluate the answers that this file was made for.",
        )
    return problems, found


_REMEDY = {
    False: "The file belongs to other answers, or the cell was changed: restore it, or remove the row.",
    True: "A spreadsheet made a number of the id: copy the ids from a fresh file, with that column imported as text.",
}


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "."))
    except ValueError:
        return False
    return True


def _check_texts(number: int, line: Mapping[str, Any], written: Mapping[str, str]) -> list[str]:
    """The columns to read: a text that was cut was judged by its beginning."""
    return [
        f"row {number}, column {name!r}: a spreadsheet cut the text, {len(text):,} characters long, at "
        f"{len(str(line[name])):,}, so that whoever filled in the row read no more. Judge it from a jsonl file "
        "(--people_file_type jsonl), then put the whole text back from a fresh file."
        for name, text in written.items()
        if name in line and was_cut(str(line[name]), inert(text))
    ]


def _check_cells(number: int, line: Mapping[str, Any], fill: Columns, allow_unfilled: bool) -> list[str]:
    problems = []
    for name, choices in fill.items():
        value = _value(line.get(name))
        if not value and not allow_unfilled:
            problems.append(f"row {number}, column {name!r}: not filled in. Write {_either(choices)}.")
        elif value and value not in choices:
            problems.append(f"row {number}, column {name!r}: {line.get(name)!r} is unknown. Write {_either(choices)}.")
    return problems


def _value(cell: Any) -> str:
    """A cell as it is compared: trimmed, in lower case, a spreadsheet's 5.0 or 5,0 as 5."""
    text = "" if cell is None else str(cell).strip().lower()
    return re.sub(r"(?<=\d)[.,]0+$", "", text)


def _either(choices: Sequence[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"
