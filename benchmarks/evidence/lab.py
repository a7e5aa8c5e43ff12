"""The work behind `evidence.py`: what is trained and sampled, each piece once, kept on disk under its settings.

A job is a folder whose name holds a hash of its settings and of the jobs it builds on. What is finished is not done
again; a changed setting makes a new folder for this job and for all that build on it. Processes may share a lab: a job
that one is at, others wait for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

INSTRUCTION = "Praise this film:"
DEFAULT_SEEDS = 3


def _size(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Plan:
    """Sizes and settings of all jobs. Tuned on validation prompts only (docs/evidence.md says how)."""

    model: str = _size("tiny", "base LM: 'tiny', 'demo' (SmolLM2-135M-Instruct), a folder or a hub name")
    base_steps: int = _size(1500, "training steps of the tiny LM")
    demonstrations: int = _size(800, "reviews in praise to imitate")
    validation: int = _size(100, "of them held out, for the validation loss and the reward bias")
    selection_prompts: int = _size(200, "prompts that tune and select (validation)")
    test_prompts: int = _size(500, "prompts that judge, and do nothing else")
    reward_prompts: int = _size(600, "prompts whose answers are ranked")
    reward_test_prompts: int = _size(100, "prompts whose rankings are held out")
    rl_prompts: int = _size(1500, "prompts of PPO")
    completions: int = _size(6, "answers ranked for each prompt (paper: 4 to 9)")
    answer_tokens: int = _size(24, "longest answer, in tokens")
    ptx_texts: int = _size(6000, "pretraining texts, sampled from the base")
    ptx_tokens: int = _size(64, "tokens of a pretraining text")
    sft_epochs: int = _size(10, "epochs of SFT (paper: 16)")
    sft_learning_rate: float = _size(1e-3, "peak, of SFT and the RL initialisation")
    reward_learning_rate: float = _size(5e-4, "peak, of the reward model (1 epoch, as the paper)")
    shots: int = _size(2, "demonstrations before the prompt of the prompted base; 4 are too long for the tiny LM")
    iterations: int = _size(20, "PPO iterations")
    rollout: int = _size(128, "episodes an iteration (paper: 512)")
    minibatch: int = _size(32, "episodes an optimizer step (paper: 64)")
    learning_rate: float = _size(8e-4, "of PPO's policy")
    value_learning_rate: float = _size(3e-4, "of PPO's critic")
    beta: float = _size(0.02, "β (paper: 0.02)")
    ptx_coef: float = _size(0.1, "γ of PPO-ptx, the best of the sweep")
    ptx_learning_rate: float = _size(8e-4, "of the policy at that γ")
    ptx_ratio: int = _size(1, "pretraining texts an episode (paper: 8)")
    ptx_iterations: int = _size(0, "PPO iterations of PPO-ptx; 0: as many as PPO's")
    paper_iterations: int = _size(6, "PPO iterations of the run at γ = 27.8 and 8:1; 0: none")
    sweep_iterations: int = _size(20, "claim 4: PPO iterations of each γ and β")
    ratio_iterations: int = _size(10, "claim 4: PPO iterations of each ptx ratio")
    long_iterations: int = _size(120, "claim 7: PPO iterations")
    judged_on: str = _size("test", "prompts of claims 3 and 4; 'selection' are those to tune on")
    batch: int = _size(100, "answers generated or scored at once; moves the sampling noise, and is in no job's key")
    bf16: bool = _size(False, "bf16 autocast in training")


QUICK = Plan(
    base_steps=3, demonstrations=40, validation=10, selection_prompts=8, test_prompts=12, reward_prompts=8,
    reward_test_prompts=4, rl_prompts=40, completions=3, answer_tokens=6, ptx_texts=40, ptx_tokens=12, sft_epochs=2,
    iterations=2, rollout=16, minibatch=8, paper_iterations=1, sweep_iterations=2, ratio_iterations=1,
    long_iterations=2,
)  # fmt: skip

# For one GPU, not tried: SmolLM2-135M at the learning rates of its demo, sizes nearer to the paper's.
LARGE = replace(
    Plan(), model="demo", demonstrations=1500, validation=200, reward_prompts=1000, reward_test_prompts=150,
    completions=9, ptx_texts=30000, sft_epochs=16, sft_learning_rate=1e-4, reward_learning_rate=1e-4, shots=4,
    iterations=60, rollout=256, minibatch=64, learning_rate=4e-5, value_learning_rate=1e-4, ptx_learning_rate=4e-5,
    paper_iterations=20, sweep_iterations=60, ratio_iterations=20, long_iterations=200, bf16=True,
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A finished piece of work: its key, its folder, and what it reported."""

    key: str
    folder: Path
    summary: dict[str, Any]

    def read(self, name: str) -> Any:
        """The content of one of its files: JSON, or JSON lines as a list."""
        text = (self.folder / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else json.loads(text)


@dataclass
class Lab:
    """Runs jobs under `root`, for these seeds."""

    root: Path
    plan: Plan
    seeds: Sequence[int]

    def job(
        self,
        kind: str,
        settings: dict[str, Any],
        body: Callable[[Path], dict[str, Any]],
        after: Sequence[Job] = (),
        seed: int | None = None,
    ) -> Job:
        """Do `body(folder)` unless that was done with these settings on top of these jobs.

        Args:
            kind: first part of the folder's name.
            settings: all that the output depends on, besides the code.
            body: writes into the folder, returns a summary that JSON can hold.
            after: the jobs whose output it reads.
            seed: of the job, where it has one.
        """
        from instruct_trl._upstream import reset_accelerator
        from instruct_trl.pipeline.stage import run_stage

        settings = {**settings, "after": [job.key for job in after], **({} if seed is None else {"seed": seed})}
        key = f"{kind}-{job_hash(settings)}"
        folder = self.root / key
        title = kind if seed is None else f"{kind}, seed {seed}"

        def work(_: str | None) -> dict[str, Any]:
            reset_accelerator()
            return body(folder)

        with self.lock(key):
            summary = run_stage(folder, title, settings, work, resume=False, announce_skip=False)
        return Job(key, folder, summary)

    def lock(self, name: str) -> AbstractContextManager[Any]:
        """Held by one process at a time: another may be at the same piece of work."""
        from filelock import FileLock

        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock")

    def shared(self, *names: str) -> dict[str, Any]:
        """These fields of the plan, as settings."""
        return {name: getattr(self.plan, name) for name in names}


def job_hash(settings: dict[str, Any]) -> str:
    """Ten hexadecimal digits that change with any setting."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def plan_arguments(parser: Any) -> None:
    """An option for each field of `Plan`; those not given keep the plan's value."""
    group = parser.add_argument_group("sizes and settings")
    for item in fields(Plan):
        kind: Any = type(item.default)
        if kind is bool:
            group.add_argument(f"--{item.name}", action="store_true", default=None, help=item.metadata["help"])
        else:
            text = f"{item.metadata['help']} (default: {item.default})"
            group.add_argument(f"--{item.name}", type=kind, help=text)


def score(prompts: list[str], completions: list[str], run_dir: str, **kwargs: Any) -> list[float]:
    """The labeler of reviews on this task: it reads the review without the instruction before it."""
    from benchmarks import review_labeler

    return review_labeler.score([prompt.removeprefix(INSTRUCTION).lstrip() for prompt in prompts], completions, run_dir)


def instruct(words: str) -> str:
    """The first words of a review as a prompt."""
    return f"{INSTRUCTION} {words}"


def read_rows(path: Path) -> list[dict]:
    """One JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
