"""The pieces of `one_base_learning.py`, each run in a process of its own by the recipes' parts."""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory_case import Peak
from instruct_trl.pipeline.arguments import read_yaml
from instruct_trl.pipeline.functions import load_function
from instruct_trl.pipeline.loading import load_split
from instruct_trl.pipeline.sampling import load_causal_lm
from instruct_trl.pipeline.stage import finished_summary, run_stage


def recipe(args: argparse.Namespace, name: str, *options: Any, config: Path | None = None, **kwargs: str) -> None:
    """Run a recipe on the run's data, with its YAML of `args.recipes`."""
    path = config or args.recipes / f"{name}.yaml"
    shared = ["--config", path, "--run_dir", args.run_dir, "--cpu_threads", args.threads]
    main = importlib.import_module(f"instruct_trl.recipes.{name}").main
    main([str(option) for option in (*shared, *options)], **kwargs)


def lora(rank: int, targets: list[str], alpha: int | None = None) -> list[str]:
    """The recipes' options of an adapter."""
    options = ["--use_peft", "--lora_r", str(rank), "--lora_alpha", str(alpha or 2 * rank)]
    return [*options, "--lora_target_modules", *targets]


def of_reward(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the reward adapter, on which all pieces build."""
    return {"rank": args.reward_rank, "targets": args.reward_targets, "rate": args.reward_learning_rate}


def start(args: argparse.Namespace) -> str:
    """The SFT model's folder, from which every policy starts: the run's RL initialisation, or its SFT."""
    name = "rl_init" if (args.recipes / "rl_init.yaml").exists() else "sft"
    return str(args.run_dir / name)


def make_reward_model(args: argparse.Namespace) -> None:
    """SFT, rankings, the reward adapter on the SFT model, and the adapter merged into it, for the full run."""
    from instruct_trl.models.loading import load_reward_model

    base = ["--model_name_or_path", args.model] if args.model else []
    recipe(args, "sft", *base)
    recipe(args, "sample")
    if Path(start(args)).name == "rl_init":
        recipe(args, "sft", *base, config=args.recipes / "rl_init.yaml", stage="rl_init")
    adapter, merged = args.folder / "reward_model", args.folder / "reward_model_merged"
    options = ["--model_name_or_path", start(args), "--learning_rate", args.reward_learning_rate]
    options += [
        "--output_dir",
        str(adapter),
        "--lora_task_type",
        "SEQ_CLS",
        *lora(args.reward_rank, args.reward_targets),
    ]

    def body(_: str | None) -> dict[str, Any]:
        model, tokenizer = load_reward_model(adapter)
        model.merge_and_unload().save_pretrained(merged)
        tokenizer.save_pretrained(merged)
        return (finished_summary(adapter) or {})["summary"]

    recipe(args, "reward_model", *options)
    run_stage(merged, "Merged reward model", of_reward(args), body, resume=False)


def measure_sft(args: argparse.Namespace) -> None:
    """The SFT model's own figures."""
    body = lambda _: judged(args, start(args))  # noqa: E731
    run_stage(args.folder / "sft", "SFT model", {"answers": args.answers}, body, resume=False)


def train_full(args: argparse.Namespace, rate: str, seed: str) -> None:
    """Four models, each trained or frozen whole."""
    train(
        args,
        folder_of(args, "full", rate, seed),
        [*rates(args, rate), "--seed", seed, *reward_path(args, "reward_model_merged")],
    )


def train_one_base(args: argparse.Namespace, rate: str, seed: str) -> None:
    """Four roles on one base."""
    options = [*rates(args, rate), "--seed", seed, *reward_path(args, "reward_model")]
    if args.modules_to_save:
        options += ["--lora_modules_to_save", *args.modules_to_save]
    train(
        args,
        folder_of(args, "one_base", rate, seed),
        [*options, "--one_base", "true", "--dtype", args.dtype, *lora(args.rank, args.targets, args.alpha)],
    )


def rates(args: argparse.Namespace, rate: str) -> list[str]:
    """The policy's learning rate and the critic's, in the proportion of the YAML where it is not given."""
    policy, _, value = rate.partition("/")
    plain = read_yaml(args.ppo)
    value = value or str(plain["value_learning_rate"] * float(policy) / plain["learning_rate"])
    return ["--learning_rate", policy, "--value_learning_rate", value]


def reward_path(args: argparse.Namespace, name: str) -> list[str]:
    return ["--reward_model_path", str(args.folder / name)]


PIECES = {"reward": make_reward_model, "sft": measure_sft, "full": train_full, "one_base": train_one_base}


def train(args: argparse.Namespace, name: str, options: list[str]) -> None:
    """One PPO-ptx run by recipes/ppo_ptx.py, and its figures."""
    folder, made = args.folder / name, args.run_dir.resolve() / "data"
    given = ["--model_name_or_path", start(args), "--dataset_name", made / "rl_prompts"]
    given += ["--pretraining_dataset_name", made / "pretraining", "--total_episodes", args.episodes, *options]

    def body(_: str | None) -> dict[str, Any]:
        peak = Peak()
        peak.start()
        recipe(args, "ppo_ptx", *given, "--disable_tqdm", "true", "--output_dir", folder / "run", config=args.ppo)
        log = json.loads((folder / "run" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        found = {"seconds": log[-1]["train_runtime"], "peak": peak.read()}
        policy = folder / "run" / "policy"
        if "--one_base" in options:
            policy = merged(policy, folder / "policy_merged")
        return found | judged(args, str(policy))

    settings = {"options": given, "ppo": read_yaml(args.ppo), "answers": args.answers, "reward": of_reward(args)}
    run_stage(folder, name, settings, body, resume=False)


def merged(adapter: Path, folder: Path) -> Path:
    """The policy's adapter in the SFT model's own float32, where the run's base was rounded to bf16."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model: Any = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    model.merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(folder)
    return folder


def judged(args: argparse.Namespace, path: str) -> dict[str, Any]:
    """Labeler scores of validation and test prompts, KL(π‖SFT) of one answer a test prompt, pretraining loss."""
    from instruct_trl.evaluation.language_modeling import mean_answer_kl, mean_token_loss
    from instruct_trl.models.generation import encode_prompt, generate_completions

    run, made = read_yaml(args.recipes / "evaluate.yaml"), args.run_dir / "data"
    model, tokenizer = load_causal_lm(path)
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=bool(run.get("bf16")))
    labeler = load_function(run["labeler"], "labeler")
    scores: dict[str, list[float]] = {}
    for use, seed, count in (("selection", 1, 1), ("test", 0, args.answers)):
        prompts = list(load_split(made / f"{use}_prompts" / "test.jsonl")["prompt"])
        with autocast:
            answers = generate_completions(
                model, tokenizer, prompts, max_new_tokens=run["max_completion_length"], batch_size=run["batch_size"],
                seed=seed, num_return_sequences=count,
            )  # fmt: skip
        asked = [prompt for prompt in prompts for _ in range(count)]
        each = labeler(asked, [answer.text for answer in answers], run_dir=str(args.run_dir))
        scores[use] = [float(sum(each[i : i + count]) / count) for i in range(0, len(each), count)]
    answers = answers[:: args.answers]
    rows = [(encode_prompt(tokenizer, p), a.token_ids) for p, a in zip(prompts, answers, strict=True)]
    texts = list(load_split(made / "pretraining" / "test.jsonl")["text"])
    with autocast:
        loss, _ = mean_token_loss(model, tokenizer, texts, batch_size=16, max_length=run["max_text_length"])
        kl = 0.0 if path == start(args) else mean_answer_kl(model, load_causal_lm(start(args))[0], rows)
    examples = [{"prompt": p, "answer": a.text} for p, a in zip(prompts[:8], answers, strict=False)]
    return {
        "score": statistics.mean(scores["test"]),
        "validation": statistics.mean(scores["selection"]),
        "kl": kl,
        "pretraining_loss": loss,
        "scores": scores["test"],
        "examples": examples,
    }


def folder_of(args: argparse.Namespace, arm: str, rate: str, seed: int | str) -> str:
    """Name of a PPO run's folder."""
    name = f"_r{args.rank}_a{args.alpha}" if args.alpha else f"_r{args.rank}"
    adapter = "_".join([name, args.dtype, *args.modules_to_save]) if arm == "one_base" else ""
    return f"{arm}{adapter}_{rate.replace('/', '_')}_{seed}"
