"""A user's own folder with tiny models, prompts and a labeler, in which evaluation and sampling are tried."""

import json
import shutil

import torch
from conftest import tiny_config
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from instruct_trl.pipeline.evaluating import EvaluateArguments
from instruct_trl.pipeline.stage import FINISHED

LABELER = """
def score(prompts, completions, **_):
    return plain([p[-1]["content"] for p in prompts], [c[0]["content"] for c in completions])


def plain(prompts, completions, **_):
    return [sum(map(ord, c)) + len(p) / 100 for p, c in zip(prompts, completions, strict=True)]
"""


def own_evaluation(tmp_path, tokenizer):
    """Settings of an evaluation of tiny models on one's own prompts, as text; `chat.jsonl` has them as messages."""
    torch.manual_seed(0)
    for name, model in (
        ("policy", LlamaForCausalLM(tiny_config())),
        ("rm", LlamaForSequenceClassification(tiny_config(num_labels=1))),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    questions = [f"q{i}" for i in range(4)]
    chats = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": q}] for q in questions]
    for name, prompts in (("text", questions), ("chat", chats)):
        lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "own_labelers.py").write_text(LABELER)
    run = EvaluateArguments(
        run_dir="run", dataset_name="text.jsonl", labeler="own_labelers:plain", sft_model="policy", ppo_model="policy",
        reward_model_path="rm", max_completion_length=4, batch_size=4, cpu_threads=1,
    )  # fmt: skip
    run.folder("evaluation").mkdir(parents=True)
    return run


def leave_control(run, finished=True, accuracy=None):
    """What the control of a run in the folder `run` leaves: its policy and, with an accuracy, its reward model's."""
    stage, rewards = run / "control" / "ppo_ptx", run / "control" / "reward_model"
    shutil.copytree("policy", stage / "policy", dirs_exist_ok=True)
    if finished:
        record = {"settings": {"reward_model_path": str(rewards)}, "seconds": 3.0}
        (stage / FINISHED).write_text(json.dumps(record))
    if accuracy is not None:
        (rewards / "evaluation").mkdir(parents=True)
        found = {"mean": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "n": 10, "n_pairs": 30}
        (rewards / "evaluation" / "metrics.json").write_text(json.dumps({"pair_accuracy": found}))
