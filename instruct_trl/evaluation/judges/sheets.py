"""Files that people fill in: CSV for spreadsheets, JSON lines for labeling tools. Bad cells are all named at once."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

Columns = Mapping[str, Sequence[str]]  # column to fill in → valid values

_SHOWN = 10


def write_sheet(path: Path, rows: Mapping[str, Mapping[str, str]], fill: Columns) -> None:
    """Write rows with their `id`, what is to be read, and empty columns to fill in; never over a file that exists.

    Raises:
        FileExistsError: the file is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"id": key, **row, **dict.fromkeys(fill, "")} for key, row in rows.items()]
    # The signature makes spreadsheets read the file as UTF-8.
    with path.open("x", encoding="utf-8-sig" if path.suffix == ".csv" else "utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, fieldnames=list(lines[0]) if lines else ["id", *fill])
            writer.writeheader()
            writer.writerows({name: _inert(cell) for name, cell in line.items()} for line in lines)
        else:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _inert(cell: str) -> str:
    """A cell that a spreadsheet would run as a formula, as text. Answers are a language model's: anything may come."""
    return "'" + cell if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


def read_sheet(
    path: Path, ids: Sequence[str], fill: Columns, allow_unfilled: bool = False
) -> dict[str, dict[str, str]] | None:
    """What was filled in: id → column → value in lower case, "" where it was left empty and that is allowed.

    Returns:
        None where no cell of the file is filled in yet.

    Raises:
        ValueError: missing columns, rows that are missing, twice there or not of `ids`, empty cells, unknown values;
            each with its row, column, value and remedy, the first ten of them.
    """
    rows = _rows(path)
    missing = [name for name in ("id", *fill) if rows and name not in rows[0][1]]
    if missing:
        raise ValueError(
            f"{path}: there is no column {missing[0]!r}, only {', '.join(rows[0][1])}. Restore its header, or fill in "
            "a fresh copy of the file."
        )
    problems, found = _check_ids(rows, ids)
    if not problems and not any(_value(row.get(name)) for _, row in rows for name in fill):
        return None
    for number, row in rows:
        problems += _check_cells(number, row, fill, allow_unfilled)
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"{path} cannot be read yet:\n{shown}{more}")
    return {key: {name: _value(row.get(name)) for name in fill} for key, row in found.items()}


def _rows(path: Path) -> list[tuple[int, dict[str, object]]]:
    """(row number as an editor shows it, cells)."""
    # A spreadsheet may save in its own encoding: what is read back (ids, replies) is ASCII in all of them.
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if path.suffix == ".csv":
        header = text.partition("\n")[0]
        delimiter = max(",;\t", key=header.count)  # what a spreadsheet saves depends on its language
        return [(i, dict(row)) for i, row in enumerate(csv.DictReader(io.StringIO(text), delimiter=delimiter), 2)]
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}). Mend the line.") from None
        if row is not None:
            rows.append((number, row))
    return rows


def _check_ids(rows: list[tuple[int, dict]], ids: Sequence[str]) -> tuple[list[str], dict[str, dict]]:
    problems: list[str] = []
    found: dict[str, dict] = {}
    known = set(ids)
    for number, row in rows:
        key = str(row.get("id") or "").strip()
        if key not in known:
            problems.append(
                f"row {number}, column 'id': {key!r} is none of this evaluation's. The file belongs to other answers, "
                "or the cell was changed: restore it, or remove the row."
            )
        elif key in found:
            problems.append(f"row {number}, column 'id': {key!r} is there twice. Remove one of the two rows.")
        found[key] = row
    lost = [key for key in known if key not in found]
    if lost:
        problems.insert(
            0,
            f"{len(lost)} of {len(known)} rows are missing, such as id {min(lost)!r}. Put them back from a fresh file, "
            "or evaluate the answers that this file was made for.",
        )
    return problems, found


def _check_cells(number: int, row: Mapping[str, object], fill: Columns, allow_unfilled: bool) -> list[str]:
    problems = []
    for name, choices in fill.items():
        value = _value(row.get(name))
        if not value and not allow_unfilled:
            problems.append(f"row {number}, column {name!r}: not filled in. Write {_either(choices)}.")
        elif value and value not in choices:
            problems.append(f"row {number}, column {name!r}: {row.get(name)!r} is unknown. Write {_either(choices)}.")
    return problems


def _value(cell: object) -> str:
    """A cell as it is compared: trimmed, in lower case, a spreadsheet's 5.0 as 5."""
    text = "" if cell is None else str(cell).strip().lower()
    return text.removesuffix(".0")


def _either(choices: Sequence[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"
