"""What the PPO tests share: prompts, texts, and a trainer small enough to train in a second."""

from datasets import Dataset

from instruct_trl import PPOPtxConfig, PPOPtxTrainer

PROMPTS = Dataset.from_dict({"prompt": [f"hello {i}" * (1 + i % 2) for i in range(16)]})
TEXTS = Dataset.from_dict({"text": [f"some text number {i} " * (1 + i % 3) for i in range(64)]})


def make(
    tmp_path,
    policy,
    reward,
    tokenizer,
    *,
    value_model=None,
    pretraining_dataset=TEXTS,
    prompts=PROMPTS,
    ref_model=None,
    role_adapters=None,
    peft_config=None,
    quantization_config=None,
    eval_prompts=None,
    **kwargs,
):
    settings = {
        "generation_batch_size": 16,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "total_episodes": 32,
        "max_completion_length": 8,
        "ptx_ratio": 2,
        "ptx_max_length": 32,
        "learning_rate": 1e-3,
        "warmup_iterations": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    args = PPOPtxConfig(str(tmp_path), **{"report_to": "none", **settings, **kwargs})
    return PPOPtxTrainer(
        policy,
        reward,
        args,
        prompts,
        eval_prompts,
        processing_class=tokenizer,
        value_model=value_model,
        ref_model=ref_model,
        role_adapters=role_adapters,
        peft_config=peft_config,
        quantization_config=quantization_config,
        pretraining_dataset=pretraining_dataset if args.ptx_coef else None,
    )
