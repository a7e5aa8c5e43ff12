"""What `recipes/ppo_ptx.py` hands to its trainer: models of their own, or roles on one base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from instruct_trl.models.model_files import is_adapter, names_adapter
from instruct_trl.pipeline.run import read_yaml, reward_path, rewards_with_labeler

if TYPE_CHECKING:
    from peft import LoraConfig


def models_of(run: Any, args: Any, model_args: Any, policy: str) -> dict[str, Any]:
    """Keyword arguments of `PPOPtxTrainer` that say which models it runs.

    Args:
        run: the recipe's settings; `one_base` asks for roles on one base.
        args: of the trainer.
        model_args: TRL's ModelConfig.
        policy: folder or name of the policy that PPO starts from; a LoRA adapter's folder with `one_base`, if SFT
            trained one.

    Raises:
        ValueError: `one_base` without adapters.
    """
    from trl import get_peft_config, get_quantization_config

    if not run.one_base:
        return {
            "model": policy,
            "reward_funcs": rewards_with_labeler(run, args, reward_path(run)),
            "quantization_config": get_quantization_config(model_args),
            "peft_config": get_peft_config(model_args),
        }
    init, args.model_init_kwargs = args.model_init_kwargs or {}, None  # upstream takes them with a path only
    init |= {"trust_remote_code": args.trust_remote_code}
    roles = load_roles(reward_path(run), policy, model_args, init)
    return {"model": None, "reward_funcs": rewards_with_labeler(run, args, roles.reward), "role_adapters": roles}


def check_one_base(run: Any, model_args: Any) -> None:
    """Refuse `one_base` before anything is trained where its pieces will not be adapters.

    Args:
        run: the recipe's settings.
        model_args: TRL's ModelConfig.

    Raises:
        ValueError: the reward model is not an adapter and will not become one; or neither SFT nor PPO has a LoRA.
    """
    policy, reward = model_args.model_name_or_path, run.reward_model_path
    if not run.one_base or (run.dataset_name is not None and None in (policy, reward)):
        return  # own data need own models: `make_what_is_missing` says so
    if reward is None and not is_adapter(reward_path(run)):
        _check_reward(_trains_adapter(run, "reward_model"), f"what {run.config_folder / 'reward_model.yaml'} trains")
    elif reward is not None:
        _check_reward(names_adapter(reward), reward)
    if model_args.use_peft:
        return
    if reward is not None and policy is not None:
        _check_policy(names_adapter(policy), policy)
    else:
        stage = "rl_init" if (run.config_folder / "rl_init.yaml").exists() else "sft"
        _check_policy(_trains_adapter(run, stage), f"that {run.config_folder / stage}.yaml trains")


def _trains_adapter(run: Any, stage: str) -> bool:
    """Whether the run's own YAML of a stage asks for one."""
    return bool(read_yaml(run.config_folder / f"{stage}.yaml").get("use_peft"))


def _check_reward(is_lora: bool, what: str) -> None:
    if not is_lora:
        raise ValueError(
            f"--one_base needs a reward model that is a LoRA adapter; {what} is none, or cannot be read. Train it with "
            "recipes/reward_model.py --use_peft --lora_task_type SEQ_CLS, and give its folder as --reward_model_path."
        )


def _check_policy(has_adapter: bool, what: str) -> None:
    if not has_adapter:
        raise ValueError(f"--one_base on the whole model {what} needs --use_peft, and its settings (lora_r, ...).")


def load_roles(reward: str, policy: str, model_args: Any, init: dict[str, Any]) -> Any:
    """RoleAdapters of a policy (an SFT adapter, or a whole model as base) and a reward adapter.

    Each is a folder, or a name on the hub. `init` goes to `from_pretrained` of the base.

    Raises:
        ValueError: the reward model is not an adapter, or there is neither an SFT adapter nor a LoRA setting.
    """
    from peft import PeftConfig
    from trl import get_peft_config, get_quantization_config

    from instruct_trl import RoleAdapters

    _check_reward(names_adapter(reward), reward)
    sft = policy if names_adapter(policy) else None
    _check_policy(sft is not None or model_args.use_peft, policy)
    quantization = get_quantization_config(model_args)
    base = policy
    if sft is not None:
        trained_on = PeftConfig.from_pretrained(sft)
        base = str(trained_on.base_model_name_or_path)
        init = {"revision": trained_on.revision, **init}
    return RoleAdapters(
        base,
        sft,
        reward,
        quantization,
        cast("LoraConfig | None", get_peft_config(model_args)),
        **init,
    )
