"""The jobs of `evidence.py` from PPO on: runs under given settings, and what a policy is worth and costs."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.evidence.jobs import (
    base,
    base_settings,
    data,
    dataset,
    pretraining,
    prompts,
    real_reviews,
    recipe,
    reward,
    rl_init,
)  # fmt: skip
from benchmarks.evidence.lab import Job, Lab, read_rows, score

LOGGED = ("score", "kl", "explained_variance", "ptx_loss", "entropy", "eos_rate", "grad_norm", "value_loss")


def ppo(lab: Lab, seed: int, **changes: Any) -> Job:
    """A PPO run of the plan's settings with `changes`: keys of PPOPtxConfig, `iterations`, and `value`.

    `value` says what the critic starts from: 'reward' (the paper), 'fresh' (the reward model's body, a new head) or
    'sft' (the RL initialisation with a new head).
    """
    plan = lab.plan
    settings: dict[str, Any] = {
        "iterations": plan.iterations,
        "learning_rate": plan.learning_rate,
        "value_learning_rate": plan.value_learning_rate,
        "beta": plan.beta,
        "ptx_coef": 0.0,
        "ptx_ratio": 1,
        "value": "reward",
    }
    settings = {**settings, **changes}
    shape = {"generation_batch_size": plan.rollout, "max_completion_length": plan.answer_tokens}
    jobs = [data(lab), rl_init(lab, seed), reward(lab, seed), pretraining(lab)]

    def body(folder: Path) -> dict[str, Any]:
        return _run(lab, seed, folder, {**settings, **shape})

    key = {**settings, **shape, **lab.shared("minibatch", "ptx_tokens", "bf16")}
    return lab.job("ppo", key, body, after=jobs, seed=seed)


def _run(lab: Lab, seed: int, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    from instruct_trl.pipeline.stage import write_json

    plan = lab.plan
    iterations, value = settings.pop("iterations"), settings.pop("value")
    start, scorer = rl_init(lab, seed).folder / "model", reward(lab, seed).folder / "model"
    with critic(start, scorer, value, seed):
        recipe(
            lab, "ppo_ptx", folder / "run", seed, model_name_or_path=start, reward_model_path=scorer,
            dataset_name=dataset(lab, "rl_prompts"), pretraining_dataset_name=pretraining(lab).folder / "train.jsonl",
            total_episodes=iterations * plan.rollout, per_device_train_batch_size=plan.minibatch,
            warmup_iterations=max(1, iterations // 20), ptx_max_length=plan.ptx_tokens, **settings,
        )  # fmt: skip
    log = Job("", folder, {}).read("run/trainer_state.json")["log_history"]
    rows = [row for row in log if "score" in row]
    write_json(folder / "history.json", [_short(row) for row in rows])
    return {"labeler": rows[-1]["rewards/labeler/mean"], "kl": rows[-1]["kl"], "iterations": len(rows)}


def _short(row: dict[str, Any]) -> dict[str, Any]:
    gold = {"labeler": row["rewards/labeler/mean"], "reward_model": row["rewards/reward_model/mean"]}
    return {**gold, **{name: row[name] for name in LOGGED if name in row}}


@contextmanager
def critic(start: Path, reward_model: Path, kind: str, seed: int) -> Iterator[None]:
    """Have the recipe's PPO start with another value model than its own, a copy of the reward model ('reward')."""
    from transformers import AutoModelForSequenceClassification, set_seed

    from instruct_trl._upstream import score_head
    from instruct_trl.pipeline import training

    if kind == "reward":
        yield
        return
    set_seed(seed)
    folder = start if kind == "sft" else reward_model
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype="float32")
    if kind == "fresh":
        model.config.reward_bias = 0.0
        score_head(model).reset_parameters()
    models_of = training.models_of
    training.models_of = lambda *given: models_of(*given) | {"value_model": model}
    try:
        yield
    finally:
        training.models_of = models_of


