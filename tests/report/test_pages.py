"""The report: escaped, self-contained, complete, honest in its sentences, and redrawn from its JSON."""

import base64
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
from launch_helpers import run_program
from report_example import NASTY, example_report, task

from instruct_trl.report import pictures
from instruct_trl.report.data import ModelResult, ReportData, load_report_data, save_report_data
from instruct_trl.report.pages import environment, main, write_report
from instruct_trl.report.pictures import require_matplotlib


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self.style = [], [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "style" and not self.style:
            self.style = data
        else:
            self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return write_report(example_report(), folder), folder


def test_page_needs_nothing_else(written):
    page_path, folder = written
    page = _Page(page_path.read_text(encoding="utf-8"))
    prefix = "data:image/png;base64,"
    assert all(link.startswith(prefix) for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in page.style
    assert "@import" not in page.style
    shown = {base64.b64decode(link.removeprefix(prefix)) for link in page.links}
    assert shown == {path.read_bytes() for path in (folder / "pictures").rglob("*.png")}
    assert len(shown) == 2 * 9  # nine pictures, each for light and for dark mode


def test_html_shows_answers_as_they_are(written):
    page = _Page(written[0].read_text(encoding="utf-8"))
    assert NASTY in page.text
    assert "line one\n\nline two" in page.text
    assert "b" not in page.tags[page.tags.index("h2") :]


def test_markdown_shows_answers_as_they_are(written):
    """markdown-it, an independent renderer, must give back the very text."""
    markdown_it = pytest.importorskip("markdown_it")
    renderer = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    html = renderer.render((written[1] / "report.md").read_text(encoding="utf-8"))
    page = _Page(html)
    assert page.text.count(NASTY) == 2  # the prompt and the answer
    assert "line one<br><br>line two" in html
    assert "script" not in page.tags
    assert [link for link in page.links if not link.startswith("pictures/")] == []
    assert set(page.links) == {f"pictures/{path.name}" for path in (written[1] / "pictures").glob("*.png")}


def test_markdown_line_starts_stay_text():
    markdown_it = pytest.importorskip("markdown_it")
    starts = ["- a", "+ b", "1. c", "2) d", "=== e", "# f", "> g", "---", "    h", "|i|j|"]
    blocks = environment("md").get_template("blocks.md").module
    texts = [*(blocks.text(caller=lambda start=start: start) for start in starts), blocks.items(starts)]
    texts.append(blocks.rows(["k"], [[start] for start in starts]))
    html = markdown_it.MarkdownIt("commonmark").enable("table").render("\n".join(texts))
    for start in (start.strip() for start in starts):
        shown = start.replace(">", "&gt;")
        assert f"<p>{shown}</p>" in html
        assert f"<li>{shown}</li>" in html
        assert f"<td>{shown}</td>" in html


def test_report_says_that_a_program_judges(written):
    for name in ("report.md", "report.html"):
        text = (written[1] / name).read_text(encoding="utf-8")
        assert "A program stands in for the paper" in text
        assert "a word list" in text
        assert "What people said is below." in text
        assert "No person judged" not in text


def test_report_holds_the_numbers(written):
    text = (written[1] / "report.md").read_text(encoding="utf-8").replace("\u00a0", " ")
    # 160 wins and 6 ties of 256: 163/256 = 63.67 %.
    for expected in ("63.7 %", "160 / 6 / 90", "3.412", "+0.058", "Kendall's tau is 0.43", "| total | 12 min 8 s |  |"):
        assert expected in text
    for expected in (
        "Rollout batch 64, not 512.",
        "| PPO-ptx | beta | 0.02 |",
        "| seed |  | 1 |",
        "| torch | 2.13.0 |",
    ):
        assert expected in text
    assert "25 %" in text  # SFT's 182 s of 728 s
    assert "accelerate launch recipes/ppo_ptx.py" in text


def plain(text):
    return text.replace("\u00a0", " ")


def test_the_report_shows_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "save_picture", lambda draw, theme, path: path.write_bytes(b""))
    text = plain(write_report(example_report(), tmp_path).with_name("report.md").read_text(encoding="utf-8"))
    for expected in (
        "| judge-1: PPO-ptx | 40 % (34 to 46) | 90 / 20 / 140 | 17 | 6 |",
        "| 3 people: PPO-ptx | – | – | 0 | 3 |",
        "| quality | 4.00<br>(2.00 to 4.40)<br>of 250, 6 left out |",
        "| boolq<br>(acc, 1,000 items) | 60.0 (57.0 to 63.0) | 58.0 (55.0 to 61.0)<br>−2.0 (−4.0 to +0.0) |",
        "The labeler scores step 80 highest (0.90); the last, step 120, has 0.40, clearly less.",
        "1,024 requests now.",
    ):
        assert expected in text


def test_json_round_trip(tmp_path):
    data = example_report()
    assert load_report_data(save_report_data(data, tmp_path / "report.json")) == data


def test_json_is_strict_json(tmp_path):
    data = example_report(training=[{"step": 1, "kl": math.nan, "score": math.inf, "ptx_loss": 3.0}])
    raw = json.loads(
        (save_report_data(data, tmp_path / "r.json")).read_text(encoding="utf-8"), parse_constant=pytest.fail
    )
    assert raw["training"] == [{"step": 1, "kl": None, "score": None, "ptx_loss": 3.0}]


def test_json_with_an_unknown_field_is_refused(tmp_path):
    path = save_report_data(example_report(), tmp_path / "report.json")
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["models"][0]["kll"] = 1
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ValueError, match="ModelResult has no field 'kll'"):
        load_report_data(path)


