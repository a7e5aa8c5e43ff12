"""Divergence is caught: the guards that skip an optimizer step or stop a PPO run before its weights are spoilt.

`DivergenceGuard` is plain arithmetic on metrics. `DivergenceMonitor` feeds it from a trainer and does what it answers.
None of this is in the paper; with the defaults only a step whose loss or gradient is not finite is touched.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from instruct_trl.trainers.checkpoints import complete_steps

logger = logging.getLogger(__name__)

ACTIONS = ("stop", "skip", "ignore")
SETTINGS = ("kl_stop", "value_loss_stop", "entropy_stop", "eos_rate_stop", "eos_rate_patience", "divergence_action")
ROLLOUT_METRICS = ("kl", "eos_rate")
MINIBATCH_METRICS = ("policy_loss", "ratio", "entropy", "value_loss")
STATE_FILE = "divergence.json"
MEDIAN_STEPS = 64  # value losses in the running median: 8 iterations of the paper's 8 steps
MEDIAN_MINIMUM = 8  # value losses before it is trusted
SKIP_LIMIT = 20  # skipped steps in a row after which "skip" stops too: nothing changes any more
Finding = tuple[str, str] | None  # (metric, one clause: what, value, threshold, remedy)


@dataclass(frozen=True)
class Verdict:
    """What to do: "go_on", "warn" (say `reason` and go on), "skip" (this optimizer step) or "stop" (the training)."""

    action: str
    reason: str = ""


class DivergenceGuard:
    """Reads metrics and answers what to do. Pure: it knows no model, and what it remembers is in `state_dict()`.

    Two kinds of finding. A bad *step* (something not finite, a value loss out of proportion) can be skipped: the next
    minibatch may be well. A bad *policy* (KL, entropy, EOS rate) cannot: with every step skipped it would stay as it
    is for ever, so that "skip" stops there too.

    Args:
        kl_stop: mean KL of an answer from the reference, in nats, above which the policy is bad; None for no limit.
        value_loss_stop: multiple of the running median of the last 64 steps' value losses above which a step is bad.
            A multiple and not a loss, since the loss has the unit of the squared reward, which is each reward
            model's own. The median waits for 8 steps and does not move for an outlier.
        entropy_stop: nats per token below which the policy is bad.
        eos_rate_stop: share of answers that end with EOS at or below which a rollout is bad.
        eos_rate_patience: bad rollouts in a row that make the policy bad.
        divergence_action: "stop", "skip" or "ignore" (warn once a metric and go on).

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        *,
        kl_stop: float | None = None,
        value_loss_stop: float | None = None,
        entropy_stop: float | None = None,
        eos_rate_stop: float | None = None,
        eos_rate_patience: int = 3,
        divergence_action: str = "stop",
    ):
        if divergence_action not in ACTIONS:
            raise ValueError(f"divergence_action must be 'stop', 'skip' or 'ignore', got {divergence_action!r}.")
        for name, value, low in (("kl_stop", kl_stop, 0), ("value_loss_stop", value_loss_stop, 1)):
            if value is not None and not value > low:
                raise ValueError(f"{name} must be above {low}, got {value}. null is no limit.")
        if entropy_stop is not None and not entropy_stop >= 0:
            raise ValueError(f"entropy_stop must not be negative, got {entropy_stop}. null is no limit.")
        if eos_rate_stop is not None and not 0 <= eos_rate_stop < 1:
            raise ValueError(f"eos_rate_stop must be in [0, 1), got {eos_rate_stop}. null is no limit.")
        if eos_rate_patience < 1:
            raise ValueError(f"eos_rate_patience must be at least 1, got {eos_rate_patience}.")
        self.kl_stop, self.value_loss_stop, self.entropy_stop = kl_stop, value_loss_stop, entropy_stop
        self.eos_rate_stop, self.eos_rate_patience, self.action = eos_rate_stop, eos_rate_patience, divergence_action
        self.value_losses: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self.unfinished_rollouts = 0
        self.skips_in_a_row = 0
        self._warned: set[str] = set()

    @classmethod
    def from_config(cls, args: Any) -> DivergenceGuard:
        """The guard that a `PPOPtxConfig` describes."""
        return cls(**{name: getattr(args, name) for name in SETTINGS})

    def judge_rollout(self, metrics: Mapping[str, float]) -> Verdict:
        """Judge `kl` and `eos_rate` of a rollout, before any step on it. A metric that is absent is not judged."""
        return self._verdict([], [self._kl(metrics), self._eos_rate(metrics)])

    def judge_step(self, metrics: Mapping[str, float]) -> Verdict:
        """Judge a minibatch, its gradients ready and its step not taken.

        Every metric given must be finite; `value_loss` and `entropy` have their own limits.
        """
        verdict = self._verdict([self._finite(metrics), self._value_loss(metrics)], [self._entropy(metrics)])
        self.skips_in_a_row = self.skips_in_a_row + 1 if verdict.action == "skip" else 0
        if self.skips_in_a_row >= SKIP_LIMIT:
            return Verdict("stop", f"{verdict.reason} It is the {SKIP_LIMIT}th step in a row to be skipped.")
        return verdict

    def _verdict(self, step: list[Finding], policy: list[Finding]) -> Verdict:
        bad_policy = next((finding for finding in policy if finding), None)
        finding = bad_policy or next((finding for finding in step if finding), None)
        if finding is None:
            return Verdict("go_on")
        name, reason = finding
        if self.action == "ignore":
            known = name in self._warned
            self._warned.add(name)
            return Verdict("go_on" if known else "warn", reason)
        return Verdict("stop" if bad_policy else self.action, reason)

    def _finite(self, metrics: Mapping[str, float]) -> Finding:
        for name, value in metrics.items():
            if not math.isfinite(value):
                remedy = "Lower learning_rate and value_learning_rate, or ptx_coef, and look at the rewards' scale."
                return name, f"{name} is {value}, it must be finite. {remedy}"
        return None

    def _value_loss(self, metrics: Mapping[str, float]) -> Finding:
        loss = metrics.get("value_loss")
        if loss is None or not math.isfinite(loss):
            return None
        median = statistics.median(self.value_losses) if len(self.value_losses) >= MEDIAN_MINIMUM else None
        self.value_losses.append(loss)
        if self.value_loss_stop is None or median is None or loss <= self.value_loss_stop * median:
            return None
        return "value_loss", (
            f"value_loss is {loss:.4g}, above value_loss_stop={self.value_loss_stop:g} times its running median "
            f"{median:.4g}. Lower value_learning_rate or value_max_grad_norm, or bound the rewards."
        )

    def _kl(self, metrics: Mapping[str, float]) -> Finding:
        kl = metrics.get("kl")
        if self.kl_stop is None or kl is None or kl <= self.kl_stop:
            return None
        return "kl", (
            f"kl is {kl:.4g} nats an answer, above kl_stop={self.kl_stop:g}. Raise beta or lower learning_rate, or "
            "raise kl_stop if answers this far from the reference are wanted."
        )

    def _entropy(self, metrics: Mapping[str, float]) -> Finding:
        entropy = metrics.get("entropy")
        if self.entropy_stop is None or entropy is None or entropy >= self.entropy_stop:
            return None
        return "entropy", (
            f"entropy is {entropy:.4g} nats a token, below entropy_stop={self.entropy_stop:g}: the policy has "
            "collapsed. Raise beta or lower learning_rate."
        )

    def _eos_rate(self, metrics: Mapping[str, float]) -> Finding:
        rate = metrics.get("eos_rate")
        if self.eos_rate_stop is None or rate is None:
            return None
        self.unfinished_rollouts = 0 if rate > self.eos_rate_stop else self.unfinished_rollouts + 1
        if self.unfinished_rollouts < self.eos_rate_patience:
            return None
        return "eos_rate", (
            f"eos_rate is {rate:.4g}, not above eos_rate_stop={self.eos_rate_stop:g} in {self.unfinished_rollouts} "
            "rollouts in a row. Set missing_eos_penalty, or raise max_completion_length."
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "value_losses": list(self.value_losses),
            "unfinished_rollouts": self.unfinished_rollouts,
            "skips_in_a_row": self.skips_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value_losses = deque(state["value_losses"], maxlen=MEDIAN_STEPS)
        self.unfinished_rollouts, self.skips_in_a_row = state["unfinished_rollouts"], state["skips_in_a_row"]


class DivergenceMonitor(TrainerCallback):
    """Feeds a [`DivergenceGuard`] from [`PPOPtxTrainer`], and does what it answers.

    A step that is skipped, or at which training stops, is never taken: policy, value model, average, both optimizers'
    moments and both schedules stay as they were. So what is saved after a stop is the last weights that were finite.
    A stopped run writes no further checkpoint, so that none is rotated away. Every number judged is the same on all
    processes, hence every verdict is.
    """

    def __init__(self, args: Any):
        self.args, self.guard = args, DivergenceGuard.from_config(args)
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
        verdict = Verdict("stop")
        if self.stopped is None:
            verdict = self.guard.judge_step({**self._take(MINIBATCH_METRICS), **more})
            self._obey(state, control, verdict)
        if verdict == Verdict("go_on"):
            self.good_step = state.global_step
        return verdict.action in ("go_on", "warn")

    def _obey(self, state: TrainerState, control: TrainerControl, verdict: Verdict) -> None:
        if verdict.action == "go_on":
            return
        args = self.args
        does = {"warn": "goes on", "skip": "skips this step", "stop": "stops"}[verdict.action]
        where = f"iteration {state.global_step // args.steps_per_iteration + 1}, step {state.global_step + 1}"
        line = f"PPO-ptx {does} in {where}: {verdict.reason}"
        if verdict.action == "stop":
            self.stopped = verdict.reason
            control.should_training_stop = True
            checkpoint = last_good_checkpoint(args.output_dir, self.good_step)
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
            with open(os.path.join(checkpoint, STATE_FILE), "w", encoding="utf-8") as file:
                json.dump({**self.guard.state_dict(), "good_step": self.good_step}, file)

    def load(self, checkpoint: str, *_: Any) -> None:
        """Take up what `save` wrote; a checkpoint without it starts the medians afresh."""
        path = os.path.join(checkpoint, STATE_FILE)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                state = json.load(file)
            self.good_step = state.pop("good_step")
            self.guard.load_state_dict(state)


def last_good_checkpoint(output_dir: str, good_step: int) -> str | None:
    """The newest complete `checkpoint-N` with N ≤ `good_step`."""
    step = next((step for step in complete_steps(output_dir) if step <= good_step), None)
    return None if step is None else os.path.join(output_dir, f"checkpoint-{step}")
