"""The paper's claim (section 3.5): comparisons shuffled into one pile overfit in one epoch, whole groups do not.

    python -m benchmarks.reward_groups
    python -m benchmarks.reward_groups --label_noise 1.0 --epochs 3

The same comparisons, two ways, both by RankingRewardTrainer from the same model:
    groups: a prompt with all its K completions is one element of a batch;
    pile:   every comparison is a row of its own (K = 2), shuffled over the whole dataset, so that a completion comes
            back K − 1 times an epoch, in different steps.
A step of both has the same number of comparisons on average, so an epoch has as many steps; weight, learning rate
(constant after 5 steps) and seeds are the same. Every `--eval_steps` steps held-out prompts and some of the training
prompts are judged, in groups for both. Prints tables by step, says what came out, and draws outputs/reward_groups.png.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import OUTPUTS, machine, mean_sd, quiet, table
from benchmarks.ranked_text import (
    RankedText,
    backbone,
    comparisons,
    judge,
    ranked_text,
    ranked_text_arguments,
    reward_model_arguments,
    settings,
)

METHODS = ("groups", "pile")
MEASURES = ("accuracy", "loss", "train accuracy", "train loss")
RISE = 0.01  # of held-out loss: what counts as overfitting
Curve = dict[int, dict[str, float]]  # step: measure: value


def train(method: str, seed: int, data: RankedText, args: argparse.Namespace) -> tuple[Curve, int, bool]:
    """One run: its curve, the steps of an epoch, and whether comparisons were weighted by 1 / pairs of a prompt."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from transformers.trainer_callback import PrinterCallback, TrainerCallback

    from instruct_trl import RankingRewardConfig, RankingRewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.backbone)
    seen = data.train[: args.train_judged]
    curve: Curve = {}

    def measure(model: Any, step: int) -> None:
        values = (*judge(model, tokenizer, data.test), *judge(model, tokenizer, seen))
        curve[step] = dict(zip(MEASURES, values, strict=True))

    class Judge(TrainerCallback):
        def on_step_end(self, *callback: Any, **kwargs: Any) -> None:
            state = callback[1]
            if state.global_step % args.eval_steps == 0 or state.global_step in (steps, steps * args.epochs):
                measure(kwargs["model"], state.global_step)

    pile = comparisons(data.train)
    rows, rows_a_step = data.train, args.prompts_per_step
    if method == "pile":
        rows, rows_a_step = pile, round(args.prompts_per_step * len(pile) / len(data.train))
    steps = -(-len(rows) // rows_a_step)
    with tempfile.TemporaryDirectory() as folder:
        config = RankingRewardConfig(
            folder,
            num_train_epochs=args.epochs,
            lr_scheduler_type="constant_with_warmup",
            **settings(args, rows_a_step, seed, args.learning_rate),
        )
        trainer: Any = RankingRewardTrainer(
            args.backbone,
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Judge()],
        )
        trainer.remove_callback(PrinterCallback)
        measure(trainer.model, 0)
        trainer.train()
    last = curve[max(curve)]
    print(
        f"# {method}, seed {seed}: {max(curve)} steps, {steps} an epoch; held-out accuracy {last['accuracy']:.3f}, "
        f"held-out loss {last['loss']:.3f}, loss on training prompts {last['train loss']:.3f}",
        flush=True,
    )
    return curve, steps, "weight" in trainer.train_dataset.column_names


def averages(curves: list[Curve], measure: str) -> dict[int, float]:
    """Mean over seeds at each step that every seed has."""
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: statistics.mean(curve[step][measure] for curve in curves) for step in common}


def report(curves: dict[str, list[Curve]], epoch_steps: int, data: RankedText, weighted: bool) -> None:
    header = ["step", "epoch"]
    header += [f"{measure}, {method}" for measure in MEASURES for method in METHODS]
    steps = sorted(set.intersection(*(set(curve) for runs in curves.values() for curve in runs)))
    rows = []
    for step in steps:
        cells = [mean_sd([c[step][measure] for c in curves[method]]) for measure in MEASURES for method in METHODS]
        rows.append([step, f"{step / epoch_steps:.2f}", *cells])
    print("\n" + data.source)
    print(
        f"{len(data.train)} prompts, {len(comparisons(data.train)):,} comparisons; {len(data.test)} prompts held out."
    )
    weight = "1 / pairs of its prompt in both" if weighted else "that in groups, and 1 in the pile (no weights here)"
    print(f"Weight of a comparison: {weight}. accuracy and loss: held-out prompts; mean ± sd over seeds.\n")
    print(table(header, rows) + "\n")
    for method in METHODS:
        losses, accuracies = averages(curves[method], "loss"), averages(curves[method], "accuracy")
        lowest, highest = min(losses, key=losses.__getitem__), max(accuracies, key=accuracies.__getitem__)
        first = [step for step in losses if step <= epoch_steps]
        dip = min(losses[step] for step in first)
        print(
            f"{method}: held-out loss {losses[lowest]:.3f} at its lowest, after {lowest / epoch_steps:.2f} epochs; "
            f"{losses[first[-1]]:.3f} at the end of epoch 1 ({losses[first[-1]] - dip:+.3f} over the lowest within "
            f"it), {losses[max(losses)]:.3f} at the end. Held-out accuracy {accuracies[highest]:.3f} at its highest, "
            f"after {highest / epoch_steps:.2f} epochs; {accuracies[first[-1]]:.3f} after epoch 1, "
            f"{accuracies[max(accuracies)]:.3f} at the end."
        )
    compare(curves, epoch_steps)


