"""Speed and memory of PPO: ours (γ = 0) against TRL 1.12.0's PPOTrainer and against the bare calls.

    python -m benchmarks.ppo                     # four cases, about 15 minutes on 2 cores
    python -m benchmarks.ppo --cases ragged:1000 --rounds 2
    python -m benchmarks.ppo --model FOLDER --rollout 32

Contenders:
    trl: PPOTrainer of TRL 1.12.0, the last release that has one, in a folder of its own;
    ours: PPOPtxTrainer with ptx_coef=0 and ema_decay=None, as TRL has neither;
    sampler: the same with old_logps_from_sampler=True, which is where TRL has its log-probs from;
    floor: generate; log-probs of policy and reference, rewards, values; forward, backward and AdamW of policy and
        value, by the functions that ours calls. No trainer, no metrics, no text.
All have the same weights, prompts (the same ones each iteration), answer lengths, rollout batch, micro-batch, rows at
once without gradient, and optimizer steps an iteration, which are counted. Weights are random, so a logits processor
draws the EOS: each prompt says how long its answer is. Everything is float32 without gradient checkpointing.

Each contender has a process of its own. They take turns, one whole iteration at a time, and sleep meanwhile. The first
iteration of each warms up and is not counted. Figures are medians over the rounds; judge by the ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

from benchmarks.common import OUTPUTS, machine, table
from benchmarks.ppo_contenders import CONTENDERS, work
from benchmarks.ppo_session import Case, Report

PAUSE = 0.3  # seconds; OpenMP threads spin for 0.2 s after their last work and would disturb the next contender
CASES = ("ragged:1000", "equal:1000", "ragged:50000", "equal:50000")
TRL = "trl==1.12.0"


class Contender:
    """One process that works through an iteration whenever it is told to."""

    def __init__(self, name: str, case: Case, args: argparse.Namespace):
        context = get_context("spawn")
        self.name = name
        self.pipe, other = context.Pipe()
        self.process = context.Process(
            target=work, args=(other, name, case, str(args.trl112), args.threads), daemon=True
        )
        self.process.start()
        other.close()
        self.reports: list[Report] = []
        self._receive()
        self.iterate()
        self.reports.clear()  # it warmed up

    def _receive(self) -> Report | None:
        try:
            message = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise SystemExit(
                f"{self.name} died with exit code {self.process.exitcode} (−9: out of memory). Lower --rollout."
            ) from None
        if isinstance(message, str):
            raise SystemExit(f"{self.name} failed:\n{message}")
        return message

    def iterate(self) -> None:
        time.sleep(PAUSE)
        self.pipe.send(True)
        report = self._receive()
        if report is not None:
            self.reports.append(report)

    def finish(self) -> None:
        self.pipe.send(False)
        self.process.join()

    def median(self, field: str) -> float:
        return statistics.median(getattr(report, field) for report in self.reports)


def install_trl(folder: Path) -> None:
    """TRL 1.12.0 alone into `folder`, unless it is there; what it needs is what TRL 1.16 needs."""
    if not (folder / "trl").is_dir():
        print(f"Installing {TRL} into {folder} ...", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), TRL]
        subprocess.run(command, check=True)


def measure(case: Case, args: argparse.Namespace) -> dict[str, Contender]:
    """All contenders of one case in turns."""
    contenders = {name: Contender(name, case, args) for name in CONTENDERS if name in args.contenders}
    for _ in range(args.rounds):
        for contender in contenders.values():
            contender.iterate()
    for contender in contenders.values():
        contender.finish()
    return contenders


HEADER = [
    "case",
    "contender",
    "episodes/s",
    "s an iteration",
    "generate / forwards / update",
    "MiB at most: rollout / iteration",
    "optimizer steps",
    "answer length: mean / max",
    "time of TRL's / of the floor's",
]


def lines_of(case: Case, contenders: dict[str, Contender]) -> list[list[str]]:
    """The rows of the table for one case."""
    lines = []
    for name, contender in contenders.items():
        median = contender.median
        seconds = median("seconds")
        share = " / ".join(f"{median(stage) / seconds:.0%}" for stage in ("generate", "forwards", "update"))

        def times(other: str, seconds: float = seconds) -> str:
            return f"{seconds / contenders[other].median('seconds'):.2f}" if other in contenders else "–"

        lines.append(
            [
                case.name,
                name,
                f"{case.rollout / seconds:.1f}",
                f"{seconds:.2f}",
                share,
                f"{median('rollout_mib'):,.0f} / {median('peak_mib'):,.0f}",
                f"{median('optimizer_steps'):.0f}",
                f"{median('mean_length'):.1f} / {median('max_length'):.0f}",
                f"{times('trl')} / {times('floor')}",
            ]
        )
    return lines


def verdicts(case: Case, contenders: dict[str, Contender]) -> list[str]:
    """The targets of one case, each met or missed."""
    checks = []
    ours = contenders.get("ours")
    if ours is not None and "trl" in contenders:
        need = 1.5 if case.answer[0] < case.answer[1] else 1.25
        gain = contenders["trl"].median("seconds") / ours.median("seconds")
        checks.append((f"{gain:.2f} times TRL 1.12's episodes/s, to reach {need:.2f}", gain >= need))
        if case.vocabulary >= 30_000:
            share = ours.median("rollout_mib") / contenders["trl"].median("rollout_mib")
            checks.append((f"{share:.2f} of TRL 1.12's peak memory in the rollout, at most 0.50", share <= 0.5))
    if ours is not None and "floor" in contenders:
        ratio = ours.median("seconds") / contenders["floor"].median("seconds")
        checks.append((f"{ratio:.2f} times the floor's time, at most 1.10", ratio <= 1.1))
    steps = {int(contender.median("optimizer_steps")) for contender in contenders.values()}
    checks.append((f"optimizer steps an iteration {sorted(steps)}, all {case.steps}", steps == {case.steps}))
    return [f"{case.name}: {text}: {'met' if met else 'MISSED'}" for text, met in checks]


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def cases_of(args: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for."""
    chosen = []
    sizes = ("rollout", "micro", "accumulation", "chunk", "hidden", "layers", "model")
    for text in args.cases:
        kind, _, vocabulary = text.partition(":")
        answer = args.answer if kind == "ragged" else (args.answer[1], args.answer[1])
        chosen.append(Case(int(vocabulary), args.prompt, answer, **{name: getattr(args, name) for name in sizes}))
    return chosen


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="ragged:VOCABULARY or equal:VOCABULARY")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5, help="timed iterations of each contender (default: 5)")
    parser.add_argument("--prompt", type=_range, default=(24, 96), help="MEAN-LARGEST tokens (default: 24-96)")
    parser.add_argument("--answer", type=_range, default=(4, 64), help="LOW-HIGH; equal: HIGH each (default: 4-64)")
    helps = {
        "rollout": "episodes an iteration",
        "micro": "rows a forward and backward",
        "accumulation": "forward-backwards a step",
        "chunk": "rows generated, or scored, at once",
        "hidden": "of the small Llama",
        "layers": "of the small Llama",
    }
    fields = {field.name: field.default for field in dataclasses.fields(Case)}
    for name, text in helps.items():
        parser.add_argument(f"--{name}", type=int, default=fields[name], help=f"{text} (default: {fields[name]})")
    parser.add_argument("--model", default="", help="folder or hub name whose config is used; weights stay random")
    parser.add_argument("--trl112", type=Path, default=OUTPUTS / "trl112", help="folder of TRL 1.12.0 (default: there)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's)")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    return parser.parse_args()


def main() -> None:
    args = parse()
    install_trl(args.trl112)
    begin = time.perf_counter()
    lines, said, figures = [], [], {}
    for case in cases_of(args):
        contenders = measure(case, args)
        lines += lines_of(case, contenders)
        said += verdicts(case, contenders)
        figures[case.name] = {name: [r._asdict() for r in c.reports] for name, c in contenders.items()}
        print(f"# {case.name} done after {time.perf_counter() - begin:.0f} s", flush=True)
    print("\n" + table(HEADER, lines) + "\n\n" + "\n".join(said) + "\n")
    sizes = (
        f"Prompts of {args.prompt[0]} tokens on average, {args.prompt[1]} at most, {args.rollout} episodes an iteration"
    )
    print(f"{sizes}, micro-batches of {args.micro}, {args.rounds} rounds; {TRL} as `trl`, `ours` on the trl below.")
    print(machine(args.threads or None))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
