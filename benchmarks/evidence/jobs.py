"""The jobs of the claims up to PPO's start: each runs a recipe with the YAML beside this file.

The order is the paper's: base → RL initialisation (SFT of 2 epochs with 10 % pretraining text) → rankings of its
answers → reward model → SFT of 16 epochs, the epoch chosen by the reward model. PPO starts from the RL initialisation.
"""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Any

from benchmarks.evidence.lab import Job, Lab, instruct, read_rows, write_rows

RANKED_PROMPTS = 8  # prompts per optimizer step of the reward model (paper: 64), as in reward_model.yaml


def recipe(lab: Lab, name: str, output: Path, seed: int, **settings: Any) -> dict[str, Any]:
    """Run a recipe on the data of all jobs; returns the summary of its stage."""
    import torch

    from instruct_trl.pipeline.stage import finished_summary

    given = {"run_dir": data(lab).folder, "output_dir": output, "seed": seed, "bf16": lab.plan.bf16, **settings}
    given["cpu_threads"] = torch.get_num_threads()  # one each where processes work side by side, not all cores each
    options = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    main = importlib.import_module(f"instruct_trl.recipes.{name}").main
    main(["--config", str(Path(__file__).with_name(f"{name}.yaml")), *options])
    return (finished_summary(output) or {}).get("summary", {})


def data(lab: Lab) -> Job:
    """The datasets of reviews and its labeler, each review in one use only; the same for all seeds."""
    from benchmarks.reviews import ReviewDataArguments, build_review_data

    plan = lab.plan
    sizes = {
        "n_demonstrations": plan.demonstrations,
        "n_validation": plan.validation,
        "n_reward_prompts": plan.reward_prompts,
        "n_reward_test_prompts": plan.reward_test_prompts,
        "n_rl_prompts": plan.rl_prompts,
        "n_test_prompts": plan.test_prompts,
        "n_selection_prompts": plan.selection_prompts,
    }

    def body(folder: Path) -> dict[str, Any]:
        made = build_review_data(folder / "data", ReviewDataArguments(**sizes))
        for path in (folder / "data").glob("*/*.jsonl"):
            rows = read_rows(path)
            # The instruction tells the task from plain reviews, which are the base's text.
            write_rows(path, [{**r, "prompt": instruct(r["prompt"])} if "prompt" in r else r for r in rows])
        return made

    return lab.job("data", sizes, body)


def dataset(lab: Lab, name: str) -> Path:
    """A dataset of the run: a folder with its splits, or a file."""
    return data(lab).folder / "data" / name


def prompts(lab: Lab, use: str) -> list[str]:
    """The prompts of a use: 'test' or 'selection'."""
    return [row["prompt"] for row in read_rows(dataset(lab, f"{use}_prompts/test.jsonl"))]


def base(lab: Lab) -> Path:
    """Folder of the base: our tiny LM, trained on reviews of which no stage has a sentence, or the one asked for."""
    if lab.plan.model == "tiny":
        from benchmarks.tiny_lm import tiny_lm

        folder = lab.root / f"base-{lab.plan.base_steps}"
        with lab.lock(folder.name):
            return tiny_lm(folder, lab.plan.base_steps, bf16=True)
    if lab.plan.model == "demo":
        from instruct_trl.recipes.demo.prepare import base_model

        return Path(base_model())
    return Path(lab.plan.model)


def base_settings(lab: Lab) -> dict[str, Any]:
    return lab.shared("model", "base_steps") if lab.plan.model == "tiny" else lab.shared("model")


