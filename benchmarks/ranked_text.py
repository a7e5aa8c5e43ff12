"""Real ranked text for the reward-model benchmarks, the model that they start from, and the judge of all methods."""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.common import OUTPUTS, sentences

PROMPT = "Review of a film:"


@dataclass(frozen=True)
class RankedText:
    """Ranked groups of completions, each with the columns `prompt`, `completions`, `ranks`; and where they are from.

    No prompt's completions are in two of the three parts. `source` is what a reader must know about the data.
    """

    train: list[dict]
    validation: list[dict]
    test: list[dict]
    source: str


def ranked_text_arguments(parser: argparse.ArgumentParser, train: int, validation: int, test: int) -> None:
    """Options that choose and cut the ranked text; the sizes given are the defaults."""
    group = parser.add_argument_group("ranked text")
    group.add_argument("--rankings", type=Path, help="your own jsonl: prompt, completions, and ranks or scores")
    for name, size in (("train", train), ("validation", validation), ("test", test)):
        group.add_argument(f"--{name}", type=int, default=size, help=f"prompts for {name} (default: {size})")
    group.add_argument("--min_k", type=int, default=4, help="fewest completions a prompt (default: 4)")
    group.add_argument("--max_k", type=int, default=9, help="most completions a prompt (default: 9)")
    group.add_argument("--max_words", type=int, default=28, help="longest review sentence used (default: 28 words)")
    group.add_argument(
        "--label_noise",
        type=float,
        default=0.0,
        help="sd of noise on the labeler's scores before ranking the training prompts, in sds of the scores: people "
        "disagree, a program does not (default: 0)",
    )


def ranked_text(args: argparse.Namespace) -> RankedText:
    """The ranked text that the options ask for.

    Raises:
        SystemExit: too few prompts for the three parts.
    """
    groups, source = (_read(args.rankings), str(args.rankings)) if args.rankings else _review_groups(args)
    random.Random(0).shuffle(groups)
    need = args.train + args.validation + args.test
    if len(groups) < need:
        raise SystemExit(f"{need} prompts asked for, {source} has {len(groups)}: lower --train, --validation or --test")
    validation, test = groups[: args.validation], groups[args.validation : args.validation + args.test]
    train = groups[args.validation + args.test : need]
    if args.label_noise:
        blur(train, args.label_noise)
        source += f" Noise of {args.label_noise} sd is on the scores of the training prompts, not on the test."
    return RankedText(with_ranks(train), with_ranks(validation), with_ranks(test), source)


