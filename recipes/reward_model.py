"""Step 2b: train the reward model on rankings of K answers per prompt (Eq. 1), and set its bias.

    accelerate launch recipes/reward_model.py                         # the demo
    accelerate launch recipes/reward_model.py --model_name_or_path M --dataset_name rankings.jsonl --output_dir rm

Data: `prompt`, `completions` (a list) and `ranks` (1 is best), `scores` or `pairs`; or `prompt`, `chosen`, `rejected`.
Held-out rankings give <output_dir>/evaluation/report.html: accuracy and its floors, calibration, length bias, scores.
With --learning_curve 0.25 0.5 1.0 the page also says what twice the labels would bring.
"""

from copy import deepcopy
from functools import cache
from pathlib import Path

from instruct_trl.recipes import EXAMPLE
from trl import ModelConfig

from instruct_trl import RankingRewardConfig
from instruct_trl.memory import dry_run
from instruct_trl.pipeline import rewarding, rows, training
from instruct_trl.pipeline.arguments import parse_recipe, settings_of
from instruct_trl.pipeline.stage import run_stage


def main(argv: list[str] | None = None) -> str:
    """Run the stage; returns its folder."""
    types = (rewarding.RewardArguments, RankingRewardConfig, ModelConfig)
    run, args, model = parse_recipe(types, "reward_model", __doc__, argv, EXAMPLE / "reward_model.yaml")
    if run.dry_run:
        start = run.models(model.model_name_or_path, "sft")
        dry_run.training("reward_model", args, model, start=start, scores=True, device_memory_gb=run.device_memory_gb)
    training.prepare_output(args, run, "reward_model")
    base = model.model_name_or_path or str(run.run / "sft")
    rankings = cache(lambda: rewarding.rankings_to_learn(run, args.seed))

    def body(checkpoint: str | None) -> dict:
        train, test = rankings()
        rewarding.subsets_of(run, args, train, test)  # refuses bad shares before anything is trained
        folds = rewarding.labelers_left_out(base, args, model, train, run.labeler_folds)
        rows.evaluate_held_out(args, test)
        trainer = rewarding.reward_trainer(base, args, model, train, test)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or checkpoint)
        if run.demonstrations_name:
            trainer.normalize(rows.further_rows(run, run.demonstrations_name)[0])
        metrics = trainer.evaluate() if test is not None else {}
        if metrics:
            rewarding.write_page(trainer, args.output_dir, run.notes, folds, train, test)
        shown = {name: metrics[f"eval_{name}"] for name in ("pair_accuracy", "kendall_tau") if metrics}
        return training.finish_training(trainer, run.dataset_name) | shown

    untouched = deepcopy(args)  # a training changes its settings
    run_stage(Path(args.output_dir), run.title, settings_of(run, args, model), body)
    if run.learning_curve and not run.shuffle_ranks:
        rewarding.train_on_shares(base, run, untouched, model, *rankings())
    return args.output_dir


if __name__ == "__main__":
    main()
