"""Running the other stages of a run from one recipe."""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING, Any

from instruct_trl._upstream import reset_accelerator
from instruct_trl.pipeline.arguments import RunArguments, read_yaml
from instruct_trl.pipeline.control import FOLDER
from instruct_trl.pipeline.training import PPOPtxArguments

if TYPE_CHECKING:
    from instruct_trl import PPOPtxConfig


def make_what_is_missing(run: PPOPtxArguments, policy: str | None) -> str:
    """Run the stages before PPO that the user's own models do not replace; returns the policy that PPO starts from.

    Raises:
        ValueError: the command line names other prompts than the YAML, without models for them.
    """
    if run.reward_model_path is not None and policy is not None:
        return policy
    if run.own_data:
        raise ValueError(
            "Own prompts (--dataset_name) need own models: give --model_name_or_path and --reward_model_path, made "
            "with recipes/sft.py, recipes/sample.py and recipes/reward_model.py on your data. Or write a YAML per "
            "stage into one folder, as recipes/demo has them, and name its ppo_ptx.yaml: --config."
        )
    base = ["--model_name_or_path", policy] if policy else []
    run_recipe("sft", run, base)
    for name in ("sample", "reward_model", "select_sft"):
        run_recipe(name, run)
    if (run.config_folder / "rl_init.yaml").exists():
        return run_recipe("sft", run, base, config="rl_init", stage="rl_init")
    return str(run.run / "selected_sft" / "model")


def with_control_rewards(run: PPOPtxArguments, args: PPOPtxConfig) -> tuple[PPOPtxArguments, PPOPtxConfig]:
    """Train the control's reward model; returns the settings of PPO on it. All else stays as in the run itself."""
    folder = run.run / FOLDER
    # What would cost time without saying more, or publish a control as the real model, is off.
    off = ["--labeler_folds", "0", "--push_to_hub", "false"]
    asked = ["--shuffle_ranks", "true", "--output_dir", str(folder / "reward_model"), *off]
    run.reward_model_path = run_recipe("reward_model", run, asked)
    args.output_dir, args.resume_from_checkpoint, args.push_to_hub = str(folder / "ppo_ptx"), None, False
    return run, args


def evaluate_if_described(run: RunArguments) -> None:
    """Run the evaluation if an evaluate.yaml beside the run's YAML names prompts for it."""
    if not run.own_data and read_yaml(run.config_folder / "evaluate.yaml").get("dataset_name"):
        run_recipe("evaluate", run)


def run_recipe(
    name: str, run: RunArguments, extra: list[str] | None = None, config: str | None = None, **kwargs: Any
) -> str:
    """Run another recipe of this run in this process, with its YAML from the same folder as this one's.

    A `--seed` on the command line is its seed, too.
    """
    seed = [] if run.given_seed is None else ["--seed", str(run.given_seed)]
    gc.collect()  # the models of the stage before, which refer to each other
    reset_accelerator()
    path = run.config_folder / f"{config or name}.yaml"
    module = importlib.import_module(f"instruct_trl.recipes.{name}")
    result = module.main(["--config", str(path), "--run_dir", run.run_dir, *seed, *(extra or [])], **kwargs)
    gc.collect()
    reset_accelerator()
    return result
