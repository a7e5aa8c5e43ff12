"""Evaluation metrics of PPO are means over rows, by hand: uneven batches, missing rewards, several sets, streams."""

from statistics import fmean, stdev

import conftest
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from ppo_helpers import make
from ppo_killed import fresh

from instruct_trl import value_model_from_reward_model
from instruct_trl.trainers.ppo_evaluation import Evaluation, answer_statistics

# The length of a prompt is its score; where it is divisible by 5, there is none.
SIZES = {"near": [1, 2, 3, 4, 6, 5, 14], "far": [7, 8, 11]}
STATISTICS = ("score", "rewards/length/mean", "rewards/length/std", "reward", "reward_std", "unscored_fraction")


def prompts(sizes):
    return Dataset.from_dict({"prompt": ["x" * size for size in sizes]})


def length(prompts, log_metric, **_):
    log_metric("share_of_x", 1.0)
    return [None if len(prompt) % 5 == 0 else float(len(prompt)) for prompt in prompts]


def trainer_of(folder, eval_prompts, **kwargs):
    return make(
        folder, fresh(conftest.policy), length, fresh(conftest.tokenizer), eval_prompts=eval_prompts, use_cpu=True,
        value_model=value_model_from_reward_model(fresh(conftest.reward_model)), ptx_coef=0.0, beta=0.0,
        **{"per_device_eval_batch_size": 2, "eval_strategy": "steps", "eval_steps": 4, **kwargs},
    )  # fmt: skip


def expected(sizes):
    scored = [float(size) for size in sizes if size % 5]
    score, spread = fmean(scored), stdev(scored)
    return dict(zip(STATISTICS, (score, score, spread, score, spread, 1 - len(scored) / len(sizes)), strict=True))


def check(found, sizes, prefix="eval_"):
    for name, value in expected(sizes).items():
        assert found[prefix + name] == pytest.approx(value), name
    assert found[prefix + "loss"] == pytest.approx(-found[prefix + "score"])  # beta is 0
    assert found[prefix + "missing_rewards"] == sum(size % 5 == 0 for size in sizes)
    assert found[prefix + "share_of_x"] == 1.0
    assert 0 <= found[prefix + "eos_rate"] <= 1
    assert 1 <= found[prefix + "completions/mean_length"] <= 8


def test_several_sets_each_have_their_own_means_whatever_the_batches(tmp_path):
    trainer = trainer_of(tmp_path, {name: prompts(sizes) for name, sizes in SIZES.items()})
    found = trainer.evaluate()
    assert "eval_score" not in found
    for name, sizes in SIZES.items():
        check(found, sizes, f"eval_{name}_")
    assert found["eval_near_score"] == 5.0  # and the mean of the means of batches, (1.5 + 3.5 + 6 + 14) / 4, is 6.25
    one = trainer.evaluate(prompts(SIZES["near"]))
    check(one, SIZES["near"])
    assert trainer.state.log_history[-1]["eval_score"] == one["eval_score"]
    check(trainer.evaluate(prompts(SIZES["near"]).to_iterable_dataset()), SIZES["near"])
    assert not trainer._metrics["eval"]


def test_the_checkpoint_is_chosen_by_the_named_set(tmp_path):
    trainer = trainer_of(
        tmp_path, {name: prompts(sizes) for name, sizes in SIZES.items()}, save_strategy="steps", save_steps=4,
        load_best_model_at_end=True, metric_for_best_model="far_score",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(fmean([7, 8, 11]))


def test_several_answers_a_prompt_are_all_counted(tmp_path):
    trainer = trainer_of(
        tmp_path, prompts([1, 2, 3, 4, 6]), num_generations=2, num_generations_eval=2, per_device_eval_batch_size=4
    )
    assert trainer.evaluate()["eval_score"] == pytest.approx(16 / 5)
    assert len(torch.cat(trainer.evaluation._rows["score"])) == 10


def test_statistics_of_answers_follow_trls_names():
    nan = float("nan")
    rows = Evaluation(Accelerator(cpu=True), [], with_win_rate=False)
    assert rows.means(None) == {}
    found = answer_statistics(torch.tensor([2.0, 8.0, 5.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert found["completions/clipped_ratio"] == pytest.approx(1 / 3)
    assert [found[f"completions/{name}_length"] for name in ("mean", "min", "max")] == [5.0, 2.0, 8.0]
    assert [found[f"completions/{name}_terminated_length"] for name in ("mean", "min", "max")] == [3.5, 2.0, 5.0]
    rows.note_batch({"sampling/ratio/min": 0.5, "sampling/ratio/max": 2.0, "tools/x": 1.0, "gone": nan}, 4)
    rows.note_batch({"sampling/ratio/min": 0.25, "sampling/ratio/max": 1.0, "tools/x": 4.0, "gone": nan}, 2)
    assert rows.means(None) == {"sampling/ratio/min": 0.25, "sampling/ratio/max": 2.0, "tools/x": 2.0}


def test_an_evaluation_without_any_reward_stops_no_run_that_chooses_by_it(tmp_path):
    options = {"metric_for_best_model": "eval_score", "greater_is_better": True, "save_strategy": "no", "max_steps": 4}
    trainer = trainer_of(tmp_path, prompts([5, 10]), **options)
    found = trainer.evaluate()
    assert found["eval_score"] is None
    assert not trainer._determine_best_metric(found, None)
    assert trainer._determine_best_metric(found | {"eval_score": -3.0}, None)