def test_moved_folder_is_redrawn(tmp_path, capsys, written):
    selection = tmp_path / "elsewhere.png"
    selection.write_bytes((written[1] / "pictures" / "win_rate.png").read_bytes())
    (tmp_path / "dark").mkdir()
    (tmp_path / "dark" / "elsewhere.png").write_bytes(b"the dark one")
    few = {"training": [], "judged": [], "runs": {}, "checkpoints": [], "reward_model": {}}  # pictures take time
    data = example_report(selection_picture=selection, selection_note="Epoch 2 is best.", **few)
    first = write_report(data, tmp_path / "run")
    before = first.read_text(encoding="utf-8")
    selection.unlink()
    (tmp_path / "dark" / "elsewhere.png").unlink()
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    (moved / "report.html").unlink()
    main([str(moved)])
    assert str(moved / "report.html") in capsys.readouterr().out
    assert (moved / "report.html").read_text(encoding="utf-8") == before
    assert "Epoch 2 is best." in before
    assert base64.b64encode(b"the dark one").decode() in before


def test_missing_parts_are_named_and_left_out(tmp_path):
    data = ReportData("bare", [ModelResult("base"), ModelResult("SFT"), ModelResult("PPO-ptx")])
    text = write_report(data, tmp_path).with_name("report.md").read_text(encoding="utf-8")
    assert "No person judged these answers. A program stands in" in text
    assert text.count("Not in this report:") == 11
    assert "Not measured" in text
    assert list((tmp_path / "pictures").rglob("*.png")) == []


def test_labeler_score_may_be_missing_from_the_log(tmp_path):
    data = example_report()
    for row in data.training:
        row.pop("labeler_score", None)
    text = write_report(data, tmp_path).with_name("report.md").read_text(encoding="utf-8")
    assert "the labeler's score over training was not logged" in text


def test_bad_report_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="no name twice"):
        ReportData("r", [ModelResult("SFT"), ModelResult("SFT")])
    with pytest.raises(ValueError, match="subject is 'PPO'"):
        ReportData("r", [ModelResult("SFT")], subject="PPO")
    with pytest.raises(FileNotFoundError, match="selection_picture .*gone.png is not there"):
        write_report(example_report(selection_picture=tmp_path / "gone.png"), tmp_path)


def test_matplotlib_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install instruct-trl\[report\]"):
        require_matplotlib()
    with pytest.raises(ImportError, match=r"pip install instruct-trl\[report\]"):
        write_report(example_report(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_import_is_light_and_drawing_leaves_no_global_state():
    code = (
        "import sys; import instruct_trl.report.pages as r; import instruct_trl.report.data as d; "
        "import instruct_trl.evaluation.estimates as e; "
        "assert 'matplotlib' not in sys.modules; "
        "import tempfile; models = [d.ModelResult('SFT', pretraining_loss=e.Estimate(3.0, None, None, 0))]; "
        "r.write_report(d.ReportData('x', models), tempfile.mkdtemp()); assert 'matplotlib.pyplot' not in sys.modules"
    )
    run_program([sys.executable, "-c", code])


def test_no_fence_can_be_broken_by_a_command(tmp_path):
    text = (
        write_report(example_report(command="echo ```` x"), tmp_path).with_name("report.md").read_text(encoding="utf-8")
    )
    assert re.search(r"^`{5}text\necho ```` x\n`{5}$", text, flags=re.M)


def test_tasks_without_a_change_draw_no_picture(tmp_path):
    data = example_report(models=[ModelResult("base", tasks={"boolq": task(0.5)}), ModelResult("SFT")], training=[])
    text = write_report(data, tmp_path).with_name("report.md").read_text(encoding="utf-8")
    assert "| boolq<br>(acc, 1,000 items) |" in text
    assert not (tmp_path / "pictures" / "tasks.png").exists()
