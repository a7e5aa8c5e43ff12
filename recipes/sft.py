"""Step 1: supervised fine-tuning on demonstrations, every epoch's checkpoint kept (Ouyang et al. 2022, section 3.5).

accelerate launch recipes/sft.py                                  # the demo: SmolLM2 on film reviews
accelerate launch recipes/sft.py --model_name_or_path M --dataset_name D --output_dir out --config my.yaml
"""

from dataclasses import dataclass, field
from pathlib import Path

from instruct_trl.recipes import EXAMPLE

from instruct_trl.pipeline.arguments import RunArguments, parse_recipe, settings_of


@dataclass
class SFTArguments(RunArguments):
    """Data of `recipes/sft.py`: `prompt` and `completion` columns (or TRL's other SFT formats)."""

    pretraining_dataset_name: str | None = field(default=None, metadata={"help": "Texts to mix in (`text`)."})


def main(argv: list[str] | None = None, stage: str = "sft") -> str:
    """Run the stage; returns its folder."""
    from trl import ModelConfig, get_peft_config, get_quantization_config

    from instruct_trl import InstructSFTConfig, InstructSFTTrainer
    from instruct_trl.memory import dry_run
    from instruct_trl.pipeline import rows, training
    from instruct_trl.pipeline.stage import run_stage

    types = (SFTArguments, InstructSFTConfig, ModelConfig)
    run, args, model = parse_recipe(types, "sft", __doc__, argv, EXAMPLE / "sft.yaml")
    if run.dry_run:
        start = run.models(model.model_name_or_path)
        dry_run.training("sft", args, model, start=start, device_memory_gb=run.device_memory_gb)
    training.prepare_output(args, run, stage)
    texts = run.pretraining_dataset_name

    def body(checkpoint: str | None) -> dict:
        train, test = rows.train_and_test(run)
        rows.evaluate_held_out(args, test)
        trainer = InstructSFTTrainer(
            training.named_model(model),
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
