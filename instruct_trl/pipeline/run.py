"""What the recipes share about a run: its folders, its data, which stages are missing, how a training ends."""

from __future__ import annotations

import gc
import importlib
from pathlib import Path
from typing import Any

from accelerate import PartialState

from instruct_trl.pipeline.arguments import RunArguments, read_yaml
from instruct_trl.pipeline.functions import load_function
from instruct_trl.pipeline.held_out import overlap, overlap_note, prompts_to_judge, say_held_out
from instruct_trl.pipeline.loading import held_out_split, load_split, load_splits, pick_split
from instruct_trl.pipeline.stage import finished_summary, run_stage
from instruct_trl.redaction import redact

HELD_OUT_TEXTS = 2000  # whose loss is measured
DEFAULT_OUTPUT = "trainer_output"  # transformers' name for "no output_dir given"


def prepare_output(args: Any, run: RunArguments, stage: str) -> None:
    """Without --output_dir a stage writes to <run_dir>/<stage>; `--resume_from_checkpoint` alone means the newest."""
    if args.output_dir in (None, DEFAULT_OUTPUT):
        args.output_dir = str(run.run / stage)
    if run.dataset_name is None:
        demo_folder(run)
    if args.resume_from_checkpoint in ("True", "true", True, ""):
        args.resume_from_checkpoint = None  # a stage takes up its newest complete checkpoint by itself


def quiet_progress(trainer: Any, metrics: list[str]) -> None:
    """Show a progress bar and these metrics, instead of every logged one."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from instruct_trl.pipeline.progress import CompactProgress

    trainer.remove_callback(PrinterCallback)
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(CompactProgress(metrics))


def finish_training(trainer: Any, dataset_name: str | None) -> dict[str, Any]:
    """Save model, state and card; push if asked; free the memory. Returns the stage's summary.

    Raises:
        RuntimeError: PPO was stopped by one of its guards; the stage then stays unfinished.
    """
    stopped = getattr(getattr(trainer, "divergence", None), "stopped", None)
    if stopped:
        raise RuntimeError(
            f"Training was stopped: {stopped} The stage is not finished; its checkpoints are in "
            f"{trainer.args.output_dir}. With other settings, give another --output_dir and, to go on from a "
            "checkpoint, --resume_from_checkpoint."
        )
    dataset_name = dataset_name and redact(dataset_name)  # the model card names it
    trainer.save_model()
    trainer.save_state()
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    else:
        trainer.create_model_card(dataset_name=dataset_name)
    summary = {"steps": trainer.state.global_step}
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    return summary


def demo_folder(run: RunArguments) -> Path:
    """The demo's datasets and labeler, made at the first call."""
    from dataclasses import asdict, fields

    from instruct_trl.recipes.demo.prepare import DemoDataArguments, build_demo_data

    known = [item.name for item in fields(DemoDataArguments)]
    args = DemoDataArguments(**read_yaml(run.config_folder / "data.yaml", known))
    folder = run.run / "data"
    body = lambda _: build_demo_data(folder, args)  # noqa: E731
    run_stage(folder, "Data", asdict(args), body, resume=False, announce_skip=False)
    return folder


def demo_or_own(run: RunArguments, name: str) -> tuple[Any, Any]:
    """(train, test) of the user's dataset, or of the demo's `name`; test is None where nothing is held out.

    Of a user's dataset, lines say which split is held out, or that none is, and how many of its prompts are trained on.

    Raises:
        ValueError: a split that is asked for is not there, or the two are the same.
    """
    if run.dataset_name is None:
        return _demo_rows(run, name)
    splits, split = load_splits(run.dataset_name, run.dataset_config), run.dataset_train_split
    train = pick_split(splits, split, run.dataset_name)
    found = held_out_split(splits, run.dataset_test_split, split, run.dataset_name)
    if found is None:
        PartialState().print(
            f"== Data: There is no test split in {run.dataset_name} (only {', '.join(splits)}): nothing is held out, "
            "and nothing will be evaluated. Put rows aside as a split test, or name one: --dataset_test_split."
        )
        return train, None
    if found == split:
        raise ValueError(
            f"--dataset_test_split {found} is the split that is trained on, so nothing would be held out. Name another "
            "split, or none."
        )
    say_held_out(run, found)
    test = pick_split(splits, found, run.dataset_name)
    note = overlap_note(overlap(train, test), len(test))
    if note:
        PartialState().print(f"== Data: {note}")
    return train, test


