"""Residual dropout: its rate on every family of decoder, and that nothing of it stays behind."""

import copy
import math

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from ppo_helpers import make as ppo_trainer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from instruct_trl.models.dropout import decoder_layers, residual_branches, residual_dropout, switch_off_dropout

LLAMA_LIKE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
GPT2_LIKE = {"n_embd": 16, "n_layer": 2, "n_head": 2}
# Where an architecture has residual dropout of its own, it is set to something else, which must not add up with ours.
FAMILIES = {
    "llama": LLAMA_LIKE, "mistral": LLAMA_LIKE, "qwen2": LLAMA_LIKE, "qwen3": LLAMA_LIKE, "gemma": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE, "gemma3_text": LLAMA_LIKE, "olmo2": LLAMA_LIKE, "glm4": LLAMA_LIKE, "smollm3": LLAMA_LIKE,
    "granite": LLAMA_LIKE, "cohere": LLAMA_LIKE,
    "mixtral": {**LLAMA_LIKE, "num_local_experts": 2},
    "phi3": {**LLAMA_LIKE, "resid_pdrop": 0.3},
    "phi": {**LLAMA_LIKE, "resid_pdrop": 0.3},
    "starcoder2": {**LLAMA_LIKE, "residual_dropout": 0.3},
    "stablelm": {**LLAMA_LIKE, "hidden_dropout": 0.3},
    "gpt_neox": {**LLAMA_LIKE, "hidden_dropout": 0.3, "use_parallel_residual": False},
    "gpt2": {**GPT2_LIKE, "resid_pdrop": 0.3},
    "gptj": {**GPT2_LIKE, "rotary_dim": 4, "resid_pdrop": 0.3},
    "gpt_neo": {
        "hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
        "resid_dropout": 0.3,
    },
    "opt": {
        "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "dropout": 0.3,
        "word_embed_proj_dim": 16,
    },
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.3},
    "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_dropout": 0.3},
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 256},
}  # fmt: skip


def make(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{"vocab_size": 64, "pad_token_id": 0, **FAMILIES[family]})
    config.eos_token_id = config.bos_token_id = None
    model = AutoModelForCausalLM.from_config(config)
    if family == "mpt":  # its config holds this one deeper
        model.transformer.blocks[0].resid_attn_dropout.p = 0.3
    return model


def stream_steps(model, ids):
    """What each decoder layer adds to the residual stream, (B, T, H): exactly 0 where all its branches drop out."""
    steps = []

    def remember(layer, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        steps.append(((output if torch.is_tensor(output) else output[0]) - before).detach())

    handles = [layer.register_forward_hook(remember, with_kwargs=True) for layer in decoder_layers(model)]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return steps


@pytest.mark.parametrize("family", FAMILIES)
def test_each_branch_drops_out_at_the_rate_and_once(family):
    model = make(family).train()
    branches = residual_branches(model)
    assert len(branches) == 4  # attention and MLP of 2 layers
    ids = torch.randint(1, 64, (4, 64))
    with residual_dropout(model, 0.5):
        steps = stream_steps(model, ids)
    # A layer adds exactly nothing where both of its branches drop out: 1/2 · 1/2. One branch missed would give 0, one
    # dropped twice (by us at 1/2, by the architecture at 0.3) 1/2 · (1 − 1/2 · 7/10) = 0.325.
    zeros = torch.cat([step.flatten() for step in steps]) == 0
    assert abs(zeros.double().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / zeros.numel())


@pytest.mark.parametrize("family", FAMILIES)
def test_eval_mode_and_leaving_the_block_give_the_plain_model(family):
    model = make(family).eval()
    ids = torch.randint(1, 64, (2, 16))
    plain = model(input_ids=ids).logits
    with residual_dropout(model, 0.5):
        assert torch.equal(model(input_ids=ids).logits, plain)
    model.train()
    torch.manual_seed(1)
    own = model(input_ids=ids).logits
    with residual_dropout(model, 0.5):
        pass
    torch.manual_seed(1)
    assert torch.equal(model(input_ids=ids).logits, own)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "falcon"])
def test_the_mean_of_many_masks_is_the_branch_itself(family):
    """Survivors are scaled by 1/(1 − p), so the expectation over masks is the output without dropout."""
    model = make(family).train()
    branch = residual_branches(model)[0]
    seen = []
    ids = torch.randint(1, 64, (1, 8))

    def output_of(module, args, output):
        seen.append((output if torch.is_tensor(output) else output[0]).detach())

    with residual_dropout(model, 0.2):
        branch.register_forward_hook(output_of)
        for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
            dropout.p = 0.0  # of the embedding
        if family == "opt":
            model.model.decoder.dropout = 0.0
        model.eval()
        model(input_ids=ids)
        model.train()
        model(input_ids=ids.expand(400, -1))  # 400 masks at once
    plain, masked = seen[0], seen[1].unsqueeze(1)
    # Var of one draw is plain² · p/(1 − p) = plain²/4, so the mean of 400 has standard error |plain|/40.
    error = (masked.mean(0) - plain).abs() / (plain.abs() / 40)
    assert error.max() < 5


