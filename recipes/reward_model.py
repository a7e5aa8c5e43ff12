"""Step 2b: train the reward model on rankings of K answers per prompt (Eq. 1), and set its bias.

    accelerate launch recipes/reward_model.py                         # the demo
    accelerate launch recipes/reward_model.py --model_name_or_path M --dataset_name rankings.jsonl --output_dir rm

Data: `prompt`, `completions` (a list) and `ranks` (1 is best), `scores` or `pairs`; or `prompt`, `chosen`, `rejected`.
Held-out rankings give <output_dir>/evaluation/report.html: accuracy, calibration, length bias, scores.
"""

from pathlib import Path

from instruct_trl.recipes import EXAMPLE
from trl import ModelConfig

from instruct_trl import RankingRewardConfig
from instruct_trl.data.ranking import shuffle_ranks
from instruct_trl.memory import dry_run
from instruct_trl.pipeline import rows, training
from instruct_trl.pipeline.arguments import parse_recipe, settings_of
from instruct_trl.pipeline.rewarding import RewardArguments, labelers_left_out, reward_trainer, write_page
from instruct_trl.pipeline.stage import run_stage


def main(argv: list[str] | None = None) -> str:
    """Run the stage; returns its folder."""
    types = (RewardArguments, RankingRewardConfig, ModelConfig)
    run, args, model = parse_recipe(types, "reward_model", __doc__, argv, EXAMPLE / "reward_model.yaml")
    if run.dry_run:
        start = run.models(model.model_name_or_path, "sft")
        dry_run.training("reward_model", args, model, start=start, scores=True, device_memory_gb=run.device_memory_gb)
    training.prepare_output(args, run, "reward_model")

    def body(checkpoint: str | None) -> dict:
        train, test = rows.train_and_test(run, rows.rankings_of(run))
        if run.shuffle_ranks:
            train = shuffle_ranks(train, args.seed, "the train dataset")
        base = model.model_name_or_path or str(run.run / "sft")
        folds = labelers_left_out(base, args, model, train, run.labeler_folds) if run.labeler_folds else None
        rows.evaluate_held_out(args, test)
        trainer = reward_trainer(base, args, model, train, test)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or checkpoint)
        if run.demonstrations_name:
            trainer.normalize(rows.further_rows(run, run.demonstrations_name)[0])
        metrics = trainer.evaluate() if test is not None else {}
        if metrics:
            write_page(trainer, args.output_dir, run.labeler_in_words, folds, train, test)
        shown = {name: metrics[f"eval_{name}"] for name in ("pair_accuracy", "kendall_tau") if metrics}
        return training.finish_training(trainer, run.dataset_name) | shown

    title = f"Reward model{' on shuffled ranks' * run.shuffle_ranks}"
    run_stage(Path(args.output_dir), title, settings_of(run, args, model), body)
    return args.output_dir


if __name__ == "__main__":
    main()
