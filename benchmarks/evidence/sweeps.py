"""The claims of `evidence.py` that are sweeps or side experiments: 4, 5, 6, 7."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.evidence.claims import by_seed, gold_a_prompt, of_policy
from benchmarks.evidence.jobs import RANKED_PROMPTS, data, rankings, rl_init
from benchmarks.evidence.lab import Job, Lab, score
from benchmarks.evidence.ppo import ppo, tax
from benchmarks.evidence.text import SHARE_BACK, SWEEP_LOST
from benchmarks.evidence.verdicts import (
    Finding,
    Verdict,
    by_interval,
    excess_gain,
    in_every_seed,
    of_seeds,
    over_seeds,
    takes_back,
)

GAMMAS = (0.3, 1.0, 5.0, 20.0, 27.8, 50.0)
BETAS = (0.0, 0.005, 0.1, 0.5, 2.0)
RATIOS = (1, 4, 8)
LABEL_NOISE = 0.75  # two labelers with it agree on 72 % of pairs, as the paper's do (72.6 %)
RATES = (2e-4, 5e-4, 1e-3, 2e-3)  # claim 5: learning rates tried for each method
FIRST = 20  # claim 6: iterations looked at, at most
LAST = 10  # claim 7: iterations whose mean is the end


def _point(lab: Lab, seed: int, **changes: Any) -> dict[str, Any]:
    """Rise of the pretraining loss and labeler's score, after and before by prompt, on test prompts."""
    start, run = rl_init(lab, seed), ppo(lab, seed, **{"iterations": lab.plan.sweep_iterations, **changes})
    cost = tax(lab, run.folder / "run" / "policy", run)["sampled"] - tax(lab, start.folder / "model", start)["sampled"]
    after = gold_a_prompt(lab, run.folder / "run" / "policy", run, seed)
    before = gold_a_prompt(lab, start.folder / "model", start, seed)
    gain = statistics.fmean(after) - statistics.fmean(before)
    return {"rise": cost, "gain": gain, "kl": run.summary["kl"], "after": after, "before": before}


def sweep(lab: Lab, seed: int) -> dict[str, dict[str, Any]]:
    """Each setting's rise and gain. γ has the plan's learning rate throughout, but for the plan's own γ.

    The ptx ratios are runs of their own length, the 1:1 beside them as well.
    """
    plan = lab.plan
    points = {"γ 0": _point(lab, seed)}
    own = {"ptx_coef": plan.ptx_coef, "learning_rate": plan.ptx_learning_rate}
    points[f"γ {plan.ptx_coef:g}"] = _point(lab, seed, ptx_ratio=plan.ptx_ratio, **own)
    for gamma in GAMMAS:
        points[f"γ {gamma:g}"] = _point(lab, seed, ptx_coef=gamma, ptx_ratio=plan.ptx_ratio)
    for beta in BETAS:
        points[f"β {beta:g}"] = _point(lab, seed, beta=beta)
    for ratio in RATIOS:
        points[f"{ratio}:1"] = _point(lab, seed, ptx_ratio=ratio, iterations=plan.ratio_iterations, **own)
    return points


def stands(points: list[dict[str, Any]], plain: list[dict[str, Any]]) -> Verdict:
    """Whether a setting takes two thirds of PPO's rise back, mean over seeds, and keeps four fifths of its gain."""
    rise, own = (statistics.fmean(point["rise"] for point in group) for group in (plain, points))
    if rise <= 0 or takes_back(0.0, rise, own) < SHARE_BACK:
        return "does not"
    after, full, before = [p["after"] for p in points], [p["after"] for p in plain], [p["before"] for p in plain]
    return by_interval(excess_gain(after, full, before, 1 - SWEEP_LOST), 0.0)


def sweep_verdict(standing: dict[str, Verdict]) -> Verdict:
    """Of each setting's verdict, that of the claim: some γ stands and no β does."""
    gammas, betas = ({v for name, v in standing.items() if name[0] == kind} for kind in "γβ")
    if "holds" in betas or gammas == {"does not"}:
        return "does not"
    return "holds" if "holds" in gammas and betas == {"does not"} else "cannot tell"


