"""The reward model's page: self-contained, escaped, complete where the data are, silent where not, and it warns."""

import base64
import json
import re

import numpy as np
import pytest
from report_example import estimate

from instruct_trl.evaluation import floors
from instruct_trl.evaluation.reward_metrics import reward_metrics
from instruct_trl.report import findings_reward as captions
from instruct_trl.report import pictures_reward as plots
from instruct_trl.report.pages import reward_warnings, write_reward_report
from instruct_trl.report.pictures import LIGHT

NASTY = '<script>alert("1")</script> | `b` & *c*'
FOLDS = {
    "folds": [
        {"held_out_labelers": [f"l{i}"], "held_in": {"mean": 0.72}, "held_out": {"mean": 0.62 + 0.002 * i}}
        for i in range(5)
    ],
    "held_in": estimate(0.72, 0.01),
    "held_out": estimate(0.624, 0.02),
    "difference": estimate(-0.096, 0.02),
}

CURVE = {
    "points": [
        {
            "fraction": n / 240,
            "prompts": n,
            "pair_accuracy": {**estimate(accuracy, 0.03), "n_pairs": 900},
            "bag_of_words": {**estimate(accuracy - 0.05, 0.03), "n_pairs": 900} if n > 60 else None,
        }
        for n, accuracy in ((60, 0.6), (120, 0.65), (240, 0.7))
    ],
    "per_doubling": estimate(0.05, 0.02),
}


