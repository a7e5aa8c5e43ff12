"""One base, four roles: each computes what a model of its own would, and nothing of one shows in another."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from role_helpers import (
    BIAS,
    EXACT,
    SIZES,
    batch,
    classifier_values,
    reward_lora,
    save_pieces,
    separate_models,
    sft_lora,
)
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
)

from instruct_trl import RewardScorer, RoleAdapters
from instruct_trl._upstream import add_fused_lm_head, keep_4bit_trainable
from instruct_trl.models.adapters import adapter_parameters, adapters_are_on

# Each role is the model it stands for -------------------------------------------------------------------------------


@pytest.mark.parametrize("on_sft", [False, True])
def test_each_role_computes_what_a_model_of_its_own_does(tmp_path, tokenizer, on_sft):
    root = save_pieces(tmp_path, tokenizer, on_sft=on_sft)
    roles = RoleAdapters(root / "base", root / "sft", root / "rm", reward_on_sft=on_sft)
    policy, reference, reward, value = separate_models(root, on_sft)
    ids, mask = batch()
    inputs = {"input_ids": ids, "attention_mask": mask}
    roles.model.eval()
    plain = reference.eval()(**inputs).logits
    for _ in range(2):  # the first round leaves nothing behind
        torch.testing.assert_close(roles.reference(**inputs).logits, plain, **EXACT)
        torch.testing.assert_close(roles.policy(**inputs).logits, policy.eval()(**inputs).logits, **EXACT)
        rows, right = batch(side="right")
        reward.config.pad_token_id = 257
        expected = reward.eval()(input_ids=rows, attention_mask=right).logits[:, 0] + BIAS
        torch.testing.assert_close(roles.reward(rows, right), expected, **EXACT)
        values = roles.value.eval()(ids, mask)
        torch.testing.assert_close(
            values[mask == 1], classifier_values(copy.deepcopy(value), ids, mask)[mask == 1], **EXACT
        )
    bare = AutoModelForCausalLM.from_pretrained(root / "base")(**inputs).logits
    assert (plain - bare).abs().max() > 0.01  # the adapter does something


def test_without_an_sft_adapter_the_reference_is_the_base(pieces):
    roles = RoleAdapters(str(pieces / "base"), None, pieces / "rm", policy_config=sft_lora(init_lora_weights=False))
    ids, mask = batch()
    inputs = {"input_ids": ids, "attention_mask": mask}
    bare = AutoModelForCausalLM.from_pretrained(pieces / "base")(**inputs).logits
    torch.testing.assert_close(roles.reference(**inputs).logits, bare, **EXACT)
    roles.model.eval()
    assert (roles.policy(**inputs).logits - bare).abs().max() > 1e-3
    assert adapters_are_on(roles.model)


def test_the_reward_role_at_work_gives_the_scores_of_its_folder(pieces, roles):
    prompts, completions = ["hello ", "a", "what is it? "], ["you", " long answer indeed", "?"]
    expected = RewardScorer(pieces / "rm", batch_size=2)(prompts, completions)
    found = RewardScorer(roles.reward, batch_size=2, prefix_sharing="off")(prompts, completions)
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pad_token_beyond_the_vocabulary_is_not_looked_up(roles, side):
    ids, mask = batch(side=side)
    far = ids.masked_fill(mask == 0, 100_000)
    torch.testing.assert_close(roles.reward(far, mask), roles.reward(ids, mask))
    last = [9, 4, 7] if side == "right" else [9, 9, 9]
    values = roles.value.eval()(far, mask)
    torch.testing.assert_close(roles.reward(ids, mask), torch.stack([values[i, n - 1] for i, n in enumerate(last)]))


def test_policy_and_critic_may_be_larger_than_what_they_start_from(pieces):
    wide = sft_lora(r=16, lora_alpha=5, target_modules="all-linear", use_rslora=True)
    roles = RoleAdapters(
        pieces / "base", pieces / "sft", pieces / "rm", policy_config=wide, value_config=reward_lora(r=3, lora_alpha=7)
    )
    ids, mask = batch()
    roles.model.eval()
    reference = roles.reference(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(roles.policy(input_ids=ids, attention_mask=mask).logits, reference, **EXACT)
    torch.testing.assert_close(roles.value.eval()(ids, mask)[:, -1], roles.reward(ids, mask), **EXACT)
    a = {name.split(".lora_A")[0]: p for name, p in roles.model.named_parameters() if "lora_A.default" in name}
    assert len(a) == 14  # 7 matrices a layer
    assert {p.shape[0] for p in a.values()} == {16}


@pytest.mark.parametrize("config", [{"r": 3}, {"target_modules": ["q_proj"]}])
def test_a_policy_without_room_for_the_sft_adapter_is_refused(pieces, config):
    with pytest.raises(ValueError, match="default adapter cannot start as a copy of sft, which has rank 4"):
        RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm", policy_config=sft_lora(**config))


@pytest.mark.parametrize("tied", [False, True])
def test_a_policy_may_train_its_head_whole_beside_an_sft_adapter_that_does_not(tmp_path, tokenizer, tied):
    """It starts as the SFT adapter on the base's head; trained, it is what plain PEFT reads and what `merge` writes."""
    root = save_pieces(tmp_path, tokenizer, tie_word_embeddings=tied)
    roles = RoleAdapters(root / "base", root / "sft", root / "rm", policy_config=sft_lora(modules_to_save=["lm_head"]))
    ids, mask = batch()
    inputs = {"input_ids": ids, "attention_mask": mask}
    roles.model.eval()
    reference = roles.reference(**inputs).logits
    torch.testing.assert_close(roles.policy(**inputs).logits, reference, **EXACT)
    for parameter in adapter_parameters(roles.model, "default").values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    trained = roles.policy(**inputs).logits
    assert (trained - reference).abs().max() > 0.1
    torch.testing.assert_close(roles.reference(**inputs).logits, reference, **EXACT)
    roles.save_pretrained(tmp_path / "out")
    roles.merge(tmp_path / "whole")
    saved = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "policy")
    for model in (saved, AutoModelForCausalLM.from_pretrained(tmp_path / "whole")):
        torch.testing.assert_close(model.eval()(**inputs).logits, trained, **EXACT)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trls_fused_head_is_the_one_of_the_role(pieces, dtype, autocast):
    """It reads the head's weight and does not call it: the policy's trained copy, and the base's for the reference."""
    config = sft_lora(modules_to_save=["lm_head"])
    roles = RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm", policy_config=config, dtype=dtype)
    for parameter in adapter_parameters(roles.model, "default").values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    add_fused_lm_head(roles.model.get_base_model())
    roles.model.eval()
    ids, mask = batch()
    inputs = {"input_ids": ids, "attention_mask": mask}
    labels = ids.masked_fill(mask == 0, -100)
    for role in (roles.policy, roles.reference):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            fused = role(**inputs, labels=labels, fused_lm_head=True).log_probs
            expected = role(**inputs).logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        scored = labels[:, 1:] != -100
        rounded = dtype == torch.bfloat16 and not autocast  # products in bf16, where a call has float32
        torch.testing.assert_close(fused[scored], expected[scored], atol=1e-2 if rounded else 1e-5, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_that_is_trained_whole_is_float32_on_a_bf16_base(pieces, autocast):
    config = sft_lora(modules_to_save=["lm_head"])
    roles = RoleAdapters(pieces / "base", None, pieces / "rm", policy_config=config, dtype=torch.bfloat16)
    assert {p.dtype for p in adapter_parameters(roles.model, "default").values()} == {torch.float32}
    ids, mask = batch()
    roles.model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        policy, reference = (
            role(input_ids=ids, attention_mask=mask).logits for role in (roles.policy, roles.reference)
        )
    torch.testing.assert_close(policy.to(torch.bfloat16), reference)


def test_four_bits(tmp_path, tokenizer):
    pytest.importorskip("bitsandbytes")
    root = save_pieces(tmp_path, tokenizer, **SIZES)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    roles = RoleAdapters(root / "base", root / "sft", root / "rm", quantization)
    assert roles.model.is_quantized
    ids, mask = batch()
    one = AutoModelForCausalLM.from_pretrained(root / "base", quantization_config=quantization, dtype=torch.float32)
    keep_4bit_trainable(one)
    expected = PeftModel.from_pretrained(one, root / "sft").eval()(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(roles.reference(input_ids=ids, attention_mask=mask).logits, expected, **EXACT)
    assert {p.dtype for p in roles.value.parameters()} == {torch.float32}
    roles.merge(tmp_path / "whole")  # onto the unquantised base
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert whole.dtype == torch.float32
    torch.testing.assert_close(
        whole(input_ids=ids).logits,
        AutoModelForCausalLM.from_pretrained(root / "merged")(input_ids=ids).logits,
        **EXACT,
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_reward_and_value_are_read_off_in_float32(pieces, autocast):
    """A bf16 base hands over bf16 hidden states; the heads do not round them again."""
    roles = RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm", dtype=torch.bfloat16)
    ids, mask = batch(side="right")
    for role in (roles.reward, roles.value):
        seen = []
        with torch.no_grad():
            role.score.weight.mul_(4)
        role.score.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            found = role.token_scores(ids, mask)
        expected = seen[0].double() @ role.score.weight.double().T
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected[..., 0] + BIAS, atol=1e-6, rtol=1e-6)


# No copy of the base ------------------------------------------------------------------------------------------------


def stored_bytes(*modules):
    """Bytes of all tensors reachable from the modules, each storage counted once."""
    seen = {}
    for module in modules:
        for tensor in [*module.parameters(), *module.buffers()]:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def test_the_base_is_there_once(tmp_path, tokenizer):
    root = save_pieces(tmp_path, tokenizer, **SIZES)
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    alone = stored_bytes(base)
    places = {p.untyped_storage().data_ptr() for p in base.parameters()}
    roles = RoleAdapters(base, root / "sft", root / "rm")
    # float32, 2 layers: q_proj, v_proj (64, 64) at rank 4, twice; q_proj, o_proj, down_proj (128, 64) at rank 2, twice
    policy_adapter = 2 * 4 * (128 + 128) * 4
    reward_adapter = 2 * 2 * (128 + 128 + 192) * 4
    head = 64 * 4
    everything = stored_bytes(roles.policy, roles.reference, roles.reward, roles.value)
    assert everything == alone + 2 * policy_adapter + 2 * reward_adapter + 2 * head
    used = {p.untyped_storage().data_ptr() for p in roles.policy.get_base_model().parameters()}
    assert places <= used  # it is the base's own memory


def test_a_role_owns_its_adapter_and_head_alone(roles):
    assert sum(p.numel() for p in roles.value.parameters()) == 2 * 2 * (32 + 32 + 48) + 16
    assert list(roles.reference.parameters()) == []
    ours = {id(p) for p in adapter_parameters(roles.model, "critic").values()} | {id(roles.value.score.weight)}
    assert {id(p) for p in roles.value.parameters()} == ours


# Switching never leaks ----------------------------------------------------------------------------------------------


def state_of(roles):
    model = roles.model
    return (
        list(model.base_model.active_adapters),
        adapters_are_on(model),
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: m.training for name, m in model.named_modules()},
    )


@pytest.mark.parametrize("role", ["policy", "reference", "reward", "value"])
@pytest.mark.parametrize("training", [True, False])
def test_everything_comes_back_also_after_an_error(roles, role, training):
    roles.model.train(training)
    roles.model.get_base_model().lm_head.train(not training)
    before = state_of(roles)
    with roles.active(role):
        pass
    assert state_of(roles) == before
    with pytest.raises(RuntimeError, match="in the middle"), roles.active(role), roles.active("value"):
        raise RuntimeError("in the middle")
    assert state_of(roles) == before
    with pytest.raises(IndexError):  # inside a forward, which has switched by itself
        roles.reward(torch.full((1, 3), 10_000), torch.ones(1, 3, dtype=torch.long))
    assert state_of(roles) == before


def test_roles_inside_roles(roles):
    with roles.active("value"):
        inside = state_of(roles)
        roles.reference(input_ids=torch.tensor([[1, 2]]))
        with roles.active("policy"):
            assert list(roles.model.base_model.active_adapters) == ["default"]
        assert state_of(roles) == inside


def test_dropout_acts_on_the_role_that_trains_alone(tmp_path, tokenizer):
    root = save_pieces(tmp_path, tokenizer, sft=sft_lora(lora_dropout=0.5), reward=reward_lora(lora_dropout=0.5))
    roles = RoleAdapters(root / "base", root / "sft", root / "rm")
    ids, mask = batch()
    inputs = {"input_ids": ids, "attention_mask": mask}

    def noisy(forward):
        return not torch.equal(forward(), forward())

    roles.model.train()
    roles.value.train()
    assert noisy(lambda: roles.policy(**inputs).logits)
    assert noisy(lambda: roles.value(ids, mask))
    assert not noisy(lambda: roles.reference(**inputs).logits)
    assert not noisy(lambda: roles.reward(ids, mask))
    roles.value.eval()
    assert not noisy(lambda: roles.value(ids, mask))
    assert noisy(lambda: roles.policy(**inputs).logits)


def named_gradients(roles):
    found = {name: p.grad for name, p in roles.model.named_parameters() if p.grad is not None}
    found |= {f"value.{name}": p.grad for name, p in roles.value.score.named_parameters() if p.grad is not None}
    return found | {f"reward.{name}": p.grad for name, p in roles.reward.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_go_to_one_role_and_are_those_of_a_model_of_its_own(pieces, roles, checkpointing):
    policy, _, _, value = separate_models(pieces)
    ids, mask = batch()
    roles.model.train()
    roles.value.train()
    if checkpointing:
        roles.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        roles.model.enable_input_require_grads()

    with roles.active("value"):
        values = roles.value(ids, mask)
        (values * mask).pow(2).mean().backward()
    found = named_gradients(roles)
    assert found.keys() == {n for n, _ in roles.model.named_parameters() if ".critic." in n} | {"value.weight"}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inner = value.base_model.model
    inner.model.train()
    hidden = inner.model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    ((inner.score(hidden).squeeze(-1) + BIAS) * mask).pow(2).mean().backward()
    for name, parameter in value.named_parameters():
        if parameter.grad is not None:
            key = "value.weight" if "score" in name else name.replace(".default.", ".critic.")
            torch.testing.assert_close(found.pop(key), parameter.grad, **EXACT)
    assert found == {}

    roles.model.zero_grad()
    roles.value.zero_grad()
    roles.policy(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    found = named_gradients(roles)
    assert found.keys() == {n for n, _ in roles.model.named_parameters() if ".default." in n}
    policy.train()
    policy(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, **EXACT)