def claim_4(lab: Lab) -> Finding:
    """γ gives back what PPO costs; β does not."""
    swept = [sweep(lab, seed) for seed in lab.seeds]
    points = {name: [one[name] for one in swept] for name in swept[0]}
    standing = {name: stands(of_setting, points["γ 0"]) for name, of_setting in points.items() if name[0] in "γβ"}
    shown: dict[bool, list[str]] = {True: [], False: []}
    for name, of_setting in points.items():
        rise, gain = (statistics.fmean(point[key] for point in of_setting) for key in ("rise", "gain"))
        verdict = f", {standing[name]}" if name in standing else ""
        shown[name in standing].append(f"{name}: {rise:+.2f} nats, gain {gain:.2f}{verdict}".replace("-", "−"))
    ratios = f"Texts an episode at γ = {lab.plan.ptx_coef:g}, {lab.plan.ratio_iterations} iterations: "
    measured = f"{lab.plan.sweep_iterations} iterations: {'; '.join(shown[True])}. {ratios}{'; '.join(shown[False])}"
    kept = [{name: {k: point[k] for k in ("rise", "gain", "kl")} for name, point in one.items()} for one in swept]
    return Finding(4, measured, sweep_verdict(standing), len(lab.seeds), {"points": kept, "standing": standing})


def fit(lab: Lab, seed: int, method: str, rate: float, train_rows: list[dict], judged: list[dict]) -> tuple[Any, int]:
    """One epoch of `reward_groups.py` by 'groups' or 'pile' from the RL initialisation: its curve, and its steps."""
    from benchmarks.ranked_text import RankedText
    from benchmarks.reward_groups import train

    args = argparse.Namespace(
        epochs=1, eval_steps=15, train_judged=20, prompts_per_step=RANKED_PROMPTS, accumulation=1, bf16=lab.plan.bf16,
        learning_rate=rate, backbone=str(rl_init(lab, seed).folder / "model"),
    )  # fmt: skip
    curve, steps, _ = train(method, seed, RankedText(train_rows, [], judged, ""), args)
    return curve, steps


def rates(lab: Lab) -> Job:
    """Each method's learning rate: its best on prompts of the first seed's rankings that are then trained on again."""
    ranked = rankings(lab, 0)

    def body(folder: Path) -> dict[str, Any]:
        from benchmarks.reward_groups import METHODS

        rows = ranked.read("rows/train.jsonl")
        held = len(rows) // 6
        parts = scored(lab, rows[:-held], LABEL_NOISE), scored(lab, rows[-held:], 0.0)
        found: dict[str, Any] = {}
        for method in METHODS:
            runs = {rate: fit(lab, 0, method, rate, *parts) for rate in RATES}
            found[method] = {str(rate): curve[steps]["accuracy"] for rate, (curve, steps) in runs.items()}
        return found

    settings = {"rates": RATES, "noise": LABEL_NOISE, **lab.shared("bf16")}
    return lab.job("rates", settings, body, after=[rl_init(lab, 0), ranked], seed=0)


def groups(lab: Lab, seed: int) -> Job:
    """Whole groups, and the same comparisons of the seed's rankings in one pile, each at its best learning rate."""
    start, ranked, tried = rl_init(lab, seed), rankings(lab, seed), rates(lab)

    def body(folder: Path) -> dict[str, Any]:
        from instruct_trl.pipeline.stage import write_json

        parts = (
            scored(lab, ranked.read("rows/train.jsonl"), LABEL_NOISE),
            scored(lab, ranked.read("rows/test.jsonl"), 0.0),
        )
        curves, ends, best = {}, {}, {}
        for method, accuracies in tried.summary.items():
            best[method] = max(accuracies, key=accuracies.__getitem__)
            curves[method], steps = fit(lab, seed, method, float(best[method]), *parts)
            ends[method] = curves[method][steps]
        write_json(folder / "curves.json", curves)
        return {"epoch": ends, "steps": steps, "rates": best}

    settings = {"noise": LABEL_NOISE, **lab.shared("bf16")}
    return lab.job("groups", settings, body, after=[start, ranked, tried], seed=seed)


def scored(lab: Lab, rows: list[dict], noise: float) -> list[dict]:
    """The rankings as a labeler with noise would make them."""
    from benchmarks.ranked_text import blur, with_ranks

    made = str(data(lab).folder)
    rows = [
        {**row, "scores": score([row["prompt"]] * len(row["completions"]), row["completions"], made)} for row in rows
    ]
    if noise:
        blur(rows, noise)
    return with_ranks(rows)


