"""Rankings, demonstrations and trainers that the tests of RankingRewardTrainer share."""

import torch
from conftest import tiny_config
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from instruct_trl.trainers.ranking_reward import RankingRewardConfig, RankingRewardTrainer

RANKINGS = [
    {"prompt": "Say hi. ", "completions": ["Hi!", "No.", "Hello there"], "ranks": [1, 3, 2]},
    {"prompt": "2+2? ", "completions": ["5", "4"], "ranks": [2, 1]},
    {"prompt": "Colour? ", "completions": ["red", "blue", "green", "table"], "ranks": [1, 1, 1, 9]},
    {"prompt": "Tied. ", "completions": ["a", "b", "c"], "ranks": [2, 2, 2]},
    {"prompt": "Why? ", "completions": ["because", "so"], "ranks": [1, 2]},
    {"prompt": "Who? ", "completions": ["me", "you", "they"], "ranks": [3, 2, 1]},
    {"prompt": "When? ", "completions": ["now", "then"], "ranks": [2, 1]},
    {"prompt": "Where? ", "completions": ["here", "there", "nowhere"], "ranks": [1, 2, 2]},
]
DEMONSTRATIONS = [{"prompt": "Say hi. ", "completion": "Hi!"}, {"prompt": "2+2? ", "completion": "It is four."}]


def config(path, **kwargs):
    defaults = {"report_to": "none", "logging_steps": 1, "save_strategy": "no", "gradient_checkpointing": False}
    return RankingRewardConfig(str(path), **{**defaults, "disable_tqdm": True, **kwargs})


def make(model, tokenizer, path, rows=RANKINGS, peft_config=None, eval_rows=None, **kwargs):
    return RankingRewardTrainer(
        model,
        config(path, **kwargs),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def fresh_model(**kwargs):
    torch.manual_seed(1)
    return LlamaForSequenceClassification(tiny_config(num_labels=1, **kwargs))


def pairs_of(rows):
    return [row["prompt"] for row in rows for _ in row["completions"]], [c for row in rows for c in row["completions"]]


def eos_as_pad():
    """256 bytes and `<|endoftext|>` 256, which ends and pads: GPT-2, Pythia and Llama bases are like that."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
