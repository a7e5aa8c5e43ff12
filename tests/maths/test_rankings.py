"""Eq. 1 and its companions. Expected values are arithmetic written here, identities, or scipy's."""

import doctest
import math
from itertools import pairwise

import pytest
import torch

from instruct_trl.maths import rankings
from instruct_trl.maths.rankings import (
    dense_ranks,
    kendall_tau,
    pair_accuracy,
    pair_counts,
    preferred_pairs,
    ranking_loss,
    ranking_losses,
    ranking_metrics,
    tied_pairs,
)


def softplus(x):
    return math.log(1 + math.exp(x))  # −log σ(−x)


def ranked(*rows):
    return preferred_pairs(torch.tensor(rows))


def test_loss_is_the_mean_over_all_pairs():
    # best 1.0, then −0.5, then 2.0: the three pairs' −log σ(r_w − r_l)
    expected = (softplus(-1.5) + softplus(1.0) + softplus(2.5)) / 3
    loss = ranking_loss(torch.tensor([[1.0, -0.5, 2.0]]), ranked([1, 2, 3]))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_equal_rewards_give_log_two():
    assert ranking_loss(torch.full((2, 9), 3.0), ranked(range(9), range(9))).item() == pytest.approx(math.log(2))


def test_ties_are_left_out_of_the_mean():
    # the first two tie, so that two of three pairs remain
    expected = (softplus(2.0 - 1.0) + softplus(2.0 + 0.5)) / 2
    loss = ranking_loss(torch.tensor([[1.0, -0.5, 2.0]]), ranked([4, 4, 9]))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_mean_is_over_prompts_that_have_an_untied_pair():
    rewards = torch.tensor([[1.0, 0.0], [5.0, -5.0], [0.0, 2.0]])
    pairs = ranked([1, 2], [1, 1], [1, 2])
    losses, counted = ranking_losses(rewards, pairs)
    assert losses.tolist() == pytest.approx([softplus(-1.0), 0.0, softplus(2.0)], rel=1e-6)
    assert counted.tolist() == [True, False, True]
    assert ranking_loss(rewards, pairs).item() == pytest.approx((softplus(-1.0) + softplus(2.0)) / 2, rel=1e-6)


def test_loss_ignores_an_added_constant():
    rewards = torch.randn(4, 5, dtype=torch.float64)
    pairs = preferred_pairs(torch.randint(1, 4, (4, 5)))
    shifted = rewards + torch.tensor([[3.0], [-7.0], [100.0], [0.1]], dtype=torch.float64)
    torch.testing.assert_close(ranking_loss(shifted, pairs), ranking_loss(rewards, pairs))


def test_only_the_order_of_ranks_counts():
    ranks = torch.tensor([[1, 2, 2, 3], [4, 1, 2, 3], [1, 1, 2, 2]])
    assert torch.equal(preferred_pairs(ranks), preferred_pairs(10 * ranks - 100))
    assert torch.equal(tied_pairs(ranks), tied_pairs(10 * ranks - 100))


def test_masked_equals_sliced():
    rewards, ranks = torch.randn(3, 6, dtype=torch.float64), torch.randint(1, 5, (3, 6))
    sizes = [2, 6, 4]
    mask = torch.arange(6) < torch.tensor(sizes).unsqueeze(1)
    garbage = torch.where(mask, rewards, torch.full_like(rewards, float("nan")))
    pairs, ties = preferred_pairs(ranks, mask), tied_pairs(ranks, mask)
    losses, counted = ranking_losses(garbage, pairs)
    tau = kendall_tau(garbage, pairs, ties)
    for row, size in enumerate(sizes):
        own = rewards[row, :size], preferred_pairs(ranks[row, :size])
        sliced, sliced_counted = ranking_losses(*own)
        torch.testing.assert_close(losses[row], sliced)
        assert counted[row] == sliced_counted
        torch.testing.assert_close(tau[row], kendall_tau(*own, tied_pairs(ranks[row, :size])))
        assert dense_ranks(ranks, mask)[row, :size].tolist() == dense_ranks(ranks[row, :size]).tolist()


def test_leading_axes_are_batch():
    rewards, pairs = torch.randn(2, 3, 4), preferred_pairs(torch.randint(1, 4, (2, 3, 4)))
    flat, _ = ranking_losses(rewards.view(6, 4), pairs.view(6, 4, 4))
    torch.testing.assert_close(ranking_losses(rewards, pairs)[0].view(6), flat)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 0.0])
def test_gradient_is_never_nan(value):
    rewards = torch.tensor([[1.0, 2.0, value], [1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True], [True, True, True]])
    pairs = preferred_pairs(torch.tensor([[1, 2, 3], [3, 1, 2], [5, 5, 5]]), mask)
    margins = torch.where(pairs, 0.5, value)  # what stands at a place without a pair is not read
    ranking_loss(rewards, pairs, margins=margins, center_coefficient=0.01).backward()
    assert torch.isfinite(rewards.grad).all()
    assert rewards.grad[0, 2] == 0
    assert (rewards.grad[2] == 0).all()


