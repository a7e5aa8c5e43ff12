"""Every way to a reward, side by side: the trainer, RewardScorer, PPO, TRL's GRPO and RLOO, plain transformers."""

import json
from pathlib import Path

import torch
from conftest import CHAT_TEMPLATE, tiny_config
from datasets import Dataset
from ppo_helpers import make as make_ppo
from ranking_helpers import DEMONSTRATIONS, RANKINGS, make
from tokenizers import processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from instruct_trl.models.reward import RewardScorer

# Rewards here are about 0.1 to 3 in size, and float32 carries 1e-7 of that through sums of 16 to 128 terms.
FLOAT32 = 1e-5


def clone(tokenizer, **special):
    """The same 256 bytes, with other special tokens and the same chat template."""
    copy = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)
    copy.chat_template = CHAT_TEMPLATE
    return copy


def with_bos(tokenizer, **kwargs):
    """As Llama's and Gemma's: puts a BOS (id 258) before every text, unless told add_special_tokens=False."""
    copy = clone(tokenizer, eos_token="<|eos|>", pad_token="<|pad|>", bos_token="<|bos|>", **kwargs)
    copy.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", copy.bos_token_id)]
    )
    copy.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    return copy


def as_messages(rows):
    """The same rows as conversations of one question and one answer."""

    def message(role, text):
        return [{"role": role, "content": text}]

    def convert(key, value):
        if key == "completions":
            return [message("assistant", text) for text in value]
        return message({"prompt": "user", "completion": "assistant"}[key], value) if isinstance(value, str) else value

    return [{key: convert(key, value) for key, value in row.items()} for row in rows]


def classifier(seed=1, dtype=torch.float32, **kwargs):
    """A tiny reward model whose scores differ by tenths, not by thousandths."""
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(tiny_config(num_labels=1, **kwargs))
    torch.nn.init.normal_(model.score.weight)
    return model.to(dtype)


def trained(model, tokenizer, path, *, conversational=False, prepare=None, **kwargs):
    """A RankingRewardTrainer after three steps large enough to see, its bias set, saved to `path / "rm"`.

    `prepare(trainer)` runs before training.
    """
    convert = as_messages if conversational else list
    rows = convert(RANKINGS)
    settings = {"max_steps": 3, "learning_rate": 3e-3, "gradient_accumulation_steps": 1}
    trainer = make(model, tokenizer, path / "out", rows=rows, eval_rows=rows, **{**settings, **kwargs})
    if prepare is not None:
        prepare(trainer)
    trainer.train()
    trainer.normalize(Dataset.from_list(convert(DEMONSTRATIONS)))
    assert abs(trainer.model.config.reward_bias) > 0.01  # else a forgotten bias would go unseen
    trainer.save_model(str(path / "rm"))
    return trainer


def examples(conversational=False):
    """Prompts and completions of RANKINGS, one of each a row."""
    rows = as_messages(RANKINGS) if conversational else RANKINGS
    return [row["prompt"] for row in rows for _ in row["completions"]], [c for row in rows for c in row["completions"]]


def trainer_rewards(trainer):
    """What evaluation saw, (N,) in the order of the rows, plus the bias."""
    predictions = torch.as_tensor(trainer.predict(trainer.eval_dataset).predictions)
    sizes = [len(row["completions"]) for row in RANKINGS]
    assert predictions.shape == (len(sizes), max(sizes))
    lists = [row[:size] for row, size in zip(predictions, sizes, strict=True)]
    return (torch.cat(lists).float() + trainer.model.config.reward_bias).tolist()


