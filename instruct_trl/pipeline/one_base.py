"""What `recipes/ppo_ptx.py` hands to its trainer: models of their own, or roles on one base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from instruct_trl.models.reward_loading import names_adapter
from instruct_trl.pipeline.run import reward_path, rewards_with_labeler

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


def load_roles(reward: str, policy: str, model_args: Any, init: dict[str, Any]) -> Any:
    """RoleAdapters of a policy (an SFT adapter, or a whole model as base) and a reward adapter.

    Each is a folder, or a name on the hub. `init` goes to `from_pretrained` of the base.

    Raises:
        ValueError: the reward model is not an adapter, or there is neither an SFT adapter nor a LoRA setting.
    """
    from peft import PeftConfig
    from trl import get_peft_config, get_quantization_config

    from instruct_trl import RoleAdapters

    if not names_adapter(reward):
        raise ValueError(
            f"--one_base needs a reward model that is a LoRA adapter; {reward} is none, or cannot be read. Train it "
            "with recipes/reward_model.py --use_peft --lora_task_type SEQ_CLS."
        )
    sft = policy if names_adapter(policy) else None
    if sft is None and not model_args.use_peft:
        raise ValueError(f"--one_base on the whole model {policy} needs --use_peft, and its settings (lora_r, ...).")
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
