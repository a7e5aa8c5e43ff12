"""Step 2a: sample K answers a prompt from the SFT model and have a labeler rank them.

    accelerate launch recipes/sample.py                               # the demo
    accelerate launch recipes/sample.py --model_name_or_path M --dataset_name prompts.jsonl --labeler my.module:score

The labeler is a program, `(prompts, completions) -> scores`. For people, `--labeler none` writes the answers without
ranks: add a `ranks` list (1 is best, ties allowed) to each row and hand the file to recipes/reward_model.py.
"""

from dataclasses import dataclass, field

from instruct_trl.pipeline.arguments import RunArguments, parse_recipe, settings_of


@dataclass
class SampleArguments(RunArguments):
    """What to sample, and who ranks."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The sampler. Default: <run_dir>/sft."})
    num_completions: int = field(default=4, metadata={"help": "K: answers a prompt (paper: 4 to 9)."})
    max_completion_length: int = field(default=1024, metadata={"help": "Longest answer in tokens (paper: 1k)."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    batch_size: int = field(default=64, metadata={"help": "Answers sampled at once."})
    labeler: str = field(default="demo", metadata={"help": "'demo', 'none', or 'module:function' of your own."})
    output_dir: str | None = field(default=None, metadata={"help": "Default: <run_dir>/rankings."})
    bf16: bool = field(default=False, metadata={"help": "Sample under bf16 autocast."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})


def main(argv: list[str] | None = None) -> str:
    """Run the stage; returns its folder."""
    from instruct_trl.memory import dry_run
    from instruct_trl.pipeline.sampling import sample_rankings
    from instruct_trl.pipeline.stage import run_stage

    (run,) = parse_recipe((SampleArguments,), "sample", __doc__, argv)
    if run.dry_run:
        sampler = (run.model_name_or_path, run.run / "sft", run.demo_model)
        dry_run.sampling(
            "sample", {"sampler": sampler}, batch_size=run.batch_size,
            max_completion_length=run.max_completion_length, bf16=run.bf16, device_memory_gb=run.device_memory_gb,
        )  # fmt: skip
    folder = run.folder("rankings")
    run_stage(folder, "Rankings", settings_of(run), lambda _: sample_rankings(run, folder), resume=False)
    return str(folder)


if __name__ == "__main__":
    main()
