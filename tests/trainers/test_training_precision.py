"""What is trained has float32 weights, whatever it was handed in as; one name of the dtype."""

import copy
import json

import ppo_helpers
import pytest
import ranking_helpers
import torch
from peft import get_peft_model
from ranking_helpers import RANKINGS, pairs_of
from role_helpers import reward_lora, save_pieces, sft_lora
from test_saved_adapters import start
from transformers import AutoModelForCausalLM, HfArgumentParser
from trl import TrlParser

from instruct_trl import InstructSFTConfig, PPOPtxConfig, RankingRewardConfig, RewardScorer, RoleAdapters
from instruct_trl.models.loading import load_reward_model
from instruct_trl.models.precision import one_dtype
from instruct_trl.models.value import ValueModel

FLOAT, HALF = torch.float32, torch.bfloat16
KINDS = ["sft", "reward", "ppo"]


def in_half(kind, policy, reward_model):
    return (reward_model if kind == "reward" else policy).to(HALF)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_half_precision_is_trained_in_float32_and_said_so(
    kind, policy, reward_model, scorer, tokenizer, tmp_path, caplog
):
    model = in_half(kind, policy, reward_model)
    before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    trainer = start(kind, model, tmp_path, tokenizer, reward=scorer, learning_rate=8e-6)
    assert "was given in bfloat16" in caplog.text
    assert {p.dtype for p in trainer.model.parameters()} == {FLOAT}
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    trainer.train()
    # Adam's step is about the learning rate; in bf16, 0.02 has neighbours 6e-5 away, and most weights would stay.
    weight = "model.layers.0.mlp.down_proj.weight"
    moved = (dict(trainer.model.named_parameters())[weight] - before[weight]) != 0
    assert moved.float().mean() > 0.95


def test_the_reference_has_the_policys_values(policy, scorer, tokenizer, tmp_path):
    trainer = start("ppo", policy.to(HALF), tmp_path, tokenizer, reward=scorer)
    for (name, own), copied in zip(policy.named_parameters(), trainer.ref_model.parameters(), strict=True):
        assert torch.equal(own, copied), name
        assert copied.dtype == FLOAT


def test_a_value_model_in_half_precision_is_trained_in_float32(policy, scorer, reward_model, tokenizer, tmp_path):
    for given in (copy.deepcopy(reward_model).to(HALF), ValueModel(copy.deepcopy(reward_model).to(HALF))):
        trainer = ppo_helpers.make(tmp_path, policy, scorer, tokenizer, value_model=given, ptx_coef=0.0)
        assert {p.dtype for p in trainer.critic.unwrapped.parameters()} == {FLOAT}


@pytest.mark.parametrize("kind", KINDS)
def test_below_an_adapter_the_base_stays_in_half_and_the_adapter_is_in_float32(
    kind, policy, reward_model, scorer, tokenizer, tmp_path
):
    model = in_half(kind, policy, reward_model)
    lora = reward_lora() if kind == "reward" else sft_lora(modules_to_save=["embed_tokens", "lm_head"])
    given = get_peft_model(copy.deepcopy(model), lora, autocast_adapter_dtype=False)
    assert HALF in {p.dtype for p in given.parameters() if p.requires_grad}
    for start_from, config in ((model, lora), (given, None)):
        trainer = start(kind, start_from, tmp_path, tokenizer, peft_config=config, reward=scorer, learning_rate=8e-6)
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {FLOAT}
        assert trainer.model.get_base_model().model.layers[0].mlp.gate_proj.weight.dtype == HALF
        before = {name: p.detach().clone() for name, p in trained.items() if "lora_A" not in name}
        trainer.train()
        assert all((trained[name] - start).abs().max() > 0 for name, start in before.items())
        if kind == "ppo":
            # A new adapter's reference is the base, whose head in bf16 rounds logits that the policy's does not.
            kl = next(row["kl"] for row in trainer.state.log_history if "kl" in row)
            assert kl == pytest.approx(0, abs=1e-3 if config else 0)