def _read(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if "scores" not in row and "ranks" not in row:
            raise SystemExit(f"{path}, line {number}: neither 'ranks' nor 'scores'.")
        row.setdefault("scores", [-rank for rank in row.get("ranks", [])])
    return rows


def with_ranks(rows: list[dict]) -> list[dict]:
    """Scores (higher is better) as dense ranks (1 is best, equal scores tie)."""
    ranked = []
    for row in rows:
        order = sorted(set(row["scores"]), reverse=True)
        ranks = [order.index(score) + 1 for score in row["scores"]]
        ranked.append({"prompt": row["prompt"], "completions": row["completions"], "ranks": ranks})
    return ranked


def blur(rows: list[dict], noise: float) -> None:
    """Add noise to the scores, in place: `noise` is its sd in sds of the scores."""
    generator = random.Random(1)
    spread = statistics.pstdev(score for row in rows for score in row["scores"])
    for row in rows:
        row["scores"] = [score + generator.gauss(0, noise * spread) for score in row["scores"]]


def _review_groups(args: argparse.Namespace) -> tuple[list[dict], str]:
    texts, rest = sentences(args.max_words)
    labeler = _labeler(rest, OUTPUTS / f"benchmark_labeler_{args.max_words}.npz")
    generator = random.Random(0)
    generator.shuffle(texts)
    scores = labeler([""] * len(texts), texts)
    groups = []
    start = 0
    while start + args.max_k <= len(texts):
        stop = start + generator.randint(args.min_k, args.max_k)
        completions = [" " + text for text in texts[start:stop]]
        groups.append({"prompt": PROMPT, "completions": completions, "scores": scores[start:stop]})
        start = stop
    return groups, (
        f"Groups of {args.min_k} to {args.max_k} review sentences that people wrote (Rotten Tomatoes), drawn at random "
        f"behind the one prompt {PROMPT!r}; they are not samples of a policy. They are ranked by a program, a "
        "sentiment classifier trained on other reviews: no person ranked them."
    )


def _labeler(reviews: list[dict], path: Path) -> Any:
    from benchmarks.review_labeler import SentimentLabeler

    if path.exists():
        return SentimentLabeler.load(path)
    labeler = SentimentLabeler.train([r["text"] for r in reviews], [r["label"] for r in reviews])
    labeler.save(path)
    return labeler


def comparisons(rows: list[dict]) -> list[dict]:
    """Every untied pair of every prompt as a row of its own: `prompt`, `chosen`, `rejected`, and `weight`.

    The weight is one over the prompt's number of untied pairs: a prompt then counts as much as any other, as it does in
    Eq. 1. trl.RewardTrainer knows no weights and drops the column.
    """
    pairs = []
    for row in rows:
        texts, ranks = row["completions"], row["ranks"]
        found = [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in combinations(range(len(texts)), 2)]
        found = [(i, j) for i, j in found if ranks[i] != ranks[j]]
        pairs += [
            {"prompt": row["prompt"], "chosen": texts[i], "rejected": texts[j], "weight": 1 / len(found)}
            for i, j in found
        ]
    return pairs


def reward_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the backbone and of the optimizer step that both quality benchmarks share."""
    group = parser.add_argument_group("model and steps")
    group.add_argument(
        "--model",
        help="folder, hub name, or 'demo' for the demo's SmolLM2-135M-Instruct (default: the tiny LM, trained first if "
        "it is not there)",
    )
    group.add_argument("--layers", type=int, help="keep that many of the model's first layers (default: all)")
    group.add_argument("--lm_steps", type=int, default=500, help="training steps of the tiny LM (default: 500)")
    group.add_argument("--lm_folder", type=Path, default=OUTPUTS / "tiny_lm", help="where it is kept")
    group.add_argument("--accumulation", type=int, default=1, help="forwards an optimizer step (default: 1)")
    group.add_argument("--bf16", action="store_true", help="bf16 autocast in all training; default: float32")
    group.add_argument("--seeds", type=int, default=3, help="runs of each method (default: 3)")


def backbone(args: argparse.Namespace) -> str:
    """The name or folder of the model that every run starts from."""
    if args.model == "demo":
        from instruct_trl.recipes.demo.prepare import base_model

        name = str(base_model())
    elif args.model:
        name = args.model
    else:
        from benchmarks.tiny_lm import tiny_lm

        name = str(tiny_lm(args.lm_folder, args.lm_steps, args.max_words, args.bf16))
    return _first_layers(name, args.layers) if args.layers else name


def _first_layers(name: str, count: int) -> str:
    """The folder of a copy of the model with its first `count` layers; the final norm stays."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    config = AutoConfig.from_pretrained(name)
    if not 0 < count <= config.num_hidden_layers:
        raise SystemExit(f"--layers {count}: {name} has 1 to {config.num_hidden_layers} layers.")
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    folder = OUTPUTS / f"{Path(name).name}_{count}_layers"
    logging.set_verbosity_error()  # it would list the weights of the layers left out
    AutoModelForCausalLM.from_pretrained(name, config=config).save_pretrained(folder)
    logging.set_verbosity_warning()
    AutoTokenizer.from_pretrained(name).save_pretrained(folder)
    return str(folder)


def settings(args: argparse.Namespace, rows_a_step: int, seed: int, learning_rate: float) -> dict[str, Any]:
    """Trainer arguments that are the same for all methods; `rows_a_step` are dataset rows an optimizer step."""
    import torch

    accelerated = torch.cuda.is_available()
    return {
        "per_device_train_batch_size": max(1, rows_a_step // args.accumulation),
        "gradient_accumulation_steps": args.accumulation,
        "learning_rate": learning_rate,
        "warmup_steps": 5,
        "adam_beta2": 0.95,
        "seed": seed,
        "bf16": args.bf16,
        "use_cpu": not accelerated,
        "dataloader_pin_memory": accelerated,
        "gradient_checkpointing": False,
        "max_length": 512,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def judge(model: Any, tokenizer: Any, rows: list[dict]) -> tuple[float, float]:
    """(share of untied pairs ordered as ranked, mean over prompts of the mean over pairs of −log σ(r_w − r_l)).

    The same code judges every method. An exact tie of rewards counts one half.
    """
    from instruct_trl import RewardScorer

    prompts = [row["prompt"] for row in rows for _ in row["completions"]]
    completions = [completion for row in rows for completion in row["completions"]]
    scores = iter(RewardScorer(model, tokenizer, batch_size=64)(prompts=prompts, completions=completions))
    right, total, losses = 0.0, 0, []
    for row in rows:
        ranked = [(rank, next(scores)) for rank in row["ranks"]]
        gaps = [better[1] - worse[1] for better in ranked for worse in ranked if better[0] < worse[0]]
        right += sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps)
        total += len(gaps)
        if gaps:
            losses.append(sum(_softplus(-gap) for gap in gaps) / len(gaps))
    return right / max(total, 1), sum(losses) / max(len(losses), 1)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
