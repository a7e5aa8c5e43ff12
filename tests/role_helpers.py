"""Adapters as plain PEFT saves them, on a tiny base: what RoleAdapters is made from, and compared with."""

import json

import torch
from conftest import tiny_config
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from instruct_trl.models.value import ValueModel

BIAS = 0.3
EXACT = {"atol": 2e-6, "rtol": 1e-5}
SIZES = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes' CPU kernel wants multiples of 32, blocks of 64


def sft_lora(**kwargs):
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **kwargs})


def reward_lora(**kwargs):
    targets = ["q_proj", "o_proj", "down_proj"]
    return LoraConfig(**{"task_type": "SEQ_CLS", "r": 2, "lora_alpha": 6, "target_modules": targets, **kwargs})


def randomise(model, seed):
    """An adapter that does something: PEFT starts with B = 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 if "lora" in name else 1.0))
    return model


def save_pieces(root, tokenizer, *, on_sft=False, sft=None, reward=None, **sizes):
    """`base/`, `sft/`, `merged/` (both in one) and `rm/`, an adapter on `base/` or on `merged/`, under `root`."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny_config(**sizes))
    base.generation_config.eos_token_id, base.generation_config.pad_token_id = 256, 257
    base.save_pretrained(root / "base")
    policy = randomise(get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), sft or sft_lora()), 1)
    policy.save_pretrained(root / "sft")
    policy.merge_and_unload().save_pretrained(root / "merged")
    below = root / ("merged" if on_sft else "base")
    classifier = AutoModelForSequenceClassification.from_pretrained(below, num_labels=1, dtype=torch.float32)
    randomise(get_peft_model(classifier, reward or reward_lora()), 2).save_pretrained(root / "rm")
    (root / "rm" / "reward_config.json").write_text(json.dumps({"reward_bias": BIAS, "dtype": "float32"}))
    for name in ("base", "sft", "merged", "rm"):
        tokenizer.save_pretrained(root / name)
    return root


def separate_models(root, on_sft=False, **kwargs):
    """The four models one by one, by PEFT's own means: policy, reference, reward model, value model (classifiers)."""
    policy = AutoPeftModelForCausalLM.from_pretrained(root / "sft", is_trainable=True, **kwargs)
    reference = AutoPeftModelForCausalLM.from_pretrained(root / "sft", **kwargs)
    classifiers = []
    for trainable in (False, True):
        below = root / ("merged" if on_sft else "base")
        base = AutoModelForSequenceClassification.from_pretrained(below, num_labels=1, **kwargs)
        base.config.reward_bias = BIAS
        classifiers.append(PeftModel.from_pretrained(base, root / "rm", is_trainable=trainable))
    return policy, reference, *classifiers


def classifier_values(model, ids, mask):
    """What a classifier under PEFT gives at every token, merged, plus the bias, (3, 9)."""
    return ValueModel(model.merge_and_unload()).eval()(ids, mask)


def batch(seed=0, side="left"):
    """3 rows of 4 to 9 tokens and their mask, (3, 9) each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 4, 7)):
        mask[row, : 9 - length] = 0
    if side == "right":
        mask = mask.flip(1)
    return ids.masked_fill(mask == 0, 257), mask
