"""SFT whose checkpoint is chosen by a reward model, as the paper does, and the same choice made after the fact.

    python examples/sft_selection.py MODEL REWARD_MODEL DEMONSTRATIONS.jsonl [OUTPUT]

DEMONSTRATIONS has `prompt` and `completion`, text or messages; a tenth of it is held out for the selection.
"""

import sys

from datasets import load_dataset

from instruct_trl import InstructSFTConfig, InstructSFTTrainer, select_checkpoint


def main(model: str, reward_model: str, demonstrations: str, output: str = "sft", **settings) -> str:
    """Train, select; returns the folder of the chosen checkpoint. `settings` override `InstructSFTConfig`."""
    data = load_dataset("json", data_files=demonstrations, split="train").train_test_split(0.1, seed=0)
    trainer = InstructSFTTrainer(
        model,
        InstructSFTConfig(output, **{"num_train_epochs": 4, "report_to": "none", **settings}),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        # At each evaluation: answer the prompts, score the answers, log eval_rm_score, keep the best checkpoint by it.
        reward_model=reward_model,
        selection_prompts=data["test"].select_columns("prompt"),
    )
    trainer.train()
    trainer.save_model()  # the best checkpoint by RM score, loaded at the end

    # The same over a finished run, whoever trained it; writes selection.json.
    result = select_checkpoint(
        output,
        reward_model,
        data["test"],
        validation_dataset=data["test"],
        max_new_tokens=trainer.args.selection_max_new_tokens,
        output_dir=f"{output}/selection",
    )
    return result.best


if __name__ == "__main__":
    main(*sys.argv[1:])
