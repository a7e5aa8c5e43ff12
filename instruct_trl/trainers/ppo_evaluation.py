"""Evaluation during PPO: how often the policy's answer scores higher than the reference's to the same prompt.

Legend: B rows of a batch.
"""

from __future__ import annotations

import copy
import logging
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets.fingerprint import Hasher
from transformers import set_seed
from trl import GRPOTrainer
from trl.trainer.utils import use_adapter

from instruct_trl.data.prompt_keys import prompt_key
from instruct_trl.evaluation.estimates import rate_interval
from instruct_trl.models.role_adapters import ReferenceRole
from instruct_trl.trainers.evaluation_rows import EvaluationRows, answer_statistics, count_rows, reward_statistics
from instruct_trl.trainers.ppo_rollout import PPORollout
from instruct_trl.trainers.run_checks import metric_and_set

logger = logging.getLogger(__name__)

# The same answer, scored in another batch, differs by the rounding of float32: that is a tie.
ROUNDING = {"rel_tol": 1e-5, "abs_tol": 1e-6}


def check_win_rate(args: Any, eval_dataset: Any, rollout_func: Any) -> bool:
    """Whether `eval_win_rate` can be logged; where it is wanted and cannot, one line says why.

    Raises:
        ValueError: it cannot, and is the `metric_for_best_model`.
    """
    generators = {
        "use_vllm=True": args.use_vllm,
        "use_transformers_continuous_batching=True": args.use_transformers_continuous_batching,
        "rollout_func": rollout_func is not None,
    }
    obstacles = [name for name, present in generators.items() if present]
    reason = f"{obstacles[0]} samples from the policy only" if obstacles else "it is switched off"
    possible = args.eval_win_rate and not obstacles
    metric, _ = metric_and_set(args.metric_for_best_model or "", eval_dataset)
    if not possible and metric.startswith("win_rate"):
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} is not logged: {reason}. Set eval_win_rate=True and "
            "sample with transformers, or choose 'eval_score'."
        )
    if obstacles and args.eval_win_rate and eval_dataset is not None:
        logger.warning("PPO-ptx: eval_win_rate is left out: %s, and needs the reference's answers.", reason)
    return possible


@contextmanager
def keep_generators(device: torch.device) -> Iterator[None]:
    """Put the random generators of Python, NumPy and torch (the CPU's and `device`'s) back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  reward functions may draw from it
    devices = [] if device.type in ("cpu", "mps") else [device]  # torch.mps has no generator by device
    try:
        with torch.random.fork_rng(devices, device_type=device.type):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class ReferenceScores:
    """The scores of the reference's answers, kept for the run, and the outcomes of the evaluation under way.

    A row is known by its content and by how often it came before in this evaluation: its place. Prompts may so come in
    any order, from several datasets, and more than once (`num_generations_eval`).
    """

    def __init__(self) -> None:
        self._scores: dict[tuple[str, int], float] = {}
        self._outcomes: list[tuple[str, str, float]] = []  # of a row: its digest, its prompt's key, who won
        self._prompts: dict[str, str] = {}
        self._seen: Counter[str] = Counter()

    def start(self) -> None:
        """Begin an evaluation; scores are kept."""
        self._outcomes.clear()
        self._seen.clear()

    def places(self, rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
        """The places of B rows of a dataset, counted as seen."""
        places = []
        for row in rows:
            digest = Hasher.hash(row)
            self._prompts[digest] = prompt_key(row.get("prompt"))
            places.append((digest, self._seen[digest]))
            self._seen[digest] += 1
        return places

    def lacks(self, places: list[tuple[str, int]]) -> bool:
        """True where one of B places has no score yet."""
        return not self._scores.keys() >= set(places)

    def keep(self, places: list[tuple[str, int]], scores: torch.Tensor) -> None:
        """Keep the reference's scores, (B,), NaN where missing."""
        self._scores |= dict(zip(places, scores.tolist(), strict=True))

    def compare(self, places: list[tuple[str, int]], scores: torch.Tensor) -> None:
        """Note who won: 1 the policy, with scores (B,), 0 the reference, ½ a tie, NaN where a score is missing."""
        for place, score in zip(places, scores.tolist(), strict=True):
            reference = self._scores[place]
            tie = math.isclose(score, reference, **ROUNDING)
            outcome = 0.5 if tie else (1.0 + float(np.sign(score - reference))) / 2
            self._outcomes.append((place[0], self._prompts[place[0]], outcome))

    def metrics(self) -> dict[str, float]:
        """Win rate over the rows of all processes, its 95 % interval over prompts, and the rows that it counts.

        A row that came several times counts once, with the mean of its outcomes. Where no row has both scores, there
        is no rate. The interval is Wilson's; where rows of the dataset share a prompt, that of `rate_interval`.
        """
        rows: dict[tuple[str, str], list[float]] = defaultdict(list)
        for digest, prompt, outcome in gather_object(self._outcomes):
            if not math.isnan(outcome):
                rows[digest, prompt].append(outcome)
        metrics = {"win_rate_prompts": float(len(rows))}
        if rows:
            found = rate_interval([fmean(outcomes) for outcomes in rows.values()], [prompt for _, prompt in rows])
            low, high = found.bounds or (0.0, 1.0)
            metrics |= {"win_rate": found.mean, "win_rate_low": low, "win_rate_high": high}
        return metrics


