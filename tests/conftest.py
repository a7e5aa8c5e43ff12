"""Tiny random models and a byte-level tokenizer, made in memory: unit tests need neither network nor assets."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes that tests start

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def one_thread():
    """A recipe's `main` takes all cores: left so, every later test of tiny models would take ten times as long."""
    torch.set_num_threads(1)


@pytest.fixture
def tokenizer():
    """256 bytes, `<|eos|>` 256, `<|pad|>` 257."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|eos|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(**kwargs):
    sizes = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    tokens = {"pad_token_id": 257, "eos_token_id": 256, "bos_token_id": None}
    if kwargs.get("vocab_size") == 257:  # a vocabulary without room for a pad of its own
        tokens["pad_token_id"] = 256
    return LlamaConfig(**{**sizes, **heads, **tokens, **kwargs})


@pytest.fixture
def policy():
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config())
    model.generation_config.eos_token_id = 256
    model.generation_config.pad_token_id = 257
    return model


@pytest.fixture
def reward_model():
    torch.manual_seed(1)
    return LlamaForSequenceClassification(tiny_config(num_labels=1))


@pytest.fixture
def scorer(reward_model, tokenizer):
    from instruct_trl import RewardScorer

    return RewardScorer(reward_model, tokenizer)


@pytest.fixture
def pieces(tmp_path, tokenizer):
    """A base and adapters on disk, as `role_helpers.save_pieces` leaves them."""
    from role_helpers import save_pieces

    return save_pieces(tmp_path, tokenizer)


@pytest.fixture
def roles(pieces):
    from instruct_trl import RoleAdapters

    return RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm")


@pytest.fixture
def own(tmp_path, tokenizer, monkeypatch):
    """Settings of an evaluation of tiny models on one's own prompts, in a folder that is the working one."""
    from pipeline_helpers import own_evaluation

    monkeypatch.chdir(tmp_path)
    return own_evaluation(tmp_path, tokenizer)
