"""The claims' rules and intervals against closed forms, the cache of jobs, the table; and a tiny run of everything."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import tiny_config
from scipy import stats
from transformers import LlamaForCausalLM

from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import claims, report, sweeps, verdicts
from benchmarks.evidence import lab as lab_module
from benchmarks.evidence.lab import LARGE, QUICK, Lab, Plan, job_hash
from benchmarks.evidence.text import CLAIM_TEXTS
from benchmarks.evidence.verdicts import Finding, Interval

ROOT = Path(__file__).parents[2]


def test_the_interval_over_seeds_is_students():
    """Of 1, 2, 3: mean 2, standard error 1/√3, and t of 2 degrees of freedom, whose 97.5 % point is 4.3027."""
    interval = verdicts.over_seeds([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2 - interval.low == pytest.approx(interval.high - 2)


def test_one_seed_has_no_interval():
    interval = verdicts.over_seeds([0.5])
    assert interval.number() == "0.50"
    assert verdicts.by_interval(interval, 0.0) == "cannot tell"


def test_a_prompts_seeds_are_averaged_before_they_are_resampled():
    """Three seeds that agree on every prompt tell no more than one: the interval is that of N coins, not of 3N."""
    scores = [1.0] * 60 + [0.0] * 40
    baseline = [0.0] * 60 + [1.0] * 40
    interval = verdicts.pooled_win_rate([scores] * 3, [baseline] * 3)
    low, high = stats.binom.ppf([0.025, 0.975], 100, 0.6) / 100
    assert interval.mean == pytest.approx(0.6)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.011)  # one prompt


def test_ties_count_half_and_differences_are_paired():
    assert verdicts.pooled_win_rate([[1.0, 2.0]], [[1.0, 2.0]]).mean == 0.5
    gap = verdicts.pooled_difference([[5.0, 1.0, 9.0], [6.0, 2.0, 10.0]], [[3.0, -1.0, 7.0], [5.0, 1.0, 9.0]])
    assert (gap.mean, gap.low, gap.high) == (1.5, 1.5, 1.5)  # by 2 in one seed, by 1 in the other, at every prompt


@pytest.mark.parametrize(
    ("rates", "verdict"),
    [
        ([(0.9, 0.8, 0.95), (0.5, 0.4, 0.6), (0.45, 0.4, 0.5)], "holds"),
        ([(0.6, 0.5, 0.7), (0.5, 0.4, 0.6), (0.45, 0.4, 0.5)], "cannot tell"),  # the first two touch
        ([(0.9, 0.8, 0.95), (0.5, 0.4, 0.6), (0.55, 0.5, 0.6)], "cannot tell"),  # the last two in the wrong order
        ([(0.9, 0.8, 0.95), (0.5, 0.4, 0.6), (0.75, 0.7, 0.79)], "does not"),
        ([(0.3, 0.2, 0.4), (0.5, 0.45, 0.6), (0.2, 0.1, 0.3)], "does not"),
    ],
)
def test_an_order_of_rates(rates, verdict):
    assert verdicts.in_order([Interval(*rate) for rate in rates]) == verdict


@pytest.mark.parametrize(
    ("passed", "verdict"), [([True] * 3, "holds"), ([False] * 3, "does not"), ([True, False, True], "cannot tell")]
)
def test_a_claim_by_seeds(passed, verdict):
    assert verdicts.in_every_seed(passed) == verdict


def test_what_is_taken_back_of_a_rise():
    """From 5.0 up to 5.6, and 5.2 with ptx: 0.4 of 0.6. Below the start, more than all of it."""
    assert verdicts.takes_back(5.0, 5.6, 5.2) == pytest.approx(2 / 3)
    assert verdicts.takes_back(5.0, 5.6, 4.9) > 1
    with pytest.raises(ValueError, match="did not rise"):
        verdicts.takes_back(5.0, 4.9, 4.9)


def test_what_is_gained_beyond_a_share_of_anothers_gain():
    """Start 1, plain 3, so 95 % of the gain ends at 2.9: 3.4 is 0.5 above it at each prompt of each seed."""
    start, plain, mixed = [[1.0] * 4] * 2, [[3.0] * 4] * 2, [[3.4] * 4] * 2
    excess = verdicts.excess_gain(mixed, plain, start, 0.95)
    assert (excess.mean, excess.low, excess.high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("rise", "after", "verdict"),
    [
        (0.3, [2.0, 2.0], "holds"),  # 0.7 of 1 nat back, all of the gain kept
        (0.4, [2.0, 2.0], "does not"),  # 0.6 back
        (0.3, [1.7, 1.7], "does not"),  # 0.7 of the gain kept
        (0.3, [1.6, 2.4], "cannot tell"),  # in the mean all of it, by prompt 0.6 and 1.4
        (-0.2, [2.0, 2.0], "holds"),  # below the start
    ],
)
def test_when_a_setting_of_the_sweep_stands(rise, after, verdict):
    plain = [{"rise": 1.0, "after": [2.0, 2.0], "before": [1.0, 1.0]}]
    assert sweeps.stands([{"rise": rise, "after": after, "before": [1.0, 1.0]}], plain) == verdict


@pytest.mark.parametrize(
    ("gammas", "betas", "verdict"),
    [
        (["holds", "does not"], ["does not"], "holds"),
        (["holds"], ["cannot tell"], "cannot tell"),
        (["cannot tell"], ["does not"], "cannot tell"),
        (["holds"], ["holds", "does not"], "does not"),
        (["does not"], ["does not"], "does not"),
    ],
)
def test_the_sweeps_verdict(gammas, betas, verdict):
    standing = {f"γ {i}": v for i, v in enumerate(gammas)} | {f"β {i}": v for i, v in enumerate(betas)}
    assert sweeps.sweep_verdict(standing) == verdict


def test_a_job_is_done_once_and_again_where_a_setting_or_what_it_builds_on_changes(tmp_path):
    done = []

    def body(folder):
        done.append(folder)
        return {"number": len(done)}

    lab = Lab(tmp_path, Plan(), [0])
    first = lab.job("first", {"a": 1}, body)
    assert lab.job("first", {"a": 1}, body).summary == {"number": 1}
    other = lab.job("first", {"a": 2}, body)
    assert len({first.key, other.key, lab.job("first", {"a": 1}, body, seed=1).key}) == 3
    second = lab.job("second", {}, body, after=[first])
    assert lab.job("second", {}, body, after=[other]).key != second.key
    assert len(done) == 5


def test_the_hash_does_not_depend_on_the_order_of_settings():
    assert job_hash({"a": 1, "b": 2}) == job_hash({"b": 2, "a": 1}) != job_hash({"a": 2, "b": 1})


def test_the_labeler_reads_the_review_without_the_instruction(monkeypatch):
    monkeypatch.setattr("benchmarks.review_labeler.score", lambda prompts, completions, run_dir: prompts)
    assert lab_module.score([lab_module.instruct("the film is")], [" fine ."], "run") == ["the film is"]


def test_a_claim_that_was_not_run_says_so_and_a_later_call_keeps_the_others(tmp_path):
    about = {"machine": "m", "minutes": 1.0, "plan": {}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(report.add(path, [Finding(1, "old", "holds", 3), Finding(2, "two", "holds", 3)], about)))
    kept = report.add(path, [Finding(1, "new", "does not", 3)], about)
    lines = report.findings_table(kept).splitlines()[2:]
    assert len(lines) == len(CLAIM_TEXTS)
    assert "new" in lines[0]
    assert lines[0].endswith("**does not** |")
    assert "two" in lines[1]
    assert all(line.endswith("**not run** |") for line in lines[2:])


def test_the_command_of_a_claim_with_more_seeds_names_them(tmp_path):
    found = [Finding(1, "three", "holds", 3), Finding(3, "six", "holds", 6)]
    kept = report.add(tmp_path / "none.json", found, {"plan": {}})
    lines = report.findings_table({str(number): row for number, row in kept.items()}).splitlines()[2:]
    assert "--claim 1`" in lines[0]
    assert "--claim 3 --seeds 6`" in lines[2]


@pytest.mark.parametrize(
    ("score", "pairs", "verdict"),
    [(2.0, 0.7, "holds"), (2.0, 0.3, "does not"), (-1.0, 0.7, "does not"), (0.0, 0.7, "cannot tell")],
)
def test_a_seed_that_ends_in_one_phrase_has_collapsed_whatever_the_labeler_says(monkeypatch, score, pairs, verdict):
    """SFT scores 0 ± 1 with 80 % of its word pairs distinct; half of that is 40 %."""
    noise = [1.0, -1.0] * 50

    def answered(shift, distinct):
        job = SimpleNamespace(summary={"distinct_2": distinct})
        job.read = lambda _: {"gold": [shift + value for value in noise]}
        return job

    monkeypatch.setattr(claims, "ptx_run", lambda *_: None)
    monkeypatch.setattr(claims, "of_sft", lambda *_: answered(0.0, 0.8))
    wide = answered(score, pairs)
    if score == 0:
        wide.read = lambda _: {"gold": [-value for value in noise]}
    monkeypatch.setattr(claims, "of_policy", lambda *_: wide)
    finding = claims.claim_8(Lab(Path(), Plan(), [0]))
    assert finding.verdict == verdict
    assert f"{100 * pairs:.0f} % (SFT 80 %)" in finding.measured


def test_samples_stand_under_the_table_with_bars_and_line_ends_taken_out():
    rows = [{"prompt": "a | b", "SFT": " one\ntwo "}]
    assert "| a / b | one two |" in report.samples({"1": {"details": {"samples": rows}}})[0]
    assert report.samples({}) == []


def test_the_average_of_the_papers_share_of_a_run():
    """After the paper's 4,000 steps 0.992^4000 of the first weights is left; so it should be after ours."""
    decay = claims.ema_of_the_papers_share(Lab(Path(), Plan(), [0]))
    steps = Plan().iterations * Plan().rollout / Plan().minibatch
    assert decay**steps == pytest.approx(0.992**4000, rel=0.1)  # the decay is rounded to three digits
    assert claims.ema_of_the_papers_share(Lab(Path(), replace(Plan(), iterations=1000), [0])) == 0.992


