"""The adapters of RoleAdapters on disk: which belong to one base, what our trainer leaves, what is saved and merged."""

import json
import shutil

import pytest
import torch
from conftest import tiny_config
from datasets import Dataset
from huggingface_hub import constants
from peft import AutoPeftModelForCausalLM, LoHaConfig, PeftModel, get_peft_model
from ranking_helpers import DEMONSTRATIONS, RANKINGS, eos_as_pad, make, pairs_of
from role_helpers import (
    BIAS,
    EXACT,
    SIZES,
    batch,
    classifier_values,
    randomise,
    reward_lora,
    save_pieces,
    separate_models,
    sft_lora,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
)
from trl import ModelConfig

from instruct_trl import RewardScorer, RoleAdapters
from instruct_trl.models.adapters import adapter_parameters
from instruct_trl.models.loading import classifier_on_sft
from instruct_trl.pipeline.training import load_roles

# Pieces that do not belong together ---------------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused(pieces, tmp_path):
    LlamaForCausalLM(tiny_config(hidden_size=32)).save_pretrained(tmp_path / "wide")
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path / "twin")
    with pytest.raises(ValueError, match=r"sft' belongs to another base: .*wide'.* hidden_size 16 and 32"):
        RoleAdapters(tmp_path / "wide", pieces / "sft", pieces / "rm")
    with pytest.raises(ValueError, match=r"trained on '.*base', but the base is '.*twin'.*allow_other_base_name"):
        RoleAdapters(tmp_path / "twin", pieces / "sft", pieces / "rm")
    RoleAdapters(tmp_path / "twin", pieces / "sft", pieces / "rm", allow_other_base_name=True)
    with pytest.raises(ValueError, match="hidden_size"):  # a base in memory has no name, but a config
        RoleAdapters(LlamaForCausalLM(tiny_config(hidden_size=32)), pieces / "sft", pieces / "rm")


def test_shapes_decide_where_the_adapters_base_is_gone(pieces):
    edit_config(pieces / "sft", base_model_name_or_path="/gone")
    edit_config(pieces / "rm", base_model_name_or_path="/gone")
    with pytest.raises(ValueError, match=r"does not fit this base: .*q_proj.lora_A.weight is \(4, 16\), .* \(4, 32\)"):
        RoleAdapters(LlamaForCausalLM(tiny_config(hidden_size=32)), pieces / "sft", pieces / "rm")
    with pytest.raises(ValueError, match=r"does not fit this base: .*layers.2.* is not in it"):
        RoleAdapters(LlamaForCausalLM(tiny_config(num_hidden_layers=3)), pieces / "sft", pieces / "rm")


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_another_revision_is_refused(pieces):
    edit_config(pieces / "rm", revision="v1")
    with pytest.raises(ValueError, match=r"rm' was trained on revision 'v1'.*revision 'main'"):
        RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm", revision="main")
    with pytest.raises(ValueError, match=r"revision 'v1'.*the base is revision 'main'. Give revision='v1'"):
        RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm")
    RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm", revision="v1")  # a folder has none to be wrong


def test_embeddings_beside_an_adapter_must_be_the_bases_own(pieces):
    """PEFT saves them where a pad token was added, in the precision of the training."""
    file = pieces / "sft" / "adapter_model.safetensors"
    embedding = AutoModelForCausalLM.from_pretrained(pieces / "base").get_input_embeddings().weight.detach()
    key, adapter = "base_model.model.model.embed_tokens.weight", load_file(file)
    save_file(adapter | {key: embedding.bfloat16()}, file)
    RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm")
    save_file(adapter | {key: embedding}, file)  # those of a base in float32, beside one in bf16
    RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm", dtype=torch.bfloat16)
    save_file(adapter | {key: embedding.bfloat16() * 1.1}, file)
    with pytest.raises(ValueError, match="sft' carries embeddings that are not those of this base"):
        RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm")


def test_an_adapter_on_the_head_is_taken(tmp_path, tokenizer):
    targets = ["q_proj", "lm_head", "embed_tokens"]
    root = save_pieces(tmp_path, tokenizer, sft=sft_lora(target_modules=targets))
    assert any("base_layer" in name for name in load_file(root / "sft" / "adapter_model.safetensors"))
    roles = RoleAdapters(root / "base", root / "sft", root / "rm")
    expected = AutoModelForCausalLM.from_pretrained(root / "merged")(input_ids=batch()[0]).logits
    torch.testing.assert_close(roles.reference(input_ids=batch()[0]).logits, expected, **EXACT)


