"""PPO reaches a ceiling that is known in advance, and stays there."""

import pytest
from datasets import Dataset

from instruct_trl import PPOPtxConfig, PPOPtxTrainer, value_model_from_reward_model


@pytest.mark.slow
def test_ppo_reaches_the_ceiling_of_1(tmp_path, policy, reward_model, tokenizer):
    """The reward is the share of the answer's tokens with an even id: about 1/2 by chance, 1 at best."""

    def even(prompts, completions, completion_ids, **_):
        return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]

    args = PPOPtxConfig(
        str(tmp_path),
        ptx_coef=0.0,
        generation_batch_size=64,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        total_episodes=64 * 60,
        max_completion_length=6,
        learning_rate=3e-3,  # at 1e-2 single iterations fall below the plateau, at 0.96
        value_learning_rate=1e-2,
        warmup_iterations=2,
        beta=0.0,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    prompts = Dataset.from_dict({"prompt": [f"{i}" for i in range(64)]})
    value_model = value_model_from_reward_model(reward_model)
    trainer = PPOPtxTrainer(policy, even, args, prompts, processing_class=tokenizer, value_model=value_model)
    trainer.train()
    scores = [row["score"] for row in trainer.state.log_history if "score" in row]
    assert 0.4 < scores[0] < 0.6
    assert min(scores[-10:]) > 0.97
