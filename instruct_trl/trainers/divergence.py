"""Guards that skip an optimizer step, or stop a PPO run, before its weights are spoilt.

`DivergenceGuard` is plain arithmetic on metrics. `DivergenceMonitor` feeds it from a trainer and obeys it.
None of this is in the paper. With the defaults only a step whose loss or gradient is not finite is touched.
"""

from __future__ import annotations

import json
import logging
import math
import operator
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from instruct_trl.trainers.checkpoints import last_complete_checkpoint

logger = logging.getLogger(__name__)

ROLLOUT_METRICS = ("kl", "eos_rate")
MINIBATCH_METRICS = ("policy_loss", "ratio", "entropy", "value_loss")
STATE_FILE = "divergence.json"
MEDIAN_STEPS = 64  # value losses in the running median: 8 iterations of the paper's 8 steps
MEDIAN_MINIMUM = 8  # value losses before it is trusted
SKIP_LIMIT = 20  # skipped steps in a row after which "skip" stops too: nothing changes any more

# Metric: the relation to its `_stop` setting that must hold (NaN breaks each), and the reason if it does not. A policy
# that breaks one is no better after a skipped step, so these stop the run under "skip", too.
POLICY_LIMITS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "kl": (
        operator.le,
        "kl is {value:.4g} nats per answer, above kl_stop={limit:g}. Raise beta or lower learning_rate, or raise "
        "kl_stop if answers this far from the reference are wanted.",
    ),
    "eos_rate": (
        operator.gt,
        "eos_rate is {value:.4g}, not above eos_rate_stop={limit:g} in {rollouts} rollouts in a row. Set "
        "missing_eos_penalty, or raise max_completion_length.",
    ),
    "entropy": (
        operator.ge,
        "entropy is {value:.4g} nats per token, below entropy_stop={limit:g}: the policy has collapsed. Raise beta or "
        "lower learning_rate.",
    ),
}


@dataclass(frozen=True)
class Verdict:
    """The guard's decision: "go_on", "warn" (say `reason` and go on), "skip" (this step) or "stop" (the training)."""

    action: str
    reason: str = ""