def finished_ids(tokenizer, completions):
    """What a policy would have generated: the answer's tokens and EOS."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]


def policy_for(tokenizer):
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return LlamaForCausalLM(tiny_config(vocab_size=len(tokenizer), **ids))


def trl_trainer(algorithm, reward, tokenizer, path, **kwargs):
    """TRL's GRPOTrainer or RLOOTrainer with `reward` as its reward function, and a random policy."""
    cls, config = {"GRPO": (GRPOTrainer, GRPOConfig), "RLOO": (RLOOTrainer, RLOOConfig)}[algorithm]
    settings = {"num_generations": 2, "per_device_train_batch_size": 2, "gradient_checkpointing": False}
    args = config(
        str(path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, beta=0.0, **{**settings, **kwargs}
    )
    prompts = Dataset.from_dict({"prompt": ["one", "two"]})
    return cls(policy_for(tokenizer), reward, args=args, train_dataset=prompts, processing_class=tokenizer)


def rewards_in(trainer, prompts, completions):
    """What a trainer of the GRPO family gives (prompt, completion) pairs, by its own calculation, (N,)."""
    ids = finished_ids(trainer.processing_class, completions)
    return trainer._calculate_rewards([{"prompt": p} for p in prompts], prompts, completions, ids)[:, 0].tolist()


def ppo_trainer(folder, path, reward=None):
    """PPOPtxTrainer given the path of `folder`, or `reward` in place of it, with a critic of its own."""
    tokenizer, reward = AutoTokenizer.from_pretrained(folder), str(folder) if reward is None else reward
    value_model = classifier(vocab_size=len(tokenizer))
    return make_ppo(
        path, policy_for(tokenizer), reward, tokenizer, value_model=value_model, ptx_coef=0.0, ema_decay=None
    )


def token_rows(tokenizer, prompts, completions):
    """Token lists, written out here: what RankingRewardTrainer says that it trains on."""
    if isinstance(prompts[0], str):
        return [tokenizer(p + c + tokenizer.eos_token)["input_ids"] for p, c in zip(prompts, completions, strict=True)]
    texts = [tokenizer.apply_chat_template(p + c, tokenize=False) for p, c in zip(prompts, completions, strict=True)]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@torch.no_grad()
def plain_rewards(model, tokenizer, prompts, completions, padding_side=None):
    """transformers' own pooled logits, (N,): row by row, or in one batch padded on `padding_side`."""
    rows = token_rows(tokenizer, prompts, completions)
    model.eval()
    if padding_side is None:
        return [model(input_ids=torch.tensor([row])).logits.item() for row in rows]
    batch = tokenizer.pad({"input_ids": rows}, padding=True, padding_side=padding_side, return_tensors="pt")
    return model(**batch).logits[:, 0].float().tolist()


def saved_bias(folder):
    """The bias as the documentation says where it lies."""
    file = Path(folder, "reward_config.json")
    file = file if file.is_file() else Path(folder, "config.json")
    return json.loads(file.read_text())["reward_bias"]


def rewards_everywhere(trainer, path, *, name="rm", conversational=False, plain=None):
    """Rewards, bias included, of RANKINGS' completions by every route to the model in `path / name`: route to (N,)."""
    folder, (prompts, completions) = path / name, examples(conversational)
    tokenizer, scorer, bias = AutoTokenizer.from_pretrained(folder), RewardScorer(folder), saved_bias(folder)
    plain = plain or AutoModelForSequenceClassification.from_pretrained(folder)
    rewards = {}
    if trainer is not None:
        rewards["trainer"] = trainer_rewards(trainer)
        rewards["RewardScorer in memory"] = RewardScorer(trainer.model, trainer.processing_class)(prompts, completions)
    rewards |= {
        "RewardScorer of the folder": scorer(prompts, completions),
        "PPO": rewards_in(ppo_trainer(folder, path / "ppo"), prompts, completions),
    }
    for algorithm in ("GRPO", "RLOO"):
        trl = trl_trainer(algorithm, scorer, tokenizer, path / algorithm)
        rewards[algorithm] = rewards_in(trl, prompts, completions)
    for side in (None, "right", "left"):
        scores = plain_rewards(plain, tokenizer, prompts, completions, side)
        rewards[f"plain transformers, padding {side}"] = [score + bias for score in scores]
    return rewards


def largest_gap(rewards):
    """The largest distance between two routes on one completion; and, for messages, each route's to the first."""
    table = torch.tensor(list(rewards.values()), dtype=torch.float64)
    spread = (table.amax(dim=0) - table.amin(dim=0)).max().item()
    return spread, {name: (row - table[0]).abs().max().item() for name, row in zip(rewards, table, strict=True)}
