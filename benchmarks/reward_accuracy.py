"""Quality and time on real ranked text: K-way reward model against trl.RewardTrainer on the exploded pairs.

    python -m benchmarks.reward_accuracy
    python -m benchmarks.reward_accuracy --model demo --layers 8
    python -m benchmarks.reward_accuracy --rankings my_rankings.jsonl --model Qwen/Qwen2.5-0.5B

Both start from the same model and see the same prompts for the same `--epochs` in the same number of optimizer steps: a
step of ours has `--prompts_per_step` prompts with all their completions, a step of TRL's as many pairs as that many
prompts have on average, drawn from all pairs in random order, as a user of TRL would. Optimizer and schedule are the
same. Each method gets the best of `--learning_rates` x `--prompts_per_step` for itself, chosen with seed 0 on
validation prompts; then it runs with every seed, and the test prompts judge. One code judges both: share of the untied
pairs of a prompt that are ordered as ranked. Wall time is that of trainer.train(), set-up and judging excluded; the
methods alternate.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from benchmarks.common import machine, mean_sd, quiet, table
from benchmarks.ranked_text import (
    RankedText,
    backbone,
    comparisons,
    judge,
    ranked_text,
    ranked_text_arguments,
    reward_model_arguments,
    settings,
)

METHODS = {"kway": "RankingRewardTrainer", "pairs": "trl.RewardTrainer on pairs"}


@dataclass(frozen=True)
class Run:
    """One training run: where it was judged, and how long it took."""

    validation: float
    test: float
    test_loss: float
    seconds: float
    steps: int


@dataclass(frozen=True)
class Setting:
    """What each method may choose for itself."""

    learning_rate: float
    prompts_per_step: int


def train(method: str, setting: Setting, seed: int, data: RankedText, args: argparse.Namespace) -> Run:
    """One run of one method, judged on the validation and test prompts."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from transformers.trainer_callback import PrinterCallback
    from trl import RewardConfig, RewardTrainer

    from instruct_trl import RankingRewardConfig, RankingRewardTrainer

    rows: list[dict] = data.train
    trainer_class: Any = RankingRewardTrainer
    config_class: Any = RankingRewardConfig
    extra: dict[str, Any] = {}
    rows_a_step = setting.prompts_per_step
    if method == "pairs":
        rows = [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in comparisons(data.train)]
        trainer_class, config_class = RewardTrainer, RewardConfig
        rows_a_step = round(setting.prompts_per_step * len(rows) / len(data.train))
        # The schedule that our config has by default.
        extra = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    elif "prefix_sharing" in {field.name for field in fields(RankingRewardConfig)}:
        extra = {"prefix_sharing": "on"}
    tokenizer = AutoTokenizer.from_pretrained(args.backbone)
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = trainer_class(
            args.backbone,
            config_class(
                folder,
                num_train_epochs=args.epochs,
                **settings(args, rows_a_step, seed, setting.learning_rate),
                **extra,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
    validation, _ = judge(trainer.model, tokenizer, data.validation)
    test, test_loss = judge(trainer.model, tokenizer, data.test)
    run = Run(validation, test, test_loss, seconds, trainer.state.global_step)
    print(
        f"# {METHODS[method]}, LR {setting.learning_rate:g}, {setting.prompts_per_step} prompts a step, seed {seed}: "
        f"validation {run.validation:.4f}, test {run.test:.4f}, {run.steps} steps in {run.seconds:.0f} s",
        flush=True,
    )
    return run


def sweep(data: RankedText, args: argparse.Namespace) -> dict[str, tuple[Setting, list[Run]]]:
    """By method: its best setting on the validation prompts, and its runs with that setting, seed by seed."""
    choices = [Setting(*choice) for choice in product(args.learning_rates, args.prompts_per_step)]
    first: dict[str, dict[Setting, Run]] = {method: {} for method in METHODS}
    for setting in choices:
        for method in METHODS:
            first[method][setting] = train(method, setting, 0, data, args)
    best = {method: max(choices, key=lambda setting: runs[setting].validation) for method, runs in first.items()}
    results = {method: (best[method], [first[method][best[method]]]) for method in METHODS}
    for seed in range(1, args.seeds):
        for method in METHODS:
            results[method][1].append(train(method, best[method], seed, data, args))
    return results


def report(results: dict[str, tuple[Setting, list[Run]]], data: RankedText) -> None:
    rows = []
    for method, (setting, runs) in results.items():
        tests = [run.test for run in runs]
        rows.append(
            [
                METHODS[method],
                f"{setting.learning_rate:g}",
                setting.prompts_per_step,
                mean_sd(tests),
                ", ".join(f"{test:.3f}" for test in tests),
                mean_sd([run.test_loss for run in runs]),
                runs[0].steps,
                f"{statistics.median(run.seconds for run in runs):.1f}",
            ]
        )
    header = [
        "method",
        "best LR",
        "prompts a step",
        "held-out pair accuracy",
        "by seed",
        "held-out loss",
        "steps",
        "training, s",
    ]
    print("\n" + data.source)
    pairs = len(comparisons(data.test))
    print(f"{len(data.train)} prompts to train on, {len(data.test)} held out ({pairs:,} untied pairs).\n")
    print(table(header, rows))
    ours, theirs = results["kway"][1], results["pairs"][1]
    ratio = statistics.median(b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True))
    gaps = [a.test - b.test for a, b in zip(ours, theirs, strict=True)]
    print(f"\nTraining time of TRL over ours: {ratio:.1f} (median over seeds).")
    print(f"Accuracy of ours minus TRL's: {mean_sd(gaps)} over {len(gaps)} seed(s).")
    reached = statistics.mean(gaps) >= 0
    print(f"Held-out accuracy at least TRL's (mean over seeds): {'met' if reached else 'missed'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--learning_rates", type=float, nargs="+", default=[3e-4, 1e-3], help="peaks to try (default: 3e-4 1e-3)"
    )
    parser.add_argument(
        "--prompts_per_step", type=int, nargs="+", default=[8], help="prompts an optimizer step, to try (default: 8)"
    )
    parser.add_argument("--epochs", type=int, default=1, help="passes over the rankings or pairs (default: 1)")
    reward_model_arguments(parser)
    ranked_text_arguments(parser, train=320, validation=80, test=200)
    args = parser.parse_args()
    quiet()
    data = ranked_text(args)
    print(data.source, flush=True)
    args.backbone = backbone(args)
    report(sweep(data, args), data)
    print("\n" + machine())


if __name__ == "__main__":
    main()
