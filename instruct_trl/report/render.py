"""A small document model with two renderings, Markdown and one self-contained HTML page.

All text is plain and escaped here, once: answers of a language model may hold anything. The page loads nothing from
anywhere: pictures are in it as base64, styles are inline, and there is no script.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from instruct_trl.report.data import Sample
from instruct_trl.report.findings import Verdict


@dataclass
class Text:
    """A paragraph; `tone` "note" sets it apart."""

    text: str
    tone: str = ""


@dataclass
class Headline:
    """The verdict, its sentence, and a few numbers to take away as (value, what it is)."""

    verdict: Verdict
    text: str
    figures: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Table:
    """Header and rows of text; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Items:
    """A list, numbered on request so that its entries can be referred to."""

    items: Sequence[str]
    numbered: bool = False


@dataclass
class Code:
    """Preformatted text."""

    text: str


@dataclass
class Picture:
    """A PNG with its finding and how to read it; `dark` is shown instead to readers in dark mode."""

    path: Path
    caption: str
    reading: str = ""
    dark: Path | None = None


@dataclass
class Samples:
    """Answers side by side; `names` gives the order of the models."""

    samples: Sequence[Sample]
    names: Sequence[str]


Block = Text | Headline | Table | Items | Code | Picture | Samples


@dataclass
class Section:
    """A heading with its blocks."""

    title: str
    blocks: Sequence[Block]


@dataclass
class Document:
    """Title, opening blocks and sections."""

    title: str
    opening: Sequence[Block]
    sections: Sequence[Section]


_VERDICTS: dict[Verdict, str] = {"better": "Yes", "worse": "No", "unclear": "Cannot tell", "missing": "Not measured"}


def score_text(sample: Sample, name: str) -> str:
    """The labeler's score of one answer, with sign; empty where there is none."""
    score = sample.scores.get(name)
    return "" if score is None else f"{score:+.2f}".replace("-", "−")


# --- Markdown ---------------------------------------------------------------------------------------------------------


def escape_markdown(text: str) -> str:
    """One line of Markdown that shows `text` as it is, also inside a table; line breaks become <br>."""
    text = text.strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", text)
    return re.sub(r"\r\n|\r|\n", "<br>", text)


def _line(text: str) -> str:
    """`escape_markdown` for the start of a line, where "- ", "1. " or "===" would begin something else."""
    text = re.sub(r"^([-+=])", r"\\\1", escape_markdown(text))
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", text)


def to_markdown(document: Document, folder: Path) -> str:
    """The document as GitHub-flavoured Markdown; pictures are linked relative to `folder`."""
    parts = [f"# {escape_markdown(document.title)}"]
    parts += [_markdown(block, folder) for block in document.opening]
    for section in document.sections:
        parts.append(f"## {escape_markdown(section.title)}")
        parts += [_markdown(block, folder) for block in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Text(text, tone):
            return ("> " if tone else "") + _line(text)
        case Headline(verdict, text, figures):
            lines = [f"**{_VERDICTS[verdict]}. {escape_markdown(text)}**"]
            lines += ["\n".join(f"- **{escape_markdown(v)}** {escape_markdown(what)}" for v, what in figures)]
            return "\n\n".join(lines).rstrip()
        case Table(header, rows):
            return _markdown_table(header, rows)
        case Items(items, numbered):
            return "\n".join(f"{f'{i}.' if numbered else '-'} {_line(item)}" for i, item in enumerate(items, 1))
        case Code(text):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
            return f"{fence}text\n{text}\n{fence}"
        case Picture(path, caption, reading):
            link = path.relative_to(folder).as_posix()
            return f"![{escape_markdown(caption)}]({link})\n\n**{escape_markdown(caption)}** {escape_markdown(reading)}"
        case Samples(samples, names):
            return "\n\n".join(_markdown_sample(i, sample, names) for i, sample in enumerate(samples, 1))


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header)]
    cells = [[escape_markdown(cell) for cell in line] for line in (header, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], lines[1], *cells[1:]))


def _markdown_sample(index: int, sample: Sample, names: Sequence[str]) -> str:
    shown = [name for name in names if name in sample.completions]
    header = [f"{name} ({score})" if (score := score_text(sample, name)) else name for name in shown]
    table = _markdown_table(header, [[sample.completions[name] for name in shown]])
    return f"**Prompt {index}:** {escape_markdown(sample.prompt)}\n\n{table}"


# --- HTML -------------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --muted: #5b6570; --line: #dfe4e8; --soft: #f4f6f8;
  --good: #0b6b3a; --bad: #a32020; --open: #7a5500; }
