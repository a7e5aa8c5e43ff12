"""The jobs of `evidence.py` up to PPO's start: data, base, pretraining texts, SFT, rankings, reward model, selection.

The order is the paper's: base → RL initialisation (SFT of 2 epochs with 10 % pretraining text) → rankings of its
answers → reward model → SFT of 16 epochs, the epoch chosen by the reward model. PPO starts from the RL initialisation.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from _evidence_lab import Job, Lab, PlainLabeler, rows_of, write_rows

ROWS = 32  # demonstrations an optimizer step (paper: 32)
RANKED_PROMPTS = 8  # prompts an optimizer step of the reward model (paper: 64)


def data(lab: Lab) -> Job:
    """The demo's datasets and its labeler, each review in one use only; the same for all seeds."""
    from instruct_trl.pipeline.demo_data import DemoDataArguments, build_demo_data

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
    return lab.job("data", sizes, lambda folder: build_demo_data(folder, DemoDataArguments(**sizes)))


def labeler(lab: Lab) -> PlainLabeler:
    return PlainLabeler(data(lab).folder)


def prompts(lab: Lab, use: str) -> list[str]:
    """The prompts of a use: 'test', 'selection', 'rl', 'reward_train' or 'reward_test'."""
    name = f"reward_prompts_{use[7:]}" if use.startswith("reward_") else f"{use}_prompts"
    return [row["prompt"] for row in rows_of(data(lab).folder / f"{name}.jsonl")]


def demonstrations(lab: Lab, part: str) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows_of(data(lab).folder / f"demonstrations_{part}.jsonl"))


def base(lab: Lab) -> Path:
    """Folder of the base: our tiny LM, trained on reviews of which no stage has a sentence, or the one asked for."""
    if lab.plan.model == "tiny":
        from _tiny_lm import tiny_lm

        folder = lab.root / f"base-{lab.plan.base_steps}"
        with lab.lock(folder.name):
            return tiny_lm(folder, lab.plan.base_steps, bf16=True)
    if lab.plan.model == "demo":
        from instruct_trl.pipeline.assets import base_model

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
    from _common import sentences

    texts = [review["text"] for review in sentences(28)[1]]
    random.Random(0).shuffle(texts)
    return texts[-count:]


def pretraining_dataset(lab: Lab) -> Any:
    from datasets import Dataset

    return Dataset.from_list(pretraining(lab).read("train.jsonl"))


