"""Cells of a spreadsheet, and how text and ids come through one unchanged.

A spreadsheet reads a CSV cell as a number, a date or a formula where it looks like one, holds 32,767 characters in a
cell, and saves in the encoding, with the separator and the decimal sign of its language.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_CELL = 32_767  # characters, of Excel and LibreOffice
# Letters that hexadecimal has not: no number, no exponent, no date, no word that a spreadsheet knows.
_LETTERS = "ghjkmnpqrstvwxyz"
_TO_LETTERS = str.maketrans("0123456789abcdef", _LETTERS)
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # the last four are what an Asian keyboard types for the first
_LONGEST_FIELD = 2**31 - 1  # what the csv module takes on every system


def letters_of(hexadecimal: str) -> str:
    """An id that no spreadsheet rewrites, one letter for each hexadecimal digit; 582394e15 would become a number."""
    return hexadecimal.lower().translate(_TO_LETTERS)


def is_odd(letters: str) -> bool:
    """Whether the number that `letters_of` was made from is odd."""
    return _LETTERS.index(letters[-1]) % 2 == 1


def inert(cell: str) -> str:
    """A cell that a spreadsheet would run as a formula, as text. Answers are a language model's: anything may come."""
    return "'" + cell if cell.startswith(_FORMULA) else cell


def is_long(text: str) -> bool:
    """Whether a spreadsheet would keep the beginning of `text` alone; it counts in units of UTF-16."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2 > LONGEST_CELL


def was_cut(cell: str, written: str) -> bool:
    """Whether what came back of `written` is only its beginning; line ends, blanks and the encoding may differ."""
    came, whole = _plain(cell), _plain(written)
    return is_long(written) and len(came) < len(whole) and (not is_long(came) or whole.startswith(came))


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def decode(raw: bytes) -> str:
    """The text of a file that a spreadsheet saved. What is read back (ids, replies) is ASCII in every encoding."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # "Unicode text"
        return raw.decode("utf-16", errors="replace")
    return raw.decode("utf-8-sig", errors="replace")


def read_csv(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(row number as a spreadsheet shows it, column → cell) of every row that is not blank."""
    separator = re.match(r"sep=(.)\s*?(\r\n|\r|\n)", text)  # a first line of Excel's own
    text = text[separator.end() :] if separator else text
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    delimiter = separator[1] if separator else max(",;\t", key=header.count)
    with _any_length():
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    names = [name.strip() for name in rows[0]] if rows else []
    for number, cells in enumerate(rows[1:], 3 if separator else 2):
        if any(cell.strip() for cell in cells):
            yield number, dict(zip(names, cells, strict=False))


@contextmanager
def _any_length() -> Iterator[None]:
    """Inside, a cell may have any length; the csv module refuses one over 131,072 characters otherwise."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
