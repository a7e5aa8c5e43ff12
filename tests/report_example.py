"""A made-up finished run for the tests of the report."""

from instruct_trl.evaluation.estimates import Estimate
from instruct_trl.evaluation.win_rate import win_rate
from instruct_trl.report import pictures
from instruct_trl.report.data import ModelResult, ReportData, Sample

pictures.DPI = 40  # drawing takes most of the time of these tests

NASTY = 'a <script>alert("1")</script> | b `c` *d* _e_ [f](http://x.y) &amp; <br> # g $h$ ~~i~~ \\| 1. j'


def win_of(wins, losses, ties=0):
    """The win rate of so many wins, losses and ties."""
    return win_rate([1.0] * wins + [0.0] * (losses + ties), [0.0] * wins + [1.0] * losses + [0.0] * ties)


def estimate(mean, half):
    """An estimate as JSON has it, with an interval of `half` to each side."""
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 130}


def task(mean, change=None):
    """A row of `benchmarks.task_table` whose interval is 0.03 to each side, that of the change 0.02."""
    row = {"metric": "acc", "mean": mean, "low": mean - 0.03, "high": mean + 0.03, "n": 1000}
    if change is not None:
        row["change"] = {"mean": change, "low": change - 0.02, "high": change + 0.02, "n": 1000}
    return row


def training_rows():
    """What a run of 30 logged steps wrote; each call makes its own, which a test may change."""
    return [
        {
            "step": 4 * i,
            "episodes": 64 * i,
            "kl": 0.25 * i,
            "score": 0.1 * i + 0.02 * (-1) ** i,
            "labeler_score": 0.05 * i + 0.02 * (-1) ** i,
            "ptx_loss": 3.0 + 0.01 * (-1) ** i,
            "value_loss": 60.0 if i == 1 else 1.0 / i,
            "explained_variance": -9.0 if i == 1 else 0.5,
        }
        for i in range(1, 31)
    ]


def example_models(win):
    """base, SFT and PPO-ptx with all figures that a model can have; `win` replaces PPO-ptx's."""
    return [
        ModelResult(
            "base",
            win_of(60, 190, 6),
            labeler=Estimate(-0.5, -0.6, -0.4, 250),
            pretraining_loss=Estimate(3.412, 3.4, 3.42, 100),
            tasks={"boolq": task(0.6), "hellaswag": task(0.32), "squad": task(0.2)},
        ),
        ModelResult(
            "SFT",
            None,
            labeler=Estimate(0.0, None, None, 1),
            kl=0.0,
            pretraining_loss=Estimate(3.458, 3.45, 3.47, 100),
            mean_length=24.0,
            distinct_2=0.86,
            opening=("it is a", 0.05),
            tasks={"boolq": task(0.58, -0.02)},
        ),
        ModelResult(
            "PPO-ptx",
            win or win_of(160, 90, 6),
            reward=Estimate(1.25, 1.1, 1.4, 250),
            kl=7.5,
            pretraining_loss=Estimate(3.47, 3.46, 3.48, 100),
            mean_length=48.0,
            distinct_2=0.3,
            opening=("a very fun", 0.4),
            favourite=("very", 0.9, 0.2),
            length_correlation=-0.2,
            like_length=win_of(52, 48),
            tasks={"boolq": task(0.55, -0.05), "hellaswag": task(0.36, 0.04), "squad": task(0.2, -0.001)},
        ),
    ]


def example_report(win=None, **changes):
    """base, SFT and PPO-ptx with every part of the report; `win` replaces PPO-ptx's, `changes` any field."""
    training = training_rows()
    fields = {
        "run_name": "demo",
        "models": example_models(win),
        "judged": [
            {"judge": "judge-1", "model": "PPO-ptx", "baseline": "SFT", "mean": 0.4, "low": 0.34, "high": 0.46}
            | {"wins": 90, "ties": 20, "losses": 140, "n": 250, "invalid": 6, "flipped": 17},
            {"judge": "3 people", "model": "PPO-ptx", "baseline": "SFT", "mean": None, "low": None, "high": None}
            | {"wins": None, "ties": None, "losses": None, "n": None, "invalid": 3, "flipped": 0},
        ],
        "ratings": [
            {"judge": "judge-1", "model": name, "question": question, "mean": mean, "low": mean / 2, "high": mean * 1.1}
            | {"n": 250, "not_applicable": 4, "invalid": 2}
            for name in ("SFT", "PPO-ptx")
            for question, mean in (("hallucination", 0.31), ("quality", 4.0))
        ],
        "judge_notes": ["judge-1: 1,024 requests now."],
        "runs": {"PPO": [{**row, "kl": 2 * row["kl"]} for row in training]},
        "checkpoints": [
            {"step": 40 * i, "checkpoint": f"checkpoint-{40 * i}", "labeler_score": estimate(s, 0.1), "score": i}
            | ({"behind_best": estimate(0.5, 0.2)} if i == 3 else {})
            for i, s in enumerate([0.2, 0.9, 0.4], 1)
        ],
        "labeler": "a word list",
        "training": [*training, {"train_runtime": 3.0, "step": 120}],
        "reward_model": {
            "pair_accuracy": {"mean": 0.713, "low": 0.68, "high": 0.744, "n": 130, "n_pairs": 1204},
            "kendall_tau": estimate(0.43, 0.05),
            "by_rank_distance": {
                "1": {"mean": 0.62, "low": None, "high": None, "n": 9, "n_pairs": 300},
                "2": {"mean": 0.86, "low": 0.81, "high": 0.9, "n": 120, "n_pairs": 904},
            },
        },
        "samples": [Sample("Prompt " + NASTY, {"base": NASTY, "SFT": "line one\n\nline two"}, {"base": -0.25})],
        "settings": {"PPO-ptx": {"beta": 0.02}, "seed": 1},
        "deviations": ["Rollout batch 64, not 512."],
        "timings": {"SFT": 182.0, "PPO-ptx": 546.0},
        "notes": ["A note with <b>."],
        "command": "accelerate launch recipes/ppo_ptx.py",
        "environment": {"torch": "2.13.0"},
    }
    return ReportData(**{**fields, **changes})
