"""Step 2c: choose among the SFT run's checkpoints the one that the reward model scores highest, as the paper does.

accelerate launch recipes/select_sft.py                           # the demo
accelerate launch recipes/select_sft.py --sft_path out --reward_model_path rm --dataset_name prompts.jsonl
"""

from dataclasses import dataclass, field
from pathlib import Path

from instruct_trl.pipeline.arguments import RunArguments, parse_recipe, settings_of


@dataclass
class SelectArguments(RunArguments):
    """What to choose from, and by what."""

    sft_path: str | None = field(default=None, metadata={"help": "Run with checkpoints. Default: <run_dir>/sft."})
    reward_model_path: str | None = field(default=None, metadata={"help": "Default: <run_dir>/reward_model."})
    max_completion_length: int = field(default=1024, metadata={"help": "Longest answer in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    batch_size: int = field(default=64, metadata={"help": "Answers sampled at once."})
    output_dir: str | None = field(default=None, metadata={"help": "Default: <run_dir>/selected_sft."})
    bf16: bool = field(default=False, metadata={"help": "Sample under bf16 autocast."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling, the same for every checkpoint."})


def main(argv: list[str] | None = None) -> str:
    """Run the stage; returns its folder."""
    from instruct_trl.memory import dry_run
    from instruct_trl.pipeline.selecting import select_and_copy
    from instruct_trl.pipeline.stage import run_stage

    (run,) = parse_recipe((SelectArguments,), "select_sft", __doc__, argv)
    if run.dry_run:
        sft = Path(run.sft_path or run.run / "sft")
        checkpoint = (*sorted(sft.glob("checkpoint-*")), run.sft_path, sft, run.demo_model)
        reward = (run.reward_model_path, run.run / "reward_model", run.demo_model)
        dry_run.sampling(
            "select_sft", {"checkpoint": checkpoint}, reward_model=reward, batch_size=run.batch_size,
            max_completion_length=run.max_completion_length, bf16=run.bf16, device_memory_gb=run.device_memory_gb,
        )  # fmt: skip
    folder = run.folder("selected_sft")
    run_stage(folder, "SFT selection", settings_of(run), lambda _: select_and_copy(run, folder), resume=False)
    return str(folder)


if __name__ == "__main__":
    main()
