"""Step 1: supervised fine-tuning on demonstrations, every epoch's checkpoint kept (Ouyang et al. 2022, section 3.5).

accelerate launch recipes/sft.py                                  # the demo: SmolLM2 on film reviews
accelerate launch recipes/sft.py --model_name_or_path M --dataset_name D --output_dir out --config my.yaml
"""

from dataclasses import dataclass, field
from pathlib import Path

from instruct_trl.pipeline.arguments import RunArguments, parse_recipe, settings_of


@dataclass
class SFTArguments(RunArguments):
    """Data of `recipes/sft.py`: `prompt` and `completion` columns (or TRL's other SFT formats)."""

    pretraining_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Texts for pretraining_fraction > 0 (`text`). Default, on the demo's data: its novels."},
    )


def main(argv: list[str] | None = None, stage: str = "sft") -> str:
    """Run the stage; returns its folder."""
    from trl import ModelConfig, get_peft_config, get_quantization_config

    from instruct_trl import InstructSFTConfig, InstructSFTTrainer
    from instruct_trl.memory import dry_run
    from instruct_trl.pipeline import run as pipeline
    from instruct_trl.pipeline.assets import base_model
    from instruct_trl.pipeline.stage import run_stage

    run, args, model = parse_recipe((SFTArguments, InstructSFTConfig, ModelConfig), "sft", __doc__, argv)
    if run.dry_run:
        start = (model.model_name_or_path, run.demo_model)
        dry_run.training("sft", args, model, start=start, device_memory_gb=run.device_memory_gb)
    pipeline.prepare_output(args, run, stage)

    def body(checkpoint: str | None) -> dict:
        texts = pipeline.pretraining_texts(run, "pretraining_fraction") if args.pretraining_fraction else None
        train, test = pipeline.demo_or_own(run, "demonstrations")
        pipeline.evaluate_held_out(args, test)
        trainer = InstructSFTTrainer(
            model.model_name_or_path or str(base_model()),
            args,
            train_dataset=train,
            eval_dataset=test if args.eval_strategy != "no" else None,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
            pretraining_dataset=texts,
        )
        pipeline.quiet_progress(trainer, ["loss", "eval_loss", "eval_rm_score"])
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or checkpoint)
        return pipeline.finish_training(trainer, run.dataset_name)

    run_stage(Path(args.output_dir), "SFT" if stage == "sft" else "RL init", settings_of(run, args, model), body)
    return args.output_dir


if __name__ == "__main__":
    main()
