"""Settings of RankingRewardTrainer; the defaults are those of Ouyang et al. 2022, appendix C.2."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import RewardConfig

from instruct_trl._upstream import apply_cpu_defaults


@dataclass
class RankingRewardConfig(RewardConfig):
    """`trl.RewardConfig` with the paper's reward-model settings as defaults.

    The batch is 64 prompts: 8 a device and 8 accumulated, on one device. Without an accelerator it runs on the CPU.
    """

    learning_rate: float = field(default=9e-6, metadata={"help": "Peak learning rate. Paper, C.2: 9e-6."})
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "Paper, C.2: 1; the reward model overfits quickly with more."}
    )
    lr_scheduler_type: str = field(
        default="cosine_with_min_lr", metadata={"help": "Paper, C.2: cosine, down to a tenth of the peak."}
    )
    lr_scheduler_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Keywords of the schedule. None means {'min_lr_rate': 0.1} for cosine_with_min_lr (paper, C.2)."
        },
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "Paper, appendix C: Adam with β1 0.9, β2 0.95."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Prompts a device and forward, each with all its completions."}
    )
    gradient_accumulation_steps: int = field(
        default=8, metadata={"help": "8 × 8 prompts on one device make the paper's batch of 64 prompts (C.2)."}
    )
    max_length: int | None = field(
        default=2048,
        metadata={"help": "Tokens of prompt and completion together; longer rows are dropped and counted. Paper: 2k."},
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Longer prompts (in tokens) are dropped and counted. The paper drops those over 1k; None: no limit."
        },
    )

    def __post_init__(self) -> None:
        apply_cpu_defaults(self)
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "cosine_with_min_lr":
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        for name in ("max_length", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 token or None, got {value}.")
        super().__post_init__()
