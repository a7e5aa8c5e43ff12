"""People as judges, through files that come back: written blind and shuffled, filled in by hand, read again.

`<folder>/compare.csv` has one row a pair, `rate.csv` one row an answer, `compare.md` and `rate.md` say what to do. No
column names a model; which answer of a pair is A is settled by a hash, so that no key file can be lost or seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean

from instruct_trl.judges.base import Answer, Pair, Question, Reply, as_text, digest
from instruct_trl.judges.cells import LONGEST_CELL, is_long, is_odd, letters_of
from instruct_trl.judges.sheets import read_sheet, write_sheet
from instruct_trl.judges.wording import CRITERION, read_choice

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
_BETTER = ("a", "b", "tie")


class WaitingForPeople(Exception):
    """The file is written and not filled in yet; the message says where it is and what to do."""


class PeopleJudge:
    """People who fill in files. The first call writes a file and raises `WaitingForPeople`; a later one reads it.

    A file that is there is never overwritten. Several people fill in copies, `compare_<who>.csv` and `rate_<who>.csv`:
    the mean of their replies counts, and `agreement` says how often two of them named the same winner.

    Args:
        folder: where the files are.
        file_type: "csv" for spreadsheets, "jsonl" for labeling tools.
        seed: of the order of rows and of which answer is A.
        criterion: what makes an answer better, for the instructions.
        allow_unfilled: rows that are not filled in count as invalid; otherwise they are refused.

    Attributes:
        agreement: (share of equal verdicts, number of them) over pairs of people on the same row, the paper's 72.6 %;
            None with one person.

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
        self._people = 1

    @property
    def name(self) -> str:
        return "a person" if self._people == 1 else f"{self._people} people"

    def compare(self, pairs: Sequence[Pair]) -> list[Reply]:
        keys = [self._key(pair.answer, pair.baseline) for pair in pairs]
        rows = {}
        for key, pair in zip(keys, pairs, strict=True):
            if not pair.same:
                a, b = self._sides(key, pair)
                rows[key] = {"prompt": as_text(pair.answer.prompt), "answer_a": a, "answer_b": b}
        guide = _COMPARE.format(file=f"compare{self.suffix}", criterion=self.criterion)
        filled = self._filled("compare", rows, {"better": _BETTER}, guide)
        said = {key: [sheet[key]["better"] for sheet in filled] for key in rows}
        self.agreement = _agreement(list(said.values()))
        return [
            Reply(0.5) if pair.same else _majority([self._outcome(key, pair, word) for word in said[key]])
            for key, pair in zip(keys, pairs, strict=True)
        ]

    def rate(self, answers: Sequence[Answer], questions: Sequence[Question]) -> list[dict[str, Reply]]:
        keys = [self._key(answer) for answer in answers]
        rows = {
            key: {"prompt": as_text(answer.prompt), "answer": answer.text}
            for key, answer in zip(keys, answers, strict=True)
        }
        lines = [f"- `{q.name}`: {q.text} Write {', '.join(q.choices)}." for q in questions]
        guide = _RATE.format(file=f"rate{self.suffix}", questions="\n".join(lines))
        filled = self._filled("rate", rows, {q.name: q.choices for q in questions}, guide)
        return [
            {
                q.name: _mean([read_choice(sheet[key][q.name], q, "not filled in") for sheet in filled])
                for q in questions
            }
            for key in keys
        ]

    def _key(self, *answers: Answer) -> str:
        """The same whichever of two answers is the model's: a row does not betray it."""
        texts = sorted(answer.text for answer in answers)
        return letters_of(digest(str(self.seed), as_text(answers[0].prompt), *texts)[:16])

    def _sides(self, key: str, pair: Pair) -> list[str]:
        """(answer A, answer B): in alphabetical order or the other way, by the row's hash."""
        return sorted([pair.answer.text, pair.baseline.text], reverse=is_odd(key))

    def _outcome(self, key: str, pair: Pair, word: str) -> Reply:
        if word not in _BETTER:
            return Reply(None, "not filled in")
        if word == "tie":
            return Reply(0.5)
        chosen = self._sides(key, pair)[_BETTER.index(word)]
        return Reply(1.0 if chosen == pair.answer.text else 0.0)

    def _filled(
        self, kind: str, rows: dict[str, dict[str, str]], fill: dict[str, tuple[str, ...]], guide: str
    ) -> list[dict[str, dict[str, str]]]:
        """What each person filled in; writes the file and its guide where there is none.

        Raises:
            WaitingForPeople: nothing is filled in yet.
        """
        if not rows:
            return []
        blank = self.folder / f"{kind}{self.suffix}"
        if not blank.exists():
            write_sheet(blank, dict(sorted(rows.items())), fill)  # by hash: shuffled, the same way each time
            rules = _RULES.format(stem=kind, suffix=self.suffix)
            (self.folder / f"{kind}.md").write_text(guide + rules, encoding="utf-8")
        copies = sorted(self.folder.glob(f"{kind}_*{self.suffix}"))
        read = [read_sheet(path, rows, fill, self.allow_unfilled) for path in [blank, *copies]]
        if read[0] in read[1:]:
            read[0] = None  # somebody filled in the blank, then copied it under a name of theirs
        filled = [sheet for sheet in read if sheet is not None]
        if not filled:
            raise WaitingForPeople(
                f"{len(rows)} rows wait to be filled in: {blank}. {blank.with_suffix('.md')} says how. Then run again."
                + (_long_cells(rows) if self.suffix == ".csv" else "")
                + _other_formats(self.folder, kind, self.suffix)
            )
        self._people = len(filled)
        return filled


def _long_cells(rows: dict[str, dict[str, str]]) -> str:
    """A sentence where a spreadsheet would show the beginning of a text alone; "" where none is so long."""
    count = sum(is_long(text) for row in rows.values() for text in row.values())
    if not count:
        return ""
    return (
        f" {count} texts have more than the {LONGEST_CELL:,} characters that a spreadsheet keeps of a cell: have them "
        "judged from a jsonl file, --people_file_type jsonl."
    )


def _other_formats(folder: Path, kind: str, suffix: str) -> str:
    """A sentence where somebody saved a workbook, which is not read; "" where nobody did."""
    found = [path.name for path in sorted(folder.glob(f"{kind}*")) if path.suffix in (".xlsx", ".xls", ".ods")]
    return f" {found[0]!r} is not read: save it as a {suffix} file." if found else ""


def _majority(replies: Sequence[Reply]) -> Reply:
    """The reply that most people gave; a tie where two are equally common."""
    values = Counter(reply.value for reply in replies if reply.value is not None)
    if not values:
        return Reply(None, replies[0].said)
    (first, most), *others = values.most_common()
    return Reply(0.5 if others and others[0][1] == most else first)


def _mean(replies: Sequence[Reply]) -> Reply:
    """Of several people's replies to one thing; the first one's remark where none of them has a value."""
    values = [reply.value for reply in replies if reply.value is not None]
    return Reply(fmean(values)) if values else Reply(None, replies[0].said)


def _agreement(rows: Sequence[Sequence[str]]) -> tuple[float, int] | None:
    """Share of equal verdicts over all pairs of people on a row, and how many pairs; None without one."""
    same = [a == b for row in rows for a, b in combinations([word for word in row if word], 2)]
    return (fmean(same), len(same)) if same else None