def test_a_claim_of_an_earlier_call_with_other_settings_says_which():
    kept = {"1": {"plan": {"seeds": 3, "iterations": 20}}, "3": {"plan": {"seeds": 3, "iterations": 6, "gone": 1}}}
    lines = report.other_settings(kept, {"seeds": 3, "iterations": 20})
    assert lines == ["Claim 3 was run with iterations = 6."]


@pytest.mark.parametrize(
    ("each", "verdict"),
    [
        (["holds"] * 3, "holds"),
        (["does not"] * 2 + ["cannot tell"], "does not"),
        (["holds", "does not"], "cannot tell"),
        (["holds", "cannot tell"], "cannot tell"),
        (["cannot tell"] * 3, "cannot tell"),
    ],
)
def test_seeds_of_which_some_cannot_tell(each, verdict):
    assert verdicts.of_seeds(each) == verdict


def test_only_what_is_between_the_markers_is_replaced(tmp_path):
    document = tmp_path / "evidence.md"
    document.write_text(f"before\n{report.MARKERS[0]}\nold\n{report.MARKERS[1]}\nafter\n")
    report.replace_table(document, "new")
    assert document.read_text() == f"before\n{report.MARKERS[0]}\nnew\n{report.MARKERS[1]}\nafter\n"
    document.write_text("no markers")
    with pytest.raises(ValueError, match="between which the table goes"):
        report.replace_table(document, "new")