def claim_5(lab: Lab) -> Finding:
    """Groups against shuffled pairs: held-out accuracy after the one epoch of the paper."""
    jobs = [groups(lab, seed) for seed in lab.seeds]
    ends = [job.summary["epoch"] for job in jobs]
    accuracy = {name: over_seeds([end[name]["accuracy"] for end in ends]).mean for name in ("groups", "pile")}
    gaps = [end["groups"]["accuracy"] - end["pile"]["accuracy"] for end in ends]
    losses = over_seeds([end["groups"]["loss"] - end["pile"]["loss"] for end in ends])
    gap = over_seeds(gaps)
    return Finding(
        5,
        f"after one epoch groups {100 * accuracy['groups']:.1f} %, pairs {100 * accuracy['pile']:.1f} %; groups minus "
        f"pairs {gap.number(3)}, by seed {by_seed(gaps, 3)}; held-out loss {losses.number(3)}; learning rates "
        f"{jobs[0].summary['rates']['groups']} and {jobs[0].summary['rates']['pile']}",
        by_interval(gap, 0.0),
        len(lab.seeds),
        {"curves": [job.read("curves.json") for job in jobs], "steps": [job.summary["steps"] for job in jobs]},
    )


def claim_6(lab: Lab) -> Finding:
    """The value function from the reward model, from its body with a new head, and from the SFT model."""
    kinds = ("reward", "fresh", "sft")
    variance: dict[str, list[float]] = {kind: [] for kind in kinds}
    gains: dict[str, list[float]] = {kind: [] for kind in kinds}
    for seed in lab.seeds:
        for kind in kinds:
            rows = ppo(lab, seed, iterations=min(FIRST, lab.plan.iterations), value=kind).read("history.json")
            variance[kind].append(statistics.median(row["explained_variance"] for row in rows))
            gains[kind].append(statistics.mean(row["labeler"] for row in rows[-3:]) - rows[0]["labeler"])
    best = [max(kinds, key=lambda kind: variance[kind][i]) == "reward" for i in range(len(lab.seeds))]
    shown = "; ".join(
        f"{kind} {over_seeds(variance[kind]).number()}, gain {over_seeds(gains[kind]).number()}" for kind in kinds
    )
    return Finding(
        6,
        f"first {len(rows)} iterations, median explained variance: {shown}",
        in_every_seed(best),
        len(lab.seeds),
        {"variance": variance, "gain": gains},
    )


def claim_7(lab: Lab) -> Finding:
    """Without KL the labeler's score turns down while the reward model's goes on; with β = 0.02 it does not."""
    from instruct_trl.evaluation.gold import turning_point

    verdicts: list[Verdict] = []
    histories, shown = [], []
    for seed in lab.seeds:
        runs = {beta: ppo(lab, seed, beta=beta, iterations=lab.plan.long_iterations) for beta in (0.0, 0.02)}
        rows = {str(beta): run.read("history.json") for beta, run in runs.items()}
        turns = {
            beta: turning_point([r["labeler"] for r in rows_], [r["reward_model"] for r in rows_])
            for beta, rows_ in rows.items()
        }
        turned, kept = turns["0.0"], turns["0.02"] is None
        verdicts.append("cannot tell" if turned is None else "holds" if turned.proxy_rose and kept else "does not")
        histories.append(rows)
        for (beta, run), turn in zip(runs.items(), turns.values(), strict=True):
            end = statistics.fmean(row["labeler"] for row in rows[str(beta)][-LAST:])
            pairs = of_policy(lab, run, seed).summary["distinct_2"]
            turned_at = "no turn" if turn is None else f"turned at {turn.gold:.2f}"
            shown.append(f"β {beta}: {turned_at}, ends {end:.2f}, {100 * pairs:.1f} % of word pairs distinct")
    return Finding(
        7,
        "by seed: " + "; ".join(shown),
        of_seeds(verdicts),
        len(lab.seeds),
        {"histories": histories},
    )


CLAIMS = {4: claim_4, 5: claim_5, 6: claim_6, 7: claim_7}