def answers(lab: Lab, policy: Path, after: Job | None, seed: int, split: str = "test", **how: Any) -> Job:
    """One answer to each prompt of the split, with the labeler's score and the reward model's.

    Args:
        policy: folder of the model; `after` is the job that made it, None for the base.
        how: `few_shot` is the number of demonstrations before each prompt; `draw` is a number that moves the
            sampling noise; `count` is the answers a prompt, those of a prompt one after the other.
    """
    from instruct_trl import RewardScorer
    from instruct_trl.pipeline.stage import write_json

    judges = [data(lab), reward(lab, seed)]
    before = [after] if after else [pretraining(lab)]

    def body(folder: Path) -> dict[str, Any]:
        questions = [prompt for prompt in prompts(lab, split) for _ in range(how.get("count", 1))]
        texts, cut = _sample(
            lab, policy, questions, seed=100 * seed + how.get("draw", 0), few_shot=how.get("few_shot", 0)
        )
        gold = score(questions, texts, str(data(lab).folder))
        scorer = RewardScorer(str(judges[1].folder / "model"), batch_size=lab.plan.batch)
        proxy = scorer(prompts=questions, completions=texts, truncated=cut)
        write_json(folder / "answers.json", {"prompts": questions, "answers": texts, "gold": gold, "proxy": proxy})
        return {"gold": statistics.mean(gold), "proxy": statistics.mean(proxy), **_hacks(texts)}

    settings = {**base_settings(lab), "policy": _name(lab, policy), "split": split, **how}
    return lab.job("answers", {**settings, **lab.shared("answer_tokens")}, body, after=[*judges, *before], seed=seed)


def _name(lab: Lab, policy: Path) -> str:
    """The policy within the lab's root; the job's key holds where it came from."""
    return str(policy.relative_to(lab.root)) if policy.is_relative_to(lab.root) else str(policy)


def _hacks(texts: list[str]) -> dict[str, float]:
    from instruct_trl.evaluation.answers import distinct_n, repetition_rate

    words = statistics.mean(len(text.split()) for text in texts)
    return {"distinct_2": distinct_n(texts, 2), "repetition": repetition_rate(texts), "words": words}


def _sample(lab: Lab, policy: Path, questions: list[str], seed: int, few_shot: int) -> tuple[list[str], list[bool]]:
    """Answers, and whether each was cut at the limit of its length."""
    from instruct_trl.models.generation import generate_completions
    from instruct_trl.pipeline.sampling import load_causal_lm

    model, tokenizer = load_causal_lm(str(policy))
    prefix = ""
    if few_shot:
        # Between documents of its training text the tiny LM has seen its EOS and nothing else.
        gap = tokenizer.eos_token if lab.plan.model == "tiny" else "\n\n"
        shown = random.Random(seed).sample(read_rows(dataset(lab, "demonstrations/train.jsonl")), few_shot)
        prefix = "".join(row["prompt"] + row["completion"] + gap for row in shown)
    drawn = generate_completions(
        model, tokenizer, [prefix + question for question in questions], max_new_tokens=lab.plan.answer_tokens,
        batch_size=lab.plan.batch, seed=seed,
    )  # fmt: skip
    texts = [answer.text.split("\n")[0] for answer in drawn]
    return texts, [answer.truncated and text == answer.text for answer, text in zip(drawn, texts, strict=True)]


def tax(lab: Lab, policy: Path, after: Job | None) -> dict[str, float]:
    """Held-out pretraining loss, nats a token: on texts of the base (`sampled`) and on reviews by people (`real`)."""
    from instruct_trl.evaluation.language_modeling import mean_token_loss
    from instruct_trl.pipeline.sampling import load_causal_lm

    texts = pretraining(lab)

    def body(folder: Path) -> dict[str, Any]:
        model, tokenizer = load_causal_lm(str(policy))
        sampled = [row["input_ids"] for row in texts.read("held_out.jsonl")]
        length, rows = lab.plan.ptx_tokens, lab.plan.batch
        return {
            "sampled": mean_token_loss(model, tokenizer, sampled, batch_size=rows, max_length=length)[0],
            "real": mean_token_loss(model, tokenizer, real_reviews(), batch_size=rows, max_length=length)[0],
        }

    jobs = [texts, after] if after else [texts]
    settings = {**base_settings(lab), "policy": _name(lab, policy)}
    return lab.job("tax", settings, body, after=jobs).summary


def base_tax(lab: Lab) -> dict[str, float]:
    return tax(lab, base(lab), None)
