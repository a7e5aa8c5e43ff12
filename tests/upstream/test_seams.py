"""The seams of TRL and transformers that this package hangs on: a release that moves one fails here, by name."""

import inspect

import pytest
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, RewardTrainer, SFTTrainer
from trl.generation.vllm_generation import VLLMGeneration

SEAMS = {
    (GRPOTrainer, "_generate_single_turn"): ["prompt_ids", "images", "multimodal_fields", "num_generations"],
    (GRPOTrainer, "_tokenize_prompts"): ["prompts"],
    (GRPOTrainer, "_calculate_rewards"): ["inputs", "prompts", "completions", "completion_ids_list"],
    (GRPOTrainer, "_get_per_token_logps_and_entropies"): ["model", "input_ids", "attention_mask", "logits_to_keep"],
    (GRPOTrainer, "_generate_and_score_completions"): ["inputs"],
    (GRPOTrainer, "_prepare_inputs"): ["generation_batch"],
    (GRPOTrainer, "_compute_loss"): ["model", "inputs"],
    (GRPOTrainer, "_get_train_sampler"): ["dataset"],
    (GRPOTrainer, "training_step"): ["model", "inputs", "num_items_in_batch"],
    (VLLMGeneration, "generate"): ["prompts", "images", "num_generations", "profiler"],
    (VLLMGeneration, "sync_weights"): [],
    (RewardTrainer, "_prepare_dataset"): ["dataset", "processing_class", "args", "dataset_name"],
    (RewardTrainer, "compute_loss"): ["model", "inputs", "return_outputs", "num_items_in_batch"],
    (SFTTrainer, "_prepare_dataset"): ["dataset"],
    (Trainer, "_save_optimizer_and_scheduler"): ["output_dir"],
    (Trainer, "_load_optimizer_and_scheduler"): ["checkpoint"],
    (Trainer, "create_scheduler"): ["num_training_steps", "optimizer"],
    (Trainer, "evaluation_loop"): [
        *("dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"),
    ],
    (Trainer, "get_optimizer_cls_and_kwargs"): ["args", "model"],
}


@pytest.mark.parametrize(("owner", "name"), SEAMS, ids=lambda part: getattr(part, "__name__", part))
def test_an_overridden_method_has_the_arguments_it_had(owner, name):
    parameters = [p for p in inspect.signature(getattr(owner, name)).parameters if p != "self"]
    expected = SEAMS[owner, name]
    assert parameters[: len(expected)] == expected


def test_our_constructors_keep_upstreams_arguments_and_order():
    from instruct_trl import InstructSFTTrainer, PPOPtxTrainer, RankingRewardTrainer

    added = {
        PPOPtxTrainer: ["value_model", "ref_model", "pretraining_dataset", "role_adapters"],
        InstructSFTTrainer: ["reward_model", "selection_prompts", "pretraining_dataset"],
        RankingRewardTrainer: [],
    }
    for ours, theirs in zip(added, (GRPOTrainer, SFTTrainer, RewardTrainer), strict=True):
        upstream = list(inspect.signature(theirs).parameters.values())
        parameters = list(inspect.signature(ours).parameters.values())
        assert [(p.name, p.kind) for p in parameters[: len(upstream)]] == [(p.name, p.kind) for p in upstream]
        assert [p.name for p in parameters[len(upstream) :]] == added[ours]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in parameters[len(upstream) :])
    for ours, theirs in ((InstructSFTTrainer, SFTTrainer), (RankingRewardTrainer, RewardTrainer)):
        defaults = [[p.default for p in inspect.signature(kind).parameters.values()] for kind in (ours, theirs)]
        assert defaults[0][: len(defaults[1])] == defaults[1]


def test_upstream_still_refuses_one_answer_a_prompt(tmp_path):
    """Once it does not, PPOPtxConfig._upstream_post_init can go."""
    with pytest.raises(ValueError, match="at least 2 generations"):
        GRPOConfig(str(tmp_path), num_generations=1, generation_batch_size=8, use_cpu=True, bf16=False)


def test_grpo_scales_its_own_loss_for_accumulation():
    assert GRPOTrainer.loss_is_scaled_for_ga is True
    assert RewardTrainer.loss_is_scaled_for_ga is False
