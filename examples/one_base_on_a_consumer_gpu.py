"""PPO-ptx on one consumer GPU: policy, reference, reward model and critic are adapters on one frozen base.

    python examples/one_base_on_a_consumer_gpu.py BASE SFT_ADAPTER REWARD_ADAPTER PROMPTS.jsonl TEXTS.jsonl [OUTPUT]

SFT_ADAPTER and REWARD_ADAPTER are folders that `InstructSFTTrainer` and `RankingRewardTrainer` saved with a LoraConfig
(recipes/sft.py --use_peft; recipes/reward_model.py --use_peft --lora_task_type SEQ_CLS). On a GPU the base is in
4 bits. See docs/guides/one_base.md.
"""

import sys

import torch
from datasets import load_dataset
from transformers import BitsAndBytesConfig

from instruct_trl import PPOPtxConfig, PPOPtxTrainer, RoleAdapters


def main(base: str, sft: str, reward: str, prompts: str, texts: str, output: str = "one-base", **settings) -> str:
    """Train; returns the folder of a standalone policy. `settings` override fields of `PPOPtxConfig`."""
    in_4bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    on_gpu = torch.cuda.is_available()  # there the 4-bit base's other weights, and the KV cache, are bf16
    dtype = torch.bfloat16 if on_gpu else torch.float32
    roles = RoleAdapters(base, sft, reward, in_4bit if on_gpu else None, dtype=dtype)
    sizes = {
        "generation_batch_size": 64,  # episodes an iteration; the paper's 512 is the default
        "local_rollout_forward_batch_size": 8,  # answers generated at once: the KV cache is what fills a small card
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,  # 4 × 4 episodes per optimizer step, so 4 steps per iteration
        "max_completion_length": 128,
        "total_episodes": 6400,
        "learning_rate": 1e-5,  # adapters want more than full fine-tuning
        "value_learning_rate": 2e-5,
        "ptx_coef": 1.0,  # γ; the paper's 27.8 wants text at which the policy has converged, and large batches
        "ptx_ratio": 1,
        "ptx_max_length": 256,
        "report_to": "none",
    }
    trainer = PPOPtxTrainer(
        None,
        args=PPOPtxConfig(output, **{**sizes, **settings}),
        train_dataset=load_dataset("json", data_files=prompts, split="train"),
        pretraining_dataset=load_dataset("json", data_files=texts, split="train"),
        role_adapters=roles,
    )
    trainer.train()
    trainer.save_model()  # policy/, value/ and ema/: adapters in PEFT's format
    roles.merge(f"{output}/merged")  # the policy without PEFT
    return f"{output}/merged"


if __name__ == "__main__":
    main(*sys.argv[1:])
