"""The two trainers of `ppo.py`, each in a process of its own: ours, and TRL 1.12.0's from a folder of its own."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import traceback
from functools import partial
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from typing import Any

from benchmarks.ppo_session import Case, Session, Stop, build, prompts

ENDLESS = 100_000  # iterations of a run that the parent ends
LEARNING_RATE = 1e-6
SETTINGS = {
    "learning_rate": LEARNING_RATE,
    "temperature": 1.0,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def work(pipe: Any, name: str, case: Case, trl112: str, threads: int) -> None:
    """Run contender `name` until the parent says stop; an error goes to the parent as a text."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    if name == "trl":
        _load_trl(trl112)
    _silence()
    try:
        import torch

        if threads:
            torch.set_num_threads(threads)
        CONTENDERS[name](Session(pipe, case))
    except Stop:
        pass
    except Exception:
        pipe.send(traceback.format_exc())


def _load_trl(folder: str) -> None:
    """Make `import trl` in this process mean the TRL that lies in `folder`."""
    spec = PathFinder.find_spec("trl", [folder])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["trl"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["trl"])


def _silence() -> None:
    """Logs of the trainers go nowhere; the parent prints the table."""
    import logging
    import warnings

    import datasets
    import transformers

    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def ours(session: Session, old_logps_from_sampler: bool = False) -> None:
    """PPOPtxTrainer, γ = 0, without the average of the weights, which TRL 1.12 does not have."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from instruct_trl import PPOPtxConfig, PPOPtxTrainer

    case = session.case
    policy, reward, tokenizer = build(case)
    args = PPOPtxConfig(
        tempfile.mkdtemp(),
        **SETTINGS,
        beta=0.02,
        ptx_coef=0.0,
        ema_decay=None,
        old_logps_from_sampler=old_logps_from_sampler,
        generation_batch_size=case.rollout,
        per_device_train_batch_size=case.micro,
        gradient_accumulation_steps=case.accumulation,
        local_rollout_forward_batch_size=case.chunk,
        max_completion_length=case.answer[1],
        total_episodes=ENDLESS * case.rollout,
        value_learning_rate=LEARNING_RATE,
    )

    class Timed(PPOPtxTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            session.update_begins()
            return super()._compute_loss(model, inputs)

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            session.stages = {name[5:]: value for name, value in logs.items() if name.startswith("time/")}
            super().log(logs, *args, **kwargs)

    class Gate(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % args.steps_per_iteration == 0:
                session.gate()

    texts = [" ".join(f"w{index}" for index in row) + " " for row in prompts(case)]
    trainer = Timed(
        session.shape_lengths(policy),
        reward,
        args,
        Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
        callbacks=[Gate()],
    )
    trainer.train()


def trl(session: Session) -> None:
    """TRL 1.12.0's PPOTrainer.

    It steps once in `gradient_accumulation_steps` backwards, whatever its minibatches are. Minibatches of one backward
    each give the wanted backwards a step; the per-device batch then only sets the rollout.
    """
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    case = session.case
    policy, reward, tokenizer = build(case)
    args = PPOConfig(
        tempfile.mkdtemp(),
        **SETTINGS,
        kl_coef=0.02,
        num_ppo_epochs=1,
        per_device_train_batch_size=case.rollout // case.accumulation,
        gradient_accumulation_steps=case.accumulation,
        num_mini_batches=case.rollout // case.micro,
        local_rollout_forward_batch_size=case.chunk,
        response_length=case.answer[1],
        total_episodes=ENDLESS * case.rollout,
        stop_token="eos",
        num_sample_generations=0,
    )
    rows = [{"input_ids": row} for row in prompts(case)]
    trainer = PPOTrainer(
        args,
        tokenizer,
        session.shape_lengths(policy),
        copy.deepcopy(policy),
        reward,
        Dataset.from_list(rows),
        copy.deepcopy(reward),
        eval_dataset=Dataset.from_list(rows[:8]),
    )
    trainer.model.register_forward_pre_hook(lambda *args: session.update_begins())

    class Gated:
        """The rollout's prompts for ever: at the end of a real loader TRL would step at every backward."""

        def __iter__(self) -> Any:
            while True:
                session.gate()
                yield trainer.data_collator(rows)

    trainer.dataloader = Gated()
    trainer.train()


def floor(session: Session) -> None:
    """The bare calls."""
    from benchmarks.ppo_floor import run

    run(session, LEARNING_RATE)


CONTENDERS = {"trl": trl, "ours": ours, "sampler": partial(ours, old_logps_from_sampler=True), "floor": floor}
