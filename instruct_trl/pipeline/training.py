"""How recipes train: where the output goes, the models of PPO, the progress shown, how a training ends."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from instruct_trl.models.model_files import is_adapter, names_adapter
from instruct_trl.pipeline.arguments import RunArguments, read_yaml, setting
from instruct_trl.pipeline.functions import load_labeler, prepare_data
from instruct_trl.redaction import redact

if TYPE_CHECKING:
    from peft import LoraConfig
    from trl import ModelConfig

    from instruct_trl import PPOPtxConfig, RoleAdapters

DEFAULT_OUTPUT = "trainer_output"  # transformers' name for "no output_dir given"


@dataclass
class PPOPtxArguments(RunArguments):
    """Data and models of `recipes/ppo_ptx.py`; a model that is not named is the run's own, made if it is missing."""

    reward_model_path: str | None = setting(None, "The reward model. Default: <run_dir>/reward_model.")
    pretraining_dataset_name: str | None = setting(None, "Texts for the γ term (`text`).")
    one_base: bool = setting(False, "All four roles as adapters on one base (RoleAdapters).")
    labeler: str = setting("none", "'module:function': logged beside the reward, never trained on; or 'none'.")
    control: str = setting(
        "none",
        "'shuffled_ranks': when the run is trained, train it once more with a reward model whose training ranks were "
        "shuffled, into <run_dir>/control, and compare. What is left of a win there does not come from the feedback. "
        "It takes the time of both trainings again. Or 'none'.",
    )


def prepare_output(args: TrainingArguments, run: RunArguments, stage: str) -> None:
    """Prepare the run's data. Without --output_dir a stage writes to <run_dir>/<stage>."""
    prepare_data(run)
    if args.output_dir in (None, DEFAULT_OUTPUT):
        args.output_dir = str(run.run / stage)
    if args.resume_from_checkpoint in ("True", "true", True, ""):
        args.resume_from_checkpoint = None  # a stage resumes at its newest complete checkpoint by itself


class CompactProgress(ProgressCallback):
    """The Trainer's progress bar, with only these metrics; trackers and trainer_state.json keep all.

    Args:
        metrics: names as logged, in the order to show them.
    """

    def __init__(self, metrics: list[str]):
        super().__init__()
        self.metrics = metrics

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        shown = {name: logs[name] for name in self.metrics if logs.get(name) is not None}
        if state.is_world_process_zero and self.training_bar is not None and shown:
            text = " · ".join(f"{name} {float(value):.4g}" for name, value in shown.items())
            self.training_bar.write(f"  step {state.global_step}/{state.max_steps} · {text}")


def quiet_progress(trainer: Trainer, metrics: list[str]) -> None:
    """Show a progress bar and these metrics, instead of every logged one."""
    trainer.remove_callback(PrinterCallback)
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(CompactProgress(metrics))


def finish_training(trainer: Trainer, dataset_name: str | None) -> dict[str, Any]:
    """Save model, state and card; push if asked; free the memory. Returns the stage's summary."""
    stopped = getattr(getattr(trainer, "divergence", None), "stopped", None)
    if stopped:
        raise RuntimeError(
            f"Training was stopped: {stopped} The stage is not finished; its checkpoints are in "
            f"{trainer.args.output_dir}. With other settings, give another --output_dir and, to continue from a "
            "checkpoint, --resume_from_checkpoint."
        )
    trainer.save_model()
    trainer.save_state()
    publish: Any = trainer.push_to_hub if trainer.args.push_to_hub else trainer.create_model_card
    publish(dataset_name=dataset_name and redact(dataset_name))  # the model card names it
    summary = {"steps": trainer.state.global_step}
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    return summary


# -- the models of a PPO run -------------------------------------------------------------------------------------------


