"""The SFT checkpoint with the highest RM score becomes the run's SFT model (Ouyang et al. 2022, section 3.5)."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from instruct_trl.evaluation.selection import as_prompts, find_checkpoints
from instruct_trl.models.model_files import check_model_path
from instruct_trl.pipeline.arguments import SamplingArguments, setting
from instruct_trl.pipeline.rows import dataset_of, further_rows, prompts_to_judge, trained_on

NOT_OF_THE_MODEL = shutil.ignore_patterns("optimizer*", "scheduler*", "rng_state*", "trainer_state*", "training_args*")


@dataclass
class SelectArguments(SamplingArguments):
    """The checkpoints, and the reward model that chooses."""

    sft_path: str | None = setting(None, "Run with checkpoints. Default: <run_dir>/sft.")
    reward_model_path: str | None = setting(None, "The reward model. Default: <run_dir>/reward_model.")
    demonstrations_name: str | None = setting(
        None, "Demonstrations; their held-out split gives the validation loss of the table."
    )


def select_and_copy(run: SelectArguments, folder: Path) -> dict[str, Any]:
    """Compare the checkpoints, write the table and the picture, copy the best one to `<folder>/model`."""
    from instruct_trl import RewardScorer, select_checkpoint
    from instruct_trl.report.pictures import require_matplotlib
    from instruct_trl.report.selection_report import finding, write_selection

    require_matplotlib()
    sft = run.sft_path or str(run.run / "sft")
    find_checkpoints(sft)
    check_model_path(run.reward_path)
    prompts = as_prompts(prompts_to_judge(run, dataset_of(run)), "The prompts of the selection")
    seen = trained_on(run, prompts, [run.sft_path, run.reward_model_path])
    reward_model = RewardScorer(run.reward_path, batch_size=run.batch_size)
    with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=run.bf16):
        validation = further_rows(run, run.demonstrations_name)[1] if run.demonstrations_name else None
        result = select_checkpoint(sft, reward_model, prompts, validation_dataset=validation, **run.drawn)
    if PartialState().is_main_process:
        write_selection(result, folder)
    if seen:
        with (folder / "selection.md").open("a", encoding="utf-8") as page:
            page.write(f"\nNot held out: {seen['note']}\n")
    PartialState().print(f"   {finding(result)}")
    shutil.copytree(result.best, folder / "model", ignore=NOT_OF_THE_MODEL, dirs_exist_ok=True)
    return {"checkpoint": Path(result.best).name}
