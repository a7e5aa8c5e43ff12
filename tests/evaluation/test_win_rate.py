"""Win rates and intervals against SciPy and closed forms."""

import numpy as np
import pytest
from scipy import stats

from instruct_trl.evaluation.estimates import bootstrap_interval, wilson_interval
from instruct_trl.evaluation.win_rate import paired_difference, win_rate, win_rate_lead


@pytest.mark.parametrize(("wins", "n"), [(0, 7), (1, 7), (7, 7), (63, 100), (161, 256), (9_999, 20_000)])
def test_wilson_equals_scipy(wins, n):
    expected = stats.binomtest(wins, n).proportion_ci(method="wilson")
    assert wilson_interval(wins, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_win_rate_without_ties_equals_scipy():
    rng = np.random.default_rng(3)
    scores, baseline = rng.normal(0.4, 1, 120), rng.normal(0, 1, 120)
    result = win_rate(scores.tolist(), baseline.tolist())
    expected = stats.binomtest(int((scores > baseline).sum()), 120).proportion_ci(method="wilson")
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_ties_count_half():
    # Differences: +1, 0, -1, 0, +2, 0: two wins, three ties, one loss, so (2 + 3/2) / 6.
    result = win_rate([1, 5, 0, 2, 3, 4], [0, 5, 1, 2, 1, 4])
    assert (result.wins, result.ties, result.losses, result.rows) == (2, 3, 1, 6)
    assert result.mean == 3.5 / 6
    # Two ties are worth one win and one loss.
    won_and_lost = win_rate([1, 0], [0, 1])
    tied = win_rate([0, 0], [0, 0])
    assert (tied.mean, tied.low, tied.high) == (won_and_lost.mean, won_and_lost.low, won_and_lost.high)


def test_swapping_the_models_mirrors_the_result():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 50).tolist(), rng.integers(0, 4, 50).tolist()
    forth, back = win_rate(a, b), win_rate(b, a)
    assert (forth.wins, forth.ties, forth.losses) == (back.losses, back.ties, back.wins)
    assert forth.ties > 0
    assert (forth.mean, forth.low, forth.high) == pytest.approx((1 - back.mean, 1 - back.high, 1 - back.low))


def test_wilson_with_half_ties_is_no_narrower_than_needed():
    """With ties the true 95 % coverage is at least what it promises, over 2,000 simulated evaluations."""
    rng = np.random.default_rng(1)
    truth = 0.35 + 0.4 / 2
    outcomes = rng.choice([1.0, 0.0, -1.0], p=[0.35, 0.4, 0.25], size=(2_000, 60))
    results = [win_rate(row.tolist(), [0.0] * 60) for row in outcomes]
    covered = np.mean([result.low <= truth <= result.high for result in results])
    assert covered >= 0.95


@pytest.mark.parametrize(
    ("wins", "losses", "verdict"), [(70, 30, "above"), (30, 70, "below"), (55, 45, "unclear"), (50, 50, "unclear")]
)
def test_verdict(wins, losses, verdict):
    # SciPy's Wilson intervals: 70/100 → 0.604 to 0.781; 55/100 → 0.452 to 0.644.
    assert win_rate([1] * wins + [0] * losses, [0] * wins + [1] * losses).verdict == verdict


def test_bootstrap_in_blocks_is_the_whole_bootstrap():
    """Many values force several blocks of draws; the interval is still the normal one, to a few per cent."""
    values = np.random.default_rng(2).normal(1.0, 3.0, 5_000)
    result = bootstrap_interval(values.tolist(), n_boot=1_000)
    expected = stats.norm.interval(0.95, loc=values.mean(), scale=values.std() / np.sqrt(len(values)))
    width = expected[1] - expected[0]
    assert (result.low, result.high) == pytest.approx(expected, abs=0.08 * width)


def test_bootstrap_of_a_ratio_has_the_ratios_standard_error():
    """Cochran's (1977, section 6.4), by which a normal interval over 400 prompts is right to a few per cent."""
    rng = np.random.default_rng(8)
    pairs = rng.integers(1, 37, 400)
    hits = rng.binomial(pairs, rng.beta(3, 2, 400))
    ours, ratio = bootstrap_interval(hits, pairs), hits.sum() / pairs.sum()
    error = np.sqrt(400 * ((hits - ratio * pairs) ** 2).sum() / 399) / pairs.sum()
    assert (ours.low, ours.high) == pytest.approx(stats.norm.interval(0.95, ratio, error), abs=0.15 * error)
    assert (ours.mean, ours.n) == (ratio, 400)


def test_ratio_needs_a_denominator_each():
    with pytest.raises(ValueError, match="one denominator above 0"):
        bootstrap_interval([1.0, 0.0], [2.0, 0.0])
    with pytest.raises(ValueError, match="one denominator above 0"):
        bootstrap_interval([1.0, 0.0], [2.0])


def test_bootstrap_seed_and_confidence():
    values = [0.0, 1.0, 4.0, 9.0, 16.0, 25.0]
    assert bootstrap_interval(values, seed=7) == bootstrap_interval(values, seed=7)
    assert bootstrap_interval(values, seed=7) != bootstrap_interval(values, seed=8)
    narrow, wide = bootstrap_interval(values, confidence=0.5), bootstrap_interval(values, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_pairing_removes_what_the_prompts_share():
    baseline = np.random.default_rng(4).normal(0, 100, 30)
    result = bootstrap_interval(paired_difference(baseline + 0.125, baseline))
    assert (result.mean, result.low, result.high) == pytest.approx((0.125, 0.125, 0.125))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: win_rate([1.0], [1.0, 2.0]), "scores has 1 entries and baseline_scores 2"),
        (lambda: win_rate([], []), "at least one prompt"),
        (lambda: win_rate([1.0, float("nan")], [0.0, 0.0]), r"scores\[1\] is nan"),
        (lambda: win_rate([1.0, 0.0], [float("inf"), 0.0]), r"baseline_scores\[0\] is inf"),
        (lambda: wilson_interval(3, 2), "between 0 and n"),
        (lambda: bootstrap_interval([1.0]), "at least 2 values"),
        (lambda: bootstrap_interval([1.0, 2.0], n_boot=0), "n_boot"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_lead_is_the_difference_of_two_win_rates_and_its_interval_knows_that_they_are_paired():
    rng = np.random.default_rng(0)
    base, luck = rng.normal(size=400), rng.normal(size=400)
    other = luck + 0.1 * rng.normal(size=400)
    better = other + 0.3
    lead, rates = win_rate_lead(better, other, base), [win_rate(s, base) for s in (better, other)]
    assert lead.mean == pytest.approx(rates[0].mean - rates[1].mean)
    assert lead.side_of(0) == "above"
    assert lead.high - lead.low < rates[0].high - rates[0].low  # the two win and lose the same prompts
    assert win_rate_lead(other, better, base).mean == -lead.mean
    assert win_rate_lead(other, other, base).mean == 0


def test_ties_count_half_in_a_lead():
    # Against 0: a win, a tie, a loss make 1, 1/2, 0. Differences: 1 − 1/2, 1/2 − 0, 0 − 1.
    assert win_rate_lead([1, 0, -1], [0, -1, 1], [0, 0, 0]).mean == 0
    assert win_rate_lead([1, 0, 0], [0, -1, 0], [0, 0, 0]).mean == pytest.approx(1 / 3)
