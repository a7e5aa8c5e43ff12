"""A saved adapter goes in again: it goes on training, in all three trainers, or is refused by name."""

import ppo_helpers
import pytest
import ranking_helpers
import test_instruct_sft as sft_helpers
import torch
from conftest import tiny_config
from peft import LoraConfig, PeftModel, load_peft_weights
from role_helpers import BIAS, batch, reward_lora, sft_lora
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from instruct_trl import RewardScorer, value_model_from_reward_model
from instruct_trl.models.loading import load_policy_and_tokenizer, load_reward_model
from instruct_trl.models.value import ValueModel
from instruct_trl.trainers.starting_model import place_reward_models


def start(kind, model, path, tokenizer=None, peft_config=None, reward=None, **kwargs):
    """A trainer of this kind on `model`, and the loss-free rest as small as can be."""
    if kind == "sft":
        args = sft_helpers.config(path, num_train_epochs=1, save_strategy="no", residual_dropout=0, **kwargs)
        return sft_helpers.InstructSFTTrainer(
            model, args, train_dataset=sft_helpers.DEMONSTRATIONS, processing_class=tokenizer, peft_config=peft_config
        )
    if kind == "reward":
        return ranking_helpers.make(model, tokenizer, path, peft_config=peft_config, max_steps=2, **kwargs)
    options = {"total_episodes": 16, "ptx_coef": 0.0, **kwargs}
    return ppo_helpers.make(path, model, reward, tokenizer, peft_config=peft_config, **options)


def frozen(root, kind):
    """The adapter as a PeftModel that was loaded for inference."""
    if kind == "reward":
        base = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=1)
        return PeftModel.from_pretrained(base, root / "rm")
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "base"), root / "sft")


def in_memory(name, adapter):
    """The name in a model of a tensor in its adapter's file, which leaves out the adapter's own name."""
    return next(own for own in adapter if own.replace(".default", "").replace(".modules_to_save", "") == name)


def adapter_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}


@pytest.mark.parametrize("kind", ["sft", "reward", "ppo"])
def test_an_adapters_folder_goes_on_training_and_is_saved_as_it_ended(pieces, tmp_path, kind):
    folder = pieces / ("rm" if kind == "reward" else "sft")
    trainer = start(kind, str(folder), tmp_path / "run", reward=str(pieces / "rm"))
    before, ids = adapter_of(trainer.model), batch()[0]
    for name, saved in load_peft_weights(folder).items():
        assert torch.equal(dict(trainer.model.named_parameters())[in_memory(name, before)], saved), name
    base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    moved = {name: (p - before[name]).abs().max() for name, p in adapter_of(trainer.model).items()}
    assert min(moved.values()) > 0
    assert all(torch.equal(p, base[n]) for n, p in trainer.model.named_parameters() if n in base)
    trainer.save_model()
    out = tmp_path / "run" / ("policy" if kind == "ppo" else "")
    again = load_reward_model(out)[0] if kind == "reward" else load_policy_and_tokenizer(out)[0]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits, atol=1e-6, rtol=1e-6)


def test_the_reference_of_an_adapters_folder_is_the_policy_as_it_was(pieces, tmp_path):
    trainer = start("ppo", str(pieces / "sft"), tmp_path, reward=str(pieces / "rm"), total_episodes=32)
    trainer.train()
    log = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert log[0] == 0
    assert abs(log[-1]) > 0


def test_the_bias_of_a_reward_adapter_goes_on(pieces, tmp_path):
    assert start("reward", str(pieces / "rm"), tmp_path).model.config.reward_bias == BIAS


@pytest.mark.parametrize(
    ("kind", "says"), [("sft", "The model"), ("reward", "The reward model"), ("ppo", "The policy")]
)
def test_a_peft_model_loaded_for_inference_is_refused(pieces, tmp_path, tokenizer, kind, says):
    with pytest.raises(ValueError, match=rf"{says} \(Peft.*no trainable parameters.*is_trainable=True"):
        start(kind, frozen(pieces, kind), tmp_path, tokenizer, reward=str(pieces / "rm"))


def test_a_frozen_body_below_a_trained_head_is_refused_too(pieces, tmp_path, tokenizer):
    model = frozen(pieces, "reward")
    model.score.requires_grad_(True)
    with pytest.raises(ValueError, match=r"no trainable parameters.*is_trainable=True"):
        start("reward", model, tmp_path, tokenizer)


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_a_whole_model_that_is_frozen_is_refused(policy, scorer, tmp_path, tokenizer, kind):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\) has no trainable parameters.*requires_grad_\(True\)"):
        start(kind, policy.requires_grad_(False), tmp_path, tokenizer, reward=scorer)


@pytest.mark.parametrize("kind", ["sft", "reward", "ppo"])
def test_a_new_adapter_on_the_folder_of_one_is_refused(pieces, tmp_path, kind):
    """Only on an SFT adapter a reward adapter may stand."""
    folder, lora = (pieces / "rm", reward_lora()) if kind == "reward" else (pieces / "sft", sft_lora())
    with pytest.raises(ValueError, match=r"is an adapter, and peft_config= asks for another. Leave peft_config out"):
        start(kind, str(folder), tmp_path, peft_config=lora, reward=str(pieces / "rm"))