class PPOEvaluation(PPORollout):
    """Adds to the evaluation a win rate against the reference; no evaluation changes what training samples.

    Subclasses set `evaluation_rows`, and `reference_scores`, None for no win rate.
    """

    evaluation_rows: EvaluationRows
    reference_scores: ReferenceScores | None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # GRPO's evaluation samples from the generators of training. Here it has a noise of its own at each step, which
        # a resumed run has, too.
        with keep_generators(self.accelerator.device):
            self._seed("evaluation", self.state.global_step, self.args.process_index)
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """GRPO's, with means over rows in place of means over batches, under the names of the set evaluated."""
        self.evaluation_rows.start()
        if self.reference_scores is not None:
            self.reference_scores.start()
        rows = count_rows(dataloader, self.num_generations_eval or 1)
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        metrics = self._evaluation_metrics(rows())
        if self.reference_scores is not None:
            metrics |= self.reference_scores.metrics()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _determine_best_metric(self, metrics: dict[str, Any], trial: Any) -> bool:
        """As Trainer's; a metric that is None, where no answer had a reward, is no better than any."""
        known = {name: math.nan if value is None else value for name, value in metrics.items()}
        return super()._determine_best_metric(known, trial)

    def _evaluation_metrics(self, count: int | None) -> dict[str, float | None]:
        """All metrics over the first `count` rows; None for all."""
        rows = self.evaluation_rows
        rewards = {name: rows.column(f"_reward/{name}", count) for name in self.reward_func_names}
        metrics = rows.means(count)
        metrics |= answer_statistics(rows.column("_length", count), rows.column("_ended", count))
        metrics |= reward_statistics(rewards, self.reward_weights)
        metrics["missing_rewards"] = rows.column("unscored_fraction", count).sum().item()
        return metrics

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self.model.training:
            return super()._prepare_inputs(generation_batch)
        places = self._places(generation_batch)
        inputs = super()._prepare_inputs(generation_batch)
        if self.reference_scores is not None:
            scored = inputs["loss_mask"].any(dim=1)
            self.reference_scores.compare(places, inputs["scores"].masked_fill(~scored, float("nan")))
        self._note_answers(inputs)
        return inputs

    def _places(self, rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
        """The places of B rows, whose reference's scores are known from here on; none without a win rate."""
        if self.reference_scores is None:
            return []
        places = self.reference_scores.places(rows)
        self._score_reference(rows, places)
        return places

    def _note_answers(self, inputs: dict[str, Any]) -> None:
        """Note length, end and rewards of each answer; and what GRPO knows of the batch as a whole."""
        size, ids, mask = len(inputs["completion_ids"]), inputs["completion_ids"], inputs["completion_mask"]
        first = self.accelerator.process_index * size
        own = torch.where(inputs["loss_mask"].any(dim=1, keepdim=True), inputs["loss_mask"], mask)  # no tool's words
        place = (mask.sum(dim=1, keepdim=True) - 1).clamp(min=0)  # a rollout_func may give no token
        last = ids.gather(1, place).squeeze(1)
        endings = torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=ids.device)
        columns = {"_length": own.sum(dim=1), "_ended": torch.isin(last, endings)}
        rewards = self._rewards[first : first + size].unbind(dim=1)
        columns |= {f"_reward/{name}": column for name, column in zip(self.reward_func_names, rewards, strict=True)}
        self.evaluation_rows.add(self.accelerator, columns)
        of_batch, self._metrics["eval"] = self._metrics["eval"], defaultdict(list)
        self.evaluation_rows.add_batch(
            {name: values[-1] for name, values in of_batch.items()}, size * self.accelerator.num_processes
        )

    def _log_means(self, metrics: dict[str, torch.Tensor], counted: torch.Tensor | None = None) -> None:
        if self.model.training:
            super()._log_means(metrics, counted)
            return
        columns = {
            name: rows if counted is None else rows.float().masked_fill(~counted, float("nan"))
            for name, rows in metrics.items()
        }
        self.evaluation_rows.add(self.accelerator, columns)

    def _score_reference(self, rows: list[dict[str, Any]], places: list[tuple[str, int]]) -> None:
        """Sample and score the reference's answers to B rows, unless all processes have the scores of theirs."""
        assert self.reference_scores is not None
        lacking = torch.tensor(float(self.reference_scores.lacks(places)), device=self.accelerator.device)
        if not self.accelerator.reduce(lacking, "sum").item():
            return
        with keep_generators(self.accelerator.device), self._as_reference():
            self._seed("reference", places)  # a resumed run, too, compares with the same answers
            rollout = GRPOTrainer._generate_and_score_completions(self, rows)
            self.reference_scores.keep(places, self._score_answers(rollout)[0])

    def _seed(self, *purpose: Any) -> None:
        """Seed every generator by `seed` and by what it is for."""
        set_seed((self.args.seed + int(Hasher.hash(purpose), 16)) % 2**32)

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Inside, GRPO's own rollout samples from the reference, and what it logs is thrown away."""
        kept = {name: getattr(self, name) for name in ("model_wrapped", "_metrics", "_logs", "beta")}
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._logs, self.beta = copy.deepcopy(self._logs), 0.0
        adapters: Any = nullcontext()
        if isinstance(self.ref_model, ReferenceRole):
            adapters = self.ref_model.active()
        elif self.ref_model is not None:
            self.model_wrapped = self.ref_model
        else:  # as GRPO does for the reference's log-probs
            policy = self.accelerator.unwrap_model(self.model)
            adapters = use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
        try:
            with adapters:
                yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)
