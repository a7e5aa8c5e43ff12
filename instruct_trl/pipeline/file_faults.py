"""Where a data file is at fault. It is asked only when `datasets` could not read the file."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instruct_trl.data.rows import shown

FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

_ONE_PER_LINE = "A json lines file has one object {...} per line."


def fault_in(path: Path) -> str | None:
    """The fault of a json, jsonl, csv or parquet file, its place, and the remedy; None if none is found.

    Lines count from 1, as editors count them; rows of a json array from 0.
    """
    try:
        if not path.stat().st_size:
            return f"{path} is empty: it has no rows. Write it again."
        kind = FILE_TYPES[path.suffix.lower()]
        if kind == "parquet":
            return _parquet_fault(path)
        return _encoding_fault(path) or (_json_fault(path) if kind == "json" else _csv_fault(path))
    except OSError as error:
        return f"{path} cannot be opened: {error.strerror}. Check the file and its permissions."


def _encoding_fault(path: Path) -> str | None:
    to_utf8 = f"-t UTF-8 {path.name} > utf8{path.suffix}"
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return f"{path} is in UTF-16. Convert it to UTF-8: iconv -f UTF-16 {to_utf8}"
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                before = line[max(0, error.start - 20) : error.start].decode("utf-8", "replace")
                return (
                    f"{path}, line {number}: byte {line[error.start]:#04x} after {before!r} is not UTF-8. If the file "
                    f"is in Latin-1 or Windows-1252, convert it: iconv -f WINDOWS-1252 {to_utf8}"
                )
    return None


class _FaultError(ValueError):
    """Carries the place and the kind of a fault out of the iteration over rows."""


def _json_fault(path: Path) -> str | None:
    columns = rows = 0
    try:
        for place, row in _json_rows(path):
            rows += 1
            if not isinstance(row, dict):
                raise _FaultError(f"{place}: {shown(row)} is {_kind(row)}, not an object. {_ONE_PER_LINE}")
            columns += len(row)
    except _FaultError as error:
        return f"{path}, {error}"
    return None if columns else f"{path} has no {'columns' if rows else 'rows'}. Write it again."


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of each row: of each line, or of the one array that the file is."""
    with path.open(encoding="utf-8-sig") as file:
        lines = (line.strip() for line in file if line.strip())
        first, second = next(lines, ""), next(lines, "")
        file.seek(0)
        if first == "{" or (first.startswith("[") and not (second and first.endswith("]"))):
            whole = _parse(file.read(), None)
            yield from ((f"row {i}", row) for i, row in enumerate(whole if isinstance(whole, list) else [whole]))
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", _parse(line, number)


def _parse(text: str, line: int | None) -> Any:
    """One value; `line` is its place, None if the text is a whole file."""
    where = "" if line is None else f"line {line}: "
    try:
        value = json.loads(text, object_pairs_hook=_once)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except json.JSONDecodeError as error:
        around = error.doc[max(0, error.pos - 30) : error.pos + 30]
        raise _FaultError(
            f"line {line or error.lineno}: broken JSON ({error.msg}, column {error.colno}), near {shown(around)}. Mend "
            f"the line, or write the file anew if it was cut off. {'' if line is None else _ONE_PER_LINE}".rstrip()
        ) from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise _FaultError(f"{where}holds half a character ({half!r}). Write the whole one.") from error
    except _FaultError as error:
        raise _FaultError(f"{where}{error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise _FaultError(f"an object names {twice!r} twice. Keep one of them.")
    return dict(pairs)


def _kind(value: Any) -> str:
    for types, kind in ((dict, "an object"), (list, "a list"), (str, "text"), (bool, "true or false")):
        if isinstance(value, types):
            return kind
    return "null" if value is None else "a number"


def _csv_fault(path: Path) -> str | None:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        line = rows = 0  # the line before the row that is read, and the rows below the header
        try:
            header = next(reader, [])
            line = reader.line_num
            for row in reader:
                rows += 1
                if len(row) > len(header):
                    return (
                        f"{path}, line {line + 1}: {len(row)} cells, where the header has {len(header)}. Put cells "
                        'that hold commas into "quotes".'
                    )
                line = reader.line_num
        except csv.Error as error:
            return f'{path}, line {line + 1}: {error}. Close every quote, and write one inside a cell as "".'
    return None if rows else f"{path} has no rows below its header. Write it again."


def _parquet_fault(path: Path) -> str | None:
    magic = b"PAR1"
    data = path.read_bytes()
    if not data.startswith(magic):
        return f"{path} is no parquet file: it begins with {shown(data[:12])}. Give it the ending of what it is."
    if not data.endswith(magic):
        return f"{path} is cut off: the end of a parquet file is missing. Copy, download or write it again."
    return None