def compare(curves: dict[str, list[Curve]], epoch_steps: int) -> None:
    """Groups minus pile after one epoch and at the end, seed by seed, and what that says of the claim."""
    for name, limit in (("after epoch 1", epoch_steps), ("at the end", None)):
        gaps: dict[str, list[float]] = {"accuracy": [], "loss": []}
        for group, pile in zip(curves["groups"], curves["pile"], strict=True):
            step = max(s for s in set(group) & set(pile) if limit is None or s <= limit)
            for measure, values in gaps.items():
                values.append(group[step][measure] - pile[step][measure])
        print(f"Groups minus pile {name}: accuracy {mean_sd(gaps['accuracy'])}, loss {mean_sd(gaps['loss'])}.")
    rises = {method: [_rise(curve, epoch_steps) for curve in curves[method]] for method in METHODS}
    shown = {method: sum(rise > RISE for rise in rises[method]) for method in METHODS}
    seeds = len(rises["pile"])
    for method in METHODS:
        print(
            f"Held-out loss after epoch 1 over its lowest within it, {method}: {mean_sd(rises[method])}; more "
            f"than {RISE} in {shown[method]} of {seeds} seeds."
        )
    seen = shown["pile"] == seeds and shown["groups"] == 0
    print(
        "The paper's claim, that the pile overfits within one epoch and groups do not, is "
        f"{'seen' if seen else 'not seen, or not in every seed,'} on this text and model."
    )


def _rise(curve: Curve, epoch_steps: int) -> float:
    within = {step: values["loss"] for step, values in curve.items() if step <= epoch_steps}
    return within[max(within)] - min(within.values())


def draw(curves: dict[str, list[Curve]], epoch_steps: int, path: Path) -> None:
    """Held-out accuracy and loss by epoch: thin lines are seeds, thick ones their mean."""
    from matplotlib.figure import Figure

    from instruct_trl.report.pictures import LIGHT

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    colors = {"groups": LIGHT.subject, "pile": LIGHT.baseline}
    for axes, measure in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        for method, style in (("groups", "-"), ("pile", "--")):
            for curve in curves[method]:
                x = [step / epoch_steps for step in sorted(curve)]
                y = [curve[step][measure] for step in sorted(curve)]
                axes.plot(x, y, style, color=colors[method], linewidth=0.8, alpha=0.4)
            mean = averages(curves[method], measure)
            x = [step / epoch_steps for step in mean]
            axes.plot(x, list(mean.values()), style, color=colors[method], linewidth=2.2, label=method)
        axes.axvline(1, color=LIGHT.muted, linewidth=0.8, linestyle=":")
        axes.set_title(f"Held-out {'pair accuracy' if measure == 'accuracy' else 'loss'}", fontsize=10)
        axes.set_xlabel("epochs")
        axes.grid(color=LIGHT.grid)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"\nPicture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="constant after 5 steps (default: 3e-4)")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the comparisons (default: 2)")
    parser.add_argument("--eval_steps", type=int, default=5, help="steps between two judgings (default: 5)")
    parser.add_argument("--train_judged", type=int, default=40, help="training prompts that are judged (default: 40)")
    parser.add_argument("--picture", type=Path, default=OUTPUTS / "reward_groups.png")
    parser.add_argument("--prompts_per_step", type=int, default=8, help="prompts an optimizer step (default: 8)")
    reward_model_arguments(parser)
    ranked_text_arguments(parser, train=200, validation=0, test=120)
    args = parser.parse_args()
    quiet()
    data = ranked_text(args)
    print(data.source, flush=True)
    args.backbone = backbone(args)
    curves: dict[str, list[Curve]] = {method: [] for method in METHODS}
    epoch_steps, weighted = 1, False
    for seed in range(args.seeds):
        for method in METHODS:
            curve, steps, weighted = train(method, seed, data, args)
            epoch_steps = steps if method == "groups" else epoch_steps
            curves[method].append(curve)
    report(curves, epoch_steps, data, weighted)
    draw(curves, epoch_steps, args.picture)
    print(machine())


if __name__ == "__main__":
    main()
