"""Identities and closed forms of the PPO-ptx maths; no expected value re-types the code under test."""

import itertools
import math

import pytest
import torch

from instruct_trl.maths.masking import masked_mean, masked_var, masked_whiten
from instruct_trl.maths.objectives import clipped_policy_loss, clipped_value_loss, explained_variance, ppo_ptx_loss
from instruct_trl.maths.returns import generalized_advantages, kl_estimate, token_rewards

LENGTHS = [5, 3, 1]
MASK = torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_masked_reductions_equal_the_sliced_ones():
    x = random(3, 5)
    real = torch.cat([x[i, :n] for i, n in enumerate(LENGTHS)])
    torch.testing.assert_close(masked_mean(x, MASK), real.mean())
    torch.testing.assert_close(masked_var(x, MASK), real.var(unbiased=False))
    torch.testing.assert_close(
        masked_mean(x, MASK, dim=1), torch.stack([x[i, :n].mean() for i, n in enumerate(LENGTHS)])
    )


def test_whitened_has_mean_0_variance_1_and_0_elsewhere():
    white = masked_whiten(random(3, 5) * 7 + 3, MASK)
    assert masked_mean(white, MASK).abs() < 1e-12
    assert abs(masked_var(white, MASK) - 1) < 1e-6
    assert (white[~MASK] == 0).all()


def test_all_masked_is_0_and_not_nan():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert masked_mean(random(2, 3), nothing) == 0
    assert (masked_whiten(random(2, 3), nothing) == 0).all()


def test_rewards_put_the_score_on_the_last_token_and_sum_to_score_minus_beta_kl():
    kl = random(3, 5)
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0]).double(), kl, MASK, beta=0.02)
    for i, (n, score) in enumerate(zip(LENGTHS, [1.0, 2.0, 3.0], strict=True)):
        assert rewards[i].sum().item() == pytest.approx(score - 0.02 * kl[i, :n].sum().item())
        assert rewards[i, n - 1].item() == pytest.approx(score - 0.02 * kl[i, n - 1].item())
        assert (rewards[i, n:] == 0).all()


def test_rewards_refuse_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit"):
        token_rewards(torch.zeros(2), torch.zeros(3, 5), MASK, 0.1)


def test_gae_with_lambda_0_is_the_td_error():
    rewards, values = random(3, 5) * MASK, random(3, 5, seed=1)
    advantages, _ = generalized_advantages(rewards, values, MASK, discount=0.9, gae_lambda=0.0)
    # Row 1 has 3 tokens: two ordinary TD errors, then one against a terminal value of 0.
    v, r = values[1].tolist(), rewards[1].tolist()
    expected = [r[0] + 0.9 * v[1] - v[0], r[1] + 0.9 * v[2] - v[1], r[2] - v[2]]
    assert advantages[1, :3].tolist() == pytest.approx(expected)
    assert (advantages[~MASK] == 0).all()


def test_gae_undiscounted_with_lambda_1_is_reward_to_go_minus_value():
    rewards, values = random(3, 5) * MASK, random(3, 5, seed=1)
    advantages, returns = generalized_advantages(rewards, values, MASK, discount=1.0, gae_lambda=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, (to_go - values) * MASK)
    torch.testing.assert_close(returns, to_go * MASK)


@pytest.mark.parametrize(("discount", "lam"), itertools.product([1.0, 0.9], [0.0, 0.5, 0.95, 1.0]))
def test_gae_of_a_terminal_score_under_a_constant_value_is_a_geometric_sum(discount, lam):
    value, score, n = 0.3, 2.0, 5
    rewards = torch.zeros(1, n, dtype=torch.float64)
    rewards[0, -1] = score
    mask = torch.ones(1, n, dtype=torch.bool)
    advantages, _ = generalized_advantages(rewards, torch.full((1, n), value).double(), mask, discount, lam)
    for t in range(n):
        inner = sum((discount * lam) ** k for k in range(n - 1 - t)) * (discount - 1) * value
        expected = inner + (discount * lam) ** (n - 1 - t) * (score - value)
        assert advantages[0, t].item() == pytest.approx(expected)


def test_padding_never_leaks_into_gae():
    rewards, values = random(3, 5) * MASK, random(3, 5, seed=1)
    garbage = values.masked_fill(~MASK, 1e6)
    for a, b in zip(
        generalized_advantages(rewards, values, MASK), generalized_advantages(rewards, garbage, MASK), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_kl_estimators_against_the_exact_divergence():
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    exact = torch.nn.functional.kl_div(q.log(), p, reduction="sum")
    for name in ("k1", "k3"):  # both unbiased: the expectation under p is exact
        assert (p * kl_estimate(p.log(), q.log(), name)).sum().item() == pytest.approx(exact.item())
    assert (p * kl_estimate(p.log(), q.log(), "k2")).sum().item() == pytest.approx(exact.item(), rel=0.05)
    assert (kl_estimate(p.log(), q.log(), "k3") >= 0).all()
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(p, q, "k4")


def test_at_ratio_1_the_gradient_is_the_plain_policy_gradient():
    logps = random(3, 5).requires_grad_()
    advantages = random(3, 5, seed=2)
    loss, ratio = clipped_policy_loss(logps, logps.detach(), advantages, 0.2, 0.2)
    loss.sum().backward()
    assert (ratio == 1).all()
    torch.testing.assert_close(logps.grad, -advantages)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [(1.5, 1.0, -1.2, 0.0), (0.5, 1.0, -0.5, -0.5), (0.5, -1.0, 0.8, 0.0), (1.5, -1.0, 1.5, 1.5)],
)
def test_the_clip_cuts_only_what_would_gain(ratio, advantage, loss, gradient):
    logps = torch.tensor([[math.log(ratio)]], requires_grad=True)
    out, _ = clipped_policy_loss(logps, torch.zeros(1, 1), torch.tensor([[advantage]]), 0.2, 0.2)
    out.sum().backward()
    assert out.item() == pytest.approx(loss)
    assert logps.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_value_loss_is_half_the_squared_error_inside_the_clip_and_pessimistic_outside():
    old, returns = torch.zeros(1), torch.ones(1)
    assert clipped_value_loss(torch.tensor([0.1]), old, returns, 0.2).item() == pytest.approx(0.5 * 0.9**2)
    assert clipped_value_loss(torch.tensor([0.9]), old, returns, 0.2).item() == pytest.approx(0.5 * 0.8**2)


def test_eq_2_is_linear_and_plain_ppo_without_gamma():
    ppo, ptx = torch.tensor(2.0), torch.tensor(3.0)
    assert ppo_ptx_loss(ppo, ptx, 0.0) == ppo
    assert ppo_ptx_loss(ppo, ptx, 27.8).item() == pytest.approx(2.0 + 83.4)


def test_explained_variance_of_a_perfect_and_of_a_constant_critic():
    returns = random(3, 5)
    assert explained_variance(returns, returns, MASK).item() == pytest.approx(1)
    assert explained_variance(torch.ones(3, 5).double(), returns, MASK).item() == pytest.approx(0)
