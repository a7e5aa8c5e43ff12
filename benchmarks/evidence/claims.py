"""The claims of `evidence.py`, each a function from jobs to a finding. docs/evidence.md tells of the rules."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.jobs import base, rl_init, selected, selected_folder
from benchmarks.evidence.lab import Job, Lab
from benchmarks.evidence.ppo import answers, base_tax, ppo, tax
from benchmarks.evidence.text import DISTINCT_KEPT, GAIN_LOST, SHARE_BACK
from benchmarks.evidence.verdicts import (
    Finding,
    Interval,
    both,
    by_interval,
    excess_gain,
    in_every_seed,
    in_order,
    over_seeds,
    pooled_difference,
    pooled_win_rate,
    takes_back,
)

ANSWERS = 3  # claims 3 and 4: a prompt
SAMPLES = 5  # claim 1: prompts shown
PAPER = {"ptx_coef": 27.8, "ptx_ratio": 8}
PAPER_EMA, PAPER_STEPS = 0.992, 4000  # 256,000 episodes, 64 a step


def ptx_run(lab: Lab, seed: int, **changes: Any) -> Job:
    """PPO-ptx at the γ and the learning rate that validation prompts chose."""
    plan = lab.plan
    own = {"ptx_coef": plan.ptx_coef, "ptx_ratio": plan.ptx_ratio, "learning_rate": plan.ptx_learning_rate}
    return ppo(lab, seed, iterations=plan.ptx_iterations or plan.iterations, **own, **changes)


def gold(job: Job) -> list[float]:
    """The labeler's score of each prompt's answer."""
    return job.read("answers.json")["gold"]


def of_policy(lab: Lab, job: Job, seed: int, part: str = "policy", split: str = "test") -> Job:
    """Answers of a PPO run's weights ('policy') or of their average ('ema')."""
    return answers(lab, job.folder / "run" / part, job, seed, split)


def of_sft(lab: Lab, seed: int, by: str = "rm", draw: int = 0) -> Job:
    return answers(lab, selected_folder(lab, seed, by), selected(lab, seed), seed, draw=draw)


def by_seed(values: Sequence[float], digits: int = 2) -> str:
    return ", ".join(f"{value:.{digits}f}".replace("-", "−") for value in values)


def claim_1(lab: Lab) -> Finding:
    """PPO-ptx > SFT > prompted base > base. SFT's own rate is that of a second draw from it, so that it has one."""
    judged = [policies(lab, seed) for seed in lab.seeds]
    baseline = [gold(of_sft(lab, seed)) for seed in lab.seeds]
    scores = {name: [gold(of_seed[name]) for of_seed in judged] for name in judged[0]}
    rates = {name: pooled_win_rate(rows, baseline) for name, rows in scores.items()}
    seeds = {
        name: [pooled_win_rate([s], [b]).mean for s, b in zip(rows, baseline, strict=True)]
        for name, rows in scores.items()
    }
    measured = "; ".join(f"{name} {rate.percent()}" for name, rate in rates.items())
    return Finding(
        1,
        f"won against SFT: {measured}. PPO-ptx by seed: {by_seed(seeds['PPO-ptx'])}, over seeds "
        f"{over_seeds(seeds['PPO-ptx']).percent()}. {_favourites(judged)}",
        in_order(list(rates.values())),
        len(lab.seeds),
        {
            "rates": {name: [rate.mean, rate.low, rate.high] for name, rate in rates.items()},
            "by_seed": seeds,
            "samples": samples(judged[0]),
        },
    )


def policies(lab: Lab, seed: int) -> dict[str, Job]:
    """The answers of each policy of claim 1, best first as the paper has it."""
    return {
        "PPO-ptx": of_policy(lab, ptx_run(lab, seed), seed),
        "SFT": of_sft(lab, seed, draw=1),
        "prompted base": answers(lab, base(lab), None, seed, few_shot=lab.plan.shots),
        "base": answers(lab, base(lab), None, seed),
    }


def samples(judged: dict[str, Job]) -> list[dict[str, str]]:
    """The first prompts with each policy's answer: chosen by position, not by how they turned out."""
    read = {name: job.read("answers.json") for name, job in judged.items()}
    prompts = read["base"]["prompts"][:SAMPLES]
    return [
        {"prompt": prompt, **{name: rows["answers"][i] for name, rows in read.items()}}
        for i, prompt in enumerate(prompts)
    ]


def _favourites(judged: Sequence[dict[str, Job]]) -> str:
    """The word that PPO-ptx uses more than SFT, by seed."""
    from instruct_trl.evaluation.answers import favourite_word

    shown = []
    for of_seed in judged:
        texts = (of_seed[name].read("answers.json")["answers"] for name in ("PPO-ptx", "SFT"))
        word, now, before = favourite_word(*texts) or ("", 0.0, 0.0)
        shown.append(f"“{word}” in {100 * now:.0f} % of answers, SFT {100 * before:.0f} %")
    return "Its favourite word by seed: " + "; ".join(shown)


