"""PPO-ptx in a project that trains with TRL already: the critic starts from the reward model, γ from your own text.

    python examples/ppo_in_a_trl_project.py POLICY REWARD_MODEL PROMPTS.jsonl TEXTS.jsonl [OUTPUT]

POLICY is a causal language model (your SFT model). REWARD_MODEL is a sequence classifier with one label and the
policy's tokenizer, from `trl.RewardTrainer` or `RankingRewardTrainer`. PROMPTS has a `prompt` column, text or messages;
TEXTS has a `text` column: what the policy shall not forget.
"""

import sys

from datasets import load_dataset

from instruct_trl import PPOPtxConfig, PPOPtxTrainer


def main(policy: str, reward_model: str, prompts: str, texts: str, output: str = "ppo-ptx", **settings) -> str:
    """Train; returns the folder of the policy. `settings` override fields of `PPOPtxConfig`."""
    sizes = {
        "generation_batch_size": 64,  # episodes an iteration; the paper's 512 is the default
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,  # 8 × 2 episodes per optimizer step, so 4 steps per iteration
        "max_completion_length": 128,
        "total_episodes": 6400,
        "ptx_coef": 1.0,  # γ; the paper's 27.8 wants text at which the policy has converged, and large batches
        "ptx_ratio": 2,
        "ptx_max_length": 256,
        "report_to": "none",
    }
    trainer = PPOPtxTrainer(
        policy,
        reward_model,
        PPOPtxConfig(output, **{**sizes, **settings}),
        load_dataset("json", data_files=prompts, split="train"),
        pretraining_dataset=load_dataset("json", data_files=texts, split="train"),
    )
    trainer.train()
    trainer.save_model()  # policy/, value/ and ema/, each readable by plain transformers
    return f"{output}/policy"


if __name__ == "__main__":
    main(*sys.argv[1:])
