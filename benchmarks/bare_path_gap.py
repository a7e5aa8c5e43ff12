"""What it costs to hand TRL's GRPOTrainer the path of a reward model in place of a RewardScorer.

    python -m benchmarks.bare_path_gap [REWARD_MODEL] [RANKINGS] [--batch_size 16] [--prompts N]

REWARD_MODEL is a folder of RankingRewardTrainer; RANKINGS a jsonl with `prompt` and `completions`, optionally `ranks`
and `truncated`. Without them: those of `make demo`. Given a path, TRL tokenises prompt + completion anew, without
special tokens (no EOS, no BOS), and knows no `reward_bias`. Both sides are TRL's own `GRPOTrainer._calculate_rewards`,
once with the path and once with a RewardScorer; the policy, which that needs and does not run, is a random one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from instruct_trl import RewardScorer

DEMO = Path("outputs/demo")


def grpo_rewards(reward: Any, tokenizer: Any, rows: list[dict], batch_size: int) -> list[float]:
    """Rewards of all completions, row by row, by TRL's GRPOTrainer with `reward` as its reward function.

    Args:
        reward: what a user gives as `reward_funcs`: a path, or a callable.
        rows: `prompt`, `completions`, optionally `truncated`, which callables are told.
    """
    sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            folder,
            num_generations=2,
            per_device_train_batch_size=2,
            beta=0.0,
            bf16=False,
            use_cpu=not torch.accelerator.is_available(),
            report_to="none",
        )
        prompts = Dataset.from_dict({"prompt": ["a", "b"]})
        trainer = GRPOTrainer(policy, reward, args=args, train_dataset=prompts, processing_class=tokenizer)
        flat = [
            {"prompt": row["prompt"], "completion": completion, "truncated": bool(cut)}
            for row in rows
            for completion, cut in zip(
                row["completions"], row.get("truncated") or [False] * len(row["completions"]), strict=True
            )
        ]
        rewards: list[float] = []
        for start in range(0, len(flat), batch_size):
            part = flat[start : start + batch_size]
            inputs = [{"prompt": example["prompt"], "truncated": example["truncated"]} for example in part]
            completions = [example["completion"] for example in part]
            # What was sampled matters to neither side: the path's does not look, and the scorer is told `truncated`.
            ids: list[list[int]] = [[] for _ in part]
            prompts_ = [example["prompt"] for example in part]
            rewards += trainer._calculate_rewards(inputs, prompts_, completions, ids)[:, 0].tolist()
    return rewards


def count_pairs(row: dict, ours: list[float], bare: list[float]) -> torch.Tensor:
    """Of one prompt, (5,): pairs, flipped pairs, ranked pairs, of these ordered as ranked by ours, by the bare path."""
    counts = torch.zeros(5, dtype=torch.long)
    for i, j in itertools.combinations(range(len(ours)), 2):
        ours_difference, bare_difference = ours[i] - ours[j], bare[i] - bare[j]
        counts[:2] += torch.tensor([1, int(ours_difference * bare_difference < 0)])
        # Lower ranks are better, so that the difference of rewards should have the other sign than that of ranks.
        sign = row["ranks"][j] - row["ranks"][i] if row.get("ranks") else 0
        if sign:
            counts[2:] += torch.tensor([1, int(sign * ours_difference > 0), int(sign * bare_difference > 0)])
    return counts


def compare(folder: str | Path, rows: list[dict], batch_size: int = 16) -> dict[str, float]:
    """The figures that `main` prints, by name. Rewards are in the reward model's own unit, shares from 0 to 1."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scorer = RewardScorer(folder, batch_size=batch_size)
    bare = torch.tensor(grpo_rewards(str(folder), tokenizer, rows, batch_size), dtype=torch.float64)
    ours = torch.tensor(grpo_rewards(scorer, tokenizer, rows, batch_size), dtype=torch.float64)
    sizes = [len(row["completions"]) for row in rows]
    lists = zip(rows, ours.split(sizes), bare.split(sizes), strict=True)
    counts = torch.stack([count_pairs(row, a.tolist(), b.tolist()) for row, a, b in lists]).sum(dim=0).tolist()
    pairs, flips, ranked, ours_correct, bare_correct = counts
    result = {
        "prompts": len(rows),
        "completions": len(ours),
        "reward_bias": scorer.reward_bias,
        "standard deviation of RewardScorer's rewards": ours.std().item(),
        "mean absolute difference": (ours - bare).abs().mean().item(),
        "mean absolute difference, bias added to the path's": (ours - bare - scorer.reward_bias).abs().mean().item(),
        "correlation": torch.corrcoef(torch.stack([ours, bare]))[0, 1].item(),
        "pairs of one prompt": pairs,
        "share of pairs whose order flips": flips / pairs if pairs else math.nan,
    }
    if ranked:
        result |= {
            "ranked pairs": ranked,
            "pair accuracy, RewardScorer": ours_correct / ranked,
            "pair accuracy, bare path": bare_correct / ranked,
        }
    return result


def read_rows(path: Path, limit: int | None) -> list[dict]:
    """The jsonl's rows that have completions, at most `limit`. Raises SystemExit where file or column is missing."""
    if not path.is_file():
        raise SystemExit(f"There is no file {path}. Run `make demo` first, or pass REWARD_MODEL and RANKINGS.")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        for column in ("prompt", "completions"):
            if column not in row:
                raise SystemExit(f"{path}, line {number}: no {column!r}. RANKINGS needs `prompt` and `completions`.")
    rows = [row for row in rows if row["completions"]][:limit]
    if not rows:
        raise SystemExit(f"{path} has no row with completions.")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reward_model", nargs="?", type=Path, default=DEMO / "reward_model")
    parser.add_argument("rankings", nargs="?", type=Path, default=DEMO / "rankings" / "test.jsonl")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--prompts", type=int, help="use the first N prompts only")
    args = parser.parse_args(arguments)
    if not args.reward_model.is_dir():
        raise SystemExit(f"There is no folder {args.reward_model}. Run `make demo` first, or pass a REWARD_MODEL.")
    rows = read_rows(args.rankings, args.prompts)
    transformers_logging.disable_progress_bar()
    for name, value in compare(args.reward_model, rows, args.batch_size).items():
        print(f"{name:52} {value:.4f}" if isinstance(value, float) else f"{name:52} {value}")


if __name__ == "__main__":
    main()
