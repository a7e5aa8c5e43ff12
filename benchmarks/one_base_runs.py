"""The pieces of `one_base_learning.py`, each run in a process of its own by the recipes' parts."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from instruct_trl.recipes.evaluate import EvaluateArguments
from instruct_trl.recipes.ppo_ptx import PPOPtxArguments

from benchmarks.memory_case import Peak
from instruct_trl import PPOPtxConfig, PPOPtxTrainer
from instruct_trl.pipeline import run as pipeline
from instruct_trl.pipeline.arguments import RunArguments, parse_recipe, settings_of
from instruct_trl.pipeline.loading import load_split
from instruct_trl.pipeline.sampling import load_causal_lm, sample_answers
from instruct_trl.pipeline.stage import finished_summary, run_stage


def lora(rank: int, targets: list[str], alpha: int | None = None) -> list[str]:
    """The recipes' options of an adapter."""
    options = ["--use_peft", "--lora_r", str(rank), "--lora_alpha", str(alpha or 2 * rank)]
    return [*options, "--lora_target_modules", *targets]


def of_reward(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the reward adapter, on which all pieces build."""
    return {"rank": args.reward_rank, "targets": args.reward_targets, "rate": args.reward_learning_rate}


def prepared(args: argparse.Namespace) -> RunArguments:
    """The run whose data, SFT model and rankings are taken, made where they are missing."""
    run = RunArguments(run_dir=str(args.run_dir), cpu_threads=args.threads)
    run._config_folder = args.recipes.resolve()  # type: ignore[attr-defined]
    return run


def start(args: argparse.Namespace) -> str:
    """The SFT model's folder, from which every policy starts: the run's RL initialisation, or its SFT."""
    name = "rl_init" if (args.recipes / "rl_init.yaml").exists() else "sft"
    return str(args.run_dir / name)


def make_reward_model(args: argparse.Namespace) -> None:
    """SFT, rankings, the reward adapter on the SFT model, and the adapter merged into it, for the full run."""
    from instruct_trl.models.loading import load_reward_model

    run, threads = prepared(args), ["--cpu_threads", str(args.threads)]
    base = ["--model_name_or_path", args.model] if args.model else []
    pipeline.run_recipe("sft", run, [*threads, *base])
    pipeline.run_recipe("sample", run, threads)
    if Path(start(args)).name == "rl_init":
        pipeline.run_recipe("sft", run, [*threads, *base], config="rl_init", stage="rl_init")
    adapter, merged = args.folder / "reward_model", args.folder / "reward_model_merged"
    options = ["--model_name_or_path", start(args), "--learning_rate", args.reward_learning_rate, *threads]
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

    pipeline.run_recipe("reward_model", run, options)
    run_stage(merged, "Merged reward model", of_reward(args), body, resume=False)


def measure_sft(args: argparse.Namespace) -> None:
    """The SFT model's own figures."""
    prepared(args)
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
    (_, plain, _) = parse(args, [])
    value = value or str(plain.value_learning_rate * float(policy) / plain.learning_rate)
    return ["--learning_rate", policy, "--value_learning_rate", value]


def reward_path(args: argparse.Namespace, name: str) -> list[str]:
    return ["--reward_model_path", str(args.folder / name)]


PIECES = {"reward": make_reward_model, "sft": measure_sft, "full": train_full, "one_base": train_one_base}


def parse(args: argparse.Namespace, options: list[str]) -> tuple[Any, PPOPtxConfig, Any]:
    """What recipes/ppo_ptx.py would read."""
    from trl import ModelConfig

    shared = ["--config", str(args.ppo), "--run_dir", str(args.run_dir), "--cpu_threads", str(args.threads)]
    shared += ["--total_episodes", str(args.episodes), "--disable_tqdm", "true"]
    parsed = parse_recipe((PPOPtxArguments, PPOPtxConfig, ModelConfig), "ppo_ptx", "", [*shared, *options])
    parsed[0]._config_folder = args.recipes.resolve()  # whose data these are
    return parsed


def train(args: argparse.Namespace, name: str, options: list[str]) -> None:
    """One PPO-ptx run, as recipes/ppo_ptx.py makes it, and its figures."""
    folder = args.folder / name
    run, config, model = parse(args, [*options, "--output_dir", str(folder)])

    def body(_: str | None) -> dict[str, Any]:
        peak = Peak()
        trainer = PPOPtxTrainer(
            **models_of(run, config, model, start(args)),
            args=config,
            train_dataset=pipeline.prompts_for(run, "rl"),
            pretraining_dataset=pipeline.pretraining_texts(run, "ptx_coef"),
        )
        peak.start()
        begin = time.perf_counter()
        trainer.train()
        found = {"seconds": time.perf_counter() - begin, "peak": peak.read()}
        policy = folder / "policy"
        trainer.save_model()
        trainer.save_state()
        if run.one_base:
            policy = merged(policy, folder / "policy_merged")
        return found | judged(args, str(policy))

    settings = settings_of(run, config, model) | {"answers": args.answers, "reward adapter": of_reward(args)}
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
    from instruct_trl.evaluation.divergence import mean_answer_kl
    from instruct_trl.evaluation.language_modeling import mean_token_loss
    from instruct_trl.models.generation import encode_prompt

    options = ["--config", str(args.recipes / "evaluate.yaml"), "--run_dir", str(args.run_dir)]
    (run,) = parse_recipe((EvaluateArguments,), "evaluate", "", [*options, "--cpu_threads", str(args.threads)])
    model, tokenizer = load_causal_lm(path)
    labeler = pipeline.load_labeler(run, "demo")
    scores: dict[str, list[float]] = {}
    for use, seed, count in (("selection", 1, 1), ("test", 0, args.answers)):
        prompts = list(pipeline.prompts_for(run, use)["prompt"])
        answers = sample_answers(model, tokenizer, prompts, run, seed=seed, desc=f"{use} answers", count=count)
        each = labeler([p for p in prompts for _ in range(count)], [answer.text for answer in answers])
        scores[use] = [float(sum(each[i : i + count]) / count) for i in range(0, len(each), count)]
    prompts, answers = list(pipeline.prompts_for(run, "test")["prompt"]), answers[:: args.answers]
    rows = [(encode_prompt(tokenizer, p), a.token_ids) for p, a in zip(prompts, answers, strict=True)]
    texts = list(load_split(args.run_dir / "data" / "pretraining_test.jsonl")["text"])
    with torch.autocast(model.device.type, torch.bfloat16, enabled=run.bf16):
        loss, _ = mean_token_loss(model, tokenizer, texts, batch_size=16, max_length=run.max_text_length)
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
