"""People as judges, through files that come back: written blind and shuffled, filled in by hand, read again.

`<folder>/compare.csv` has one row per pair and `rate.csv` one row per answer; `compare.md` and `rate.md` say what to
do. No column names a model. A hash decides which answer of a pair is A, so there is no key file to lose or to see.

A spreadsheet reads a cell as a number, a date or a formula if it looks like one, keeps 32,767 characters per cell, and
saves with the encoding, the separator and the decimal sign of its language. The second half of this file copes.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from instruct_trl.judges.base import Answer, Pair, Question, Reply, as_text, digest
from instruct_trl.judges.wording import CRITERION, read_choice

Columns = Mapping[str, Sequence[str]]  # column to fill in → valid values
Rows = Mapping[str, Mapping[str, str]]  # id → column to read → text
Sheet = dict[str, dict[str, str]]  # id → column to fill in → value
Lines = Iterator[tuple[int, dict[str, Any]]]  # row number as a spreadsheet shows it, column → cell

LONGEST_CELL = 32_767  # characters, of Excel and LibreOffice
_SHOWN = 10  # problems per error
_BETTER = ("a", "b", "tie")
_WORKBOOKS = (".xlsx", ".xls", ".ods")
# Letters that hexadecimal has not: no number, no exponent, no date, no word that a spreadsheet knows.
_LETTERS = "ghjkmnpqrstvwxyz"
_TO_LETTERS = str.maketrans("0123456789abcdef", _LETTERS)
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # the last four are what an Asian keyboard types for the first
_COMPARE = """# Which answer is better?

Open `{file}`. Each row has a prompt and two answers. Read both to the end, then write into the column `better`:

- `a` if answer A is better,
- `b` if answer B is better,
- `tie` if neither is.

{criterion}
"""
_RATE = """# About each answer

Open `{file}`. Each row has a prompt and one answer. Read it to the end, then fill in every column after `answer`:

{questions}
"""
_RULES = """
Change no other column and remove no row; their order does not matter. Save the file in the same format and leave it
in this folder. If several people judge, give each a copy named `{stem}_<who>{suffix}` and put the filled copies here.
"""


class WaitingForPeople(Exception):
    """The file is written and not filled in yet; the message says where it is and what to do."""


class PeopleJudge:
    """People who fill in files. The first call writes a file and raises `WaitingForPeople`; a later one reads it.

    A file that is there is never overwritten. Several people fill in copies, `compare_<who>.csv` and `rate_<who>.csv`:
    the verdict of most of them counts, and the mean of their ratings.

    Args:
        folder: where the files are.
        file_type: "csv" for spreadsheets, "jsonl" for labeling tools.
        seed: decides the order of the rows and which answer is A.
        criterion: what makes an answer better, for the instructions.
        allow_unfilled: count rows that are not filled in as invalid; otherwise they are refused.

    Attributes:
        agreement: (share of equal verdicts, number of comparisons) over pairs of people on the same row, the paper's
            72.6 %; None with one person.

    Raises:
        ValueError: another file type; when reading, whatever `read_sheet` finds.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        file_type: str = "csv",
        seed: int = 0,
        criterion: str = CRITERION,
        allow_unfilled: bool = False,
    ):
        if file_type not in ("csv", "jsonl"):
            raise ValueError(f"file_type is {file_type!r}; give csv or jsonl.")
        self.folder, self.suffix, self.seed = Path(folder), f".{file_type}", seed
        self.criterion, self.allow_unfilled = criterion, allow_unfilled
        self.agreement: tuple[float, int] | None = None
        self.name = "a person"

    def compare(self, pairs: Sequence[Pair]) -> list[Reply]:
        """Write `compare` with a row per pair, or read it."""
        keys = [self._key(pair.answer, pair.baseline) for pair in pairs]
        rows = {}
        for key, pair in zip(keys, pairs, strict=True):
            if not pair.same:
                a, b = _sides(key, pair)
                rows[key] = {"prompt": as_text(pair.answer.prompt), "answer_a": a, "answer_b": b}
        guide = _COMPARE.format(file=f"compare{self.suffix}", criterion=self.criterion)
        filled = self._filled("compare", rows, {"better": _BETTER}, guide)
        said = {key: [sheet[key]["better"] for sheet in filled] for key in rows}
        same = [a == b for words in said.values() for a, b in combinations(filter(None, words), 2)]
        self.agreement = (fmean(same), len(same)) if same else None
        return [
            Reply(0.5) if pair.same else _majority(key, pair, said[key]) for key, pair in zip(keys, pairs, strict=True)
        ]

    def rate(self, answers: Sequence[Answer], questions: Sequence[Question]) -> list[dict[str, Reply]]:
        """Write `rate` with a row per answer, or read it."""
        keys = [self._key(answer) for answer in answers]
        rows = {k: {"prompt": as_text(a.prompt), "answer": a.text} for k, a in zip(keys, answers, strict=True)}
        lines = [f"- `{q.name}`: {q.text} Write {', '.join(q.choices)}." for q in questions]
        guide = _RATE.format(file=f"rate{self.suffix}", questions="\n".join(lines))
        filled = self._filled("rate", rows, {q.name: q.choices for q in questions}, guide)
        said = [
            {q.name: [read_choice(sheet[key][q.name], q, "not filled in") for sheet in filled] for q in questions}
            for key in keys
        ]
        return [{name: _mean(replies) for name, replies in row.items()} for row in said]

    def _key(self, *answers: Answer) -> str:
        """A row's id. It does not depend on which of two answers is the model's, so it gives nothing away."""
        texts = sorted(answer.text for answer in answers)
        return digest(str(self.seed), as_text(answers[0].prompt), *texts)[:16].translate(_TO_LETTERS)

    def _filled(self, kind: str, rows: Rows, fill: Columns, guide: str) -> list[Sheet]:
        """Each person's sheet; writes the file and its guide if there is none.

        Raises:
            WaitingForPeople: nothing is filled in yet.
        """
        if not rows:
            return []
        blank = self.folder / f"{kind}{self.suffix}"
        if not blank.exists():
            write_sheet(blank, dict(sorted(rows.items())), fill)  # by hash: shuffled, the same way each time
            rules = _RULES.format(stem=kind, suffix=self.suffix)
            blank.with_suffix(".md").write_text(guide + rules, encoding="utf-8")
        copies = sorted(self.folder.glob(f"{kind}_*{self.suffix}"))
        first, *others = [read_sheet(path, rows, fill, self.allow_unfilled) for path in [blank, *copies]]
        # Somebody may fill in the blank, then copy it under a name of theirs.
        filled = [sheet for sheet in ([] if first in others else [first]) + others if sheet is not None]
        if not filled:
            raise WaitingForPeople(self._waiting(blank, rows))
        self.name = "a person" if len(filled) == 1 else f"{len(filled)} people"
        return filled

    def _waiting(self, blank: Path, rows: Rows) -> str:
        text = f"{len(rows)} rows wait to be filled in: {blank}. {blank.with_suffix('.md')} says how. Then run again."
        long = sum(_is_long(cell) for row in rows.values() for cell in row.values())
        if long and self.suffix == ".csv":
            text += (
                f" {long} texts have more than the {LONGEST_CELL:,} characters that a spreadsheet keeps of a cell: "
                "have them judged from a jsonl file, --people_file_type jsonl."
            )
        books = (path.name for path in sorted(self.folder.glob(f"{blank.stem}*")) if path.suffix in _WORKBOOKS)
        book = next(books, None)
        return text + (f" {book!r} is not read: save it as a {self.suffix} file." if book else "")