def claim_2(lab: Lab) -> Finding:
    """The epoch that the reward model keeps is later than the one that the validation loss keeps, and better.

    Its win rate against the last epoch says what choosing is worth beside training on.
    """
    by_rm, by_loss, epochs, curves = [], [], [], []
    chosen, last = [], []  # of the seeds where these are not the same checkpoint
    for seed in lab.seeds:
        choice = selected(lab, seed)
        epochs.append((choice.summary["by_rm"], choice.summary["by_loss"]))
        curves.append(choice.summary["epochs"])
        by_rm.append(gold(of_sft(lab, seed)))
        by_loss.append(gold(of_sft(lab, seed, by="loss")))
        if choice.summary["by_rm"] < choice.summary["epochs"][-1]["epoch"]:
            chosen.append(by_rm[-1])
            last.append(gold(of_sft(lab, seed, by="last")))
    rate = pooled_win_rate(by_rm, by_loss)
    verdict = both(in_every_seed([rm > loss for rm, loss in epochs]), by_interval(rate, 0.5))
    shown = ", ".join(f"{rm:.0f} against {loss:.0f}" for rm, loss in epochs)
    return Finding(
        2,
        f"epoch by RM against by loss: {shown}; win rate of the RM's choice {rate.percent()}"
        + (f", against the last epoch, where another, {pooled_win_rate(chosen, last).percent()}" if chosen else ""),
        verdict,
        len(lab.seeds),
        {"epochs": epochs, "curves": curves, "rate": [rate.mean, rate.low, rate.high]},
    )


def claim_3(lab: Lab) -> Finding:
    """What PPO costs on pretraining text, and what PPO-ptx takes back of it, at which price."""
    points = [_tax_and_gain(lab, seed) for seed in lab.seeds]
    rises, rises_real = ([p["PPO"][key] for p in points] for key in ("rise", "rise_real"))
    back, back_real = ([p[key] for p in points] for key in ("back", "back_real"))
    recovered = in_every_seed([rise > 0 and share >= SHARE_BACK for rise, share in zip(rises, back, strict=True)])
    gained = [p.pop("gains") for p in points]  # a number a prompt
    excess = excess_gain(*([gains[name] for gains in gained] for name in ("PPO-ptx", "PPO", "start")), 1 - GAIN_LOST)
    each = [p["PPO-ptx"]["gain"] - (1 - GAIN_LOST) * p["PPO"]["gain"] for p in points]
    plain, mixed = ([p[name]["gain"] for p in points] for name in ("PPO", "PPO-ptx"))
    return Finding(
        3,
        f"{_lengths(lab)}PPO: loss on the base's samples {over_seeds(rises).number()} nats up; PPO-ptx at "
        f"γ = {lab.plan.ptx_coef:g} takes back {over_seeds(back).percent()}, by seed {by_seed(back)}. On reviews by "
        f"people {over_seeds(rises_real).number()} nats up, {over_seeds(back_real).percent()} back, by seed "
        f"{by_seed(back_real)}. Gain by seed: PPO {by_seed(plain)}; PPO-ptx {by_seed(mixed)}; "
        f"minus 95 % of PPO's {over_seeds(each).number()} over seeds, {excess.number()} for these seeds over prompts. "
        f"γ = 27.8 at 8:1: {_of_the_papers(points)}",
        both(recovered, by_interval(over_seeds(each), 0.0)),
        len(lab.seeds),
        {"points": points},
    )


def _lengths(lab: Lab) -> str:
    """How long each ran, where that differs."""
    longer, plain = lab.plan.ptx_iterations, lab.plan.iterations
    return f"PPO-ptx {longer} iterations, PPO {plain}. " if longer not in (0, plain) else ""


def _of_the_papers(points: list[dict]) -> str:
    name = "27.8 at 8:1"
    if name not in points[0]:
        return "not run"
    rise, gain = (over_seeds([point[name][key] for point in points]) for key in ("rise", "gain"))
    return f"loss {rise.number()} nats up, gain {gain.number()}, after {points[0][name]['iterations']} iterations"


