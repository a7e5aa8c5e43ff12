"""What a PPO-ptx run leaves on disk: the finished models, and checkpoints that a killed run goes on from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from instruct_trl.models.adapters import save_token_rows
from instruct_trl.models.role_adapters import RoleAdapters
from instruct_trl.trainers.checkpoints import begin_checkpoint, last_complete_checkpoint, seal_checkpoint
from instruct_trl.trainers.ema import EMACallback
from instruct_trl.trainers.ppo_evaluation import PPOEvaluation
from instruct_trl.trainers.ppo_ptx_state import load_state, save_state


class PPOSaving(PPOEvaluation):
    """The part of [`PPOPtxTrainer`] that saves and resumes."""

    ema: EMACallback | None
    role_adapters: RoleAdapters | None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write `policy/`, `value/` and `ema/` under `output_dir`, each readable by plain transformers.

        A push has all three, and the policy at the root too, where the hub and the model card look for it.
        """
        root = output_dir or self.args.output_dir
        if self.args.push_to_hub and not _internal_call and root == self.args.output_dir:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)  # which comes back here
            return
        if _internal_call:
            super().save_model(root, _internal_call=True)
            if output_dir is not None:  # a checkpoint, which `save_state` completes; `push_to_hub` names no folder
                return
        super().save_model(os.path.join(root, "policy"), _internal_call=True)
        self.critic.save_model(os.path.join(root, "value"))
        if self.args.should_save:
            self._tokenizer.save_pretrained(os.path.join(root, "value"))
        if self.ema is not None:
            with self.ema.applied():
                super().save_model(os.path.join(root, "ema"), _internal_call=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save and self.role_adapters is None and hasattr(self.model, "peft_config"):
            save_token_rows(self.model, str(output_dir or self.args.output_dir))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:  # upstream takes the highest number, also of a torn checkpoint
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint=True, but {self.args.output_dir} holds no complete checkpoint. Leave it "
                    "out to start afresh."
                )
        self.any_scored = None
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.any_scored is False:
            raise ValueError(
                "No answer of this run got a score: every reward function gave None, NaN or infinity for each. Nothing "
                "was learned. Look at what the reward functions return."
            )
        return output

    def _init_training_state(self, max_steps: int, steps_an_epoch: int, epochs: int, *args: Any) -> tuple[int, int]:
        """A finished run has no epoch left. Upstream would take a step more, where it ended inside an epoch."""
        position = super()._init_training_state(max_steps, steps_an_epoch, epochs, *args)
        return (epochs, 0) if self.state.global_step >= max_steps else position

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The policy's adapter alone: upstream would take `value/` for another adapter of the policy."""
        if self.role_adapters is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.role_adapters.load_policy(resume_from_checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            begin_checkpoint(Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"))
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """The last thing each process writes before the main one writes `trainer_state.json`."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal_checkpoint(Path(output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_state(self, output_dir)
        if self.args.should_save:
            self.divergence.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_state(self, checkpoint)
            self.divergence.load(checkpoint)
