"""The learning curve: nested subsets of prompts, a line whose slope is known, and its interval over prompts."""

import numpy as np
import pytest

from instruct_trl.evaluation.learning_curve import learning_curve, nested_subsets
from instruct_trl.report.findings_reward import twice

PROMPTS = [f"prompt {row % 40}" for row in range(100)]  # 20 prompts have three rows, 20 have two


def test_subsets_are_nested_hold_whole_prompts_and_follow_the_seed():
    subsets = nested_subsets(PROMPTS, [1.0, 0.25, 0.5])
    assert list(subsets) == [0.25, 0.5, 1.0]
    names = {fraction: {PROMPTS[row] for row in rows} for fraction, rows in subsets.items()}
    assert [len(chosen) for chosen in names.values()] == [10, 20, 40]
    assert names[0.25] < names[0.5] < names[1.0]
    for fraction, rows in subsets.items():
        assert rows == [row for row, prompt in enumerate(PROMPTS) if prompt in names[fraction]]
    assert nested_subsets(PROMPTS, [0.25]) == {0.25: subsets[0.25]}  # whatever else is asked for
    assert nested_subsets(PROMPTS, [0.25], seed=1) != {0.25: subsets[0.25]}


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ([0.0, 0.5], r"--learning_curve 0: give shares .* above 0 and at most 1"),
        ([0.5, 1.5], r"--learning_curve 1.5: give shares"),
        ([0.5, 0.5], r"--learning_curve 0.5 is given twice"),
        ([0.1, 1.0], r"--learning_curve 0.1 of 40 training prompts is 4 of them.* 10 or more"),
        ([0.5, 0.501], r"0.5 and 0.501 are both 20 of 40 training prompts"),
    ],
)
def test_bad_fractions_are_refused(fractions, message):
    with pytest.raises(ValueError, match=message):
        nested_subsets(PROMPTS, fractions)


def records(right, n=200):
    """`n` prompts of one pair, of which the model orders the first `right`."""
    return [
        {"rewards": [1.0, 0.0] if number < right else [0.0, 1.0], "pairs": [[0, 1]], "prompt_key": str(number)}
        for number in range(n)
    ]


def test_a_line_is_found_with_its_slope():
    """60, 65 and 70 % with 50, 100 and 200 prompts: 5 points per doubling."""
    found = learning_curve({0.25: 50, 0.5: 100, 1.0: 200}, {0.25: records(120), 0.5: records(130), 1.0: records(140)})
    assert [point["pair_accuracy"]["mean"] for point in found["points"]] == [0.6, 0.65, 0.7]
    gain = found["per_doubling"]
    assert gain["mean"] == pytest.approx(0.05)
    # The slope is (last − first) / 2: ½ on 20 of 200 prompts, 0 on the others. Its standard error is
    # √(0.1 · ¼ − 0.05²) / √200 = 0.0106.
    assert (gain["high"] - gain["low"]) / 2 == pytest.approx(1.96 * 0.0106, rel=0.1)
    text = twice(found).replace("\u00a0", " ")
    assert text.startswith("Twice the labels (400 prompts) would bring +5.0 points (95 % interval +")
    assert text.endswith("from about 70 % of pairs to about 75 %.")


def test_noise_promises_nothing_and_two_points_are_no_line():
    rng = np.random.default_rng(0)
    noisy = {
        fraction: [{**row, "rewards": rng.normal(size=2).tolist()} for row in records(0)] for fraction in (0.25, 0.5, 1)
    }
    found = learning_curve({0.25: 50, 0.5: 100, 1: 200}, noisy)
    assert found["per_doubling"]["low"] < 0 < found["per_doubling"]["high"]
    assert "is open" in twice(found)
    found = learning_curve({0.5: 100, 1.0: 200}, {0.5: records(120), 1.0: records(140)})
    assert found["per_doubling"] is None
    assert "takes a line through 3 shares" in twice(found)


def test_a_curve_that_falls_is_said():
    found = learning_curve({0.25: 50, 0.5: 100, 1.0: 200}, {0.25: records(190), 0.5: records(150), 1.0: records(110)})
    assert twice(found).startswith("More labels made it worse")


def test_other_pairs_make_no_curve():
    with pytest.raises(ValueError, match="not asked about the same held-out pairs"):
        learning_curve({0.5: 100, 1.0: 200}, {0.5: records(120, 150), 1.0: records(140)})