@pytest.mark.parametrize("on_sft", [False, True])
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_a_head_or_embedding_that_sft_trained_whole_is_taken(tmp_path, tokenizer, names, on_sft):
    """By policy and reference, and by reward and critic only where they stand on the SFT adapter."""
    root = save_pieces(tmp_path, tokenizer, sft=sft_lora(modules_to_save=names), on_sft=on_sft)
    roles = RoleAdapters(root / "base", root / "sft", root / "rm", reward_on_sft=on_sft)
    ids, mask = batch()
    roles.model.eval()
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = AutoModelForCausalLM.from_pretrained(root / "merged")(**inputs).logits
    bare = AutoModelForCausalLM.from_pretrained(root / "base")(**inputs).logits
    assert (expected - bare).abs().max() > 0.1
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(roles.policy(**inputs).logits, expected, **close)
    torch.testing.assert_close(roles.reference(**inputs).logits, expected, **close)
    *_, value = separate_models(root, on_sft)
    values = roles.value.eval()(ids, mask)[mask == 1]
    torch.testing.assert_close(values, classifier_values(value, ids, mask)[mask == 1], **close)


def test_a_reward_adapter_on_the_merged_sft_model_must_say_so(tmp_path, tokenizer):
    root = save_pieces(tmp_path, tokenizer, on_sft=True)
    with pytest.raises(ValueError, match=r"rm' was trained on '.*merged', but the base is '.*base'"):
        RoleAdapters(root / "base", root / "sft", root / "rm")
    edit_config(root / "rm", base_model_name_or_path=str(root / "sft"))
    roles = RoleAdapters(root / "base", root / "sft", root / "rm")  # by its base's name
    expected = RoleAdapters(
        root / "merged", None, root / "rm", policy_config=sft_lora(), reward_on_sft=False, allow_other_base_name=True
    )
    torch.testing.assert_close(roles.reward(*batch()), expected.reward(*batch()), **EXACT)


def test_a_reward_adapter_on_an_sft_adapter_that_is_not_there_is_refused(tmp_path, tokenizer):
    """Else it would run on the bare base, which it never saw."""
    root = save_pieces(tmp_path, tokenizer, on_sft=True)
    edit_config(root / "rm", base_model_name_or_path=str(root / "sft"))
    roles = RoleAdapters(root / "base", root / "sft", root / "rm")
    roles.save_pretrained(tmp_path / "out")
    says = r"was trained on the SFT adapter '.*sft'.*Give '.*sft' as sft_adapter.*reward_on_sft=True"
    for reward in (root / "rm", tmp_path / "out" / "value"):
        for sft, other in ((None, True), (tmp_path / "out" / "policy", True), (tmp_path / "out" / "policy", False)):
            with pytest.raises(ValueError, match=says):
                RoleAdapters(root / "base", sft, reward, policy_config=sft_lora(), allow_other_base_name=other)
    # A later run then goes on by load_policy.
    again = RoleAdapters(root / "base", root / "sft", tmp_path / "out" / "value")
    again.load_policy(tmp_path / "out" / "policy")
    torch.testing.assert_close(again.reward(*batch()), roles.value.eval()(*batch())[:, -1])
    moved = (root / "sft").rename(root / "moved")
    torch.testing.assert_close(
        RoleAdapters(root / "base", moved, root / "rm", reward_on_sft=True).reward(*batch()), roles.reward(*batch())
    )


def test_what_cannot_be_a_role_is_refused(pieces, tmp_path):
    with pytest.raises(ValueError, match="There is no adapter at"):
        RoleAdapters(pieces / "base", pieces / "base", pieces / "rm")
    with pytest.raises(ValueError, match="does not hold a scalar score head"):
        RoleAdapters(pieces / "base", pieces / "sft", pieces / "sft")
    with pytest.raises(ValueError, match="reward_adapter is not given"):
        RoleAdapters(pieces / "base", pieces / "sft")
    with pytest.raises(ValueError, match="pass policy_config="):
        RoleAdapters(pieces / "base", None, pieces / "rm")
    with pytest.raises(ValueError, match="carries adapters already"):
        RoleAdapters(AutoPeftModelForCausalLM.from_pretrained(pieces / "sft"), pieces / "sft", pieces / "rm")
    with pytest.raises(ValueError, match=r"base '.*sft' carries adapters already.* as sft_adapter"):
        RoleAdapters(pieces / "sft", None, pieces / "rm", policy_config=sft_lora(), allow_other_base_name=True)
    with pytest.raises(ValueError, match="init_lora_weights='pissa', which changes weights of the base"):
        RoleAdapters(pieces / "base", None, pieces / "rm", policy_config=sft_lora(init_lora_weights="pissa"))
    other = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pieces / "base"), LoHaConfig(target_modules=["q_proj"], r=2)
    )
    other.save_pretrained(tmp_path / "loha")
    with pytest.raises(ValueError, match="is a LoHaConfig"):
        RoleAdapters(pieces / "base", tmp_path / "loha", pieces / "rm")


