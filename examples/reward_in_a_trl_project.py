"""A reward model from rankings, then as a reward function of TRL's own GRPOTrainer.

    python examples/reward_in_a_trl_project.py MODEL RANKINGS.jsonl DEMONSTRATIONS.jsonl [OUTPUT]

RANKINGS has `prompt`, `completions` (a list) and `ranks` (1 is best, ties allowed); DEMONSTRATIONS has `prompt` and
`completion`. docs/reference/data_format.md says more.
"""

import sys

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from instruct_trl import RankingRewardConfig, RankingRewardTrainer, RewardScorer


def train_reward_model(model: str, rankings: str, demonstrations: str, output: str) -> str:
    """The paper's reward model: Eq. 1 over all pairs of a prompt, one epoch, demonstrations shifted to 0 on average."""
    trainer = RankingRewardTrainer(
        model,
        RankingRewardConfig(output, save_strategy="no", report_to="none"),
        train_dataset=load_dataset("json", data_files=rankings, split="train"),
    )
    trainer.train()
    trainer.normalize(load_dataset("json", data_files=demonstrations, split="train"))
    trainer.save_model()
    return output


def use_in_grpo(model: str, reward_model: str, prompts: str, output: str, max_steps: int = 10) -> None:
    """TRL's GRPO with our scorer: the reward is read at the answer's EOS, and the bias counts."""
    prompt_column = load_dataset("json", data_files=prompts, split="train").select_columns("prompt")
    gpu = torch.accelerator.is_available()
    trainer = GRPOTrainer(
        model,
        RewardScorer(reward_model, batch_size=16),
        GRPOConfig(output, max_steps=max_steps, max_completion_length=32, report_to="none", bf16=gpu, use_cpu=not gpu),
        prompt_column,
    )
    trainer.train()


def main(model: str, rankings: str, demonstrations: str, output: str = "reward-model", max_steps: int = 10) -> str:
    """Train the reward model, use it; returns its folder."""
    folder = train_reward_model(model, rankings, demonstrations, output)
    use_in_grpo(model, folder, rankings, f"{output}-grpo", int(max_steps))
    return folder


if __name__ == "__main__":
    main(*sys.argv[1:])
