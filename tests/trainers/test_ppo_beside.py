"""What stands beside PPO's policy: columns, other tokenizers, rewards that never come, other settings on resume."""

import copy
import logging

import pytest
import torch
from conftest import tiny_config
from datasets import Dataset
from ppo_helpers import make
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerFast

from instruct_trl import RewardScorer, value_model_from_reward_model
from instruct_trl.data.encoding import same_tokens

PLAIN = {"ptx_coef": 0.0, "ema_decay": None}


def lengths(prompts, completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def rows_read(scorer):
    """The token rows that `scorer` reads from here on."""
    rows, score = [], scorer._score

    def spy(batch, prompts):
        rows.extend(batch)
        return score(batch, prompts)

    scorer._score = spy
    return rows


@pytest.fixture
def mirrored(tokenizer):
    """The conftest's tokenizer with its 256 bytes numbered backwards."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True))}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|eos|>")


# Columns of the prompts -----------------------------------------------------------------------------------------------


def test_columns_of_our_names_are_left_out_and_said(tmp_path, policy, reward_model, tokenizer, caplog):
    """What reward functions and models get under these names is what was drawn, whatever the dataset holds."""
    seen = {}

    def note(prompts, completions, **kwargs):
        seen.update(kwargs)
        return lengths(prompts, completions)

    rows = [
        {"prompt": f"q{i}", "prompt_ids": [1, 2, 3], "completions": ["a", "b"], "truncated": 7, "gold": i}
        for i in range(16)
    ]
    scorer = RewardScorer(reward_model, tokenizer)
    read = rows_read(scorer)
    value = value_model_from_reward_model(reward_model)
    with caplog.at_level(logging.WARNING):
        trainer = make(
            tmp_path, policy, [scorer, note], tokenizer, prompts=Dataset.from_list(rows), value_model=value,
            max_steps=1, **PLAIN,
        )  # fmt: skip
    assert "'prompt_ids', 'completions', 'truncated'" in caplog.text
    trainer.train()
    assert all(row[0] == ord("q") - 33 for row in read)  # byte 113 is the 80th of the alphabet
    assert sorted(seen["gold"]) == list(range(16))
    assert set(seen["truncated"]) <= {True, False}
    assert [1, 2, 3] not in seen["prompt_ids"]


# Tokenizers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy_begins", [True, False])
def test_a_reward_model_reads_its_own_bos(tmp_path, reward_model, tokenizer, policy_begins):
    """One of policy and reward model begins texts with a BOS: each reads a prompt as its own tokenizer writes it."""
    tokenizer.save_pretrained(tmp_path / "bos")
    plain, begun = tokenizer, type(tokenizer).from_pretrained(tmp_path / "bos")
    for each in (plain, begun):
        each.add_special_tokens({"bos_token": "<|pad|>"})
    begun._tokenizer.post_processor = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 257)])
    own, others = (begun, plain) if policy_begins else (plain, begun)
    torch.manual_seed(0)
    scorer = RewardScorer(reward_model, others)
    read = rows_read(scorer)
    value = value_model_from_reward_model(reward_model)
    make(tmp_path, LlamaForCausalLM(tiny_config()), scorer, own, value_model=value, max_steps=1, **PLAIN).train()
    assert read
    assert all((row[0] == 257) is not policy_begins for row in read)


@pytest.mark.parametrize("given", ["path", "model"])
@pytest.mark.parametrize("name", ["value_model", "ref_model"])
def test_models_of_another_tokenizer_are_refused(tmp_path, policy, reward_model, tokenizer, mirrored, name, given):
    other = tmp_path / "other"
    (reward_model if name == "value_model" else policy).save_pretrained(other)
    mirrored.save_pretrained(other)
    kind = AutoModelForSequenceClassification if name == "value_model" else LlamaForCausalLM
    models = {"value_model": value_model_from_reward_model(reward_model)}
    models[name] = str(other) if given == "path" else kind.from_pretrained(other)
    with pytest.raises(ValueError, match=f"{name} .*other.* has a tokenizer .* that is not the policy's"):
        make(tmp_path, policy, lengths, tokenizer, **models, **PLAIN)


def test_a_pad_token_of_another_name_is_no_other_tokenizer(tokenizer):
    renamed = type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(tokenizer._tokenizer.to_str().replace("<|pad|>", "[PAD]"))
    )
    renamed.pad_token, renamed.eos_token = "[PAD]", "<|eos|>"
    assert renamed.get_vocab().keys() ^ tokenizer.get_vocab().keys() == {"[PAD]", "<|pad|>"}
    assert same_tokens(renamed, tokenizer)


# Rewards --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", [None, float("nan"), float("inf")])
def test_a_run_without_a_score_is_no_training(tmp_path, policy, reward_model, tokenizer, nothing):
    value = value_model_from_reward_model(reward_model)
    trainer = make(
        tmp_path, policy, lambda prompts, **_: [nothing] * len(prompts), tokenizer, value_model=value, **PLAIN
    )
    with pytest.raises(ValueError, match="No answer of this run got a score"):
        trainer.train()


# Resuming -------------------------------------------------------------------------------------------------------------


SIZES = {"generation_batch_size": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


def run(folder, policy, reward_model, tokenizer, resume=None, **kwargs):
    """Three iterations of two steps; a checkpoint at each. Returns the answers that were scored, and the weights."""
    seen = []

    def note(prompts, completions, **_):
        seen.append((prompts, completions))
        return lengths(prompts, completions)

    policy = copy.deepcopy(policy)  # a resumed run, too, is handed what the first began with
    settings = {"save_strategy": "no" if resume else "steps", "save_steps": 1, "total_episodes": 24, **SIZES, **kwargs}
    value = value_model_from_reward_model(reward_model)
    trainer = make(folder, policy, note, tokenizer, value_model=value, **PLAIN, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return seen, torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def test_resume_with_other_sizes(tmp_path, policy, reward_model, tokenizer):
    """Between two rollouts other micro-batches of the same minibatch go on as before; all else is refused."""
    models = policy, reward_model, tokenizer
    answers, weights = run(tmp_path, *models)
    smaller = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    for step in (2, 4):
        again, resumed = run(tmp_path, *models, f"{tmp_path}/checkpoint-{step}", **smaller)
        assert again == answers[step // 2 :]
        torch.testing.assert_close(resumed, weights, rtol=0, atol=1e-6)
    changes = {
        "per_device_train_batch_size=2": (3, smaller),
        "generation_batch_size=16": (2, {"generation_batch_size": 16}),
        "minibatch_size=2": (2, {"per_device_train_batch_size": 2}),
        "num_generations=2": (2, {"num_generations": 2}),
        "num_iterations=2": (2, {"num_iterations": 2}),
        "seed=7": (2, {"seed": 7}),
    }
    for named, (step, change) in changes.items():
        with pytest.raises(ValueError, match=f"checkpoint-{step} was written with .*, and this run has .*{named}"):
            run(tmp_path, *models, f"{tmp_path}/checkpoint-{step}", **change)