def test_the_recipe_takes_adapters_by_their_names_on_the_hub(pieces, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    for name in ("sft", "rm"):
        (cache / f"models--me--{name}" / "refs").mkdir(parents=True)
        (cache / f"models--me--{name}" / "refs" / "main").write_text("1" * 40)
        shutil.copytree(pieces / name, cache / f"models--me--{name}" / "snapshots" / ("1" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    given = ModelConfig(lora_r=4, lora_target_modules=["q_proj", "v_proj"])
    expected = RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm").reward(*batch())
    torch.testing.assert_close(load_roles("me/rm", "me/sft", given, {}).reward(*batch()), expected)
    with pytest.raises(ValueError, match="me/gone is not one, or cannot be read"):
        load_roles("me/gone", "me/sft", given, {})


# Reward adapters of our own trainer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["base", "sft"])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_a_reward_adapter_of_our_trainer_is_the_reward_role(tmp_path, tokenizer, below, pad_is_eos):
    """Trained on the base or on the SFT adapter; with a pad token of its own, added beyond the base's vocabulary."""
    tokenizer = eos_as_pad() if pad_is_eos else tokenizer
    root = save_pieces(tmp_path, tokenizer, **({"vocab_size": 257} if pad_is_eos else {}))
    (root / "rm" / "reward_config.json").unlink()
    trainer = make(
        str(root / below), None, tmp_path / "run", peft_config=reward_lora(), max_steps=3, learning_rate=1e-2
    )
    trainer.train()
    trainer.normalize(Dataset.from_list(DEMONSTRATIONS))
    trainer.save_model(str(root / "trained"))
    expected = RewardScorer(trainer.model, trainer.processing_class)(*pairs_of(RANKINGS))
    assert RewardScorer(root / "trained")(*pairs_of(RANKINGS)) == pytest.approx(expected, abs=1e-5)
    roles = RoleAdapters(root / "base", root / "sft", root / "trained")
    found = RewardScorer(roles.reward, prefix_sharing="off")(*pairs_of(RANKINGS))
    assert found == pytest.approx(expected, abs=1e-5)
    assert roles._stacks["reward"] == (["reward"] if below == "base" else ["sft", "reward"])


def test_a_reward_adapter_on_an_sft_adapter_is_not_trained_in_4_bits(pieces, tmp_path):
    with pytest.raises(ValueError, match="cannot be merged into a quantised base"):
        make(
            str(pieces / "sft"), None, tmp_path / "run", peft_config=reward_lora(),
            model_init_kwargs={"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
        )  # fmt: skip


def test_nothing_is_merged_into_a_base_that_is_stored_quantised(tmp_path, tokenizer):
    pytest.importorskip("bitsandbytes")
    root = save_pieces(tmp_path, tokenizer, **SIZES)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    stored = AutoModelForCausalLM.from_pretrained(root / "base", quantization_config=quantization)
    stored.save_pretrained(root / "base")
    with pytest.raises(ValueError, match=r"cannot be merged into a quantised base \('.*base'\)"):
        classifier_on_sft(root / "sft")
    roles = RoleAdapters(root / "base", root / "sft", root / "rm")
    with pytest.raises(ValueError, match="base' is stored quantised"):
        roles.merge(tmp_path / "whole")


# Saved --------------------------------------------------------------------------------------------------------------


def test_each_adapter_is_saved_in_its_own_folder_and_read_by_plain_peft(pieces, roles, tmp_path):
    for adapter, seed in (("default", 3), ("critic", 4)):
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter_parameters(roles.model, adapter).values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    roles.save_pretrained(tmp_path / "out")
    ids, mask = batch()
    roles.model.eval()
    base = AutoModelForCausalLM.from_pretrained(pieces / "base")
    policy = PeftModel.from_pretrained(base, tmp_path / "out" / "policy").eval()
    found = roles.policy(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(policy(input_ids=ids, attention_mask=mask).logits, found, **EXACT)
    classifier = AutoModelForSequenceClassification.from_pretrained(pieces / "base", num_labels=1)
    classifier.config.reward_bias = BIAS
    value = PeftModel.from_pretrained(classifier, tmp_path / "out" / "value")
    torch.testing.assert_close(
        roles.value.eval()(ids, mask)[mask == 1], classifier_values(value, ids, mask)[mask == 1], **EXACT
    )
    files = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    one = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    expected = {f"policy/{name}" for name in one} | {f"value/{name}" for name in {*one, "reward_config.json"}}
    assert files == expected
    for role in ("policy", "value"):
        assert f"base_model: {pieces / 'base'}" in (tmp_path / "out" / role / "README.md").read_text()
        assert all("base_layer" not in key for key in load_file(tmp_path / "out" / role / "adapter_model.safetensors"))


def test_what_was_saved_can_be_taken_up_again(pieces, roles, tmp_path):
    randomise(roles.model, 5)
    with torch.no_grad():
        roles.value.score.weight.add_(1.0)
    roles.save_pretrained(tmp_path / "out")
    again = RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm")
    again.load_policy(tmp_path / "out" / "policy")
    again.value.load_pretrained(tmp_path / "out" / "value")
    for role in ("policy", "value"):
        for one, two in zip(getattr(roles, role).parameters(), getattr(again, role).parameters(), strict=True):
            assert torch.equal(one, two)
    # a finished run's folders make the next run's pieces
    third = RoleAdapters(pieces / "base", tmp_path / "out" / "policy", tmp_path / "out" / "value")
    torch.testing.assert_close(third.reward(*batch()), roles.value.eval()(*batch())[:, -1])


def test_the_value_folder_says_how_this_base_was_loaded(pieces, tmp_path):
    """Not how the reward model's was, which may have been trained in 4 bits."""
    theirs = {"reward_bias": BIAS, "dtype": "float32", "quantization_config": {"load_in_4bit": True}, "note": "kept"}
    (pieces / "rm" / "reward_config.json").write_text(json.dumps(theirs))
    roles = RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm", dtype=torch.bfloat16)
    roles.save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "value" / "reward_config.json").read_text())
    assert saved == {"reward_bias": BIAS, "dtype": "bfloat16", "note": "kept"}


@pytest.mark.parametrize("in_memory", [False, True])
def test_merge_writes_a_standalone_policy_and_leaves_the_base_alone(pieces, tmp_path, in_memory):
    base = AutoModelForCausalLM.from_pretrained(pieces / "base") if in_memory else pieces / "base"
    roles = RoleAdapters(base, pieces / "sft", pieces / "rm")
    randomise(roles.model, 5)
    before = {name: p.clone() for name, p in roles.model.named_parameters()}
    roles.merge(tmp_path / "whole")
    assert all(torch.equal(p, before[name]) for name, p in roles.model.named_parameters())
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    roles.model.eval()
    ids, mask = batch()
    expected = roles.policy(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(whole(input_ids=ids, attention_mask=mask).logits, expected, **EXACT)


@pytest.mark.parametrize("in_memory", [False, True])
def test_what_bf16_would_round_away_is_merged_all_the_same(pieces, tmp_path, in_memory):
    """An update of about a thousandth of a weight; bf16 rounds to 2⁻⁹ of it. The tokenizer lies beside it."""
    layer = "model.layers.1.self_attn.v_proj"
    base = AutoModelForCausalLM.from_pretrained(pieces / "base", dtype=torch.bfloat16 if in_memory else torch.float32)
    before = base.get_submodule(layer).weight.detach().float()
    roles = RoleAdapters(base if in_memory else pieces / "base", pieces / "sft", pieces / "rm", dtype=torch.bfloat16)
    own = adapter_parameters(roles.model, "default")
    for name, parameter in own.items():
        parameter.data.normal_(std=1e-2 if "lora_A" in name else 1e-4)
    a, b = (own[f"base_model.model.{layer}.lora_{part}.default.weight"].detach() for part in "AB")
    update = b @ a * (8 / 4)  # PEFT's lora_alpha over r
    assert update.abs().max() < before.abs().mean() / 256
    whole = roles.merge(tmp_path / "whole")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(merged.get_submodule(layer).weight - before, update, atol=1e-8, rtol=1e-3)
    assert whole.dtype == merged.dtype == torch.float32
    saved = AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert saved("hello").input_ids == AutoTokenizer.from_pretrained(pieces / "sft")("hello").input_ids
