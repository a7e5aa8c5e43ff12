"""PPOPtxConfig: the paper's arithmetic as defaults, and bad values refused by name."""

import pytest
from transformers import Trainer
from transformers.optimization import get_scheduler

from instruct_trl import PPOPtxConfig


def config(tmp_path, **kwargs):
    return PPOPtxConfig(str(tmp_path), report_to="none", **kwargs)


def test_the_defaults_are_the_papers(tmp_path):
    args = config(tmp_path)
    assert (args.generation_batch_size, args.minibatch_size, args.steps_per_iteration) == (512, 64, 8)
    assert args.max_steps == 256_000 // 512 * 8 == 4000
    assert args.warmup_steps == 10 * 8
    assert (args.beta, args.epsilon, args.discount, args.ptx_coef, args.ptx_ratio) == (0.02, 0.2, 1.0, 27.8, 8)
    assert (args.value_learning_rate, args.ema_decay, args.num_generations, args.num_iterations) == (9e-6, 0.992, 1, 1)
    assert (args.adam_beta1, args.adam_beta2, args.temperature) == (0.9, 0.95, 1.0)


def test_the_warm_up_starts_at_a_tenth_and_ends_constant(tmp_path, policy):
    args = config(tmp_path, generation_batch_size=64, gradient_accumulation_steps=1, warmup_iterations=2)
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, policy)
    optimizer = optimizer_class(policy.parameters(), **{**kwargs, "lr": 1.0})
    schedule = get_scheduler(
        args.lr_scheduler_type, optimizer, args.warmup_steps, args.max_steps, args.lr_scheduler_kwargs
    )
    rates = []
    for _ in range(40):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1)
    assert rates[8] == pytest.approx(0.55)  # half-way through 2 iterations of 8 steps: (0.1 + 1) / 2
    assert rates[16:] == pytest.approx([1.0] * 24)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"generation_batch_size": 96, "per_device_train_batch_size": 8}, "must be a multiple of the minibatch"),
        ({"loss_type": "grpo"}, "loss_type='grpo' would change"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions"),
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"entropy_coef": 0.1}, "entropy_coef"),
        ({"ptx_coef": -1.0}, "ptx_coef must not be negative"),
        ({"ptx_ratio": 0}, "ptx_ratio must be at least 1"),
        ({"gae_lambda": 1.5}, "gae_lambda must be in"),
        ({"kl_estimator": "k9"}, "k9"),
    ],
)
def test_bad_values_are_refused_by_name(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **kwargs)


def test_more_than_one_answer_a_prompt_and_an_inner_epoch_more(tmp_path):
    args = config(tmp_path, num_generations=4, num_iterations=2, total_episodes=1024)
    assert args.num_generations == 4
    assert args.steps_per_iteration == 16
    assert args.max_steps == 32


@pytest.mark.parametrize("name", ["divergence_action", "kl_estimator", "beta", "value_clip", "num_iterations"])
def test_null_is_refused_where_it_leaves_out_no_limit(name, tmp_path):
    """As before any model is loaded: later it would be a KeyError in the middle of a run."""
    with pytest.raises(ValueError, match=f"{name} must .*got None"):
        PPOPtxConfig(str(tmp_path), **{name: None})
    assert PPOPtxConfig(str(tmp_path), kl_stop=None).kl_stop is None
