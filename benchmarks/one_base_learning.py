r"""Does PPO with four roles on one base learn what full fine-tuning learns, from the same episodes?

    python -m benchmarks.one_base_learning                      # takes up the stages of `make demo-long`, or makes them

and, some 30 times as fast, the same task with a language model of 4M parameters:

    python -m benchmarks.tiny_lm --steps 1500 --bf16 --folder outputs/tiny_1500
    python -m benchmarks.one_base_learning --model outputs/tiny_1500 --run_dir outputs/tiny_demo \
        --recipes benchmarks/tiny_demo --ppo benchmarks/tiny_demo/ppo_ptx.yaml --episodes 2048 --dtype float32 \
        --full_learning_rates 4e-4 8e-4 --learning_rates 2e-3 4e-3 --reward_learning_rate 3e-3

The demo's task: continue a film review and praise the film; the labeler is a sentiment classifier, which nothing trains
on. Once: SFT model and rankings (the stages of `--run_dir`), and a reward adapter trained by `--recipes` on the SFT
model with LoRA. Then for every seed two PPO-ptx runs with the same prompts, episodes, seeds and pretraining texts:

- full: policy, reference, reward model (the adapter merged into it) and critic (its copy) are four models; policy and
  critic are trained whole.
- one base: `RoleAdapters` on the SFT model; only adapters and the critic's head are trained.

Learning rates are the policy's, or the policy's and the critic's as `2e-3/3e-4`; the critic's is otherwise in the
proportion of `--ppo` to the policy's. Where several are given, seed 0 runs each, and the labeler's score on validation
prompts picks.

The gain is the labeler's mean score of answers to held-out test prompts less the SFT model's, sampled with the same
seed. Every run has a process of its own. Finished pieces stay under <run_dir>/one_base_learning and are not done again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import OUTPUTS, machine, mean_sd, table

ROOT = Path(__file__).resolve().parent.parent
GB = 10**9


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--run_dir", type=Path, default=OUTPUTS / "demo_long", help="data, SFT and rankings (default: make demo-long's)"
    )
    add("--recipes", type=Path, default=ROOT / "recipes" / "demo_long", help="YAMLs of these (default: demo_long's)")
    add("--ppo", type=Path, default=ROOT / "recipes" / "demo" / "ppo_ptx.yaml", help="of PPO-ptx (default: the demo's)")
    add("--model", help="folder or name that SFT starts from (default: the demo's SmolLM2-135M)")
    add("--episodes", type=int, default=640, help="of each PPO run (default: 640; the demo has 960)")
    add("--answers", type=int, default=3, help="sampled for each test prompt (default: 3)")
    add("--seeds", type=int, default=3, help="pairs of runs (default: 3)")
    add("--full_learning_rates", nargs="+", default=["4e-5"], help="of the whole models (default: 4e-5, the demo's)")
    add("--learning_rates", nargs="+", default=["4e-4"], help="of the adapters (default: 4e-4)")
    add("--reward_learning_rate", default="1e-3", help="of the reward adapter (default: 1e-3)")
    add("--rank", type=int, default=16, help="of the adapters (default: 16)")
    add("--alpha", type=int, help="of the policy's adapter (default: twice the rank, as of the others)")
    add("--reward_rank", type=int, help="of the reward and the critic's adapter (default: as --rank)")
    add("--targets", nargs="+", default=["q_proj", "k_proj", "v_proj", "o_proj"], help="LoRA's (default: attention)")
    add("--modules_to_save", nargs="+", default=[], help="layers of the policy that train whole, e.g. lm_head")
    add("--reward_targets", nargs="+", help="of the reward and the critic's adapter (default: as --targets)")
    add("--dtype", default="bfloat16", help="of the one base; adapters are float32 (default: bfloat16)")
    add("--threads", type=int, help="torch threads of each run (default: the cores at hand)")
    add("--piece", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.threads = args.threads or len(os.sched_getaffinity(0))
    args.reward_rank, args.reward_targets = args.reward_rank or args.rank, args.reward_targets or args.targets
    args.folder = args.run_dir / "one_base_learning"
    return args


def main() -> None:
    from benchmarks import one_base_runs as runs

    args = arguments()
    if args.piece is not None:
        runs.PIECES[args.piece.split(":")[0]](args, *args.piece.split(":")[1:])
        return
    reward = piece(args, "reward", "reward_model_merged")
    sft = piece(args, "sft", "sft")
    best, found = {}, []
    for arm, rates in (("full", args.full_learning_rates), ("one_base", args.learning_rates)):
        tried = {rate: piece(args, f"{arm}:{rate}:0", runs.folder_of(args, arm, rate, 0)) for rate in rates}
        best[arm] = max(tried, key=lambda rate: tried[rate]["validation"])
        found += [f"{arm} {rate}: {run['validation']:.3f}" for rate, run in tried.items()]
    print("Labeler on validation prompts, seed 0, by learning rate: " + ", ".join(found) + ".", flush=True)
    pairs = []
    for seed in range(args.seeds):
        both = [
            piece(args, f"{arm}:{rate}:{seed}", runs.folder_of(args, arm, rate, seed)) for arm, rate in best.items()
        ]
        pairs.append((both[0], both[1]))
        report(args, sft, reward, best, pairs)


def piece(args: argparse.Namespace, name: str, folder: str) -> dict[str, Any]:
    """What a piece reported. Its process does it, keeps it if it was done with these settings, or refuses others."""
    from instruct_trl.pipeline.stage import finished_summary

    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.one_base_learning", *sys.argv[1:], "--piece", name]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"{name} failed; what is above says why. The pieces before it are kept.")
    found = finished_summary(args.folder / folder)
    assert found is not None
    return found["summary"]


def report(
    args: argparse.Namespace,
    sft: dict[str, Any],
    reward: dict[str, Any],
    best: dict[str, str],
    pairs: list[tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    """The table of the seeds done so far, and whether nine tenths of the gain are reached."""
    from instruct_trl.evaluation.estimates import bootstrap_interval

    print("\n" + machine(args.threads))
    print(
        f"{args.episodes} episodes a run. Reward adapter: held-out pair accuracy "
        f"{reward['pair_accuracy']['mean']:.3f}. SFT "
        f"model: labeler {sft['score']:.3f} on {len(sft['scores'])} test prompts, {args.answers} answers each, "
        f"pretraining loss {sft['pretraining_loss']:.3f}."
    )
    print("Learning rate of the policy: " + ", ".join(f"{arm} {rate}" for arm, rate in best.items()) + ".\n")
    rows, gains = [], []
    for seed, both in enumerate(pairs):
        full, ours = (run["score"] - sft["score"] for run in both)
        gains.append((full, ours))
        for name, run, gain in zip(("full", "one base"), both, (full, ours), strict=True):
            rows.append(
                [
                    seed,
                    name,
                    f"{run['score']:.3f}",
                    f"{gain:+.3f}",
                    f"{ours / full:.2f}" if name == "one base" else "",
                    f"{run['kl']:.2f}",
                    f"{run['pretraining_loss']:.3f}",
                    f"{run['seconds']:.0f}",
                    f"{run['peak'] / GB:.2f}",
                ]
            )
    header = ("seed", "run", "labeler", "gain", "share", "KL(π‖SFT)", "pretraining loss", "training, s", "peak, GB")
    print(table(header, rows))
    total = [
        [statistics.mean(run["scores"][i] for run in group) - base for i, base in enumerate(sft["scores"])]
        for group in zip(*pairs, strict=True)
    ]
    excess = bootstrap_interval([ours - 0.9 * full for full, ours in zip(*total, strict=True)])
    full_gains, our_gains = ([pair[i] for pair in gains] for i in (0, 1))
    share = statistics.mean(our_gains) / statistics.mean(full_gains)
    print(f"\nGain: full {mean_sd(full_gains)}, one base {mean_sd(our_gains)} (mean ± sd of {len(gains)} seeds).")
    interval = f"{excess.low:+.3f} to {excess.high:+.3f}, over prompts"
    print(f"One base's gain less 0.9 of full's: {excess.mean:+.3f} ({interval}).")
    print(f"{'met' if share >= 0.9 else 'MISSED'}: at least 0.90 of the full fine-tune's gain: {share:.2f}", flush=True)


if __name__ == "__main__":
    main()
