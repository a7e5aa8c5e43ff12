"""Memory of a PPO iteration: four models against one base with four roles, measured, and as `--dry_run` predicts it.

    python -m benchmarks.memory [MODEL] [--cases four_full one_base_nf4 ...] [--targets attention]

MODEL is a folder, a hub name, or a config.json, whose weights are then random. Default: the demo's SmolLM2-135M. Each
case is a process of its own that runs one iteration (rollout, scores, two optimizer steps with pretraining text).

Measured on a CPU: the process's peak resident memory (VmHWM) during that iteration, less what the process holds when
all is imported and no model is loaded yet. glibc is told to give large freed blocks back at once
(MALLOC_MMAP_THRESHOLD_): otherwise the peak depends on what the allocator keeps. Weights are copied out of the mapped
checkpoint first: else a page counts once it is read, and a whole file as long as one tensor of it lives. On a GPU: the
peak of torch's allocator. The prediction is the dry run's for the same settings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import machine, table

CASES = {
    "four_full": "four full models",
    "policy_lora": "LoRA on the policy only (TRL 1.12's way)",
    "four_lora": "four separate LoRA models",
    "one_base_fp32": "one base, float32",
    "one_base_bf16": "one base, bf16",
    "one_base_nf4": "one base, 4-bit (nf4, double quantisation)",
}
MB = 1e6


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder, hub name or config.json (default: the demo's SmolLM2)")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=("attention", "all-linear"), default="attention")
    for name, default, text in (
        ("rollout", 16, "episodes of the iteration"),
        ("chunk", 16, "rows generated or scored at once"),
        ("micro_batch", 4, "rows of a forward and backward; two make an optimizer step"),
        ("prompt", 32, "tokens"),
        ("completion", 32, "tokens"),
        ("ptx_length", 64, "tokens of a pretraining text"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--autocast", action="store_true", help="bf16 autocast")
    parser.add_argument(
        "--keep_freed", action="store_true", help="CPU: the recipes' allocator, which keeps what is freed"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--pieces", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.case is not None:
        from benchmarks.memory_case import make_pieces, measure

        print(json.dumps(make_pieces(args) if args.case == "pieces" else measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        made = child(args, "pieces", folder)
        results = {}
        for case in args.cases:
            results[case] = child(args, case, folder) | predict(args, case, folder)
            print(f"{case}: {json.dumps(results[case])}", file=sys.stderr, flush=True)
    print(machine(device=made["device"]))
    report(args, made, results)


def child(args: argparse.Namespace, case: str, folder: str) -> dict[str, Any]:
    """Run one case in a process of its own."""
    environment = dict(os.environ)
    if not args.keep_freed:
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.memory",
        *sys.argv[1:],
        "--case",
        case,
        "--pieces",
        folder,
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{case} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def predict(args: argparse.Namespace, case: str, folder: str) -> dict[str, Any]:
    """The dry run's figures for a case."""
    from benchmarks.memory_case import plan_of

    plan = plan_of(args, case, Path(folder))
    return {"predicted": plan.peak, "weights_predicted": plan.weights, "phase": plan.peak_phase.name}


def report(args: argparse.Namespace, made: dict[str, Any], results: dict[str, dict[str, Any]]) -> None:
    """The table and the targets."""
    print(
        f"Model: {made['name']}, {made['parameters'] / MB:.1f} M parameters. Rollout {args.rollout}, micro-batch "
        f"{args.micro_batch} × 2, prompts {args.prompt} + answers {args.completion} tokens, texts of "
        f"{args.ptx_length}; LoRA rank {args.rank} on {args.targets}. Megabytes (10^6 bytes).\n"
    )
    header = (
        "case",
        "weights, arithmetic",
        "weights, measured",
        "peak measured",
        "peak predicted",
        "predicted / measured",
        "peak in",
        "episodes/s",
    )
    rows = [
        (
            CASES[case],
            f"{r['weights_predicted'] / MB:.0f}",
            f"{r['weights'] / MB:.0f}",
            f"{r['peak'] / MB:.0f}",
            f"{r['predicted'] / MB:.0f}",
            f"{r['predicted'] / r['peak']:.2f}",
            r["phase"],
            f"{r['episodes_per_second']:.2f}",
        )
        for case, r in results.items()
    ]
    print(table(header, rows) + "\n")
    for line in targets(args, made, results):
        print(line)


def targets(args: argparse.Namespace, made: dict[str, Any], results: dict[str, dict[str, Any]]) -> list[str]:
    """One line a target, met or missed."""
    lines = []

    def judge(what: str, value: float, limit: float) -> None:
        lines.append(f"{'met' if value <= limit else 'MISSED':7}{what}: {value:.3f} (at most {limit})")

    ours = [case for case in results if case.startswith("one_base")]
    for case in ours:
        ratio = results[case]["weights"] / made["bases"][case.removeprefix("one_base_")]
        judge(f"{case}: weights of the four roles, over one base's", ratio, 1.10)
        for other, limit in (("four_full", 0.4), ("policy_lora", 1.0)):
            if other in results:
                judge(f"{case}: peak, over {other}'s", results[case]["peak"] / results[other]["peak"], limit)
    for case, r in results.items():
        judge(f"{case}: error of the prediction", abs(r["predicted"] / r["peak"] - 1), 0.15)
    return lines


if __name__ == "__main__":
    main()
