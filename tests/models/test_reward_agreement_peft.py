"""Rewards of LoRA and QLoRA reward models: the same by every route, adapter alone and merged, head included."""

import pytest
import torch
from agreement_helpers import (
    FLOAT32,
    classifier,
    clone,
    examples,
    largest_gap,
    plain_rewards,
    ppo_trainer,
    rewards_everywhere,
    rewards_in,
    saved_bias,
    trained,
    trainer_rewards,
    trl_trainer,
)
from conftest import tiny_config
from peft import AutoPeftModelForSequenceClassification, LoraConfig
from ranking_helpers import RANKINGS, eos_as_pad, make
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

from instruct_trl._upstream import keep_4bit_trainable
from instruct_trl.models.loading import load_reward_model
from instruct_trl.models.reward import RewardScorer


def lora():
    return LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"])


def save_base(path, tokenizer, kind="causal", dtype=torch.float32, **kwargs):
    """A base model on disk, a causal LM or a classifier with a trained head; returns its path."""
    torch.manual_seed(0)
    model = classifier(**kwargs) if kind == "classifier" else LlamaForCausalLM(tiny_config(**kwargs))
    model.to(dtype).save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    return str(path / "base")


def merge(model, tokenizer, folder):
    """What a user does: merge, save as a plain model."""
    model.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def plain_adapter(folder, loader=AutoModelForSequenceClassification, **kwargs):
    """The adapter's folder read by upstream alone, with what its documentation asks for: one label, dtype, pad id."""
    model = loader.from_pretrained(folder, num_labels=1, **{"dtype": torch.float32, **kwargs})
    model.config.pad_token_id = AutoTokenizer.from_pretrained(folder).pad_token_id
    return model


@pytest.mark.parametrize(
    ("kind", "conversational", "dtype"),
    [
        ("causal", False, torch.float32),
        ("causal", True, torch.float32),
        ("classifier", False, torch.float32),
        ("no pad", False, torch.float32),
        ("causal", False, torch.bfloat16),  # TRL trains it in float32; `dtype` in reward_config.json says so
    ],
)
def test_adapter_alone_and_merged_agree(tokenizer, tmp_path, kind, conversational, dtype):
    tokenizer = clone(tokenizer, eos_token="<|eos|>", pad_token="<|pad|>", padding_side="left")
    size = {"vocab_size": 258}
    if kind == "no pad":
        tokenizer, size = clone(eos_as_pad(), eos_token="<|endoftext|>"), {"vocab_size": 257}
    base = save_base(tmp_path, tokenizer, kind, dtype, **size)
    trainer = trained(base, None, tmp_path, conversational=conversational, peft_config=lora())
    # transformers alone refuses an adapter whose embeddings have grown; peft's own class grows them.
    loader = AutoPeftModelForSequenceClassification if kind == "no pad" else AutoModelForSequenceClassification
    plain = plain_adapter(tmp_path / "rm", loader)
    alone = rewards_everywhere(trainer, tmp_path, conversational=conversational, plain=plain)
    assert largest_gap(alone)[0] < FLOAT32, largest_gap(alone)[1]
    assert len(set(alone["trainer"])) > 10
    merge(*load_reward_model(tmp_path / "rm"), tmp_path / "merged from the folder")
    merge(trainer.model, trainer.processing_class, tmp_path / "merged in memory")  # the trainer is of no use then
    for name in ("merged from the folder", "merged in memory"):
        assert saved_bias(tmp_path / name) == saved_bias(tmp_path / "rm")
        merged = {"adapter": alone["trainer"]}
        merged |= rewards_everywhere(None, tmp_path, name=name, conversational=conversational)
        assert largest_gap(merged)[0] < FLOAT32, (name, largest_gap(merged)[1])


def test_an_adapter_with_a_grown_embedding_is_refused_by_plain_transformers(tokenizer, tmp_path):
    """Loudly, so that nobody is given another score: merged, or read by RewardScorer or peft, it is fine."""
    base = save_base(tmp_path, clone(eos_as_pad(), eos_token="<|endoftext|>"), vocab_size=257)
    trained(base, None, tmp_path, peft_config=lora())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        plain_adapter(tmp_path / "rm")


