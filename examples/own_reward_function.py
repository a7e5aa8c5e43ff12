"""PPO with a critic on a reward function of your own: no reward model, no pretraining text.

    python examples/own_reward_function.py MODEL [OUTPUT]

MODEL is a causal language model, a folder or a hub name. The reward is any TRL reward function: it gets `prompts`,
`completions`, `completion_ids` and the dataset's other columns, and returns a score for each completion.
"""

import sys

from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from instruct_trl import PPOPtxConfig, PPOPtxTrainer

OPENINGS = ["The weather today", "My favourite book", "In the old town", "Once upon a time"]


def few_long_words(prompts: list[str], completions: list[str], **kwargs) -> list[float]:
    """Minus the share of words of more than six letters."""
    words = [completion.split() for completion in completions]
    return [-sum(len(word) > 6 for word in row) / max(len(row), 1) for row in words]


def main(model: str, output: str = "own-reward") -> str:
    """Train for 64 episodes; returns the folder of the policy."""
    trainer = PPOPtxTrainer(
        model,
        few_long_words,
        PPOPtxConfig(
            output,
            ptx_coef=0,  # plain PPO: no pretraining text
            total_episodes=64,
            generation_batch_size=16,  # 16 episodes an iteration, in 2 minibatches of 4 × 2
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_completion_length=16,
            warmup_iterations=1,
            save_strategy="no",
            report_to="none",
        ),
        Dataset.from_dict({"prompt": OPENINGS * 16}),
        # A function has no weights to start the critic from: take the policy's, with a new scalar head.
        value_model=AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype="float32"),
    )
    trainer.train()
    trainer.save_model()  # policy/, value/ and ema/
    return f"{output}/policy"


if __name__ == "__main__":
    main(*sys.argv[1:])