class DivergenceGuard:
    """Reads metrics and answers what to do. It knows no model; `memory`, plain JSON, is all that it remembers.

    `settings` are those of a `PPOPtxConfig`, which checks them; None is no limit.
    """

    def __init__(self, settings: Any):
        self.settings = settings
        self.memory: dict[str, Any] = {"value_losses": [], "unfinished_rollouts": 0, "skips_in_a_row": 0}
        self._warned: set[str] = set()

    def judge_rollout(self, metrics: Mapping[str, float]) -> Verdict:
        """Judge `kl` and `eos_rate` of a rollout, before any step on it. A metric that is absent is not judged."""
        return self._verdict(self._bad_policy(metrics), {})

    def judge_step(self, metrics: Mapping[str, float]) -> Verdict:
        """Judge a minibatch, its gradients ready and its step not taken.

        Every metric must be finite; `value_loss` and `entropy` have limits of their own.
        """
        remedy = "Lower learning_rate and value_learning_rate, or ptx_coef, and look at the rewards' scale."
        step = {
            name: f"{name} is {value}, it must be finite. {remedy}"
            for name, value in metrics.items()
            if not math.isfinite(value)
        }
        loss, losses = metrics.get("value_loss", math.nan), self.memory["value_losses"]
        limit = math.inf if self.settings.value_loss_stop is None else self.settings.value_loss_stop
        if math.isfinite(loss):
            # A multiple of the median, not a fixed loss: the loss has the unit of the squared reward, which is each
            # reward model's own. An outlier hardly moves a median.
            median = statistics.median(losses) if len(losses) >= MEDIAN_MINIMUM else math.inf
            self.memory["value_losses"] = [*losses, loss][-MEDIAN_STEPS:]
            if loss > limit * median:
                step["value_loss"] = (
                    f"value_loss is {loss:.4g}, above value_loss_stop={limit:g} times its running "
                    f"median {median:.4g}. Lower value_learning_rate or value_max_grad_norm, or bound the rewards."
                )
        verdict = self._verdict(self._bad_policy(metrics), step)
        skips = self.memory["skips_in_a_row"] + 1 if verdict.action == "skip" else 0
        self.memory["skips_in_a_row"] = skips
        if skips >= SKIP_LIMIT:
            return Verdict("stop", f"{verdict.reason} It is the {SKIP_LIMIT}th step in a row to be skipped.")
        return verdict

    def _bad_policy(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """The reason for each limit that the policy breaks, by metric."""
        reasons = {}
        for name, (holds, reason) in POLICY_LIMITS.items():
            value, limit = metrics.get(name), getattr(self.settings, f"{name}_stop")
            if value is None or limit is None:
                continue
            broken = not holds(value, limit)
            if name == "eos_rate":  # one rollout without an end may be chance
                self.memory["unfinished_rollouts"] = self.memory["unfinished_rollouts"] + 1 if broken else 0
                broken = self.memory["unfinished_rollouts"] >= self.settings.eos_rate_patience
            if broken:
                reasons[name] = reason.format(value=value, limit=limit, rollouts=self.memory["unfinished_rollouts"])
        return reasons

    def _verdict(self, policy: dict[str, str], step: dict[str, str]) -> Verdict:
        name, reason = next(iter({**policy, **step}.items()), (None, ""))
        if name is None:
            return Verdict("go_on")
        if self.settings.divergence_action == "ignore":
            known = name in self._warned
            self._warned.add(name)
            return Verdict("go_on" if known else "warn", reason)
        return Verdict("stop" if policy else self.settings.divergence_action, reason)


class DivergenceMonitor(TrainerCallback):
    """Feeds a [`DivergenceGuard`] from [`PPOPtxTrainer`], and does what it answers.

    A step that is skipped, or at which training stops, is never taken: weights, average, moments and schedules stay as
    they were. So a stopped run saves the last weights that were finite. It writes no further checkpoint, so that no
    good one is rotated away. Every number judged is the same on all processes, hence every verdict is.
    """

    def __init__(self, args: Any):
        self.args, self.guard = args, DivergenceGuard(args)
        self.stopped: str | None = None  # the reason, once training has been stopped
        self.good_step = -1  # the newest step whose weights passed a rollout and a minibatch
        self._sums: dict[str, tuple[float, float]] = {}
        self._scored: float | None = None  # answers of this run that have a score; None before the first rollout

    def observe(self, name: str, total: float, count: float) -> None:
        """Add a micro-batch, or a rollout, to the mean that will be judged. Nothing observed is not judged."""
        if name == "score":
            self._scored = (self._scored or 0.0) + count
        if count and name in ROLLOUT_METRICS + MINIBATCH_METRICS:
            old_total, old_count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (old_total + total, old_count + count)

    def _take(self, names: tuple[str, ...]) -> dict[str, float]:
        sums = {name: self._sums.pop(name) for name in names if name in self._sums}
        return {name: total / count for name, (total, count) in sums.items()}

    def judge_rollout(self, state: TrainerState, control: TrainerControl) -> None:
        """Stop before the first step on a rollout that shows a bad policy."""
        self._obey(state, control, self.guard.judge_rollout(self._take(ROLLOUT_METRICS)))

    def may_step(self, state: TrainerState, control: TrainerControl, more: Mapping[str, float]) -> bool:
        """True if the optimizers may step; `more` are metrics beside the observed ones, gradient norms above all."""
        if self.stopped is not None:
            return False
        verdict = self.guard.judge_step({**self._take(MINIBATCH_METRICS), **more})
        self._obey(state, control, verdict)
        if verdict == Verdict("go_on"):  # one that was ignored has a reason, and is not good
            self.good_step = state.global_step
        return verdict.action in ("go_on", "warn")

    def _obey(self, state: TrainerState, control: TrainerControl, verdict: Verdict) -> None:
        if verdict.action == "go_on":
            return
        args = self.args
        does = {"warn": "goes on", "skip": "skips this step", "stop": "stops"}[verdict.action]
        place = f"iteration {state.global_step // args.steps_per_iteration + 1}, step {state.global_step + 1}"
        line = f"PPO-ptx {does} in {place}: {verdict.reason}"
        if verdict.action == "stop":
            self.stopped = verdict.reason
            control.should_training_stop = True
            checkpoint = last_complete_checkpoint(args.output_dir, self.good_step)
            line += f" Last good checkpoint: {checkpoint}." if checkpoint else (
                f" No good checkpoint is left in {args.output_dir}: save more often (save_steps), or keep more "
                "(save_total_limit)."
            )  # fmt: skip
        if state.is_world_process_zero:
            logger.warning(line)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopped = self._scored = None
        self._sums.clear()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._scored == 0:
            raise ValueError(
                "No answer of this run got a score: every reward function gave None, NaN or infinity for each. Nothing "
                "was learned. Look at what the reward functions return."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped is not None:
            control.should_log, control.should_save, control.should_evaluate = True, False, False

    on_epoch_end = on_step_end

    def save(self, checkpoint: str, args: TrainingArguments) -> None:
        """Write what the guard remembers, once."""
        if args.should_save:
            state = {**self.guard.memory, "good_step": self.good_step}
            Path(checkpoint, STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, checkpoint: str, *_: Any) -> None:
        """Take up what `save` wrote; a checkpoint without it starts the medians afresh."""
        path = Path(checkpoint, STATE_FILE)
        if path.is_file():
            state = json.loads(path.read_text(encoding="utf-8"))
            self.good_step = state.pop("good_step")
            self.guard.memory = state