def pretraining(lab: Lab) -> Job:
    """Texts sampled from the base: a corpus on which it is converged, since it is their distribution."""
    from instruct_trl.models.generation import generate_completions
    from instruct_trl.pipeline.sampling import load_causal_lm

    plan = lab.plan
    held_out = max(10, plan.ptx_texts // 20)

    def body(folder: Path) -> dict[str, Any]:
        model, tokenizer = load_causal_lm(str(base(lab)))
        start = tokenizer.eos_token  # what comes before every document
        answers = generate_completions(
            model, tokenizer, [start], max_new_tokens=plan.ptx_tokens - 1, batch_size=plan.batch, seed=1,
            num_return_sequences=plan.ptx_texts + held_out,
        )  # fmt: skip
        rows = [{"input_ids": [tokenizer.eos_token_id, *answer.token_ids]} for answer in answers]
        write_rows(folder / "held_out.jsonl", rows[:held_out])
        write_rows(folder / "train.jsonl", rows[held_out:])
        return {"texts": len(rows), "held out": held_out}

    return lab.job("pretraining", {**base_settings(lab), **lab.shared("ptx_texts", "ptx_tokens")}, body)


def real_reviews(count: int = 100) -> list[str]:
    """Reviews that the tiny LM held out."""
    from benchmarks.common import sentences

    texts = [review["text"] for review in sentences(28)[1]]
    random.Random(0).shuffle(texts)
    return texts[-count:]


def _sft(lab: Lab, output: Path, seed: int, **settings: Any) -> dict[str, Any]:
    model, texts = str(base(lab)), dataset(lab, "demonstrations")
    rate = lab.plan.sft_learning_rate
    return recipe(
        lab, "sft", output, seed, model_name_or_path=model, dataset_name=texts, learning_rate=rate, **settings
    )


def rl_init(lab: Lab, seed: int) -> Job:
    """Where PPO starts: the base after 2 epochs of demonstrations with 10 % pretraining text (paper, appendix C.3)."""
    length = max(64, lab.plan.ptx_tokens)
    mix = {"pretraining_dataset_name": pretraining(lab).folder / "train.jsonl", "pretraining_fraction": 0.1}

    def body(folder: Path) -> dict[str, Any]:
        how = {"num_train_epochs": 2, "max_length": length, "save_strategy": "no"}
        return _sft(lab, folder / "model", seed, **how, **mix)

    settings = {**base_settings(lab), **lab.shared("sft_learning_rate", "bf16")}
    return lab.job("rl_init", settings, body, after=[data(lab), pretraining(lab)], seed=seed)


def sft(lab: Lab, seed: int) -> Job:
    """SFT for 16 epochs; every epoch is kept for the selection."""

    def body(folder: Path) -> dict[str, Any]:
        how = {"num_train_epochs": lab.plan.sft_epochs, "max_length": 64, "save_strategy": "epoch"}
        return _sft(lab, folder / "model", seed, **how)

    settings = {**base_settings(lab), **lab.shared("sft_epochs", "sft_learning_rate", "bf16")}
    return lab.job("sft", settings, body, after=[data(lab)], seed=seed)


def rankings(lab: Lab, seed: int) -> Job:
    """Answers of the RL initialisation, ranked by the labeler."""
    plan, start = lab.plan, rl_init(lab, seed)

    def body(folder: Path) -> dict[str, Any]:
        return recipe(
            lab, "sample", folder / "rows", 1000 * seed, model_name_or_path=start.folder / "model",
            dataset_name=dataset(lab, "reward_prompts"), num_completions=plan.completions,
            max_completion_length=plan.answer_tokens, batch_size=plan.batch,
        )  # fmt: skip

    return lab.job("rankings", lab.shared("completions", "answer_tokens"), body, after=[start], seed=seed)


def reward(lab: Lab, seed: int) -> Job:
    """The reward model: one epoch of whole groups from the RL initialisation; demonstrations average 0."""
    start, ranked = rl_init(lab, seed), rankings(lab, seed)

    def body(folder: Path) -> dict[str, Any]:
        return recipe(
            lab, "reward_model", folder / "model", seed, model_name_or_path=start.folder / "model",
            dataset_name=ranked.folder / "rows", demonstrations_name=dataset(lab, "demonstrations/test.jsonl"),
            learning_rate=lab.plan.reward_learning_rate,
        )  # fmt: skip

    return lab.job("reward", lab.shared("reward_learning_rate", "bf16"), body, after=[start, ranked], seed=seed)


def selected(lab: Lab, seed: int) -> Job:
    """SFT's epochs with their RM score and validation loss, on validation prompts."""
    plan, epochs, judge = lab.plan, sft(lab, seed), reward(lab, seed)

    def body(folder: Path) -> dict[str, Any]:
        recipe(
            lab, "select_sft", folder / "selected", seed, sft_path=epochs.folder / "model",
            reward_model_path=judge.folder / "model", dataset_name=dataset(lab, "selection_prompts"),
            demonstrations_name=dataset(lab, "demonstrations"), max_completion_length=plan.answer_tokens,
            batch_size=plan.batch,
        )  # fmt: skip
        table = Job("", folder, {}).read("selected/selection.json")
        rows = [
            {
                "folder": r["checkpoint"],
                "epoch": r["epoch"],
                "rm_score": r["rm_score"]["mean"],
                "loss": r["validation_loss"],
            }
            for r in table["rows"]
        ]
        picked = {Path(row["folder"]).name: row["epoch"] for row in rows}
        best, by_loss = Path(table["best"]).name, Path(table["best_by_loss"]).name
        return {"epochs": rows, "by_rm": picked[best], "by_loss": picked[by_loss], "rm": best, "loss": by_loss}

    settings = lab.shared("answer_tokens", "selection_prompts")
    return lab.job("selection", settings, body, after=[epochs, judge], seed=seed)


def selected_folder(lab: Lab, seed: int, by: str = "rm") -> Path:
    """The checkpoint that the reward model ('rm') or the validation loss ('loss') keeps, or the 'last'."""
    choice = selected(lab, seed).summary
    last = Path(max(choice["epochs"], key=lambda row: row["epoch"])["folder"]).name
    return sft(lab, seed).folder / "model" / {**choice, "last": last}[by]
