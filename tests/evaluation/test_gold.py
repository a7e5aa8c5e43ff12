"""A turning point is a clear fall and not noise, and a series moved only where it went further than its noise."""

import numpy as np
import pytest

from instruct_trl.evaluation.gold import best_checkpoint, direction, path_means, turning_point


def noisy(levels, seed=0):
    return (np.asarray(levels) + np.random.default_rng(seed).normal(0, 0.3, len(levels))).tolist()


def test_a_turning_point_is_found_where_gold_rises_and_falls():
    up_and_down = np.concatenate([np.linspace(0, 4, 60), np.linspace(4, 1, 60)])
    rising = np.linspace(0, 5, 120)
    turn = turning_point(noisy(up_and_down), noisy(rising, 1))
    assert 50 <= turn.index <= 72
    assert turn.gold == pytest.approx(4.0, abs=0.4)
    assert turn.last == pytest.approx(1.1, abs=0.4)
    assert turn.proxy_rose
    assert not turning_point(noisy(up_and_down), noisy(up_and_down, 1)).proxy_rose
    assert turning_point(noisy(rising), noisy(rising, 1)) is None
    assert turning_point([1.0] * 20, [1.0] * 20) is None


def test_noise_alone_has_seldom_a_turning_point():
    """Whatever peak noise has, other noise judges it: at most about one run in twenty is called a fall."""
    found = sum(turning_point(noisy([0.0] * 120, seed), [0.0] * 120) is not None for seed in range(200))
    assert found <= 14


def test_the_best_checkpoint_is_the_first_of_the_highest():
    rows = [{"step": i, "labeler_score": s and {"mean": s}} for i, s in enumerate([0.1, 0.9, 0.9, None])]
    assert best_checkpoint(rows)["step"] == 1
    with pytest.raises(ValueError, match="No checkpoint has a labeler's score"):
        best_checkpoint(rows[3:])


def test_direction_of_a_noisy_series():
    noise = [0.0, 1.0, -1.0] * 10
    # Of the 29 differences of neighbours 20 are 1 and 9 are 2: σ = 1.483/√2 = 1.0486. Six values an end have median 0:
    # two standard errors are 2 · 1.253 · 1.0486 · √(2/6) = 1.5172.
    shifted = lambda step: [*noise[:-6], *(v + step for v in noise[-6:])]  # noqa: E731
    assert direction(shifted(1.53)) == "rose"
    assert direction(shifted(-1.53)) == "fell"
    assert direction(shifted(1.50)) == "did not clearly move"
    assert direction([1.0, 2.0, 3.0] * 4) == ""
    # One wild step does not hide a clear change.
    assert direction([1e6, *shifted(5)[1:]]) == "rose"


@pytest.mark.parametrize("n", [15, 19, 24, 30, 45, 60])
def test_direction_calls_noise_a_move_in_one_series_of_twenty(n):
    """Two standard errors: 4.6 % for normal noise; medians of 3 to 12 values and 1,000 series come near it."""
    noise = np.random.default_rng(n).normal(size=(1000, n))
    false = np.mean([direction(row.tolist()) != "did not clearly move" for row in noise])
    assert 0.02 <= false <= 0.08
    trend = noise + np.linspace(0, 4, n)
    assert np.mean([direction(row.tolist()) == "rose" for row in trend]) > 0.8


def test_path_means_keep_the_mean_and_the_order():
    # 6 values in 4 groups: edges 0, 1, 3, 4, 6.
    assert path_means([1, 2, 4, 8, 16, 32], points=4) == [1, 3, 8, 24]
    assert path_means([5.0], points=16) == [5.0]
