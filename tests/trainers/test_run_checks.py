"""A run that would train nothing is refused with the numbers, and so is a metric that no evaluation set logs."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from ppo_helpers import PROMPTS
from ppo_helpers import make as make_ppo
from ranking_helpers import RANKINGS, config, fresh_model
from ranking_helpers import make as make_ranking
from transformers import EarlyStoppingCallback

from instruct_trl import InstructSFTConfig, InstructSFTTrainer, RankingRewardTrainer
from instruct_trl.trainers.ppo_evaluation import check_win_rate
from instruct_trl.trainers.run_checks import check_best_metric, metric_and_set, rows_of_a_step

DEMOS = [{"prompt": f"q{i}", "completion": f"answer {i}"} for i in range(8)]


def sft(path, policy, tokenizer, rows=DEMOS, callbacks=None, eval_dataset=None, **kwargs):
    settings = {"report_to": "none", "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True, **kwargs}
    return InstructSFTTrainer(
        policy,
        InstructSFTConfig(str(path), **{"num_train_epochs": 1, **settings}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


# Rows -----------------------------------------------------------------------------------------------------------------


def test_fewer_prompts_than_a_rollout_after_the_filter(tmp_path, policy, scorer, tokenizer):
    prompts = Dataset.from_dict({"prompt": ["q" * (4 + 40 * (i % 2)) for i in range(12)]})
    kwargs = {"prompts": prompts, "ptx_coef": 0.0, "generation_batch_size": 8}
    with pytest.raises(ValueError, match=r"6 rows left after every filter, but one rollout takes 8 different prompts"):
        make_ppo(tmp_path, policy, scorer, tokenizer, max_prompt_length=10, **kwargs)
    make_ppo(tmp_path, policy, scorer, tokenizer, **kwargs)
    with pytest.raises(ValueError, match="6 rows left"):
        make_ppo(tmp_path, policy, scorer, tokenizer, **{**kwargs, "prompts": prompts.select(range(6))})
    make_ppo(tmp_path, policy, scorer, tokenizer, num_generations=2, **{**kwargs, "prompts": prompts.select(range(6))})


@pytest.mark.parametrize(
    ("drop", "split", "even", "processes", "needed"),
    [
        (False, False, True, 2, 1),  # the one row goes to both processes
        (True, False, True, 2, 8),
        (True, True, True, 2, 4),  # a batch is shared by the processes
        (True, False, True, 1, 4),
        (False, False, False, 2, 5),  # with 4 the second process would wait for ever
    ],
)
def test_rows_that_a_step_takes(drop, split, even, processes, needed):
    accelerate = SimpleNamespace(split_batches=split, even_batches=even)
    args = SimpleNamespace(
        train_batch_size=4, world_size=processes, dataloader_drop_last=drop, accelerator_config=accelerate
    )
    assert rows_of_a_step(args) == needed


def test_rankings_and_demonstrations_that_fill_no_batch(tmp_path, policy, tokenizer):
    shape = {"per_device_train_batch_size": 16, "dataloader_drop_last": True}
    message = "8 rows left after every filter, but one step takes 16 .per_device_train_batch_size=16, processes: 1"
    with pytest.raises(ValueError, match=message):
        make_ranking(fresh_model(), tokenizer, tmp_path, **shape)
    with pytest.raises(ValueError, match=message):
        sft(tmp_path, policy, tokenizer, **shape)


def test_a_batch_that_is_not_full_is_trained_on(tmp_path, policy, tokenizer):
    trainer = sft(tmp_path, policy, tokenizer, rows=DEMOS[:3])
    trainer.train()
    assert trainer.state.global_step == 1


def test_streams_too_short_for_a_batch_end_in_an_error(tmp_path, policy, scorer, tokenizer):
    stream = IterableDataset.from_generator(lambda: iter(list(PROMPTS)[:6]))
    trainer = make_ppo(tmp_path, policy, scorer, tokenizer, prompts=stream, ptx_coef=0.0, max_steps=4)
    with pytest.raises(ValueError, match="ended at step 0 of 4: .* one rollout takes 16 different prompts"):
        trainer.train()
    trainer = RankingRewardTrainer(
        fresh_model(),
        config(tmp_path, max_steps=2, per_device_train_batch_size=2, max_length=1),
        train_dataset=IterableDataset.from_generator(lambda: iter(RANKINGS)),
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match="ended at step 0 of 2"):
        trainer.train()


def test_no_rows_and_nothing_to_learn(tmp_path, policy, scorer, tokenizer):
    with pytest.raises(ValueError, match="^train_dataset has no rows"):
        sft(tmp_path, policy, tokenizer, rows=[])
    with pytest.raises(ValueError, match=r"^eval_dataset\[far\] has no rows"):
        sft(tmp_path, policy, tokenizer, eval_dataset={"far": Dataset.from_list([])}, eval_strategy="epoch")
    with pytest.raises(ValueError, match="^train_dataset has no rows"):
        make_ranking(fresh_model(), tokenizer, tmp_path, rows=[])
    with pytest.raises(ValueError, match="0 rows left after every filter, but one rollout takes 16"):
        make_ppo(tmp_path, policy, scorer, tokenizer, prompts=Dataset.from_dict({"prompt": []}), ptx_coef=0.0)
    prompts_alone = [{"prompt": "q" * 30, "completion": "a"}] * 8  # once cut
    with pytest.raises(ValueError, match="0 rows left after every filter"):
        sft(tmp_path, policy, tokenizer, rows=prompts_alone, max_length=10)
    with pytest.raises(ValueError, match="no token of them counts in the loss"):
        sft(tmp_path, policy, tokenizer, rows=prompts_alone, max_length=10, packing=True)


# Schedules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [-1, 0, float("nan")])
def test_a_schedule_of_no_steps(tmp_path, policy, scorer, tokenizer, epochs):
    message = rf"num_train_epochs={epochs}.* with max_steps=-?\d+ is a schedule of 0 steps"
    with pytest.raises(ValueError, match=message):
        sft(tmp_path, policy, tokenizer, num_train_epochs=epochs)
    with pytest.raises(ValueError, match=message):
        make_ranking(fresh_model(), tokenizer, tmp_path, num_train_epochs=epochs, max_steps=0)
    with pytest.raises(ValueError, match=message):
        make_ppo(tmp_path, policy, scorer, tokenizer, ptx_coef=0.0, total_episodes=None, num_train_epochs=epochs)
    sft(tmp_path, policy, tokenizer, num_train_epochs=epochs, max_steps=1)


@pytest.mark.parametrize("episodes", [0, -16])
def test_no_episodes(tmp_path, policy, scorer, tokenizer, episodes):
    with pytest.raises(ValueError, match=f"total_episodes must be at least 1, got {episodes}"):
        make_ppo(tmp_path, policy, scorer, tokenizer, total_episodes=episodes)


# Several evaluation sets ----------------------------------------------------------------------------------------------


def test_a_metric_and_its_set():
    sets = {"a": None, "a_b": None}
    assert metric_and_set("eval_a_b_loss", sets) == ("loss", "a_b")
    assert metric_and_set("a_loss", sets) == ("loss", "a")
    assert metric_and_set("eval_loss", sets) == ("loss", None)
    assert metric_and_set("eval_a_loss", None) == ("a_loss", None)


def test_a_metric_of_no_set_is_refused_with_the_right_names(tmp_path, policy, tokenizer):
    args = SimpleNamespace(metric_for_best_model="win_rate", eval_strategy="steps")
    with pytest.raises(ValueError, match="names none of the sets .*near, far.* one of 'near_win_rate', 'far_win_rate'"):
        check_best_metric(args, {"near": 1, "far": 2})
    check_best_metric(args, {"near": 1, "far": 2}, without_set=("win_rate",))
    check_best_metric(args, PROMPTS)
    sets = {"near": Dataset.from_list(DEMOS[:2]), "far": Dataset.from_list(DEMOS[2:4])}
    chosen = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    with pytest.raises(ValueError, match="one of 'near_loss', 'far_loss'"):
        sft(tmp_path, policy, tokenizer, eval_dataset=sets, **chosen)
    with pytest.raises(ValueError, match="one of 'near_pair_accuracy', 'far_pair_accuracy'"):
        RankingRewardTrainer(
            fresh_model(),
            config(tmp_path, **chosen, metric_for_best_model="pair_accuracy"),
            train_dataset=Dataset.from_list(RANKINGS),
            eval_dataset={name: Dataset.from_list(RANKINGS) for name in ("near", "far")},
            processing_class=tokenizer,
        )


def test_a_win_rate_of_a_set_that_cannot_be_is_refused(tmp_path):
    args = SimpleNamespace(
        metric_for_best_model="eval_near_win_rate", eval_win_rate=False, use_vllm=False,
        use_transformers_continuous_batching=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="is not logged: it is switched off"):
        check_win_rate(args, {"near": 1}, None)


def test_ppo_logs_each_set_under_its_name_and_keeps_the_best(tmp_path, policy, reward_model, tokenizer):
    """Scores are the lengths of the prompts, so each set's mean is known; no evaluation is better than the first."""
    sets = {name: Dataset.from_dict({"prompt": ["q" * n] * 4}) for name, n in (("near", 3), ("far", 7))}

    def length(prompts, completions, **kwargs):
        return [float(len(prompt)) for prompt in prompts]

    trainer = make_ppo(
        tmp_path, policy, length, tokenizer, value_model=reward_model, eval_prompts=sets, ptx_coef=0.0, max_steps=16,
        eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4, load_best_model_at_end=True,
        metric_for_best_model="near_score", greater_is_better=True, ema_decay=None,
    )  # fmt: skip
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    trainer.train()
    evaluations = [row for row in trainer.state.log_history if any(key.startswith("eval_") for key in row)]
    scores = {key: row[key] for row in evaluations for key in row if key.endswith("_score")}
    assert scores == {"eval_near_score": 3.0, "eval_far_score": 7.0}
    assert all("eval_near_win_rate" in row or "eval_far_win_rate" in row for row in evaluations)
    assert (trainer.state.global_step, trainer.state.best_metric) == (8, 3.0)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")


def test_sft_logs_each_set_under_its_name(tmp_path, policy, tokenizer):
    rows = {"short": [{"prompt": "q", "completion": "a" * 3}], "long": [{"prompt": "q", "completion": "a" * 9}]}
    sets = {name: Dataset.from_list(part) for name, part in rows.items()}
    metrics = sft(tmp_path, policy, tokenizer, eval_dataset=sets, eval_strategy="epoch").evaluate()
    torch.testing.assert_close(metrics["eval_short_entropy"], metrics["eval_long_entropy"], rtol=0.1, atol=0)
    assert "eval_entropy" not in metrics
