"""The paper's claims in miniature, with seeds and intervals: one table and its pictures.

    python -m benchmarks.evidence                    # claims 1, 2, 3, 5, 8, 9
    python -m benchmarks.evidence --claim 3          # one claim
    python -m benchmarks.evidence --all              # every claim, hours
    python -m benchmarks.evidence --all --large      # a larger model and sizes, for one GPU

Everything is made once and kept under `--folder`; run it again after an interruption and it goes on. With `--jobs 2`
two processes work at the same time, one thread each. Prompts that judge (test) tune nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.common import OUTPUTS, machine, quiet
from benchmarks.evidence.lab import DEFAULT_SEEDS, LARGE, QUICK, Lab, Plan, plan_arguments

HOUR = (1, 2, 3, 5, 8, 9)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claim", type=int, nargs="+", help="only these claims")
    parser.add_argument("--all", action="store_true", help="every claim, those that take hours too")
    parser.add_argument("--seeds", type=int, default=DEFAULT_SEEDS, help="seeds of every claim (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at work at the same time (default: 1)")
    parser.add_argument("--folder", type=Path, help="where everything is kept (default: outputs/evidence)")
    parser.add_argument("--pictures", type=Path, help="where pictures go (default: FOLDER/pictures)")
    parser.add_argument("--write", type=Path, help="a document whose table is replaced, between its two markers")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs, not what comes out")
    sizes.add_argument("--large", action="store_true", help="SmolLM2-135M and larger sizes, for one GPU")
    parser.add_argument("--only_seed", type=int, help=argparse.SUPPRESS)
    plan_arguments(parser)
    args = parser.parse_args(argv)
    args.folder = args.folder or OUTPUTS / ("evidence" + "_quick" * args.quick + "_large" * args.large)
    return args


def the_plan(args: argparse.Namespace) -> Plan:
    given = {item.name: getattr(args, item.name) for item in fields(Plan)}
    sizes = QUICK if args.quick else LARGE if args.large else Plan()
    return replace(sizes, **{k: v for k, v in given.items() if v is not None})


def claims() -> dict[int, Any]:
    """Every claim's function by its number."""
    from benchmarks.evidence.claims import CLAIMS
    from benchmarks.evidence.sweeps import CLAIMS as SWEEPS

    return {**CLAIMS, **SWEEPS}


def the_claims(args: argparse.Namespace) -> list[int]:
    """Raises SystemExit for a claim that there is not."""
    known = claims()
    unknown = sorted(set(args.claim or []) - set(known))
    if unknown:
        raise SystemExit(f"--claim {unknown[0]}: there are {', '.join(map(str, sorted(known)))}.")
    return sorted(args.claim or (known if args.all else HOUR))


def shared_jobs(lab: Lab) -> None:
    """What all seeds build on, done before they part."""
    from benchmarks.evidence.jobs import data
    from benchmarks.evidence.ppo import base_tax

    data(lab)
    base_tax(lab)


def side_by_side(args: argparse.Namespace, numbers: Sequence[int], argv: Sequence[str]) -> None:
    """Each claim's jobs of each seed in a process of its own, `args.jobs` at a time, one thread each.

    Raises:
        SystemExit: one of them failed; says which.
    """
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    waiting = [(number, seed) for number in numbers for seed in range(args.seeds)]
    waiting.sort(key=lambda one: one[0] == 5 and one[1] > 0)  # they wait for the learning rates that seed 0 tries
    running: dict[tuple[int, int], subprocess.Popen] = {}
    while waiting or running:
        while waiting and len(running) < args.jobs:
            number, seed = waiting.pop(0)
            command = [
                sys.executable,
                "-m",
                "benchmarks.evidence",
                *argv,
                "--claim",
                str(number),
                "--only_seed",
                str(seed),
            ]
            running[number, seed] = subprocess.Popen(command, env={**os.environ, **threads})
        for (number, seed), process in list(running.items()):
            if process.poll() is not None:
                del running[number, seed]
                if process.returncode:
                    for other in running.values():
                        other.terminate()
                    raise SystemExit(f"Claim {number}, seed {seed} failed (see above). Run it again to go on.")
        time.sleep(0.5)


def main(argv: Sequence[str] | None = None) -> list[Any]:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    quiet()
    numbers, plan = the_claims(args), the_plan(args)
    begin = time.perf_counter()
    seeds = range(args.seeds) if args.only_seed is None else [args.only_seed]
    lab = Lab(args.folder, plan, seeds)
    shared_jobs(lab)
    if args.jobs > 1 and args.only_seed is None:
        side_by_side(args, numbers, argv)
    known = claims()
    findings = [known[number](lab) for number in numbers]
    if args.only_seed is not None:
        return findings
    import torch

    from benchmarks.evidence.report import report

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    line = machine(1 if args.jobs > 1 else None, str(accelerator))
    about = {"machine": line, "minutes": (time.perf_counter() - begin) / 60, "plan": asdict(plan)}
    report(findings, about, args.folder, args.pictures or args.folder / "pictures", args.write)
    return findings


if __name__ == "__main__":
    main()
