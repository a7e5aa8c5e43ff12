"""Settings of RankingRewardTrainer; the defaults are those of Ouyang et al. 2022, appendix C.2."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import RewardConfig

from instruct_trl._upstream import apply_cpu_defaults
from instruct_trl.models.precision import one_dtype
from instruct_trl.trainers.run_checks import check_training_numbers


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

    prefix_sharing: str = field(
        default="auto",
        metadata={
            "help": "Compute each prompt once for all its completions. 'auto' falls back to one row a completion, with "
            "a line that says why, where a model cannot share; 'on' raises there; 'off' never shares."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Bounds memory: a batch of prompts is computed in pieces of at most so many tokens, forward and "
            "backward one after the other. Loss and gradient stay the same. None: the whole batch at once."
        },
    )
    two_pass: bool = field(
        default=False,
        metadata={
            "help": "Bounds memory by one completion (or by max_tokens_per_batch): the rewards of the batch come "
            "first, without gradient, then a backward pass by pieces. Same gradient; about a third more to compute."
        },
    )
    use_margins: bool = field(
        default=False,
        metadata={
            "help": "−log σ(r_w − r_l − margin), the margin being the difference of the pair's `scores`, or the "
            "`margin` column beside chosen/rejected, as in TRL. The paper has none."
        },
    )

    def __post_init__(self) -> None:
        apply_cpu_defaults(self)
        check_training_numbers(self)
        if self.prefix_sharing not in ("auto", "on", "off"):
            raise ValueError(f"prefix_sharing must be 'auto', 'on' or 'off', got {self.prefix_sharing!r}.")
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "cosine_with_min_lr":
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        for name in ("max_length", "max_prompt_length", "max_tokens_per_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 token or None, got {value}.")
        if self.two_pass and not self.disable_dropout:
            raise ValueError("two_pass needs disable_dropout=True: the second pass must give the rewards of the first.")
        super().__post_init__()
        self.model_init_kwargs = one_dtype(self.model_init_kwargs)
