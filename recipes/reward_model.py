"""Step 2b: train the reward model on rankings of K answers a prompt (Eq. 1), and set its bias.

    accelerate launch recipes/reward_model.py                         # the demo
    accelerate launch recipes/reward_model.py --model_name_or_path M --dataset_name rankings.jsonl --output_dir rm

Data: `prompt`, `completions` (a list) and `ranks` (1 is best) or `scores`; or `prompt`, `chosen`, `rejected`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from instruct_trl.pipeline.arguments import RunArguments, parse_recipe, settings_of


@dataclass
class RewardArguments(RunArguments):
    """Data of `recipes/reward_model.py`."""

    demonstrations_name: str | None = field(
        default=None, metadata={"help": "`prompt`, `completion` rows that shall score 0 on average (the reward bias)."}
    )


def main(argv: list[str] | None = None) -> str:
    """Run the stage; returns its folder."""
    from trl import ModelConfig, get_peft_config, get_quantization_config

    from instruct_trl import RankingRewardConfig, RankingRewardTrainer
    from instruct_trl.pipeline.run import demo_or_own, finish_training, prepare_output, quiet_progress, rankings
    from instruct_trl.pipeline.stage import run_stage

    run, args, model = parse_recipe((RewardArguments, RankingRewardConfig, ModelConfig), "reward_model", __doc__, argv)
    prepare_output(args, run, "reward_model")

    def body(checkpoint: str | None) -> dict:
        train, test = rankings(run)
        trainer = RankingRewardTrainer(
            model.model_name_or_path or str(run.run / "sft"),
            args,
            train_dataset=train,
            eval_dataset=test,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
        quiet_progress(trainer, ["loss", "pair_accuracy", "eval_pair_accuracy"])
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or checkpoint)
        metrics = trainer.evaluate() if test is not None else {}
        if run.demonstrations_name or run.dataset_name is None:
            trainer.normalize(demo_or_own(run, "demonstrations", run.demonstrations_name)[0])
        shown = {name: metrics[f"eval_{name}"] for name in ("pair_accuracy", "kendall_tau") if metrics}
        return finish_training(trainer, run.dataset_name) | shown

    run_stage(Path(args.output_dir), "Reward model", settings_of(run, args, model), body)
    return args.output_dir


if __name__ == "__main__":
    main()
