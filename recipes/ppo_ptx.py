"""Step 3: PPO with a critic and pretraining gradients (Eq. 2). The main job: it first does whatever is missing.

accelerate launch recipes/ppo_ptx.py                              # the demo, all stages, ending in a report
accelerate launch recipes/ppo_ptx.py --config mine/ppo_ptx.yaml   # the same with the YAMLs of your own in mine/
accelerate launch recipes/ppo_ptx.py --model_name_or_path P --reward_model_path R --dataset_name prompts.jsonl \\
    --pretraining_dataset_name texts.jsonl                        # or --ptx_coef 0, for plain PPO
accelerate launch recipes/ppo_ptx.py --control shuffled_ranks     # and once more without feedback, to compare with
"""

from copy import deepcopy
from pathlib import Path

from instruct_trl.recipes import EXAMPLE
from instruct_trl.recipes.stages import evaluate_if_described, make_what_is_missing, with_control_rewards
from trl import ModelConfig

from instruct_trl import PPOPtxConfig, PPOPtxTrainer
from instruct_trl.memory import dry_run
from instruct_trl.pipeline import rows, training
from instruct_trl.pipeline.arguments import parse_recipe, settings_of
from instruct_trl.pipeline.control import check_control
from instruct_trl.pipeline.stage import run_stage


def main(argv: list[str] | None = None) -> str:
    """Run the missing stages, PPO-ptx, its control, and the evaluation that a YAML describes; returns PPO's folder."""
    types = (training.PPOPtxArguments, PPOPtxConfig, ModelConfig)
    run, args, model = parse_recipe(types, "ppo_ptx", __doc__, argv, EXAMPLE / "ppo_ptx.yaml")
    training.check_one_base(run, model)
    has_control = check_control(run, args.output_dir)
    if run.dry_run:
        policy, reward = run.models(model.model_name_or_path, "selected_sft/model"), run.reward_model_path
        roles = {"policy": policy, "reward_model": [reward, run.run / "reward_model"], "one_base": run.one_base}
        dry_run.ppo("ppo_ptx", args, model, **roles, control=has_control, device_memory_gb=run.device_memory_gb)
    training.prepare_output(args, run, "ppo_ptx")
    policy = make_what_is_missing(run, model.model_name_or_path)

    def train(run: training.PPOPtxArguments, args: PPOPtxConfig, title: str) -> None:
        def body(checkpoint: str | None) -> dict:
            texts = rows.pretraining_texts(run, run.pretraining_dataset_name, "ptx_coef", args.ptx_coef)
            prompts, models = rows.rl_prompts(run), training.models_of(run, args, model, policy)
            trainer = PPOPtxTrainer(pretraining_dataset=texts, train_dataset=prompts, args=args, **models)
            training.quiet_progress(trainer, ["episodes", "score", "rewards/labeler/mean", "kl", "ptx_loss"])
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or checkpoint)
            return training.finish_training(trainer, run.dataset_name)

        run_stage(Path(args.output_dir), title, settings_of(run, args, model), body)

    untouched = deepcopy((run, args))  # a training changes its settings
    train(run, args, "PPO-ptx")
    if has_control:
        train(*with_control_rewards(*untouched), "PPO-ptx on shuffled ranks")
    evaluate_if_described(run)
    return args.output_dir


if __name__ == "__main__":
    main()