def test_a_head_trained_in_float32_on_a_base_in_half_comes_back_unrounded(tmp_path, tokenizer):
    root = save_pieces(tmp_path, tokenizer)
    trainer = ranking_helpers.make(
        str(root / "base"), tokenizer, tmp_path / "out", peft_config=reward_lora(), max_steps=2, learning_rate=1e-3,
        model_init_kwargs={"dtype": "bfloat16"},
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    head = trainer.model.get_base_model().score.weight
    assert not torch.equal(head, head.to(HALF).float())
    assert torch.equal(load_reward_model(tmp_path / "out")[0].get_base_model().score.weight, head)
    scores = RewardScorer(trainer.model, tokenizer)(*pairs_of(RANKINGS))
    assert RewardScorer(tmp_path / "out")(*pairs_of(RANKINGS)) == pytest.approx(scores, abs=1e-6)


# The name -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_precision_asked_for_by_either_name_is_that_of_the_weights(
    pieces, kind, name, scorer, tmp_path, caplog, tokenizer
):
    trainer = start(
        kind, str(pieces / "base"), tmp_path, tokenizer, reward=scorer, model_init_kwargs={name: "bfloat16"}
    )
    assert trainer.model.dtype == HALF
    assert "asks for weights in bfloat16" in caplog.text


def test_a_checkpoints_own_precision_is_not_asked_for_by_name(pieces, scorer, tokenizer, tmp_path):
    AutoModelForCausalLM.from_pretrained(pieces / "base").to(HALF).save_pretrained(pieces / "base")
    for kind in KINDS:
        for kwargs in ({"dtype": "auto"}, None):
            trainer = start(kind, str(pieces / "base"), tmp_path, tokenizer, reward=scorer, model_init_kwargs=kwargs)
            assert trainer.model.dtype == FLOAT


@pytest.mark.parametrize("config", [InstructSFTConfig, RankingRewardConfig, PPOPtxConfig])
def test_two_names_that_differ_are_refused_and_yaml_has_both(config, tmp_path):
    extra = {"ptx_coef": 0} if config is PPOPtxConfig else {}
    with pytest.raises(ValueError, match=r"dtype='float32' and torch_dtype='bfloat16'.*Give dtype alone"):
        config(str(tmp_path), model_init_kwargs={"dtype": "float32", "torch_dtype": "bfloat16"}, **extra)
    for name in ("dtype", "torch_dtype"):
        file = tmp_path / "settings.yaml"
        file.write_text(json.dumps({"model_init_kwargs": {name: "bfloat16"}, "output_dir": str(tmp_path), **extra}))
        (args,) = TrlParser(config).parse_args_and_config(["--config", str(file)])
        assert args.model_init_kwargs == {"dtype": "bfloat16"}
        line = ["--output_dir", str(tmp_path), "--model_init_kwargs", json.dumps({name: "float16"})]
        (args,) = HfArgumentParser(config).parse_args_into_dataclasses(line)
        assert args.model_init_kwargs == {"dtype": "float16"}


def test_roles_and_reward_models_know_both_names(pieces):
    roles = RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm", torch_dtype="bfloat16")
    assert roles.model.dtype == HALF
    with pytest.raises(ValueError, match="model_kwargs has dtype=torch.float32 and torch_dtype='bfloat16'"):
        RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm", dtype=FLOAT, torch_dtype="bfloat16")
    assert load_reward_model(pieces / "rm", torch_dtype=HALF)[0].dtype == HALF


def test_one_dtype_is_one_of_torchs():
    assert one_dtype(None) is None
    assert one_dtype({"torch_dtype": "torch.bfloat16", "dtype": "bfloat16"}) == {"dtype": "bfloat16"}
    given = {"torch_dtype": HALF, "revision": "v1"}
    assert one_dtype(given) == {"dtype": HALF, "revision": "v1"}
    assert "torch_dtype" in given
    for wrong in ("bf16", "int8", 16, torch.int8):
        with pytest.raises(ValueError, match=r"model_init_kwargs\['torch_dtype'\] is .*Give 'float32'"):
            one_dtype({"torch_dtype": wrong})