def test_the_head_is_trained_and_saved_under_lora(tokenizer, tmp_path):
    initial = {}

    def remember(trainer):
        initial["score"] = trainer.model.base_model.model.score.modules_to_save["default"].weight.detach().clone()

    base = save_base(tmp_path, tokenizer)
    trainer = trained(base, None, tmp_path, peft_config=lora(), prepare=remember)
    now = trainer.model.base_model.model.score.modules_to_save["default"].weight
    assert (now - initial["score"]).abs().max() > 1e-3
    saved = load_file(tmp_path / "rm" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(saved, now)
    reloaded = load_reward_model(tmp_path / "rm")[0].merge_and_unload()
    assert torch.equal(reloaded.score.weight, now)


def test_ppo_takes_a_peft_model_in_memory(tokenizer, tmp_path):
    trainer = trained(save_base(tmp_path, tokenizer), None, tmp_path, peft_config=lora())
    rewards = rewards_in(ppo_trainer(tmp_path / "rm", tmp_path / "ppo", reward=trainer.model), *examples())
    assert rewards == pytest.approx(trainer_rewards(trainer), abs=FLOAT32)


# 4-bit bases --------------------------------------------------------------------------------------------------------

# bitsandbytes' CPU kernel wants outputs in multiples of 32, and a block is 64 weights.
SIZES = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def quantization():
    """4-bit NF4, float32 arithmetic."""
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def trained_in_4bit(path, tokenizer, quantization, **kwargs):
    base = save_base(path, tokenizer, **SIZES)
    options = {"model_init_kwargs": {"quantization_config": quantization}, **kwargs}
    return trained(base, None, path, peft_config=lora(), **options)


def test_qlora_trains_in_float32(tokenizer, tmp_path, quantization):
    """TRL casts adapters and head to bf16 on a 4-bit base, where float32 hidden states then meet a bf16 head."""
    trainer = trained_in_4bit(tmp_path, tokenizer, quantization)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_qlora_adapter_agrees_on_the_4bit_base(tokenizer, tmp_path, quantization):
    trainer = trained_in_4bit(tmp_path, tokenizer, quantization)
    folder, (prompts, completions) = tmp_path / "rm", examples()
    saved = AutoTokenizer.from_pretrained(folder)
    scorer = RewardScorer(*load_reward_model(folder, quantization_config=quantization))
    plain = plain_adapter(folder, quantization_config=quantization)
    keep_4bit_trainable(plain)  # else, on CPUs with AVX512-BF16, bitsandbytes computes in bf16: 1e-3 off
    rewards = {
        "trainer": trainer_rewards(trainer),
        "RewardScorer in memory": RewardScorer(trainer.model, trainer.processing_class)(prompts, completions),
        "RewardScorer of the folder": scorer(prompts, completions),
        "PPO": rewards_in(ppo_trainer(folder, tmp_path / "ppo", reward=scorer), prompts, completions),
        "GRPO": rewards_in(trl_trainer("GRPO", scorer, saved, tmp_path / "grpo"), prompts, completions),
        "RLOO": rewards_in(trl_trainer("RLOO", scorer, saved, tmp_path / "rloo"), prompts, completions),
        "plain": [r + saved_bias(folder) for r in plain_rewards(plain, saved, prompts, completions)],
    }
    assert largest_gap(rewards)[0] < FLOAT32, largest_gap(rewards)[1]


def test_qlora_folder_alone_agrees(tokenizer, tmp_path, quantization):
    trainer = trained_in_4bit(tmp_path, tokenizer, quantization)
    rewards = RewardScorer(tmp_path / "rm")(*examples())
    assert rewards == pytest.approx(trainer_rewards(trainer), abs=FLOAT32)


def test_qlora_merged_into_float32_differs_by_the_quantisation_error_alone(tokenizer, tmp_path, quantization):
    """Merged into the base's own weights, rewards move; merged into the 4-bit weights written out, they do not."""
    from bitsandbytes.functional import dequantize_4bit

    trainer = trained_in_4bit(tmp_path, tokenizer, quantization)
    folder, rewards = tmp_path / "rm", torch.tensor(trainer_rewards(trainer))
    merged, saved = _on_float32_base(folder), AutoTokenizer.from_pretrained(folder)
    merge(merged, saved, tmp_path / "merged")
    gap = (torch.tensor(RewardScorer(tmp_path / "merged")(*examples())) - rewards).abs().max()
    assert 1e-3 < gap < 0.5 * rewards.std()  # 0.15 standard deviations here: worth knowing, and no failure

    exact, quantised = _on_float32_base(folder), dict(trainer.model.named_modules())
    for name, module in exact.named_modules():
        weight = getattr(quantised.get(name), "weight", None)
        if isinstance(module, torch.nn.Linear) and hasattr(weight, "quant_state"):
            module.weight.data = dequantize_4bit(weight.data, weight.quant_state).float()
    merge(exact, saved, tmp_path / "exact")
    assert RewardScorer(tmp_path / "exact")(*examples()) == pytest.approx(rewards.tolist(), abs=FLOAT32)


def _on_float32_base(folder):
    """The adapter on its base in float32, whatever the base was in training; its bias included."""
    model = plain_adapter(folder, AutoPeftModelForSequenceClassification)
    model.config.reward_bias = saved_bias(folder)
    return model


def test_a_4bit_base_has_gradients_after_evaluation(tokenizer, tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    if not functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes does not pack")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    options = {"model_init_kwargs": {"quantization_config": quantization}, "peft_config": lora()}
    base = save_base(tmp_path, tokenizer, **SIZES)
    trainer = make(base, None, tmp_path / "out", eval_rows=RANKINGS, **options)

    trainer.evaluate()
    trainer.model.train()
    (batch,) = trainer.get_train_dataloader()
    trainer.compute_loss(trainer.model, batch).backward()
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trainable) == 9  # A and B of two projections in two layers, and the head
    assert [name for name, parameter in trainable.items() if parameter.grad is None] == []
