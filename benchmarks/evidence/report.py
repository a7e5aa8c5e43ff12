"""What `evidence.py` leaves: results.json, the table between two markers of a document, and the pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import table
from benchmarks.evidence.lab import DEFAULT_SEEDS
from benchmarks.evidence.text import CLAIM_TEXTS
from benchmarks.evidence.verdicts import Finding

MARKERS = ("<!-- table -->", "<!-- /table -->")


def report(
    findings: Sequence[Finding], about: dict[str, Any], folder: Path, pictures: Path, document: Path | None
) -> None:
    """Add the findings to `folder/results.json`; print the table, draw pictures, write the table into `document`."""
    from benchmarks.evidence.pictures import draw_all
    from instruct_trl.pipeline.stage import write_json

    kept = add(folder / "results.json", findings, about)
    write_json(folder / "results.json", kept)
    text = "\n\n".join([findings_table(kept), *other_settings(kept, about["plan"]), rules(), *samples(kept)])
    print("\n" + text + "\n")
    for path in draw_all({int(number): row["details"] for number, row in kept.items()}, pictures):
        print(f"Picture: {path}")
    print(f"{about['machine']}\n{about['minutes']:.0f} minutes in this call; results: {folder / 'results.json'}")
    if document is not None:
        replace_table(document, f"{text}\n\n{about['machine']}")


def add(path: Path, findings: Sequence[Finding], about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The results on disk by claim, those of this call in place of older ones, each with machine and settings."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {**kept, **{str(finding.claim): {**finding.as_dict(), **about} for finding in findings}}


def findings_table(kept: dict[str, dict[str, Any]]) -> str:
    """Every claim in a row of markdown; one that was not run says so."""
    rows = []
    for number, text in CLAIM_TEXTS.items():
        row = kept.get(str(number))
        ours, seeds, verdict = (row["measured"], row["seeds"], row["verdict"]) if row else ("", "", "not run")
        more = f" --seeds {seeds}" if row and seeds != DEFAULT_SEEDS else ""
        command = f"`python -m benchmarks.evidence --claim {number}{more}`"
        rows.append([f"{number}. {text.title}", text.paper, ours, seeds, command, f"**{verdict}**"])
    return table(["claim", "paper", "ours, 95 % intervals", "seeds", "command", "verdict"], rows)


def rules() -> str:
    """When each claim holds, as a list."""
    lines = [f"- Claim {number}. {text.rule}" for number, text in CLAIM_TEXTS.items()]
    return "\n".join(["The rules of the verdicts, for 95 % intervals:", "", *lines])


def samples(kept: dict[str, dict[str, Any]]) -> list[str]:
    """A table of claim 1's first prompts with each policy's answer, if it was run."""
    rows = kept.get("1", {}).get("details", {}).get("samples")
    if not rows:
        return []
    cells = [[" ".join(text.replace("|", "/").split()) for text in row.values()] for row in rows]
    return ["The first test prompts and what each policy of claim 1 answers, seed 0:\n\n" + table(list(rows[0]), cells)]


def other_settings(kept: dict[str, dict[str, Any]], plan: dict[str, Any]) -> list[str]:
    """A line for each claim that was run with other settings than this plan's."""
    lines = []
    for number, row in kept.items():
        other = {name: value for name, value in row["plan"].items() if plan.get(name, value) != value}
        if other:
            lines.append(f"Claim {number} was run with " + ", ".join(f"{k} = {v}" for k, v in other.items()) + ".")
    return lines


def replace_table(document: Path, text: str) -> None:
    """Put the table between the markers of the document.

    Raises:
        ValueError: it lacks one of them.
    """
    content = document.read_text(encoding="utf-8")
    if any(marker not in content for marker in MARKERS):
        raise ValueError(f"{document} needs the lines {MARKERS[0]} and {MARKERS[1]}, between which the table goes.")
    before, rest = content.split(MARKERS[0], 1)
    after = rest.split(MARKERS[1], 1)[1]
    document.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{after}", encoding="utf-8")
