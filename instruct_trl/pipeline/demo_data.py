"""The demo's datasets: one-sentence film reviews to continue, passages of novels as pretraining text.

The task: given the first words of a review, write the rest of it. Demonstrations are reviews that people wrote in
praise; the labeler ranks by praise. Every review goes to one use only (labeler, demonstrations, reward prompts, RL
prompts, test prompts), so that nothing is judged on what it was trained on.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from instruct_trl.pipeline.assets import book_passages, movie_reviews
from instruct_trl.pipeline.labeler import SentimentLabeler

SENTENCES = "rotten_tomatoes"


@dataclass
class DemoDataArguments:
    """Sizes of the demo's datasets, and how prompts are cut."""

    prompt_words: int = field(default=4, metadata={"help": "Words of a review that make the prompt."})
    max_words: int = field(default=24, metadata={"help": "Longest review used as a demonstration, in words."})
    n_demonstrations: int = field(default=512, metadata={"help": "Reviews in praise, to imitate (SFT)."})
    n_validation: int = field(default=64, metadata={"help": "Demonstrations held out for the validation loss."})
    n_reward_prompts: int = field(default=256, metadata={"help": "Prompts whose answers are ranked."})
    n_reward_test_prompts: int = field(default=48, metadata={"help": "Prompts whose rankings are held out."})
    n_rl_prompts: int = field(default=1500, metadata={"help": "Prompts for PPO."})
    n_test_prompts: int = field(default=256, metadata={"help": "Prompts that only the final evaluation sees."})
    n_selection_prompts: int = field(default=64, metadata={"help": "Prompts for choosing the SFT checkpoint."})
    n_pretraining_test: int = field(default=200, metadata={"help": "Passages held out for the pretraining loss."})


def split(review: str, prompt_words: int) -> tuple[str, str]:
    """(prompt, completion): the first words, and the rest with its leading space."""
    words = review.split(" ")
    return " ".join(words[:prompt_words]), " " + " ".join(words[prompt_words:])


def build_demo_data(folder: Path, args: DemoDataArguments, seed: int = 0) -> dict:
    """Write the datasets as jsonl and the labeler under `folder`; returns counts and the labeler's accuracy."""
    reviews = movie_reviews()
    sentences = [r for r in reviews if r["source"] == SENTENCES]
    random.Random(seed).shuffle(sentences)
    usable = [r for r in sentences if args.prompt_words + 4 <= len(r["text"].split(" ")) <= args.max_words]
    praise = [r for r in usable if r["label"] == 1]
    parts = {}
    taken: set[str] = set()

    def take(name: str, pool: list[dict], count: int) -> list[dict]:
        rows = [r for r in pool if r["text"] not in taken][:count]
        if len(rows) < count:
            raise ValueError(f"{name}: {count} reviews asked for, only {len(rows)} left. Lower the sizes.")
        taken.update(r["text"] for r in rows)
        pairs = [split(r["text"], args.prompt_words) for r in rows]
        parts[name] = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
        return rows

    take("demonstrations_train", praise, args.n_demonstrations)
    take("demonstrations_test", praise, args.n_validation)
    judged = take("test_prompts", usable, args.n_test_prompts)
    for name, count in (
        ("selection_prompts", args.n_selection_prompts),
        ("reward_prompts_train", args.n_reward_prompts),
        ("reward_prompts_test", args.n_reward_test_prompts),
        ("rl_prompts", args.n_rl_prompts),
    ):
        take(name, usable, count)
    for name, rows in parts.items():
        if "prompts" in name:
            parts[name] = [{"prompt": row["prompt"]} for row in rows]
    passages = book_passages()
    random.Random(seed).shuffle(passages)
    parts["pretraining_test"] = [{"text": text} for text in passages[: args.n_pretraining_test]]
    parts["pretraining_train"] = [{"text": text} for text in passages[args.n_pretraining_test :]]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rest = [r for r in reviews if r["text"] not in taken]
    random.Random(seed).shuffle(rest)
    return {name: len(rows) for name, rows in parts.items()} | _train_labeler(folder, rest, judged)


def _train_labeler(folder: Path, reviews: list[dict], judged: list[dict]) -> dict:
    """Train on all but a tenth, at most 500, of the reviews that are left; report the accuracy on reviews not seen.

    `labeler_accuracy` is that on the tenth, most of them long; `labeler_accuracy_prompts` that on `judged`, the
    one-sentence reviews that the test prompts begin.
    """
    held_out = min(500, len(reviews) // 10)
    texts, labels = _columns(reviews)
    labeler = SentimentLabeler.train(texts[:-held_out], labels[:-held_out])
    labeler.save(folder / "labeler.npz")
    return {
        "labeler_accuracy": labeler.accuracy(texts[-held_out:], labels[-held_out:]),
        "labeler_accuracy_prompts": labeler.accuracy(*_columns(judged)),
    }


def _columns(reviews: list[dict]) -> tuple[list[str], list[int]]:
    return [review["text"] for review in reviews], [review["label"] for review in reviews]
