"""`old_logps_from_sampler`: one forward less, the same numbers up to rounding, and refused where nothing is kept."""

import pytest
import torch
from peft import LoraConfig
from ppo_helpers import make

from instruct_trl import PPOPtxConfig


def rows(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def run(tmp_path, policy, scorer, tokenizer, **kwargs):
    """A trained trainer and the rows that its policy saw without gradient."""
    trainer = make(tmp_path, policy, scorer, tokenizer, **kwargs)
    seen = []
    policy.lm_head.register_forward_pre_hook(lambda *args: None if torch.is_grad_enabled() else seen.append(1))
    trainer.train()
    return trainer, len(seen)


def test_it_saves_the_forward_and_moves_nothing_but_rounding(tmp_path, policy, scorer, tokenizer):
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    first, forwards = run(tmp_path / "a", policy, scorer, tokenizer)
    trained = {name: value.clone() for name, value in policy.state_dict().items()}
    policy.load_state_dict(weights)
    vars(policy).pop("forward", None)
    second, fewer = run(tmp_path / "b", policy, scorer, tokenizer, old_logps_from_sampler=True)
    assert fewer < forwards
    assert len(rows(second, "sampler_gap")) == 2  # once a rollout
    assert max(rows(second, "sampler_gap")) < 1e-5
    assert rows(second, "ratio")[0] == pytest.approx(1, abs=1e-5)
    assert rows(second, "ratio")[4] == pytest.approx(1, abs=1e-5)
    for key in ("ratio", "kl", "policy_loss", "value_loss"):
        assert rows(second, key) == pytest.approx(rows(first, key), abs=1e-4)
    for name, value in policy.state_dict().items():
        torch.testing.assert_close(value, trained[name], atol=1e-3, rtol=1e-3)


def test_the_gap_tells_of_a_sampler_that_is_not_the_policy(tmp_path, policy, scorer, tokenizer):
    trainer = make(tmp_path, policy, scorer, tokenizer, old_logps_from_sampler=True)
    generate = trainer._generate_single_turn

    def biased(*args, **kwargs):
        answers, logps = generate(*args, **kwargs)
        return answers, [[logp - 0.25 for logp in row] for row in logps]

    trainer._generate_single_turn = biased
    trainer.train()
    assert rows(trainer, "sampler_gap") == pytest.approx([0.25, 0.25], abs=1e-4)


def test_tokens_without_a_number_are_scored_by_a_forward(tmp_path, policy, scorer, tokenizer):
    trainer = make(tmp_path, policy, scorer, tokenizer, old_logps_from_sampler=True)
    generate = trainer._generate_single_turn

    def with_a_hole(*args, **kwargs):
        answers, logps = generate(*args, **kwargs)
        return answers, [[None, *row[1:]] for row in logps]

    trainer._generate_single_turn = with_a_hole
    trainer.train()
    assert rows(trainer, "ratio")[0] == pytest.approx(1, abs=1e-5)


def test_refused_where_the_sampler_keeps_no_log_probs(tmp_path, policy, scorer, tokenizer):
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "generation_batch_size": 8}
    for kwargs, named in (
        ({"use_transformers_continuous_batching": True}, "continuous batching"),
        ({"use_vllm": True}, "vllm_importance_sampling_correction"),
    ):
        with pytest.raises(ValueError, match=named):
            PPOPtxConfig(str(tmp_path), **sizes, old_logps_from_sampler=True, **kwargs)
    trainer = make(tmp_path, policy, scorer, tokenizer, old_logps_from_sampler=True)
    trainer._generate_single_turn = lambda prompts, *args, **kwargs: ([[65, 256]] * len(prompts), None)
    with pytest.raises(ValueError, match="keeps no log-probs"):
        trainer.train()


def test_refused_with_an_adapter_which_has_no_reference_of_its_own(tmp_path, policy, scorer, tokenizer):
    with pytest.raises(ValueError, match="reference model of its own"):
        make_with_adapter(tmp_path, policy, scorer, tokenizer)


def make_with_adapter(tmp_path, policy, scorer, tokenizer):
    from ppo_helpers import PROMPTS

    from instruct_trl import PPOPtxTrainer

    args = PPOPtxConfig(
        str(tmp_path), old_logps_from_sampler=True, ptx_coef=0.0, generation_batch_size=8, report_to="none",
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_completion_length=4,
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=2)
    PPOPtxTrainer(policy, scorer, args, PROMPTS, processing_class=tokenizer, peft_config=lora)