def quiet_settings(lab: Lab, seed: int) -> dict[str, Any]:
    """Trainer arguments that all stages share."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "bf16": lab.plan.bf16,
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }


def without_prints(trainer: Any) -> Any:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def _sft(lab: Lab, folder: Path, seed: int, epochs: int, fraction: float, keep_epochs: bool) -> Any:
    from instruct_trl import InstructSFTConfig, InstructSFTTrainer

    args = InstructSFTConfig(
        str(folder),
        num_train_epochs=epochs,
        learning_rate=lab.plan.sft_learning_rate,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1,
        residual_dropout=0.0,
        pretraining_fraction=fraction,
        max_length=max(64, lab.plan.ptx_tokens) if fraction else 64,
        train_sampling_strategy="group_by_length",
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="epoch" if keep_epochs else "no",
        save_only_model=True,
        **quiet_settings(lab, seed),
    )
    trainer = without_prints(
        InstructSFTTrainer(
            str(base(lab)),
            args,
            train_dataset=demonstrations(lab, "train"),
            pretraining_dataset=pretraining_dataset(lab) if fraction else None,
        )
    )
    trainer.train()
    return trainer


def rl_init(lab: Lab, seed: int) -> Job:
    """Where PPO starts: the base after 2 epochs of demonstrations with 10 % pretraining text (paper, appendix C.3)."""

    def body(folder: Path) -> dict[str, Any]:
        trainer = _sft(lab, folder, seed, 2, 0.1, keep_epochs=False)
        trainer.save_model(str(folder / "model"))
        return {"steps": trainer.state.global_step}

    settings = {**base_settings(lab), **lab.shared("sft_learning_rate", "bf16")}
    return lab.job("rl_init", settings, body, after=[data(lab), pretraining(lab)], seed=seed)


def sft(lab: Lab, seed: int) -> Job:
    """SFT for 16 epochs; every epoch is kept for the selection."""

    def body(folder: Path) -> dict[str, Any]:
        return {"steps": _sft(lab, folder, seed, lab.plan.sft_epochs, 0.0, keep_epochs=True).state.global_step}

    settings = {**base_settings(lab), **lab.shared("sft_epochs", "sft_learning_rate", "bf16")}
    return lab.job("sft", settings, body, after=[data(lab)], seed=seed)


def rankings(lab: Lab, seed: int) -> Job:
    """Answers of the RL initialisation, ranked by the labeler."""
    from instruct_trl.models.generation import generate_completions
    from instruct_trl.pipeline.sampling import load_causal_lm, ranks_of

    plan, start, judge = lab.plan, rl_init(lab, seed), labeler(lab)

    def body(folder: Path) -> dict[str, Any]:
        model, tokenizer = load_causal_lm(str(start.folder / "model"))
        counts = {}
        for offset, part in enumerate(("train", "test")):
            questions = prompts(lab, f"reward_{part}")
            answers = generate_completions(
                model, tokenizer, questions, max_new_tokens=plan.answer_tokens, batch_size=plan.batch,
                seed=1000 * seed + 500 * offset, num_return_sequences=plan.completions,
            )  # fmt: skip
            rows = []
            for i, prompt in enumerate(questions):
                group = [a for a in answers[i * plan.completions : (i + 1) * plan.completions] if a.text.strip()]
                if len(group) > 1:
                    texts = [answer.text for answer in group]
                    ranks = ranks_of(judge([prompt] * len(texts), texts))
                    cut = [answer.truncated for answer in group]
                    rows.append({"prompt": prompt, "completions": texts, "truncated": cut, "ranks": ranks})
            write_rows(folder / f"{part}.jsonl", rows)
            counts[f"{part} prompts"] = len(rows)
        return counts

    return lab.job("rankings", lab.shared("completions", "answer_tokens"), body, after=[start], seed=seed)


def reward(lab: Lab, seed: int) -> Job:
    """The reward model: one epoch of whole groups from the RL initialisation; demonstrations average 0."""
    from datasets import Dataset

    from instruct_trl import RankingRewardConfig, RankingRewardTrainer

    start, ranked = rl_init(lab, seed), rankings(lab, seed)

    def body(folder: Path) -> dict[str, Any]:
        args = RankingRewardConfig(
            str(folder),
            learning_rate=lab.plan.reward_learning_rate,
            per_device_train_batch_size=RANKED_PROMPTS,
            gradient_accumulation_steps=1,
            max_length=256,
            logging_strategy="no",
            eval_strategy="no",
            save_strategy="no",
            **quiet_settings(lab, seed),
        )
        trainer: Any = without_prints(
            RankingRewardTrainer(
                str(start.folder / "model"),
                args,
                train_dataset=Dataset.from_list(ranked.read("train.jsonl")),
                eval_dataset=Dataset.from_list(ranked.read("test.jsonl")),
            )
        )
        trainer.train()
        trainer.normalize(demonstrations(lab, "test"))
        trainer.save_model(str(folder / "model"))
        return {"pair accuracy": trainer.evaluate()["eval_pair_accuracy"]}

    return lab.job("reward", lab.shared("reward_learning_rate", "bf16"), body, after=[start, ranked], seed=seed)


def selected(lab: Lab, seed: int) -> Job:
    """SFT's epochs with their RM score and validation loss, on validation prompts."""
    from instruct_trl import RewardScorer, select_checkpoint

    epochs, judge = sft(lab, seed), reward(lab, seed)

    def body(folder: Path) -> dict[str, Any]:
        result = select_checkpoint(
            str(epochs.folder),
            RewardScorer(str(judge.folder / "model"), batch_size=lab.plan.batch),
            prompts(lab, "selection"),
            validation_dataset=demonstrations(lab, "test"),
            max_new_tokens=lab.plan.answer_tokens,
            batch_size=lab.plan.batch,
            seed=seed,
        )
        rows = [
            {"folder": row.checkpoint, "epoch": row.epoch, "rm_score": row.rm_score.mean, "loss": row.validation_loss}
            for row in result.rows
        ]
        picked = {Path(row.checkpoint).name: row.epoch for row in result.rows}
        best, by_loss = Path(result.best).name, Path(str(result.best_by_loss)).name
        return {"epochs": rows, "by_rm": picked[best], "by_loss": picked[by_loss], "rm": best, "loss": by_loss}

    return lab.job(
        "selection", lab.shared("answer_tokens", "selection_prompts"), body, after=[epochs, judge], seed=seed
    )


def selected_folder(lab: Lab, seed: int, by: str = "rm") -> Path:
    """The checkpoint that the reward model ('rm') or the validation loss ('loss') keeps, or the 'last'."""
    choice = selected(lab, seed).summary
    last = Path(max(choice["epochs"], key=lambda row: row["epoch"])["folder"]).name
    return sft(lab, seed).folder / {**choice, "last": last}[by]