def _demo_rows(run: RunArguments, name: str) -> tuple[Any, Any]:
    folder = demo_folder(run)
    return load_split(folder / f"{name}_train.jsonl"), load_split(folder / f"{name}_test.jsonl")


def further_rows(run: RunArguments, name: str, own: str | None) -> tuple[Any, Any]:
    """The same of a dataset beside the main one, `own`, or the demo's `name`; no line is said.

    Its splits are those of the main one where it has them, else those of the usual names, else its only one.
    """
    if own is None:
        return _demo_rows(run, name)
    splits = load_splits(own, run.dataset_config)
    names = [run.dataset_train_split, "train", *(splits if len(splits) == 1 else [])]
    split = next((split for split in names if split in splits), run.dataset_train_split)
    asked = run.dataset_test_split if run.dataset_test_split in splits else None
    found = held_out_split(splits, asked, split, own)
    train = pick_split(splits, split, own)
    return train, None if found in (None, split) else pick_split(splits, found, own)


def evaluate_held_out(args: Any, test: Any) -> None:
    """Where nothing is held out, switch evaluation during training off.

    Raises:
        ValueError: a checkpoint is to be chosen by it.
    """
    if test is not None:
        return
    if args.load_best_model_at_end or args.save_strategy == "best":
        raise ValueError(
            "There is no test split: nothing is held out, by which the best checkpoint could be chosen "
            "(load_best_model_at_end, save_strategy 'best'). Give a test split, or switch these off."
        )
    args.eval_strategy, args.eval_on_start = "no", False


def rankings(run: RunArguments) -> tuple[Any, Any]:
    """(train, test) rankings: the user's, or those that recipes/sample.py wrote into the run."""
    if run.dataset_name is not None:
        return demo_or_own(run, "rankings")
    folder = run.run / "rankings"
    if not (folder / "train.jsonl").exists():
        raise ValueError(f"{folder} holds no rankings yet. Run recipes/sample.py first, or name a --dataset_name.")
    if not (folder / "test.jsonl").exists():
        raise ValueError(
            f"{folder} holds rankings of your own prompts. Name them: --dataset_name {folder / 'train.jsonl'}, and "
            "--demonstrations_name, whose scores shall average 0."
        )
    return load_split(folder / "train.jsonl"), load_split(folder / "test.jsonl")


def prompts_for(run: RunArguments, use: str) -> Any:
    """Rows with a `prompt` column: the user's, or the demo's for this use ('rl', 'selection', 'test').

    Of a user's dataset RL takes the train split, every other use the held-out one (`prompts_to_judge`).
    """
    if run.dataset_name is None:
        return load_split(demo_folder(run) / f"{use}_prompts.jsonl")
    if use == "rl":
        return load_split(run.dataset_name, run.dataset_train_split, run.dataset_config)
    return prompts_to_judge(run, run.dataset_name)


def pretraining_texts(run: Any, setting: str) -> Any:
    """Texts of the γ term or of SFT's mix, with a `text` or `input_ids` column.

    Raises:
        ValueError: one's own data without texts of one's own; names the `setting` that asks for them.
    """
    if run.pretraining_dataset_name is None and run.dataset_name is not None:
        raise ValueError(f"{setting} > 0 needs --pretraining_dataset_name (a `text` column); or set --{setting} 0.")
    return further_rows(run, "pretraining", run.pretraining_dataset_name)[0]


