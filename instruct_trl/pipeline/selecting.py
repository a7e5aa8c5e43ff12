"""The SFT checkpoint with the highest RM score becomes the run's SFT model (Ouyang et al. 2022, section 3.5)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from instruct_trl.evaluation.selection import as_prompts, find_checkpoints
from instruct_trl.models.model_files import check_model_path
from instruct_trl.pipeline.held_out import trained_on
from instruct_trl.pipeline.run import demo_or_own, prompts_for, reward_path

NOT_OF_THE_MODEL = shutil.ignore_patterns("optimizer*", "scheduler*", "rng_state*", "trainer_state*", "training_args*")


def select_and_copy(run: Any, folder: Path) -> dict[str, Any]:
    """Compare the checkpoints, write the table and the picture, copy the best one to `<folder>/model`."""
    from instruct_trl import RewardScorer, select_checkpoint
    from instruct_trl.report.pictures import require_matplotlib
    from instruct_trl.report.selection_report import finding, write_selection

    require_matplotlib()
    own = run.dataset_name is not None
    sft = run.sft_path or str(run.run / "sft")
    find_checkpoints(sft)
    check_model_path(reward_path(run))
    prompts = as_prompts(prompts_for(run, "selection"), "The prompts of the selection")
    seen = trained_on(run, prompts)
    reward_model = RewardScorer(reward_path(run), batch_size=run.batch_size)
    with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=run.bf16):
        result = select_checkpoint(
            sft,
            reward_model,
            prompts,
            validation_dataset=None if own else demo_or_own(run, "demonstrations")[1],
            max_new_tokens=run.max_completion_length,
            temperature=run.temperature,
            batch_size=run.batch_size,
            seed=run.seed,
        )
    write_selection(result, folder)
    if seen:
        with (folder / "selection.md").open("a", encoding="utf-8") as page:
            page.write(f"\nNot held out: {seen['note']}\n")
    PartialState().print(f"   {finding(result)}")
    shutil.copytree(result.best, folder / "model", ignore=NOT_OF_THE_MODEL, dirs_exist_ok=True)
    return {"checkpoint": Path(result.best).name}
