"""Step 3: PPO with a critic and pretraining gradients (Eq. 2). The main job: it first does whatever is missing.

accelerate launch recipes/ppo_ptx.py                              # the demo, all stages, ending in a report
accelerate launch recipes/ppo_ptx.py --model_name_or_path P --reward_model_path R --dataset_name prompts.jsonl \\
    --pretraining_dataset_name texts.jsonl                        # or --ptx_coef 0, for plain PPO
"""

from dataclasses import dataclass, field
from pathlib import Path

from instruct_trl.pipeline.arguments import RunArguments, parse_recipe, settings_of


@dataclass
class PPOPtxArguments(RunArguments):
    """Data and models of `recipes/ppo_ptx.py`; what is not given is taken from the run, and made if it is missing."""

    reward_model_path: str | None = field(default=None, metadata={"help": "Default: <run_dir>/reward_model."})
    pretraining_dataset_name: str | None = field(default=None, metadata={"help": "Texts for the γ term (`text`)."})
    one_base: bool = field(default=False, metadata={"help": "All four roles as adapters on one base (RoleAdapters)."})
    labeler: str = field(
        default="demo",
        metadata={"help": "Logged beside the reward, never trained on: 'demo', 'none', 'module:function'."},
    )


def main(argv: list[str] | None = None) -> str:
    """Run the missing stages, PPO-ptx and, on the demo's data, the evaluation; returns the stage's folder."""
    from trl import ModelConfig

    from instruct_trl import PPOPtxConfig, PPOPtxTrainer
    from instruct_trl.memory import dry_run
    from instruct_trl.pipeline import run as pipeline
    from instruct_trl.pipeline.one_base import check_one_base, models_of
    from instruct_trl.pipeline.stage import run_stage

    run, args, model = parse_recipe((PPOPtxArguments, PPOPtxConfig, ModelConfig), "ppo_ptx", __doc__, argv)
    check_one_base(run, model)
    if run.dry_run:
        policies = (model.model_name_or_path, run.run / "selected_sft" / "model", run.demo_model)
        dry_run.ppo(
            "ppo_ptx", args, model, policy=policies,
            reward_model=(run.reward_model_path, run.run / "reward_model"), one_base=run.one_base,
            device_memory_gb=run.device_memory_gb,
        )  # fmt: skip
    pipeline.prepare_output(args, run, "ppo_ptx")
    policy = pipeline.make_what_is_missing(run, model.model_name_or_path)

    def body(checkpoint: str | None) -> dict:
        trainer = PPOPtxTrainer(
            pretraining_dataset=pipeline.pretraining_texts(run, "ptx_coef") if args.ptx_coef else None,
            train_dataset=pipeline.prompts_for(run, "rl"),
            **models_of(run, args, model, policy),
            args=args,
        )
        pipeline.quiet_progress(trainer, ["episodes", "score", "rewards/labeler/mean", "kl", "ptx_loss"])
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or checkpoint)
        return pipeline.finish_training(trainer, run.dataset_name)

    run_stage(Path(args.output_dir), "PPO-ptx", settings_of(run, args, model), body)
    if run.dataset_name is None:
        pipeline.run_recipe("evaluate", run)
    return args.output_dir


if __name__ == "__main__":
    main()