def test_zero_is_no_dropout_at_all_not_even_the_architectures_own():
    model = make("gpt_neox").train()
    ids = torch.randint(1, 64, (2, 16))
    model.gpt_neox.emb_dropout.p = 0.0  # not on the residual branches, so it stays
    with residual_dropout(model, 0.0):
        first, second = model(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.equal(first, second)
    assert torch.equal(first, model.eval()(input_ids=ids).logits)


def test_none_leaves_the_architectures_own_dropout():
    model = make("gpt2").train()
    with residual_dropout(model, None):
        assert model.transformer.h[0].mlp.dropout.p == 0.3


def gradients(model, ids, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    with residual_dropout(model, 0.3):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.gradient_checkpointing_disable()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_gradient_checkpointing_recomputes_the_same_masks(family):
    model = make(family)
    ids = torch.randint(1, 64, (2, 16))
    plain, recomputed = gradients(model, ids, False), gradients(model, ids, True)
    assert plain.keys() == recomputed.keys()
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name])


def test_adapters_are_found_through_and_keep_their_own_dropout():
    model = make("llama")
    lora = LoraConfig(r=2, lora_dropout=0.1, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, lora).train()
    assert len(residual_branches(peft_model)) == 4
    with residual_dropout(peft_model, 0.5):
        rates = {m.p for n, m in peft_model.named_modules() if isinstance(m, nn.Dropout) and "lora_dropout" in n}
    assert rates == {0.1}


def test_what_is_saved_during_training_is_plain(tmp_path):
    model = make("falcon")
    with residual_dropout(model, 0.5):
        model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.config.hidden_dropout == 0.3  # its own, as before
    ids = torch.randint(1, 64, (2, 16))
    assert torch.equal(saved.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_a_rate_outside_its_range_is_refused(p):
    with pytest.raises(ValueError, match="residual_dropout must be in"), residual_dropout(make("llama"), p):
        pass


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(ValueError, match="no decoder layers with an attention and an MLP branch found in Sequential"):
        residual_branches(nn.Sequential(nn.Linear(2, 2)))


# Every dropout that these architectures have, where they keep it as a number or in the config.
RATES = {
    "llama": {"attention_dropout": 0.3},
    "qwen3": {"attention_dropout": 0.3},
    "gemma2": {"attention_dropout": 0.3},
    "starcoder2": {"attention_dropout": 0.3, "residual_dropout": 0.3, "embedding_dropout": 0.3},
    "gpt_neox": {"attention_dropout": 0.3, "hidden_dropout": 0.3},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3, "layerdrop": 0.3},
    "bloom": {"attention_dropout": 0.3, "hidden_dropout": 0.3},
    "falcon": {"attention_dropout": 0.3, "hidden_dropout": 0.3},
    "gpt2": {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
    "gptj": {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
    "gpt_neo": {"attention_dropout": 0.3, "resid_dropout": 0.3, "embed_dropout": 0.3},
    "phi": {"attention_dropout": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
    "persimmon": {"attention_dropout": 0.3, "hidden_dropout": 0.3},
}


@pytest.mark.parametrize("family", RATES)
def test_switched_off_train_mode_computes_what_eval_mode_does(family):
    sizes = {**FAMILIES.get(family, LLAMA_LIKE), **RATES[family]}
    config = AutoConfig.for_model(family, **{"vocab_size": 64, "pad_token_id": 0, **sizes})
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(1, 64, (4, 16))
    expected = model.eval()(input_ids=ids).logits
    assert not torch.equal(model.train()(input_ids=ids).logits, expected)  # there is something to switch off
    before = model.config.to_dict()
    switch_off_dropout(model)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert model.config.to_dict() == before
    twin = copy.deepcopy(model)
    twin.config.note = "new"  # what is set later, as its attention, still reaches every layer
    assert all(part.config.note == "new" for part in twin.modules() if hasattr(part, "config"))
    torch.testing.assert_close(twin(input_ids=ids).logits, expected)


@pytest.mark.parametrize("adapter", [LoraConfig(lora_dropout=0.5), LoHaConfig(rank_dropout=0.5, module_dropout=0.5)])
def test_the_dropout_of_adapters_is_switched_off(adapter):
    adapter.target_modules, adapter.init_weights = ["q_proj", "down_proj"], False
    adapter.init_lora_weights = False
    model = get_peft_model(make("llama"), adapter).train()
    ids = torch.randint(1, 64, (4, 16))
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    switch_off_dropout(model)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_ppo_starts_each_iteration_at_a_ratio_of_one(tmp_path, tokenizer):
    sizes = {**FAMILIES["opt"], "vocab_size": 258, "pad_token_id": 257, "eos_token_id": 256, "num_labels": 1}
    config = AutoConfig.for_model("opt", **{**sizes, **RATES["opt"]})
    trainer = ppo_trainer(
        tmp_path, AutoModelForCausalLM.from_config(config), lambda completion_ids, **_: [1.0] * len(completion_ids),
        tokenizer, value_model=AutoModelForSequenceClassification.from_config(config), learning_rate=0.0,
        value_learning_rate=0.0, total_episodes=16, ptx_coef=0.0, weight_decay=0.0,
    )  # fmt: skip
    trainer.train()
    logs = [row for row in trainer.state.log_history if "ratio" in row]
    assert [row["ratio"] for row in logs] == pytest.approx([1.0] * 4, abs=1e-6)
    values = trainer.critic.model.train()
    rows = {"input_ids": torch.arange(1, 65).view(8, 8), "attention_mask": torch.ones(8, 8, dtype=torch.long)}
    assert torch.equal(values(**rows), values(**rows))