@media (prefers-color-scheme: dark) { :root { --back: #14181d; --text: #e8ebee; --muted: #a3adb8; --line: #333b44;
  --soft: #1d232a; --good: #5fd394; --bad: #ff9089; --open: #f0c25a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 46rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
.headline { border-left: .4rem solid var(--open); background: var(--soft); padding: .8rem 1rem; border-radius: .3rem; }
.headline p { margin: 0; font-size: 1.1rem; } .headline strong { color: var(--open); }
.better { border-color: var(--good); } .better strong { color: var(--good); }
.worse { border-color: var(--bad); } .worse strong { color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.figures div { background: var(--soft); border-radius: .3rem; padding: .6rem .8rem; }
.figures b { display: block; font-size: 1.35rem; } .figures span { color: var(--muted); font-size: .9rem; }
.note { color: var(--muted); border-left: .2rem solid var(--line); padding-left: .8rem; }
figure { margin: 1rem 0; }
figure img { display: block; width: 100%; max-width: 40rem; height: auto; border-radius: .3rem; }
figure .plain { background: #fff; padding: .3rem; }
figcaption { font-weight: 600; margin-top: .4rem; }
figcaption small { display: block; font-weight: 400; color: var(--muted); font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; white-space: pre-line; } tbody th { font-weight: 400; color: var(--muted); }
@media (max-width: 30rem) { table { font-size: .8rem; } th, td { padding-right: .4rem; } }
pre { background: var(--soft); padding: .7rem; border-radius: .3rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.sample { margin: 1rem 0 1.6rem; } .prompt { white-space: pre-wrap; font-style: italic; margin: 0 0 .5rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .6rem; }
.answer { background: var(--soft); border-radius: .3rem; padding: .6rem .8rem; min-width: 0; }
.answer header { display: flex; justify-content: space-between; gap: .5rem; font-weight: 600; }
.answer p { margin: .3rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .92rem; max-height: 22rem;
  overflow-y: auto; } .top { outline: 2px solid var(--good); } .top header span { color: var(--good); }
"""


def to_html(document: Document) -> str:
    """The document as one page that needs no other file and no network; follows the reader's light or dark mode."""
    body = [f"<h1>{escape(document.title)}</h1>"]
    body += [_html(block) for block in document.opening]
    for section in document.sections:
        body.append(f"<section><h2>{escape(section.title)}</h2>")
        body += [_html(block) for block in section.blocks]
        body.append("</section>")
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(document.title)}</title>\n'
        f"<style>{_STYLE}</style></head><body>\n"
    )
    return head + "\n".join(body) + "\n</body></html>\n"


def _html(block: Block) -> str:
    match block:
        case Text(text, tone):
            return f'<p class="{tone}">{escape(text)}</p>' if tone else f"<p>{escape(text)}</p>"
        case Headline(verdict, text, figures):
            tiles = "".join(f"<div><b>{escape(v)}</b><span>{escape(what)}</span></div>" for v, what in figures)
            lead = f"<strong>{_VERDICTS[verdict]}.</strong> {escape(text)}"
            grid = f'<div class="figures">{tiles}</div>' if tiles else ""
            return f'<div class="headline {verdict}"><p>{lead}</p></div>\n{grid}'
        case Table(header, rows):
            return _html_table(header, rows)
        case Items(items, numbered):
            tag = "ol" if numbered else "ul"
            return f"<{tag}>{''.join(f'<li>{escape(item)}</li>' for item in items)}</{tag}>"
        case Code(text):
            return f"<pre><code>{escape(text)}</code></pre>"
        case Picture():
            return _html_picture(block)
        case Samples(samples, names):
            return "\n".join(_html_sample(sample, names) for sample in samples)


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _html_picture(picture: Picture) -> str:
    image = (
        f'<img {"" if picture.dark else "class=plain "}alt="{escape(picture.caption)}" src="{_data_uri(picture.path)}">'
    )
    if picture.dark:
        dark = f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(picture.dark)}">'
        image = f"<picture>{dark}{image}</picture>"
    reading = f"<small>{escape(picture.reading)}</small>" if picture.reading else ""
    return f"<figure>{image}<figcaption>{escape(picture.caption)}{reading}</figcaption></figure>"


def _html_sample(sample: Sample, names: Sequence[str]) -> str:
    shown = [name for name in names if name in sample.completions]
    best = max((sample.scores[name] for name in shown if name in sample.scores), default=None)
    cards = []
    for name in shown:
        top = " top" if best is not None and sample.scores.get(name) == best else ""
        head = f"<header>{escape(name)}<span>{score_text(sample, name)}</span></header>"
        cards.append(f'<div class="answer{top}">{head}<p>{escape(sample.completions[name])}</p></div>')
    answers = f'<div class="answers">{"".join(cards)}</div>'
    return f'<div class="sample"><p class="prompt">{escape(sample.prompt)}</p>{answers}</div>'