def _tax_and_gain(lab: Lab, seed: int) -> dict:
    start = rl_init(lab, seed)
    before = gold_a_prompt(lab, start.folder / "model", start, seed)
    losses = tax(lab, start.folder / "model", start)
    runs = {
        "PPO": ppo(lab, seed),
        "PPO-ptx": ptx_run(lab, seed),
    }
    if lab.plan.paper_iterations:
        runs["27.8 at 8:1"] = ppo(lab, seed, iterations=lab.plan.paper_iterations, **PAPER)
    point: dict = {"base": base_tax(lab), "start": losses}
    after = {name: gold_a_prompt(lab, run.folder / "run" / "policy", run, seed) for name, run in runs.items()}
    for name, run in runs.items():
        cost = tax(lab, run.folder / "run" / "policy", run)
        point[name] = {
            "rise": cost["sampled"] - losses["sampled"],
            "rise_real": cost["real"] - losses["real"],
            "gain": statistics.fmean(after[name]) - statistics.fmean(before),
            "kl": run.summary["kl"],
            "iterations": run.summary["iterations"],
        }
    plain, mixed = point["PPO"], point["PPO-ptx"]
    for share, rise in (("back", "rise"), ("back_real", "rise_real")):
        point[share] = takes_back(0.0, plain[rise], mixed[rise]) if plain[rise] > 0 else 0.0
    point["gains"] = {**after, "start": before}
    return point


def gold_a_prompt(lab: Lab, policy: Path, after: Job, seed: int) -> list[float]:
    """The labeler's mean score of `ANSWERS` answers to each prompt: one answer does not tell 5 % of a gain."""
    scores = gold(answers(lab, policy, after, seed, lab.plan.judged_on, count=ANSWERS))
    return [statistics.fmean(scores[i : i + ANSWERS]) for i in range(0, len(scores), ANSWERS)]


def claim_8(lab: Lab) -> Finding:
    """No seed of claim 1 ends below SFT in the labeler's score, nor in one phrase that the labeler likes."""
    gaps, pairs, verdicts = [], [], []
    for seed in lab.seeds:
        run, sft = of_policy(lab, ptx_run(lab, seed), seed), of_sft(lab, seed)
        gaps.append(pooled_difference([gold(run)], [gold(sft)]))
        pairs.append((run.summary["distinct_2"], sft.summary["distinct_2"]))
        one_phrase = pairs[-1][0] < DISTINCT_KEPT * pairs[-1][1]
        verdicts.append("does not" if one_phrase else by_interval(gaps[-1], 0.0))
    verdict = "does not" if "does not" in verdicts else "holds" if set(verdicts) == {"holds"} else "cannot tell"
    shown = ", ".join(f"{100 * own:.0f} % (SFT {100 * other:.0f} %)" for own, other in pairs)
    return Finding(
        8,
        f"labeler's score minus SFT's, by seed: {'; '.join(gap.number() for gap in gaps)}. Distinct word pairs: "
        f"{shown}",
        verdict,
        len(lab.seeds),
        {"gaps": [[gap.mean, gap.low, gap.high] for gap in gaps], "distinct_2": pairs},
    )


def ema_of_the_papers_share(lab: Lab) -> float:
    """The decay whose average reaches over the same share of our run as the paper's over its 4,000 steps."""
    steps = (lab.plan.ptx_iterations or lab.plan.iterations) * (lab.plan.rollout // lab.plan.minibatch)
    return round(PAPER_EMA ** (PAPER_STEPS / steps), 3)


def claim_9(lab: Lab) -> Finding:
    """The average of the weights against the weights themselves, at the end of claim 1's runs.

    Judged is the paper's decay. Beside it stands the one that suits a run of this length.
    """
    decay = ema_of_the_papers_share(lab)
    rate, gap, losses = _average_against_raw(lab, [ptx_run(lab, seed) for seed in lab.seeds])
    scaled, scaled_gap, _ = _average_against_raw(lab, [ptx_run(lab, seed, ema_decay=decay) for seed in lab.seeds])
    return Finding(
        9,
        f"EMA wins {rate.percent()} against raw; labeler's score {gap.number()} apart; pretraining loss "
        f"{losses.number(3)} apart. Decay {decay:g}, for the paper's share of the run: EMA wins {scaled.percent()}, "
        f"score {scaled_gap.number()} apart",
        by_interval(rate, 0.5),
        len(lab.seeds),
        {"rate": [rate.mean, rate.low, rate.high], "scaled": [scaled.mean, scaled.low, scaled.high]},
    )


def _average_against_raw(lab: Lab, runs: Sequence[Job]) -> tuple[Interval, Interval, Interval]:
    """Win rate, difference of the labeler's score, and of the pretraining loss over seeds, of a run a seed."""
    of_seed = list(zip(lab.seeds, runs, strict=True))
    averaged = [gold(of_policy(lab, run, seed, "ema")) for seed, run in of_seed]
    raw = [gold(of_policy(lab, run, seed)) for seed, run in of_seed]
    costs = [[tax(lab, run.folder / "run" / part, run)["sampled"] for part in ("ema", "policy")] for run in runs]
    losses = over_seeds([ema - own for ema, own in costs])
    return pooled_win_rate(averaged, raw), pooled_difference(averaged, raw), losses


ClaimFunction = Callable[[Lab], Finding]
CLAIMS: dict[int, ClaimFunction] = {1: claim_1, 2: claim_2, 3: claim_3, 8: claim_8, 9: claim_9}
