"""Evaluate base, SFT and PPO-ptx against SFT on held-out prompts, and write report.md and report.html with pictures.

accelerate launch recipes/evaluate.py                                    # the demo
accelerate launch recipes/evaluate.py --tasks hellaswag boolq squad      # and what alignment costs elsewhere
accelerate launch recipes/evaluate.py --judges http://localhost:8000/v1 people --judge_model NAME --questions likert
accelerate launch recipes/evaluate.py --run_dir outputs/mine --dataset_name prompts.jsonl --labeler my.module:score
accelerate launch recipes/evaluate.py --other_models prompted=BASE --prefixes prompted=shots.txt --output_dir DIR
Answers are sampled once; judges and tasks can be added in later runs. docs/guides/evaluation.md is the guide.
"""

from dataclasses import dataclass, field

from instruct_trl.pipeline.arguments import RunArguments, parse_recipe, settings_of
from instruct_trl.pipeline.benchmarking import TaskArguments
from instruct_trl.pipeline.judging import JudgeArguments


@dataclass
class EvaluateArguments(RunArguments):
    """What is compared, and by whom."""

    base_model: str | None = field(default=None, metadata={"help": "Default: the demo's, on its data alone."})
    sft_model: str | None = field(default=None, metadata={"help": "Baseline; default: <run_dir>/selected_sft/model."})
    ppo_model: str | None = field(default=None, metadata={"help": "Default: <run_dir>/ppo_ptx/policy."})
    other_models: list[str] = field(
        default_factory=list, metadata={"help": "More to compare: NAME=PATH, such as PPO=..."}
    )
    prefixes: list[str] = field(default_factory=list, metadata={"help": "Text put before their prompts: NAME=FILE."})
    other_runs: list[str] = field(default_factory=list, metadata={"help": "Folders of PPO runs to draw: NAME=PATH."})
    reward_model_path: str | None = field(default=None, metadata={"help": "Default: <run_dir>/reward_model."})
    pretraining_dataset_name: str | None = field(default=None, metadata={"help": "Held-out texts, for a loss on them."})
    labeler: str = field(default="demo", metadata={"help": "The judge: 'demo', or 'module:function' of your own."})
    checkpoint_prompts: str | None = field(
        default=None, metadata={"help": "Score every PPO checkpoint on these prompts: 'demo', or a dataset."}
    )
    max_completion_length: int = field(default=1024, metadata={"help": "Longest answer in tokens."})
    max_text_length: int = field(default=256, metadata={"help": "Tokens of a held-out pretraining text."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    batch_size: int = field(default=64, metadata={"help": "Answers sampled at once."})
    output_dir: str | None = field(default=None, metadata={"help": "Default: <run_dir>/evaluation; report: <run_dir>."})
    bf16: bool = field(default=False, metadata={"help": "Sample and score under bf16 autocast."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling, the same for every model."})


def main(argv: list[str] | None = None) -> str:
    """Run the stage and write the report; returns the report's path."""
    from instruct_trl.memory import dry_run
    from instruct_trl.pipeline.evaluating import check_evaluation, evaluate_models
    from instruct_trl.pipeline.evaluation_report import judged_report
    from instruct_trl.pipeline.stage import run_stage

    run, judges, tasks = parse_recipe((EvaluateArguments, JudgeArguments, TaskArguments), "evaluate", __doc__, argv)
    if run.dry_run:
        sft = (run.sft_model, run.run / "selected_sft" / "model", run.demo_model)
        dry_run.sampling(
            "evaluate", {"model": (run.ppo_model, *sft), "reference": sft},
            reward_model=(run.reward_model_path, run.run / "reward_model", run.demo_model), batch_size=run.batch_size,
            max_completion_length=run.max_completion_length, bf16=run.bf16, device_memory_gb=run.device_memory_gb,
        )  # fmt: skip
    folder = run.folder("evaluation")
    tried = check_evaluation(run, judges, tasks)
    run_stage(folder, "Evaluation", settings_of(run), lambda _: evaluate_models(run, folder, tried), resume=False)
    return judged_report(run, folder, tasks, judges)


if __name__ == "__main__":
    main()
