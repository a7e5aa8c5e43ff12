"""Bad input to PPOPtxTrainer: one clear error each, before any training."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from ppo_helpers import PROMPTS, make
from transformers import BitsAndBytesConfig, LlamaForCausalLM, LlamaForSequenceClassification

from instruct_trl import PPOPtxConfig, PPOPtxTrainer, RewardScorer
from instruct_trl.trainers.ppo_ptx_setup import Models, check_beside_roles, load_policy_tokenizer, wrap_reward_funcs


def test_gamma_without_pretraining_data(tmp_path, policy, scorer, tokenizer):
    with pytest.raises(ValueError, match="needs pretraining_dataset"):
        make(tmp_path, policy, scorer, tokenizer, pretraining_dataset=None)


def test_a_function_alone_gives_no_critic(tmp_path, policy, tokenizer):
    with pytest.raises(ValueError, match="Pass value_model="):
        make(tmp_path, policy, lambda prompts, completions, **_: [0.0] * len(prompts), tokenizer)


def test_no_reward_at_all(tmp_path, policy, tokenizer):
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        make(tmp_path, policy, None, tokenizer)


def test_a_reward_tokenizer_that_differs_is_named(tmp_path, policy, reward_model, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens([f"word{i}" for i in range(20)])
    other.name_or_path = "other-tokenizer"
    with pytest.raises(ValueError, match="other-tokenizer"):
        make(tmp_path, policy, RewardScorer(reward_model, other), tokenizer)


def test_a_value_model_with_two_labels(tmp_path, policy, scorer, tokenizer):
    with pytest.raises(ValueError, match="num_labels=2"):
        make(
            tmp_path, policy, scorer, tokenizer,
            value_model=LlamaForSequenceClassification(tiny_config(num_labels=2)),
        )  # fmt: skip


def test_no_prompt_column(tmp_path, policy, scorer, tokenizer):
    with pytest.raises(ValueError, match="train_dataset has no column 'prompt'.* Did you mean 'promt'"):
        make(tmp_path, policy, scorer, tokenizer, prompts=Dataset.from_dict({"promt": ["a"]}))


def test_an_empty_prompt(tmp_path, policy, scorer, tokenizer):
    with pytest.raises(ValueError, match="row 1 is empty"):
        make(tmp_path, policy, scorer, tokenizer, prompts=Dataset.from_dict({"prompt": ["a", " "]}))


def test_prompts_that_are_all_too_long(tmp_path, policy, scorer, tokenizer):
    with pytest.raises(ValueError, match="all 16 prompts are longer than max_prompt_length=3"):
        make(tmp_path, policy, scorer, tokenizer, max_prompt_length=3)


def test_some_prompts_too_long_are_dropped_and_counted(tmp_path, policy, scorer, tokenizer, caplog):
    trainer = make(
        tmp_path, policy, scorer, tokenizer, max_prompt_length=8, generation_batch_size=4, total_episodes=4,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    assert len(trainer.train_dataset) == 8
    assert "dropped 8 of 16 prompts" in caplog.text


def test_a_tokenizer_without_eos(tmp_path, policy, scorer, tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="EOS"):
        make(tmp_path, policy, scorer, tokenizer)


def test_a_model_path_that_does_not_exist(tmp_path, scorer, tokenizer):
    with pytest.raises(ValueError, match="no-such-model"):
        make(tmp_path, str(tmp_path / "no-such-model"), scorer, tokenizer)


def test_how_the_policy_is_loaded_outlives_the_first_trainer(tmp_path, policy, scorer, tokenizer):
    policy.save_pretrained(tmp_path / "policy")
    args = PPOPtxConfig(
        str(tmp_path / "run"), ptx_coef=0.0, report_to="none", model_init_kwargs={"dtype": "bfloat16"},
        use_cpu=True, bf16=False, generation_batch_size=8, per_device_train_batch_size=4, gradient_accumulation_steps=1,
        max_completion_length=8,
    )  # fmt: skip
    for _ in range(2):
        trainer = PPOPtxTrainer(str(tmp_path / "policy"), scorer, args, PROMPTS, processing_class=tokenizer)
        assert trainer.model.dtype == torch.bfloat16


def test_vllm_on_a_shared_base_that_it_would_round_is_refused(roles):
    args = SimpleNamespace(use_vllm=True, cast_lm_head_to_fp32=False)
    check_beside_roles(Models(None, roles=roles), roles, args)
    roles.model.bfloat16()
    with pytest.raises(ValueError, match="rounds a base that is not in float32"):
        check_beside_roles(Models(None, roles=roles), roles, args)


def test_a_head_in_float32_is_refused_where_it_cannot_be(tmp_path, policy, scorer, tokenizer, roles):
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32=True rewrites the head of the base"):
        make(tmp_path, None, None, None, role_adapters=roles, cast_lm_head_to_fp32=True)
    tied = LlamaForCausalLM(tiny_config(tie_word_embeddings=True))
    tied.generation_config.eos_token_id = 256
    lora = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    with pytest.raises(ValueError, match="does not work with adapters on a model whose head is its embedding"):
        make(tmp_path, get_peft_model(tied, LoraConfig(**lora)), scorer, tokenizer, cast_lm_head_to_fp32=True)
    make(tmp_path, get_peft_model(policy, LoraConfig(**lora)), scorer, tokenizer, cast_lm_head_to_fp32=True)


def test_a_quantised_path_without_adapters_is_refused(tmp_path, policy, scorer, tokenizer):
    policy.save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="quantization_config needs peft_config"):
        make(tmp_path, str(tmp_path / "policy"), scorer, tokenizer, quantization_config=BitsAndBytesConfig())


def test_a_base_without_a_name_needs_its_tokenizer():
    with pytest.raises(ValueError, match="built in memory: pass its tokenizer as processing_class"):
        load_policy_tokenizer(None, SimpleNamespace(tokenizer_path=""))


def test_pretraining_data_without_text(tmp_path, policy, scorer, tokenizer):
    with pytest.raises(ValueError, match="has no column 'text' or 'input_ids'"):
        make(tmp_path, policy, scorer, tokenizer, pretraining_dataset=Dataset.from_dict({"txt": ["a b"]}))


def test_the_policy_as_its_own_reference_is_refused(tmp_path, policy, scorer, tokenizer):
    args = PPOPtxConfig(str(tmp_path), ptx_coef=0.0, report_to="none")
    with pytest.raises(ValueError, match="ref_model is the policy itself"):
        PPOPtxTrainer(policy, scorer, args, PROMPTS, processing_class=tokenizer, ref_model=policy)


@pytest.mark.parametrize(("knob", "value"), [("top_p", 0.9), ("top_k", 5), ("min_p", 0.1), ("repetition_penalty", 1.2)])
def test_a_sampler_that_the_log_probs_do_not_follow_is_refused(tmp_path, knob, value):
    with pytest.raises(ValueError, match=knob):
        PPOPtxConfig(str(tmp_path), **{knob: value})


def test_two_reward_models_have_names_of_their_own(scorer, reward_model, tokenizer, tmp_path):
    wrapped = wrap_reward_funcs([scorer, reward_model], tokenizer, PPOPtxConfig(str(tmp_path)))
    assert [func.__name__ for func in wrapped] == ["reward_model_1", "reward_model_2"]


def test_a_critic_of_ones_own_loses_its_dropout(tmp_path, policy, scorer, tokenizer):
    critic = LlamaForSequenceClassification(tiny_config(num_labels=1))
    critic.model.layers[0].mlp = torch.nn.Sequential(critic.model.layers[0].mlp, torch.nn.Dropout(0.5))
    trainer = make(tmp_path, policy, scorer, tokenizer, value_model=critic)
    assert {module.p for module in trainer.critic.model.modules() if isinstance(module, torch.nn.Dropout)} == {0}