@pytest.mark.parametrize("kind", ["sft", "reward", "ppo"])
def test_a_config_read_from_a_folder_would_make_an_adapter_that_does_not_train(pieces, tmp_path, kind):
    lora = LoraConfig.from_pretrained(pieces / ("rm" if kind == "reward" else "sft"))
    with pytest.raises(ValueError, match=r"inference_mode=True.*Set peft_config.inference_mode = False"):
        start(kind, str(pieces / "base"), tmp_path, peft_config=lora, reward=str(pieces / "rm"))


def test_an_adapter_of_the_other_kind_is_refused(pieces, tmp_path):
    for kind in ("sft", "ppo"):
        with pytest.raises(ValueError, match="rm' is the adapter of a reward model"):
            start(kind, str(pieces / "rm"), tmp_path, reward=str(pieces / "rm"))
    with pytest.raises(ValueError, match="sft' is the adapter of a language model. Pass peft_config="):
        start("reward", str(pieces / "sft"), tmp_path)


def test_an_adapter_of_another_base_is_refused_by_name(pieces, tmp_path):
    LlamaForCausalLM(tiny_config(hidden_size=32)).save_pretrained(pieces / "base")
    with pytest.raises(ValueError, match=r"sft' does not fit its base '.*base'"):
        start("sft", str(pieces / "sft"), tmp_path)


# Value and reference model by path, reward models in memory -----------------------------------------------------------


def test_the_value_model_may_be_a_path(pieces, policy, tokenizer, tmp_path):
    """Whole or an adapter's; by plain PEFT, merged, it gives the same values."""
    scorer, ids = RewardScorer(str(pieces / "rm")), batch()
    trainer = ppo_helpers.make(tmp_path, policy, scorer, tokenizer, value_model=str(pieces / "rm"), ptx_coef=0.0)
    expected = ValueModel(frozen(pieces, "reward").merge_and_unload()).eval()
    values = trainer.critic.unwrapped.eval()(*ids)
    torch.testing.assert_close(values, expected(*ids) + BIAS, atol=1e-6, rtol=1e-6)
    trainer.critic.unwrapped.save_pretrained(tmp_path / "whole")
    assert torch.equal(ValueModel.from_pretrained(tmp_path / "whole").eval()(*ids), values)
    with pytest.raises(ValueError, match="There is no model folder './nowhere'"):
        ppo_helpers.make(tmp_path, policy, scorer, tokenizer, value_model="./nowhere", ptx_coef=0.0)


def test_a_reward_adapter_is_merged_into_its_copy_the_critic(pieces):
    model = load_reward_model(pieces / "rm")[0]
    values = value_model_from_reward_model(model).eval()(*batch())
    assert any("lora" in name for name, _ in model.named_parameters())  # it keeps its own
    expected = ValueModel(frozen(pieces, "reward").merge_and_unload()).eval()(*batch()) + BIAS
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-6)


def test_a_value_model_that_would_not_train_is_refused(pieces, policy, scorer, tokenizer, tmp_path, reward_model):
    with pytest.raises(ValueError, match="value model carries PEFT adapters. Merge them first"):
        ppo_helpers.make(tmp_path, policy, scorer, tokenizer, value_model=frozen(pieces, "reward"), ptx_coef=0.0)
    still = reward_model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"value_model \(ValueModel\) has no trainable parameters"):
        ppo_helpers.make(tmp_path, policy, scorer, tokenizer, value_model=still, ptx_coef=0.0)


@pytest.mark.parametrize("folder", ["sft", "merged"])
def test_the_reference_may_be_a_path(pieces, policy, scorer, tokenizer, tmp_path, folder):
    trainer = ppo_helpers.make(
        tmp_path, policy, scorer, tokenizer, ref_model=str(pieces / folder), ptx_coef=0.0, bf16=False
    )
    expected = AutoModelForCausalLM.from_pretrained(pieces / "merged")
    ids = batch()[0]
    torch.testing.assert_close(trainer.ref_model(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())


def test_reward_models_in_memory_move_to_the_device_of_training(reward_model, scorer, roles, tokenizer):
    functions = [scorer, len, RewardScorer(roles.reward, tokenizer)]
    place_reward_models(functions, torch.device("meta"))
    assert {p.device.type for p in reward_model.parameters()} == {"meta"}
    assert {p.device.type for p in roles.model.parameters()} == {"cpu"}  # with the policy, later
    spread = ranking_helpers.fresh_model()
    spread.hf_device_map = {"": "cpu"}
    place_reward_models([RewardScorer(spread, tokenizer)], torch.device("meta"))
    assert {p.device.type for p in spread.parameters()} == {"cpu"}


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_both_trainers_place_them(kind, policy, reward_model, scorer, tokenizer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(reward_model, "to", lambda device: asked.append(device))
    if kind == "ppo":
        trainer = ppo_helpers.make(tmp_path, policy, scorer, tokenizer, ptx_coef=0.0)
    else:
        trainer = sft_helpers.make(
            tmp_path, policy, tokenizer, reward_model=scorer, selection_prompts=sft_helpers.PROMPTS
        )
    assert asked == [trainer.accelerator.device]