def models_of(run: PPOPtxArguments, args: PPOPtxConfig, model_args: ModelConfig, policy: str) -> dict[str, Any]:
    """Keyword arguments of `PPOPtxTrainer` that say which models it runs: models of their own, or roles on one base.

    Args:
        policy: folder or name of the policy that PPO starts from; with `one_base`, an SFT adapter's or a whole model's.
    """
    from trl import get_peft_config, get_quantization_config

    if not run.one_base:
        return {
            "model": policy,
            "reward_funcs": rewards_with_labeler(run, args, run.reward_path),
            "quantization_config": get_quantization_config(model_args),
            "peft_config": get_peft_config(model_args),
        }
    init: Any = args.model_init_kwargs or {}
    args.model_init_kwargs = None  # upstream takes them with a path only
    roles = load_roles(run.reward_path, policy, model_args, init | {"trust_remote_code": args.trust_remote_code})
    return {"model": None, "reward_funcs": rewards_with_labeler(run, args, roles.reward), "role_adapters": roles}


def rewards_with_labeler(run: PPOPtxArguments, args: PPOPtxConfig, reward_model: Any) -> list[Any]:
    """The reward model (a path, or a role) and, with weight 0, the labeler: its score is logged and trains nothing."""
    from instruct_trl import RewardScorer

    rows = args.local_rollout_forward_batch_size
    scorer = RewardScorer(reward_model, batch_size=rows) if isinstance(reward_model, str) else reward_model
    if run.labeler == "none":
        return [scorer]
    args.reward_weights = [1.0, 0.0]
    score: Callable[..., Any] = load_labeler(run.labeler, run)

    def labeler(**columns: Any) -> Any:  # TRL logs it by its name, and the report looks for "labeler"
        return score(**columns)

    return [scorer, labeler]


def check_one_base(run: PPOPtxArguments, model_args: ModelConfig) -> None:
    """Refuse `one_base` before anything is trained, if its parts will not be adapters."""
    policy, reward = model_args.model_name_or_path, run.reward_model_path
    if not run.one_base or (run.own_data and None in (policy, reward)):
        return  # the recipe refuses own data without own models

    def trains_adapter(stage: str) -> tuple[bool, str]:  # whether the run's own YAML of a stage asks for one
        path = run.config_folder / f"{stage}.yaml"
        return bool(read_yaml(path).get("use_peft")), f"that {path} trains"

    if reward is not None:
        _check_reward(names_adapter(reward), reward)
    elif not is_adapter(run.reward_path):
        _check_reward(*trains_adapter("reward_model"))
    if not model_args.use_peft and reward is not None and policy is not None:
        _check_policy(names_adapter(policy), policy)
    elif not model_args.use_peft:
        _check_policy(*trains_adapter("rl_init" if (run.config_folder / "rl_init.yaml").exists() else "sft"))


def _check_reward(is_lora: bool, model: str) -> None:
    if not is_lora:
        raise ValueError(
            f"--one_base needs a reward model that is a LoRA adapter; the model {model} is not one, or cannot be read. "
            "Train it with recipes/reward_model.py --use_peft --lora_task_type SEQ_CLS, and give its folder as "
            "--reward_model_path."
        )


def _check_policy(has_adapter: bool, model: str) -> None:
    if not has_adapter:
        raise ValueError(
            f"--one_base needs an adapter for the policy, and the model {model} is whole. Add --use_peft and its "
            "settings (lora_r, ...)."
        )


def load_roles(reward: str, policy: str, model_args: ModelConfig, init: dict[str, Any]) -> RoleAdapters:
    """RoleAdapters of a policy (an SFT adapter, or a whole model as base) and a reward adapter.

    Each is a folder, or a name on the hub. `init` goes to `from_pretrained` of the base.
    """
    from peft import PeftConfig
    from trl import get_peft_config, get_quantization_config

    from instruct_trl import RoleAdapters

    _check_reward(names_adapter(reward), reward)
    base, sft = policy, policy if names_adapter(policy) else None
    _check_policy(sft is not None or model_args.use_peft, policy)
    if sft is not None:
        trained_on = PeftConfig.from_pretrained(sft)
        base, init = str(trained_on.base_model_name_or_path), {"revision": trained_on.revision, **init}
    lora = cast("LoraConfig | None", get_peft_config(model_args))
    return RoleAdapters(base, sft, reward, get_quantization_config(model_args), lora, **init)
