"""The claims of `evidence.py` that are sweeps or side experiments: 4, 5, 6, 7."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from _evidence_claims import by_seed
from _evidence_jobs import RANKED_PROMPTS, labeler, rankings, rl_init
from _evidence_lab import Job, Lab
from _evidence_ppo import answers, ppo, tax
from _evidence_text import GAIN_LOST, SHARE_BACK
from _evidence_verdicts import Finding, by_interval, in_every_seed, over_seeds, takes_back

GAMMAS = (1.0, 5.0, 20.0, 27.8, 50.0)
BETAS = (0.0, 0.005, 0.1, 0.5, 2.0)
RATIOS = (1, 4, 8)
LABEL_NOISE = 0.75  # two labelers with it agree on 72 % of pairs, as the paper's do (72.6 %)
NOISES = {"train": LABEL_NOISE, "test": 0.0}
FIRST = 20  # claim 6: iterations looked at


def _point(lab: Lab, seed: int, **changes: Any) -> dict[str, float]:
    """Rise of the pretraining loss and gain of the labeler's score over where PPO started, on validation prompts."""
    start, run = rl_init(lab, seed), ppo(lab, seed, iterations=lab.plan.sweep_iterations, **changes)
    cost = tax(lab, run.folder / "policy", run)["sampled"] - tax(lab, start.folder / "model", start)["sampled"]
    ends = [answers(lab, run.folder / "policy", run, seed, "selection")]
    ends.append(answers(lab, start.folder / "model", start, seed, "selection"))
    return {"rise": cost, "gain": ends[0].summary["gold"] - ends[1].summary["gold"], "kl": run.summary["kl"]}


def sweep(lab: Lab, seed: int) -> dict[str, dict[str, float]]:
    """Each setting's rise and gain. γ has the plan's learning rate throughout, but for the plan's own γ."""
    plan = lab.plan
    points = {"γ 0": _point(lab, seed)}
    own = {"ptx_coef": plan.ptx_coef, "learning_rate": plan.ptx_learning_rate}
    points[f"γ {plan.ptx_coef:g}"] = _point(lab, seed, ptx_ratio=plan.ptx_ratio, **own)
    for gamma in GAMMAS:
        points[f"γ {gamma:g}"] = _point(lab, seed, ptx_coef=gamma, ptx_ratio=plan.ptx_ratio)
    for beta in BETAS:
        points[f"β {beta:g}"] = _point(lab, seed, beta=beta)
    for ratio in RATIOS:
        points[f"γ {plan.ptx_coef:g}, {ratio}:1"] = _point(lab, seed, ptx_ratio=ratio, **own)
    return points


def good(point: dict[str, float], plain: dict[str, float]) -> bool:
    """Two thirds of the rise taken back at no more than a twentieth of the gain."""
    if plain["rise"] <= 0:
        return False
    kept = point["gain"] >= (1 - GAIN_LOST) * plain["gain"]
    return kept and takes_back(0, plain["rise"], point["rise"]) >= SHARE_BACK


def claim_4(lab: Lab) -> Finding:
    """γ gives back what PPO costs; β does not."""
    points = [sweep(lab, seed) for seed in lab.seeds]
    passed = []
    for swept in points:
        fits = {name for name, point in swept.items() if good(point, swept["γ 0"])}
        passed.append(any(name[0] == "γ" for name in fits) and not any(name[0] == "β" for name in fits))
    shown = []
    for name in points[0]:
        rise, gain = (over_seeds([swept[name][key] for swept in points]).mean for key in ("rise", "gain"))
        shown.append(f"{name}: {rise:+.2f} nats, gain {gain:.2f}".replace("-", "−"))
    return Finding(
        4,
        "; ".join(shown),
        in_every_seed(passed),
        len(lab.seeds),
        {"points": points},
    )


def groups(lab: Lab, seed: int) -> Job:
    """`reward_groups.py`'s two runs on the seed's rankings: whole groups, and the same comparisons in one pile."""

    start, ranked = rl_init(lab, seed), rankings(lab, seed)

    def body(folder: Path) -> dict[str, Any]:
        from _common import RankedText
        from reward_groups import METHODS, train

        from instruct_trl.pipeline.stage import write_json

        parts = [scored(lab, ranked.read(f"{part}.jsonl"), noise) for part, noise in NOISES.items()]
        args = argparse.Namespace(
            epochs=1, eval_steps=15, train_judged=20,
            prompts_per_step=RANKED_PROMPTS, accumulation=1, bf16=lab.plan.bf16, backbone=str(start.folder / "model"),
        )  # fmt: skip
        curves, ends = {}, {}
        for method in METHODS:
            args.learning_rate = getattr(lab.plan, f"{method}_learning_rate")
            curves[method], steps, _ = train(method, seed, RankedText(parts[0], [], parts[1], ""), args)
            ends[method] = curves[method][steps]
        write_json(folder / "curves.json", curves)
        return {"epoch": ends, "steps": steps}

    settings = {**lab.shared("groups_learning_rate", "pile_learning_rate", "bf16"), "noise": LABEL_NOISE}
    return lab.job("groups", settings, body, after=[start, ranked], seed=seed)


def scored(lab: Lab, rows: list[dict], noise: float) -> list[dict]:
    """The rankings as a labeler with noise would make them."""
    from _common import blur, with_ranks

    judge = labeler(lab)
    rows = [{**row, "scores": judge([row["prompt"]] * len(row["completions"]), row["completions"])} for row in rows]
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
        f"pairs {gap.number(3)}, by seed {by_seed(gaps, 3)}; held-out loss {losses.number(3)}",
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
            variance[kind].append(statistics.mean(row["explained_variance"] for row in rows))
            gains[kind].append(statistics.mean(row["labeler"] for row in rows[-3:]) - rows[0]["labeler"])
    best = [max(kinds, key=lambda kind: variance[kind][i]) == "reward" for i in range(len(lab.seeds))]
    shown = "; ".join(
        f"{kind}: explained variance {over_seeds(variance[kind]).number()}, gain {over_seeds(gains[kind]).number()}"
        for kind in kinds
    )
    return Finding(
        6,
        f"first {FIRST} iterations: {shown}",
        in_every_seed(best),
        len(lab.seeds),
        {"variance": variance, "gain": gains},
    )


def claim_7(lab: Lab) -> Finding:
    """Without KL the labeler's score turns down while the reward model's goes on; with β = 0.02 it does not."""
    from instruct_trl.evaluation.gold import turning_point

    passed, histories, shown = [], [], []
    for seed in lab.seeds:
        runs = {beta: ppo(lab, seed, beta=beta, iterations=lab.plan.long_iterations) for beta in (0.0, 0.02)}
        rows = {str(beta): run.read("history.json") for beta, run in runs.items()}
        turns = {
            beta: turning_point([r["labeler"] for r in rows_], [r["reward_model"] for r in rows_])
            for beta, rows_ in rows.items()
        }
        passed.append(turns["0.0"] is not None and turns["0.0"].proxy_rose and turns["0.02"] is None)
        histories.append(rows)
        for beta, turn in turns.items():
            end = rows[beta][-1]["labeler"]
            shown.append(f"β {beta}: {'no turn' if turn is None else f'turned at {turn.gold:.2f}'}, ends {end:.2f}")
    return Finding(
        7,
        "by seed: " + "; ".join(shown),
        in_every_seed(passed),
        len(lab.seeds),
        {"histories": histories},
    )


CLAIMS = {4: claim_4, 5: claim_5, 6: claim_6, 7: claim_7}
