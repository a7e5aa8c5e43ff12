"""Evaluate base, SFT and PPO-ptx against SFT on held-out prompts, and write report.md and report.html with pictures.

accelerate launch recipes/evaluate.py                                    # the demo
accelerate launch recipes/evaluate.py --tasks hellaswag boolq squad      # and what alignment costs elsewhere
accelerate launch recipes/evaluate.py --judges http://localhost:8000/v1 people --judge_model NAME --questions likert
accelerate launch recipes/evaluate.py --run_dir outputs/mine --dataset_name prompts.jsonl --labeler my.module:score
accelerate launch recipes/evaluate.py --other_models prompted=BASE --prefixes prompted=shots.txt --output_dir DIR
Answers are sampled once; judges and tasks can be added in later runs. docs/guides/evaluation.md is the guide.
"""

from instruct_trl.recipes import EXAMPLE

from instruct_trl.memory import dry_run
from instruct_trl.pipeline.arguments import parse_recipe, settings_of
from instruct_trl.pipeline.benchmarking import TaskArguments, check_tasks
from instruct_trl.pipeline.control import evaluate_control
from instruct_trl.pipeline.evaluating import EvaluateArguments, evaluate_models
from instruct_trl.pipeline.evaluation_report import judged_report
from instruct_trl.pipeline.functions import prepare_data
from instruct_trl.pipeline.judging import JudgeArguments, check_judges
from instruct_trl.pipeline.stage import run_stage


def main(argv: list[str] | None = None) -> str:
    """Run the stage and write the report; returns the report's path."""
    types = (EvaluateArguments, JudgeArguments, TaskArguments)
    run, judges, tasks = parse_recipe(types, "evaluate", __doc__, argv, EXAMPLE / "evaluate.yaml")
    if run.dry_run:
        sft = run.models(run.sft_model, "selected_sft/model")
        reward_model = run.models(run.reward_model_path, "reward_model")
        dry_run.sampling(
            "evaluate", {"model": [run.ppo_model, *sft], "reference": sft}, reward_model=reward_model, **run.sizes
        )
    folder = run.folder("evaluation")
    check_tasks(run, tasks)
    tried = check_judges(run, judges, folder)
    prepare_data(run)
    run_stage(folder, "Evaluation", settings_of(run), lambda _: evaluate_models(run, folder, tried), resume=False)
    evaluate_control(run, folder)
    return judged_report(run, folder, tasks, judges)


if __name__ == "__main__":
    main()