def held_out_texts(run: Any) -> list | None:
    """Texts for the held-out pretraining loss, at most `HELD_OUT_TEXTS`; None on one's own data where none are named.

    Of a dataset the test split, of one that has no such split all of it. A line says so if a stage was trained on it.

    Raises:
        ValueError: it has no `text` and no `input_ids` column, or both; or a row without text.
    """
    from instruct_trl.data.checks import check_pretraining_row, check_rows, require_columns

    own = run.pretraining_dataset_name
    if own is None and run.dataset_name is not None:
        return None
    train, test = further_rows(run, "pretraining", own)
    rows = train if test is None else test
    require_columns(rows, [("text", "input_ids")], f"--pretraining_dataset_name {own}")
    stages = {stage: finished_summary(run.run / stage) or {} for stage in ("sft", "rl_init", "ppo_ptx")}
    taught = [s for s, made in stages.items() if made.get("settings", {}).get("pretraining_dataset_name") == own]
    if own and taught and test is None:
        PartialState().print(f"== Pretraining loss: {own} holds the texts that {', '.join(taught)} was trained on.")
    if len(rows) > HELD_OUT_TEXTS:
        PartialState().print(f"== Pretraining loss: of {len(rows):,} texts the first {HELD_OUT_TEXTS:,}.")
        rows = rows.select(range(HELD_OUT_TEXTS))
    check_rows(rows, check_pretraining_row)
    return list(rows["text" if "text" in rows.column_names else "input_ids"])


def load_labeler(run: RunArguments, name: str, option: str = "labeler") -> Any:
    """The demo's labeler, or the function that 'module:function' names; `option` is the setting that names it.

    Raises:
        ValueError: the demo's on a user's own data, or whatever `load_function` finds.
    """
    if name == "demo" and run.dataset_name is not None:
        raise ValueError(
            "The demo's labeler judges film reviews. For your own data name yours: --labeler module:function."
        )
    if name == "demo":
        from instruct_trl.recipes.demo.labeler import SentimentLabeler

        return SentimentLabeler.load(demo_folder(run) / "labeler.npz")
    return load_function(name, option)


def reward_path(run: Any) -> str:
    """The reward model's folder: the user's, or the run's own."""
    return run.reward_model_path or str(run.run / "reward_model")


def rewards_with_labeler(run: Any, args: Any, reward_model: Any) -> list[Any]:
    """The reward model (a path, or a role) and, with weight 0, the labeler: its score is logged and trains nothing.

    TRL logs a reward function by its name; the labeler's is always "labeler", where the report looks for it.
    """
    from instruct_trl import RewardScorer

    rows = args.local_rollout_forward_batch_size
    scorer = RewardScorer(reward_model, batch_size=rows) if isinstance(reward_model, str) else reward_model
    if run.labeler == "none" or (run.labeler == "demo" and run.dataset_name is not None):
        return [scorer]
    args.reward_weights = [1.0, 0.0]
    score = load_labeler(run, run.labeler)

    def labeler(**columns: Any) -> Any:
        return score(**columns)

    return [scorer, labeler]


def make_what_is_missing(run: Any, policy: str | None) -> str:
    """Run the stages before PPO that the user's own models do not replace; returns the policy PPO starts from."""
    if run.reward_model_path is not None and policy is not None:
        return policy
    if run.dataset_name is not None:
        raise ValueError(
            "Own prompts (--dataset_name) need own models: give --model_name_or_path and --reward_model_path, made "
            "with recipes/sft.py, recipes/sample.py and recipes/reward_model.py on your data."
        )
    base = ["--model_name_or_path", policy] if policy else []
    run_recipe("sft", run, base)
    for name in ("sample", "reward_model", "select_sft"):
        run_recipe(name, run)
    if (run.config_folder / "rl_init.yaml").exists():
        return run_recipe("sft", run, base, config="rl_init", stage="rl_init")
    return str(run.run / "selected_sft" / "model")


def run_recipe(name: str, run: RunArguments, extra: list[str] | None = None, config: str | None = None, **kwargs: Any):
    """Run another recipe of this run in this process, with its YAML from the same folder as this one's."""
    from instruct_trl._upstream import reset_accelerator

    reset_accelerator()
    path = run.config_folder / f"{config or name}.yaml"
    module = importlib.import_module(f"instruct_trl.recipes.{name}")
    result = module.main(["--config", str(path), "--run_dir", run.run_dir, *(extra or [])], **kwargs)
    gc.collect()
    reset_accelerator()
    return result
