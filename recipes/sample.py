"""Step 2a: sample K answers per prompt from the SFT model and have a labeler rank them.

    accelerate launch recipes/sample.py                               # the demo
    accelerate launch recipes/sample.py --model_name_or_path M --dataset_name prompts.jsonl --labeler my.module:score

The labeler is a program, `(prompts, completions) -> scores`. For people, `--labeler none` writes the answers without
ranks: add a `ranks` list (1 is best, ties allowed) to each row and hand the file to recipes/reward_model.py.
Prompts of a held-out split become held-out rankings, in test.jsonl.
"""

from instruct_trl.recipes import EXAMPLE

from instruct_trl.memory import dry_run
from instruct_trl.pipeline.arguments import parse_recipe, settings_of
from instruct_trl.pipeline.functions import prepare_data
from instruct_trl.pipeline.sampling import SampleArguments, sample_rankings
from instruct_trl.pipeline.stage import run_stage


def main(argv: list[str] | None = None) -> str:
    """Run the stage; returns its folder."""
    (run,) = parse_recipe((SampleArguments,), "sample", __doc__, argv, EXAMPLE / "sample.yaml")
    if run.dry_run:
        dry_run.sampling("sample", {"sampler": run.models(run.model_name_or_path, "sft")}, **run.sizes)
    prepare_data(run)
    folder = run.folder("rankings")
    run_stage(folder, "Rankings", settings_of(run), lambda _: sample_rankings(run, folder), resume=False)
    return str(folder)


if __name__ == "__main__":
    main()