def test_every_size_of_the_plan_is_smaller_in_a_quick_run():
    sizes = [name for name in ("base_steps", "test_prompts", "iterations", "ptx_texts", "sft_epochs", "rollout")]
    assert all(getattr(QUICK, name) < getattr(Plan(), name) for name in sizes)


def test_a_size_that_is_given_goes_before_a_named_one():
    args = evidence.parse(["--large", "--iterations", "5"])
    assert evidence.the_plan(args) == replace(LARGE, iterations=5)
    assert args.folder.name == "evidence_large"
    assert evidence.the_plan(evidence.parse([])) == Plan()
    with pytest.raises(SystemExit):
        evidence.parse(["--large", "--quick"])


@pytest.mark.slow
def test_the_larger_sizes_leave_reviews_for_every_use():
    """Each review is used once: what is asked for is at most what there is of the length asked for."""
    from benchmarks.reviews import SENTENCES, ReviewDataArguments, movie_reviews

    limits = ReviewDataArguments()
    lengths = [len(row["text"].split(" ")) for row in movie_reviews() if row["source"] == SENTENCES]
    usable = sum(limits.prompt_words + 4 <= length <= limits.max_words for length in lengths)
    for plan in (Plan(), LARGE):
        demonstrations, prompts = plan.demonstrations + plan.validation, plan.selection_prompts + plan.test_prompts
        assert demonstrations + prompts + plan.reward_prompts + plan.reward_test_prompts + plan.rl_prompts <= usable


def test_every_claims_rule_is_said():
    assert [line.split(".")[0] for line in report.rules().splitlines()[2:]] == [f"- Claim {n}" for n in CLAIM_TEXTS]


@pytest.mark.slow
def test_every_claim_runs_is_resumed_and_ends_in_table_and_pictures(tmp_path, monkeypatch, tokenizer, capfd):
    """One seed at tiny sizes; a second call finds its jobs done and does another seed's in processes side by side."""
    for name, fewer in {"GAMMAS": (0.3,), "BETAS": (0.1,), "RATIOS": (1,), "RATES": (5e-4,)}.items():
        monkeypatch.setattr(sweeps, name, fewer)
    monkeypatch.chdir(ROOT)  # the labeler is a function of benchmarks
    LlamaForCausalLM(tiny_config(max_position_embeddings=1024)).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    quick = ["--quick", "--folder", str(tmp_path), "--model", str(tmp_path / "lm")]
    evidence.main([*quick, "--all", "--seeds", "1"])
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert sorted(map(int, results)) == list(CLAIM_TEXTS)
    assert all(row["seeds"] == 1 and row["verdict"] in ("holds", "does not", "cannot tell") for row in results.values())
    names = {path.name for path in (tmp_path / "pictures").glob("*.png")}
    assert {"evidence_win_rate.png", "evidence_tax.png", "evidence_selection.png", "evidence_groups.png"} <= names
    capfd.readouterr()
    evidence.main([*quick, "--claim", "2", "--seeds", "2", "--jobs", "2"])
    out = capfd.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [results[number]["seeds"] for number in ("1", "2")] == [1, 2]
    assert "seed 0: starting" not in out
    assert "seed 1: starting" in out
