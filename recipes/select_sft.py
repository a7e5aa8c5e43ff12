"""Step 2c: choose among the SFT run's checkpoints the one that the reward model scores highest, as the paper does.

accelerate launch recipes/select_sft.py                           # the demo
accelerate launch recipes/select_sft.py --sft_path out --reward_model_path rm --dataset_name prompts.jsonl
"""

from pathlib import Path

from instruct_trl.recipes import EXAMPLE

from instruct_trl.memory import dry_run
from instruct_trl.pipeline.arguments import parse_recipe, settings_of
from instruct_trl.pipeline.functions import prepare_data
from instruct_trl.pipeline.selecting import SelectArguments, select_and_copy
from instruct_trl.pipeline.stage import run_stage


def main(argv: list[str] | None = None) -> str:
    """Run the stage; returns its folder."""
    (run,) = parse_recipe((SelectArguments,), "select_sft", __doc__, argv, EXAMPLE / "select_sft.yaml")
    if run.dry_run:
        checkpoints = sorted(Path(run.sft_path or run.run / "sft").glob("checkpoint-*"))
        checkpoint = {"checkpoint": [*checkpoints, *run.models(run.sft_path, "sft")]}
        reward_model = run.models(run.reward_model_path, "reward_model")
        dry_run.sampling("select_sft", checkpoint, reward_model=reward_model, **run.sizes)
    prepare_data(run)
    folder = run.folder("selected_sft")
    run_stage(folder, "SFT selection", settings_of(run), lambda _: select_and_copy(run, folder), resume=False)
    return str(folder)


if __name__ == "__main__":
    main()
