"""The settings of step 1: the paper's schedule as defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from instruct_trl._upstream import apply_cpu_defaults
from instruct_trl.models.precision import one_dtype
from instruct_trl.trainers.run_checks import check_training_numbers


@dataclass
class InstructSFTConfig(SFTConfig):
    """`trl.SFTConfig` with the paper's SFT schedule (appendix C.1) and selection by RM score.

    All fields of `trl.SFTConfig` are there. The effective batch of 32 is 8 a device × 4 accumulation steps on one
    device: divide the accumulation by the number of devices.

    Raises:
        ValueError: a rate, fraction or length of ours out of its range.
    """

    num_train_epochs: float = field(
        default=16, metadata={"help": "Passes over the demonstrations. Paper: 16 (2 for the RL initialisation)."}
    )
    learning_rate: float = field(
        default=9.65e-6, metadata={"help": "Peak. Paper: 9.65e-6 for 1.3B and 6B, 5.03e-6 for 175B."}
    )
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Rows a device and forward pass. Paper: 32 an optimizer step, here 8 x 4."}
    )
    gradient_accumulation_steps: int = field(
        default=4, metadata={"help": "Forward passes an optimizer step. Paper: 32 rows a step, here 8 x 4."}
    )
    lr_scheduler_type: str = field(
        default="cosine_with_min_lr", metadata={"help": "Paper: cosine down to a tenth of the peak."}
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Of the scheduler; with cosine_with_min_lr it defaults to {"min_lr_rate": 0.1}. Paper: 0.1.'},
    )
    warmup_steps: float = field(default=0, metadata={"help": "Paper: no warm-up."})
    adam_beta1: float = field(default=0.9, metadata={"help": "Paper: 0.9."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Paper: 0.95."})
    max_length: int | None = field(
        default=2048, metadata={"help": "Tokens a row keeps; longer rows are cut and counted. Paper: context of 2k."}
    )
    save_strategy: str = field(default="epoch", metadata={"help": "Every checkpoint is a candidate for the selection."})
    eval_strategy: str = field(default="epoch", metadata={"help": "Matches save_strategy, so the best one is known."})
    save_total_limit: int | None = field(
        default=None, metadata={"help": "None keeps all checkpoints: select_checkpoint compares them afterwards."}
    )
    residual_dropout: float | None = field(
        default=0.2,
        metadata={
            "help": "Dropout of what attention and MLP add to the residual stream, on any decoder. Paper: 0.2. 0: "
            "none; null: what the model's own config says."
        },
    )
    pretraining_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of pretraining text among the examples. Paper: 0 for SFT, 0.1 for the RL init."},
    )
    selection_max_new_tokens: int = field(
        default=256, metadata={"help": "Limit of an answer to a selection prompt, in tokens. Paper: 1024."}
    )
    selection_temperature: float = field(
        default=1.0, metadata={"help": "Of the answers to the selection prompts; 0 is greedy. Paper: 1."}
    )
    selection_batch_size: int = field(default=8, metadata={"help": "Answers generated at once."})
    selection_seed: int = field(
        default=0, metadata={"help": "Of the answers' noise; the same at every evaluation, so that epochs compare."}
    )

    def __post_init__(self) -> None:
        apply_cpu_defaults(self)
        check_training_numbers(self)
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "cosine_with_min_lr":
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        # Upstream fills in "loss" below; the trainer puts the RM score there only where the user named nothing.
        self._metric_was_chosen = self.metric_for_best_model is not None
        super().__post_init__()
        self.model_init_kwargs = one_dtype(self.model_init_kwargs)
        if self.residual_dropout is not None and not 0 <= self.residual_dropout < 1:
            raise ValueError(f"residual_dropout must be in [0, 1), got {self.residual_dropout}; the paper's is 0.2.")
        if not 0 <= self.pretraining_fraction < 1:
            raise ValueError(
                f"pretraining_fraction must be in [0, 1), got {self.pretraining_fraction}; the paper's RL "
                "initialisation has 0.1."
            )
        for name in ("selection_max_new_tokens", "selection_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.selection_temperature < 0:
            raise ValueError(f"selection_temperature must be 0 (greedy) or more, got {self.selection_temperature}.")