def make(n=120, noise=1.0, length_weight=0.0, scale=1.0, sizes=(4, 9), labelers=("ann", "bob", NASTY), seed=0):
    """Records whose rewards are true quality + length + noise; the labeler goes by quality alone."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(n):
        k = int(rng.integers(sizes[0], sizes[1] + 1))
        quality, lengths = rng.normal(size=k), rng.integers(10, 100, size=k)
        rewards = scale * (quality + length_weight * (lengths - 55) / 26 + noise * rng.normal(size=k))
        ranks = [int(r) for r in np.argsort(np.argsort(-quality))]
        records.append(
            {
                "rewards": [float(r) for r in rewards],
                "pairs": [[a, b] for a in range(k) for b in range(k) if ranks[a] < ranks[b]],
                "ranks": ranks,
                "lengths": [int(x) for x in lengths],
                "prompt_length": int(rng.integers(5, 200)),
                "labeler": labelers[i % len(labelers)] if labelers else None,
            }
        )
    return records


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rm") / "new"
    records = make()
    rng = np.random.default_rng(1)
    for record in records:
        record["bag_of_words"] = rng.normal(size=len(record["rewards"])).tolist()
    more = {"title": "RM " + NASTY, "notes": [NASTY], "labeler_folds": FOLDS, "learning_curve": CURVE}
    return write_reward_report(records, folder, **more), folder


ALL = {
    *("accuracy", "by_k", "by_prompt_length", "by_labeler", "labeler_folds"),
    *("calibration", "length", "length_rules", "scores", "learning_curve"),
}


def test_page_needs_nothing_else_and_holds_every_picture(written):
    html = (written[1] / "report.html").read_text(encoding="utf-8")
    links = re.findall(r'(?:src|srcset|href)="([^"]*)"', html)
    prefix = "data:image/png;base64,"
    assert all(link.startswith(prefix) for link in links)
    files = list((written[1] / "pictures").rglob("*.png"))
    assert {base64.b64decode(link.removeprefix(prefix)) for link in links} == {path.read_bytes() for path in files}
    assert {path.stem for path in files} == ALL
    assert len(files) == 2 * len(ALL)
    assert "<script" not in html
    assert "http" not in html
    assert "prefers-color-scheme: dark" in html


def test_markdown_links_the_pictures_and_escapes(written):
    text = (written[1] / "report.md").read_text(encoding="utf-8")
    assert {f"pictures/{name}.png" for name in ALL} == set(re.findall(r"\((pictures/[^)]*)\)", text))
    assert "<script" not in text


def test_metrics_are_returned_and_written(written):
    metrics, folder = written
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8")) == metrics
    assert metrics["pair_accuracy"]["mean"] == reward_metrics(make(), n_boot=10)["pair_accuracy"]["mean"]


def test_sections_without_data_are_left_out(tmp_path):
    records = make(sizes=(2, 2), labelers=())
    for row in records:
        row.update(ranks=[], lengths=[], prompt_length=None)
    metrics = write_reward_report(records, tmp_path, title="pairs")
    assert {path.stem for path in tmp_path.rglob("*.png")} == {"accuracy", "calibration", "scores"}
    headings = re.findall(r"^## (.*)$", (tmp_path / "report.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == [
        "How often is it right?",
        "Is it as sure as it should be?",
        "What scores does it give?",
        "All numbers",
    ]
    assert metrics["length"] is None


def test_a_good_model_is_not_warned_about():
    metrics = reward_metrics(make(n=200, noise=0.3, scale=3.0), n_boot=200)
    assert reward_warnings(metrics) == []
    assert captions.headline(metrics)[0] == "better"


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"noise": 1.0, "length_weight": 2.5}, "The score follows length: r = +"),
        ({"noise": 1.0, "length_weight": 2.5}, "Where the shorter answer is the better one"),
        ({"noise": 30.0}, "The accuracy cannot be told from a coin's"),
        ({"noise": 30.0}, "The reward model does not clearly beat the rule"),
        ({"scale": -1.0}, "The reward model orders answers the wrong way round"),
        ({"scale": -1.0}, "The reward model contradicts ann"),
        ({"scale": 9.0}, "The reward model is too sure: train for fewer epochs"),
        ({"noise": 0.2, "scale": 0.05}, "The reward model is not sure enough: train longer"),
        ({"n": 30}, "Only 30 prompts have a compared pair"),
    ],
)
def test_warnings(options, warning):
    metrics = reward_metrics(make(**options), n_boot=200)
    assert any(warning in text for text in reward_warnings(metrics)), reward_warnings(metrics)


def test_warning_about_new_labelers_and_its_place_on_the_page(written):
    metrics, folder = written
    expected = "On labelers it never saw, the reward model loses 9.60 points"
    assert any(text.startswith(expected) for text in metrics["warnings"])
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.index("<strong>Warning.</strong> On labelers") < html.index("How often is it right?")
    assert "But read the warnings below." in html
    unclear = {**FOLDS, "difference": estimate(-0.025, 0.03)}
    assert captions.new_labelers(unclear).startswith("No clear loss")


def test_accuracy_picture_shows_the_numbers():
    metrics = reward_metrics(make(), n_boot=100)
    figure = plots.reward_pictures(metrics, make())["accuracy"](LIGHT)
    dots = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"]
    floor = metrics["floors"]["length"]["accuracy"]
    rates = [metrics["pair_accuracy"], floor, *metrics["by_rank_distance"].values()]
    assert dots == pytest.approx([100 * rate["mean"] for rate in rates])
    assert figure.axes[0].get_xlabel() == "held-out pairs ordered as the labeler does (%)"


def test_floors_and_leads_are_on_both_pages(written):
    metrics, folder = written
    floor = metrics["floors"]["bag_of_words"]
    assert floor["lead"]["mean"] == pytest.approx(metrics["pair_accuracy"]["mean"] - floor["accuracy"]["mean"])
    assert floor["lead"]["low"] > 0
    for page in ("report.md", "report.html"):
        text = (folder / page).read_text(encoding="utf-8").replace("\u00a0", " ")
        assert "The reward model knows more than length and words" in text
        for row in metrics["floors"]["length"], floor:
            lead = f"{100 * row['lead']['mean']:+.1f} points ({100 * row['lead']['low']:+.1f} to"
            assert f"{100 * row['accuracy']['mean']:.1f} % (" in text
            assert lead in text
        assert "Twice the labels (480 prompts) would bring +5.0 points (95 % interval +3.0 to +7.0)" in text
        assert "from about 70 % of pairs to about 75 %." in text


def test_a_missing_bag_of_words_is_said_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(floors, "find_spec", lambda name: None)
    write_reward_report(make(n=20), tmp_path, title="no bag")
    assert "pip install instruct-trl\\[report\\]" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_learning_curve_picture_shows_the_points_and_the_step_beyond():
    (axes,) = plots.draw_learning_curve(CURVE, LIGHT).axes
    model, bag = ([list(line.get_ydata()) for line in axes.lines if line.get_label() == name]
                  for name in ("reward model", "bag of words"))  # fmt: skip
    assert model == [pytest.approx([60, 65, 70])]
    assert bag == [pytest.approx([60, 65])]
    beyond = [line for line in axes.lines if list(line.get_xdata()) == [240, 480]]
    assert list(beyond[0].get_ydata()) == pytest.approx([70, 75])


def test_calibration_picture_shows_bins_and_their_shares():
    metrics = reward_metrics(make(), n_boot=100)
    curve, counts = plots.draw_calibration(metrics, LIGHT).axes
    shown = [(line.get_xdata()[0], line.get_ydata()[0]) for line in curve.lines if line.get_marker() == "o"]
    bins = metrics["calibration"]["bins"]
    assert shown == [(pytest.approx(100 * b["confidence"]), pytest.approx(100 * b["accuracy"]["mean"])) for b in bins]
    assert sum(bar.get_height() for bar in counts.patches) == pytest.approx(100)


def test_histograms_hold_every_answer():
    metrics, records = reward_metrics(make(), n_boot=100), make()
    above, below = plots.draw_scores(metrics, records, LIGHT).axes
    for patch in (above.patches[0], below.patches[0], below.patches[2]):
        assert sum(patch.get_data().values) == pytest.approx(100)


def test_many_labelers_show_the_largest_groups():
    rows = {str(i): {**estimate(0.7, 0.1), "n_pairs": i} for i in range(40)}
    assert list(plots.shown_groups(rows)) == [str(i) for i in range(28, 40)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("n", "scale"), [(1, 1.0), (3, 0.0), (12, 1e-6), (12, 1e6)])
def test_any_records_make_a_page(tmp_path, n, scale):
    """Equal rewards, huge ones, one prompt alone, a prompt without pairs, answers of one length."""
    records = make(n=n, scale=scale, sizes=(2, 3))
    records[0]["lengths"] = [7] * len(records[0]["rewards"])
    records.append({**records[0], "pairs": [], "ranks": [1] * len(records[0]["rewards"])})
    metrics = write_reward_report(records, tmp_path, title="odd")
    assert metrics["pair_accuracy"]["n"] == n