def test_all_masked_is_zero_with_a_gradient():
    rewards = torch.randn(2, 3, requires_grad=True)
    loss = ranking_loss(rewards, torch.zeros(2, 3, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert (rewards.grad == 0).all()


def test_gradient_pushes_winner_up_and_sums_to_zero():
    rewards = torch.zeros(1, 2, requires_grad=True)
    ranking_loss(rewards, ranked([2, 1])).backward()
    assert rewards.grad[0].tolist() == pytest.approx([0.5, -0.5])  # −σ(0) on the winner


def test_center_coefficient_adds_the_squared_sums():
    rewards = torch.tensor([[1.0, 0.5]])
    with_center, _ = ranking_losses(rewards, ranked([1, 2]), center_coefficient=0.1)
    assert with_center.item() == pytest.approx(softplus(-0.5) + 0.1 * 1.5**2, rel=1e-6)


def test_half_precision_is_computed_in_float32():
    rewards = torch.tensor([[2.0, 0.5]], dtype=torch.bfloat16)
    assert ranking_loss(rewards, ranked([1, 2])).item() == pytest.approx(softplus(-1.5), rel=1e-6)


def test_pair_accuracy_is_over_pairs_not_prompts():
    # prompt 1: all 3 pairs right; prompt 2: its single pair wrong: 3 of 4
    rewards = torch.tensor([[3.0, 2.0, 1.0], [0.0, 1.0, 9.0]])
    ranks = torch.tensor([[1, 2, 3], [1, 2, 3]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    pairs = preferred_pairs(ranks, mask)
    assert pair_accuracy(rewards, pairs).item() == 0.75
    correct, total = pair_counts(rewards, pairs)
    assert (correct.tolist(), total.tolist()) == ([3, 0], [3, 1])


def test_equal_rewards_order_no_pair():
    assert pair_accuracy(torch.zeros(1, 4), ranked([1, 2, 3, 4])).item() == 0


def test_kendall_tau_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 6, (50, 7), generator=generator).double()
    ranks = torch.randint(1, 5, (50, 7), generator=generator)
    ours = kendall_tau(rewards, preferred_pairs(ranks), tied_pairs(ranks))
    for row in range(50):
        expected = stats.kendalltau(-rewards[row].numpy(), ranks[row].numpy()).statistic
        assert ours[row].item() == pytest.approx(expected, abs=1e-12)


def test_kendall_tau_extremes():
    pairs = ranked([1, 2, 3, 4])
    assert kendall_tau(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), pairs).item() == 1
    assert kendall_tau(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), pairs).item() == -1
    assert kendall_tau(torch.zeros(1, 4), pairs).item() == 0


def test_dense_ranks_keep_the_order_and_the_ties():
    ranks = torch.tensor([[40, 7, 7, -3, 40]])
    dense = dense_ranks(ranks)
    assert dense.tolist() == [[3, 2, 2, 1, 3]]
    assert torch.equal(preferred_pairs(dense), preferred_pairs(ranks))
    distinct = sorted(set(dense[0].tolist()))
    assert all(after - before == 1 for before, after in pairwise(distinct))


def test_metrics_over_ragged_prompts():
    rewards = torch.tensor([[2.0, 1.0, 0.0], [1.0, 5.0, 0.0], [4.0, 6.0, 0.0]])
    ranks = torch.tensor([[1, 1, 2], [1, 2, 0], [3, 3, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, False]])
    metrics = ranking_metrics(rewards, preferred_pairs(ranks, mask), ranks, mask)
    assert metrics["loss"] == pytest.approx(((softplus(-2.0) + softplus(-1.0)) / 2 + softplus(4.0)) / 2, rel=1e-6)
    assert metrics["pair_accuracy"] == pytest.approx(2 / 3)
    # τ-b of prompt 1: 2 concordant, 2 pairs untied in ranks, 3 in rewards; of prompt 2: −1; prompt 3 has none
    assert metrics["kendall_tau"] == pytest.approx((2 / math.sqrt(6) - 1) / 2)
    assert metrics["mean_score_rank_1"] == pytest.approx((2 + 1 + 1 + 4 + 6) / 5)
    assert metrics["mean_score_rank_2"] == pytest.approx((0 + 5) / 2)
    assert (metrics["tied_pairs"], metrics["tied_prompts"]) == (2, 1)


def test_shapes_that_do_not_fit_are_refused():
    rewards, pairs = torch.zeros(1, 3), ranked([1, 2, 3])
    with pytest.raises(ValueError, match=r"pairs \(1, 3\) do not fit rewards \(1, 3\).*preferred_pairs"):
        ranking_loss(rewards, torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"mask \(3,\) does not fit ranks \(1, 3\)"):
        preferred_pairs(torch.ones(1, 3), torch.ones(3))
    with pytest.raises(ValueError, match=r"margins \(1, 3\) do not fit pairs \(1, 3, 3\)"):
        ranking_loss(rewards, pairs, margins=torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"weights \(3,\) do not fit \(1,\): give one per prompt"):
        ranking_loss(rewards, pairs, weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"ties \(3, 3\) do not fit"):
        kendall_tau(rewards, pairs, pairs[0])


def test_doctests_hold():
    assert doctest.testmod(rankings, extraglobs={"torch": torch}).failed == 0


def test_ranks_apart_counts_dense_ranks_so_that_gaps_and_ties_do_not_matter():
    assert rankings.ranks_apart(torch.tensor([7, 3, 7, 9])).tolist()[1] == [1, 0, 1, 2]
