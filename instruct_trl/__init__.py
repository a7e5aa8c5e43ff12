"""InstructGPT (Ouyang et al. 2022) as a plugin on top of Hugging Face TRL: the public names, nothing else."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name → module that defines it. Nothing heavy is imported until a name is used (PEP 562).
_PUBLIC = {
    "RankingRewardConfig": "instruct_trl.trainers.ranking_reward",
    "RankingRewardTrainer": "instruct_trl.trainers.ranking_reward",
    "InstructSFTConfig": "instruct_trl.trainers.instruct_sft",
    "InstructSFTTrainer": "instruct_trl.trainers.instruct_sft",
    "PPOPtxConfig": "instruct_trl.trainers.ppo_ptx_config",
    "PPOPtxTrainer": "instruct_trl.trainers.ppo_ptx",
    "RewardScorer": "instruct_trl.models.reward",
    "value_model_from_reward_model": "instruct_trl.models.value",
    "RoleAdapters": "instruct_trl.models.role_adapters",
    "select_checkpoint": "instruct_trl.evaluation.selection",
}

__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from instruct_trl.evaluation.selection import select_checkpoint as select_checkpoint
    from instruct_trl.models.reward import RewardScorer as RewardScorer
    from instruct_trl.models.role_adapters import RoleAdapters as RoleAdapters
    from instruct_trl.models.value import value_model_from_reward_model as value_model_from_reward_model
    from instruct_trl.trainers.instruct_sft import InstructSFTConfig as InstructSFTConfig
    from instruct_trl.trainers.instruct_sft import InstructSFTTrainer as InstructSFTTrainer
    from instruct_trl.trainers.ppo_ptx import PPOPtxTrainer as PPOPtxTrainer
    from instruct_trl.trainers.ppo_ptx_config import PPOPtxConfig as PPOPtxConfig
    from instruct_trl.trainers.ranking_reward import RankingRewardConfig as RankingRewardConfig
    from instruct_trl.trainers.ranking_reward import RankingRewardTrainer as RankingRewardTrainer


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'instruct_trl' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")


def __dir__() -> list[str]:
    return sorted(__all__)
