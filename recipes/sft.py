"""Step 1: supervised fine-tuning on demonstrations, every epoch's checkpoint kept (Ouyang et al. 2022, section 3.5).

accelerate launch recipes/sft.py                                  # the demo: SmolLM2 on sentences that people wrote
accelerate launch recipes/sft.py --model_name_or_path M --dataset_name D --output_dir out --config my.yaml
"""

from dataclasses import dataclass
from pathlib import Path

from instruct_trl.recipes import EXAMPLE
from trl import ModelConfig, get_peft_config, get_quantization_config

from instruct_trl import InstructSFTConfig, InstructSFTTrainer
from instruct_trl.memory import dry_run
from instruct_trl.pipeline import rows, training
from instruct_trl.pipeline.arguments import RunArguments, parse_recipe, setting, settings_of
from instruct_trl.pipeline.stage import run_stage


@dataclass
class SFTArguments(RunArguments):
    """Data of `recipes/sft.py`: `prompt` and `completion` columns (or TRL's other SFT formats)."""

    pretraining_dataset_name: str | None = setting(None, "Texts to mix in (`text`).")


def main(argv: list[str] | None = None, stage: str = "sft") -> str:
    """Run the stage; returns its folder."""
    types = (SFTArguments, InstructSFTConfig, ModelConfig)
    run, args, model = parse_recipe(types, "sft", __doc__, argv, EXAMPLE / "sft.yaml")
    start, texts = model.model_name_or_path, run.pretraining_dataset_name
    if run.dry_run:
        dry_run.training("sft", args, model, start=run.models(start), device_memory_gb=run.device_memory_gb)
    training.prepare_output(args, run, stage)

    def body(checkpoint: str | None) -> dict:
        train, test = rows.train_and_test(run)
        rows.evaluate_held_out(args, test)
        if not start:
            raise ValueError("There is no model to start from. Name one: --model_name_or_path.")
        trainer = InstructSFTTrainer(
            start,
            args,
            train_dataset=train,
            eval_dataset=test if args.eval_strategy != "no" else None,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
            pretraining_dataset=rows.pretraining_texts(run, texts, "pretraining_fraction", args.pretraining_fraction),
        )
        training.quiet_progress(trainer, ["loss", "eval_loss", "eval_rm_score"])
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or checkpoint)
        return training.finish_training(trainer, run.dataset_name)

    run_stage(Path(args.output_dir), "SFT" if stage == "sft" else "RL init", settings_of(run, args, model), body)
    return args.output_dir


if __name__ == "__main__":
    main()
