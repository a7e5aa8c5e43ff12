"""Settings of `PPOPtxTrainer`: TRL's names where TRL has the thing, the paper's values as defaults."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from instruct_trl._upstream import apply_cpu_defaults, load_models_whole
from instruct_trl.models.precision import one_dtype
from instruct_trl.trainers.run_checks import check_training_numbers

# Inherited settings that would change the objective of Eq. 2 unseen, and the only value that each may have.
FIXED: dict[str, Any] = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "mask_truncated_completions": False,
    "sync_ref_model": False,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "delta": None,
    "use_liger_kernel": False,
    "fp16": False,
    # The log-probs are those of the policy at its temperature: answers must be drawn from nothing else.
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
}

# What `generation_kwargs` may hold: how answers are computed. Anything else shapes what they are drawn from.
ALLOWED_GENERATION_KWARGS = {
    *("cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "use_cache", "disable_compile"),
    *("compile_config", "low_memory", "seed", "detokenize"),
}

# What each setting must be. Null leaves out a limit of OPTIONAL; of the others it is no value.
OPTIONAL = {"kl_stop", "value_loss_stop", "entropy_stop", "eos_rate_stop"}
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("ptx_coef", "beta", "value_clip", "value_max_grad_norm", "warmup_iterations", "entropy_stop"),
        (lambda value: value >= 0, "not be negative"),
    ),
    **dict.fromkeys(
        ("ptx_ratio", "ptx_max_length", "num_iterations", "local_rollout_forward_batch_size", "eos_rate_patience"),
        (lambda value: value >= 1, "be at least 1"),
    ),
    **dict.fromkeys(("discount", "gae_lambda"), (lambda value: 0 <= value <= 1, "be in [0, 1]")),
    "eos_rate_stop": (lambda value: 0 <= value < 1, "be in [0, 1)"),
    "kl_stop": (lambda value: value > 0, "be above 0"),
    "value_loss_stop": (lambda value: value > 1, "be above 1"),
    "kl_estimator": (lambda value: value in ("k1", "k2", "k3"), "be 'k1', 'k2' or 'k3'"),
    "divergence_action": (lambda value: value in ("stop", "skip", "ignore"), "be 'stop', 'skip' or 'ignore'"),
}


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PPOPtxConfig(GRPOConfig):
    """Configuration of [`PPOPtxTrainer`]: every default is the paper's, or its help says that none is published.

    With the defaults, each iteration samples 512 episodes and goes over them once, in 8 minibatches of 64, with one
    optimizer step each. Settings of `GRPOConfig` that would change the objective are refused by name.

    Raises:
        ValueError: batch sizes that do not divide, an option out of range, or a refused inherited knob.
    """

    beta: float = _setting(0.02, "β of Eq. 2: weight of the KL penalty per token (paper: 0.02).")
    epsilon: float = _setting(0.2, "Clip range of the policy ratio (paper: 0.2).")
    num_iterations: int = _setting(1, "Inner epochs over each rollout batch (paper: 1).")
    num_generations: int = _setting(1, "Answers sampled per prompt (paper: 1).")
    generation_batch_size: int = _setting(512, "Rollout batch: episodes per iteration on all processes (paper: 512).")
    per_device_train_batch_size: int = _setting(8, "Episodes per forward and backward on one device.")
    gradient_accumulation_steps: int = _setting(8, "Micro-batches per optimizer step. 8 × 8 is the paper's 64.")
    temperature: float = _setting(1.0, "Sampling temperature (paper: 1).")
    max_prompt_length: int | None = _setting(1024, "Longer prompts are dropped and counted (paper: 1k tokens).")
    max_completion_length: int | None = _setting(1024, "Longest answer, in tokens (paper: 1k).")
    total_episodes: int | None = _setting(256_000, "Episodes of the run (paper: 256k). max_steps overrides it.")
    loss_type: str = _setting("dapo", "Fixed: the mean over the minibatch's completion tokens.")
    learning_rate: float = _setting(8e-6, "Peak LR of the policy (not published; the paper diverged above 8.05e-6).")
    lr_scheduler_type: str = _setting("warmup_stable_decay", "The LR is constant after the warm-up (paper).")
    lr_scheduler_kwargs: dict | str | None = _setting(None, "Default: the LR starts at a tenth and never decays.")
    warmup_iterations: int = _setting(10, "Iterations of warm-up (paper: 10). warmup_steps overrides it.")
    adam_beta2: float = _setting(0.95, "β2 of Adam (paper: 0.95).")
    disable_dropout: bool = _setting(True, "Switch dropout off in policy, reference and value model.")
    logging_steps: float | None = _setting(None, "Steps between logs. Default: log once per iteration.")  # type: ignore[assignment]

    ptx_coef: float = _setting(27.8, "γ of Eq. 2: weight of the pretraining loss (paper: 27.8). 0 is plain PPO.")
    ptx_ratio: int = _setting(8, "Pretraining examples per episode (paper: 8).")
    ptx_max_length: int = _setting(2048, "Pretraining examples are cut to this many tokens (paper: 2k).")
    discount: float = _setting(1.0, "Discount of GAE (paper: 1, no discount).")
    gae_lambda: float = _setting(0.95, "λ of GAE (not published).")
    kl_estimator: str = _setting("k1", "Estimator of the KL penalty: 'k1' (paper), 'k2' or 'k3'.")
    whiten_advantages: bool = _setting(True, "Whiten advantages over the whole rollout batch (not published).")
    missing_eos_penalty: float | None = _setting(
        None, "Subtract this from the score of an answer that does not end in an EOS."
    )
    value_clip: float = _setting(0.2, "Clip range of the value update (not published; the policy's).")
    value_learning_rate: float = _setting(9e-6, "Peak LR of the value model (paper: 9e-6).")
    value_max_grad_norm: float = _setting(1.0, "Gradient clip of the value model (not published). 0 is no clip.")
    ema_decay: float | None = _setting(0.992, "Decay per step of the average of the policy's weights (paper: 0.992).")
    local_rollout_forward_batch_size: int = _setting(64, "Rows generated or scored at once on one device.")
    old_logps_from_sampler: bool = _setting(
        False,
        "Take log π_old from the sampler and save a forward. The first ratio is then 1 only up to the sampler's "
        "rounding, logged as sampler_gap.",
    )
    eval_win_rate: bool = _setting(
        True, "With eval_dataset, log how often the policy's answer scores higher than the reference's."
    )

    kl_stop: float | None = _setting(None, "Stop training if a rollout's mean KL, in nats per answer, exceeds this.")
    value_loss_stop: float | None = _setting(
        None, "A step is bad if its value loss exceeds this many times the running median."
    )
    entropy_stop: float | None = _setting(
        None, "Stop training if the policy's entropy, in nats per token, falls below this."
    )
    eos_rate_stop: float | None = _setting(
        None,
        "Stop training if this share of answers or fewer end in an EOS, eos_rate_patience times in a row. 0: none do.",
    )
    eos_rate_patience: int = _setting(3, "Consecutive rollouts that eos_rate_stop needs before it stops training.")
    divergence_action: str = _setting(
        "stop",
        "At a step that is bad or not finite: 'stop' training, 'skip' the step, or 'ignore' it and warn once. "
        "Under 'skip' the limits on KL, entropy and EOS still stop training; under 'ignore' they warn.",
    )

    def __post_init__(self) -> None:
        apply_cpu_defaults(self)
        check_training_numbers(self)
        self._check_settings()
        self._check_sampler()
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "warmup_stable_decay":
            self.lr_scheduler_kwargs = {"min_lr_ratio": 0.1, "num_decay_steps": 0}
        log_each_iteration = self.logging_steps is None
        if log_each_iteration:
            self.logging_steps = 1
        self._upstream_post_init()
        self.model_init_kwargs = one_dtype(self.model_init_kwargs)
        if self.torch_compile:  # set by torch_compile_backend and torch_compile_mode, too
            raise ValueError(
                "torch_compile=True does not work with PPO-ptx: in a compiled forward the critic's head would not get "
                "its precision, nor the policy's head the positions to project. Leave torch_compile, "
                "torch_compile_backend and torch_compile_mode out."
            )
        load_models_whole()
        if self.generation_batch_size % self.minibatch_size:
            raise ValueError(
                f"generation_batch_size ({self.generation_batch_size}) must be a multiple of the minibatch, "
                f"per_device_train_batch_size × gradient_accumulation_steps × processes = "
                f"{self.per_device_train_batch_size} × {self.gradient_accumulation_steps} × {self.world_size} = "
                f"{self.minibatch_size}. Change one of them."
            )
        if self.max_steps <= 0 and self.total_episodes is not None:
            self.max_steps = -(-self.total_episodes // self.generation_batch_size) * self.steps_per_iteration
        if log_each_iteration:
            self.logging_steps = self.steps_per_iteration
        if not self.warmup_steps:
            self.warmup_steps = self.warmup_iterations * self.steps_per_iteration

    def _upstream_post_init(self) -> None:
        """GRPO refuses one answer per prompt, for its group baseline; PPO has a critic. Show it a legal number."""
        num_generations = self.num_generations or 1
        if num_generations == 1:
            self.num_generations_eval = self.num_generations_eval or 1
            self.num_generations = self.generation_batch_size or 2
        try:
            super().__post_init__()
        finally:
            self.num_generations = num_generations

    def _check_settings(self) -> None:
        for name, only in FIXED.items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} would change PPO-ptx's objective; leave it at {only!r}."
                )
        for name, (holds, must) in RANGES.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            if value is None or not holds(value):
                raise ValueError(f"{name} must {must}, got {value!r}.")
        if self.total_episodes is not None and self.total_episodes < 1:
            raise ValueError(
                f"total_episodes must be at least 1, got {self.total_episodes}: nothing would be trained. For a number "
                "of optimizer steps set max_steps, for epochs total_episodes=None."
            )

    def _check_sampler(self) -> None:
        given = self.generation_kwargs or {}
        names = sorted(set(json.loads(given) if isinstance(given, str) else given) - ALLOWED_GENERATION_KWARGS)
        if names:
            raise ValueError(
                f"generation_kwargs holds {', '.join(map(repr, names))}. Answers would come from another distribution "
                "than the one whose log-probs PPO-ptx computes, or end elsewhere. Remove it: the temperature and the "
                f"length have settings of their own. Allowed are {', '.join(sorted(ALLOWED_GENERATION_KWARGS))}."
            )
        if self.old_logps_from_sampler and self.use_transformers_continuous_batching:
            raise ValueError("old_logps_from_sampler: continuous batching keeps no log-probs. Switch one of them off.")
        if self.old_logps_from_sampler and self.use_vllm and self.vllm_importance_sampling_correction:
            raise ValueError(
                "old_logps_from_sampler takes vLLM's log-probs as they are: set "
                "vllm_importance_sampling_correction=False, which compares them with a forward's, or leave it off."
            )

    @property
    def minibatch_size(self) -> int:
        """Episodes per optimizer step on all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps between two rollouts: 8 in the paper."""
        return self.generation_batch_size // self.minibatch_size * self.num_iterations