def _sides(key: str, pair: Pair) -> list[str]:
    """[answer A, answer B]: in alphabetical order or the other way, by the row's hash."""
    return sorted([pair.answer.text, pair.baseline.text], reverse=_LETTERS.index(key[-1]) % 2 == 1)


def _majority(key: str, pair: Pair, words: Sequence[str]) -> Reply:
    """The verdict that most people gave; a tie if two are equally common."""
    winners = {"tie": 0.5} | {
        word: float(side == pair.answer.text) for word, side in zip(_BETTER, _sides(key, pair), strict=False)
    }
    (value, most), *others = Counter(winners[word] for word in words if word).most_common() or [(-1.0, 0)]
    if not most:
        return Reply(None, "not filled in")
    return Reply(0.5 if others and others[0][1] == most else value)


def _mean(replies: Sequence[Reply]) -> Reply:
    """The mean of several people's replies; the first one's remark if none of them has a value."""
    values = [reply.value for reply in replies if reply.value is not None]
    return Reply(fmean(values)) if values else replies[0]


def write_sheet(path: Path, rows: Rows, fill: Columns) -> None:
    """Write rows with their `id`, the columns to read, and empty columns to fill in.

    Raises:
        FileExistsError: the file is there; it is never overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"id": key, **row, **dict.fromkeys(fill, "")} for key, row in rows.items()]
    # The signature makes spreadsheets read the file as UTF-8; half a surrogate pair, which it has not, becomes "?".
    encoding = "utf-8-sig" if path.suffix == ".csv" else "utf-8"
    with path.open("x", encoding=encoding, errors="replace", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, fieldnames=list(lines[0]))
            writer.writeheader()
            writer.writerows({name: _inert(cell) for name, cell in line.items()} for line in lines)
        else:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def read_sheet(path: Path, rows: Rows, fill: Columns, allow_unfilled: bool = False) -> Sheet | None:
    """The values that were filled in, in lower case; "" for an empty cell if that is allowed.

    Args:
        path: the file that came back.
        rows: what was written.
        fill: the columns to fill in.
        allow_unfilled: whether cells may be empty.

    Returns:
        None if no cell of the file is filled in yet.

    Raises:
        ValueError: missing columns; rows that are missing, doubled or unknown; texts that the spreadsheet cut; empty
            cells; unknown values. It names the first ten with their row, column, value and remedy.
    """
    raw = path.read_bytes()
    # Ids and values to read are ASCII in every encoding; "Unicode text" is UTF-16.
    utf_16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = raw.decode("utf-16" if utf_16 else "utf-8-sig", errors="replace")
    lines = list(_read_csv(text) if path.suffix == ".csv" else _read_jsonl(path, text))
    if lines and (missing := [name for name in ("id", *fill) if name not in lines[0][1]]):
        raise ValueError(
            f"{path}: there is no column {missing[0]!r}, only {', '.join(lines[0][1])}. Restore its header, or fill in "
            "a fresh copy of the file."
        )
    foreign: list[str] = []
    problems: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    for number, line in lines:
        shown = str(line.get("id") or "").strip()
        key = shown.lower() if shown.lower() in rows else shown.lower().translate(_TO_LETTERS)  # older sheets: digits
        if key in rows and key not in found:
            found[key] = line
            problems += _cut_texts(number, line, rows[key])
        else:
            foreign.append(f"row {number}, column 'id': {shown!r} {_foreign(shown, key in found)}")
        problems += _bad_cells(number, line, fill, allow_unfilled)
    if lost := rows.keys() - found.keys():
        text = f"{len(lost)} of {len(rows)} rows are missing, such as id {min(lost)!r}. Put them back from a fresh file"
        foreign.insert(0, f"{text}, or evaluate the answers that this file was made for.")
    if not foreign and not any(_value(line.get(name)) for line in found.values() for name in fill):
        return None
    if problems := foreign + problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise ValueError("\n  ".join([f"{path} cannot be read yet:", *problems[:_SHOWN], *more]))
    return {key: {name: _value(line.get(name)) for name in fill} for key, line in found.items()}


def _read_csv(text: str) -> Lines:
    """Every row that is not blank."""
    separator = re.match(r"sep=(.)\s*?(\r\n|\r|\n)", text)  # a first line of Excel's own
    text = text[separator.end() :] if separator else text
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    delimiter = separator[1] if separator else max(",;\t", key=header.count)
    limit = csv.field_size_limit(2**31 - 1)  # the csv module refuses a cell over 131,072 characters otherwise
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    finally:
        csv.field_size_limit(limit)
    names = [name.strip() for name in rows[0]] if rows else []
    for number, cells in enumerate(rows[1:], 3 if separator else 2):
        if any(cell.strip() for cell in cells):
            yield number, dict(zip(names, cells, strict=False))


def _read_jsonl(path: Path, text: str) -> Lines:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error}). Fix the line.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: {line.strip()!r:.80} is not a JSON object. Fix the line.")
        yield number, row


def _foreign(shown: str, twice: bool) -> str:
    if twice:
        return "is there twice. Remove one of the two rows."
    if re.fullmatch(r"[\d.,]+(E[+-]?\d+)?", shown):
        remedy = "A spreadsheet made a number of the id: copy the ids from a fresh file, importing them as text."
    else:
        remedy = "The file belongs to other answers, or the cell was changed: restore it, or remove the row."
    return f"is none of this evaluation's. {remedy}"


def _cut_texts(number: int, line: Mapping[str, Any], written: Mapping[str, str]) -> Iterator[str]:
    """Texts that came back cut: whoever filled in the row judged the beginning alone."""
    for name, text in written.items():
        cell = _inert(text)
        # Line ends, blanks and the encoding may differ.
        came, whole = " ".join(str(line.get(name, cell)).split()), " ".join(cell.split())
        if _is_long(cell) and len(came) < len(whole) and (not _is_long(came) or whole.startswith(came)):
            yield (
                f"row {number}, column {name!r}: a spreadsheet cut the text, {len(text):,} characters long, at "
                f"{len(str(line[name])):,}, so that whoever filled in the row read no more. Judge it from a jsonl file "
                "(--people_file_type jsonl), then put the whole text back from a fresh file."
            )


def _bad_cells(number: int, line: Mapping[str, Any], fill: Columns, allow_unfilled: bool) -> Iterator[str]:
    for name, choices in fill.items():
        value = _value(line.get(name))
        if value not in choices and (value or not allow_unfilled):
            problem = f"{line.get(name)!r} is unknown" if value else "not filled in"
            either = f"{', '.join(choices[:-1])} or {choices[-1]}"
            yield f"row {number}, column {name!r}: {problem}. Write {either}."


def _value(cell: Any) -> str:
    """A cell as it is compared: trimmed, in lower case, a spreadsheet's 5.0 or 5,0 as 5."""
    return re.sub(r"(?<=\d)[.,]0+$", "", "" if cell is None else str(cell).strip().lower())


def _inert(cell: str) -> str:
    """The cell as text, even if a spreadsheet would run it as a formula: answers may hold anything."""
    return "'" + cell if cell.startswith(_FORMULA) else cell


def _is_long(text: str) -> bool:
    """Whether a spreadsheet would keep only the beginning of `text`; it counts in units of UTF-16."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2 > LONGEST_CELL
