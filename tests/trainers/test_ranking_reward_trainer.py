"""RankingRewardTrainer: its loss against TRL's and across batch shapes and processes, its metrics, its defaults."""

import logging
import math
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from launch_helpers import leave_process_group, processes
from ranking_helpers import RANKINGS, config, fresh_model, make
from trl import RewardConfig, RewardTrainer

from instruct_trl.models.reward import RewardScorer
from instruct_trl.trainers.ranking_reward import RankingRewardConfig, RankingRewardTrainer


def trained(path, tokenizer, rows, batch, accumulation, steps=1, **kwargs):
    """Weights and first logged loss after SGD on `rows`, which are taken in order."""
    shape = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": steps}
    fixed = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    order = {"train_sampling_strategy": "sequential"}
    trainer = make(fresh_model(), tokenizer, path, rows, **shape, **fixed, **order, **kwargs)
    trainer.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return weights, trainer.state.log_history[0]["loss"]


def pair_rows(conversational=False):
    rows = [
        {"prompt": "Say hi. ", "chosen": "Hi!", "rejected": "No."},
        {"prompt": "2+2? ", "chosen": "4", "rejected": "5"},
    ]
    if not conversational:
        return rows
    role = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{key: [{"role": role[key], "content": text}] for key, text in row.items()} for row in rows]


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("center", [None, 0.1])
def test_two_completions_equal_trl_reward_trainer(tokenizer, tmp_path, conversational, center):
    data = Dataset.from_list(pair_rows(conversational))
    common = {"per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False}
    theirs = RewardTrainer(
        fresh_model(),
        RewardConfig(str(tmp_path), center_rewards_coefficient=center, **common),
        train_dataset=data,
        processing_class=tokenizer,
    )
    ours = RankingRewardTrainer(
        fresh_model(),
        config(tmp_path, center_rewards_coefficient=center, per_device_train_batch_size=2),
        train_dataset=data,
        processing_class=tokenizer,
    )
    gradients = []
    for trainer in (theirs, ours):
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
        loss = trainer.compute_loss(trainer.model.train(), batch)
        loss.backward()
        gradients.append(
            (loss, torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
        )
    torch.testing.assert_close(gradients[1][0], gradients[0][0])
    torch.testing.assert_close(gradients[1][1], gradients[0][1])


def test_two_completions_train_to_the_same_weights_as_trl(tokenizer, tmp_path):
    kwargs = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3, "seed": 3}
    kwargs |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "adam_beta2": 0.95, "report_to": "none"}
    kwargs |= {"adam_epsilon": 1e-5}  # at 1e-8, Adam turns the rounding of a gradient near 0 into a step of 1e-2
    ours = make(fresh_model(), tokenizer, tmp_path / "a", pair_rows(), **kwargs)
    ours.train()
    args = RewardConfig(str(tmp_path / "b"), use_cpu=True, bf16=False, save_strategy="no", **kwargs)
    data = Dataset.from_list(pair_rows())
    theirs = RewardTrainer(fresh_model(), args, train_dataset=data, processing_class=tokenizer)
    theirs.train()
    for one, two in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_accumulation_equals_one_batch(tokenizer, tmp_path, batch, accumulation):
    # row 3 is tied throughout: with batch 1 it is a micro-batch of its own, and must not count
    whole, loss = trained(tmp_path / "whole", tokenizer, RANKINGS, 8, 1)
    parts, parts_loss = trained(tmp_path / "parts", tokenizer, RANKINGS, batch, accumulation)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert parts_loss == pytest.approx(loss, abs=1e-4)  # Trainer logs four decimals
    assert not torch.equal(whole, torch.cat([p.detach().flatten() for p in fresh_model().parameters()]))


def test_tied_prompts_change_nothing(tokenizer, tmp_path):
    untied = [row for row in RANKINGS if len(set(row["ranks"])) > 1]
    without, loss = trained(tmp_path / "a", tokenizer, untied, 7, 1)
    with_tied, tied_loss = trained(tmp_path / "b", tokenizer, RANKINGS, 8, 1)
    torch.testing.assert_close(with_tied, without, rtol=1e-5, atol=1e-6)
    assert tied_loss == pytest.approx(loss, abs=1e-4)


def test_gradient_checkpointing_equals_none(tokenizer, tmp_path):
    plain, _ = trained(tmp_path / "a", tokenizer, RANKINGS, 4, 2)
    checkpointed, _ = trained(tmp_path / "b", tokenizer, RANKINGS, 4, 2, gradient_checkpointing=True)
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-6)


def test_each_completion_is_forwarded_once(tokenizer, tmp_path):
    trainer = make(fresh_model(), tokenizer, tmp_path, prefix_sharing="off")
    rows = []
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append((args[0] if args else kwargs["input_ids"]).shape[0]), with_kwargs=True
    )
    trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[index] for index in range(8)]))
    assert rows == [sum(len(row["completions"]) for row in RANKINGS)]


def test_it_learns_a_ranking_to_its_ceiling(tokenizer, tmp_path):
    rows = [{"prompt": f"{n}: ", "completions": ["aaa", "bbb", "ccc"], "ranks": [1, 2, 3]} for n in range(8)]
    kwargs = {"learning_rate": 1e-2, "max_steps": 15, "per_device_train_batch_size": 8}
    trainer = make(fresh_model(), tokenizer, tmp_path, rows, eval_rows=rows, gradient_accumulation_steps=1, **kwargs)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_pair_accuracy"] == 1.0
    assert metrics["eval_kendall_tau"] == 1.0
    assert metrics["eval_mean_score_rank_1"] > metrics["eval_mean_score_rank_2"] > metrics["eval_mean_score_rank_3"]


def test_evaluation_is_exact_over_the_whole_set(tokenizer, tmp_path):
    """By hand from RewardScorer's scores; batches of 3 over 8 prompts would give another mean of means."""
    trainer = make(fresh_model(), tokenizer, tmp_path, eval_rows=RANKINGS, per_device_eval_batch_size=3)
    trainer.model.config.reward_bias = 0.5
    metrics = trainer.evaluate()
    scorer = RewardScorer(trainer.model, tokenizer)
    right = pairs = 0
    losses, best = [], []
    for row in RANKINGS:
        scores = scorer([row["prompt"]] * len(row["completions"]), row["completions"])
        items = list(zip(scores, row["ranks"], strict=True))
        margins = [good - bad for good, rank in items for bad, other in items if rank < other]
        right, pairs = right + sum(margin > 0 for margin in margins), pairs + len(margins)
        if margins:
            losses.append(sum(math.log(1 + math.exp(-margin)) for margin in margins) / len(margins))
        best += [score for score, rank in items if rank == min(row["ranks"])]
    assert metrics["eval_pair_accuracy"] == pytest.approx(right / pairs)
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert metrics["eval_mean_score_rank_1"] == pytest.approx(sum(best) / len(best), rel=1e-4)
    assert metrics["eval_tied_prompts"] == 1
    assert metrics["eval_tied_pairs"] == 3 + 3 + 1  # rows 2 (red = blue = green), 3 (all) and 7 (there = nowhere)
    assert {"eval_mean_score_rank_3", "eval_kendall_tau"} <= set(metrics)
    assert "eval_mean_score_rank_4" not in metrics


def test_named_evaluation_sets_and_counts_of_what_was_dropped(tokenizer, tmp_path):
    long = {"prompt": "Long ", "completions": ["x" * 200, "y"], "ranks": [1, 2]}
    trainer = make(fresh_model(), tokenizer, tmp_path, max_length=100)
    metrics = trainer.evaluate({"a": Dataset.from_list(RANKINGS), "b": Dataset.from_list([*RANKINGS, long])})
    assert (metrics["eval_a_overlong_rows"], metrics["eval_b_overlong_rows"]) == (0, 1)
    assert (metrics["eval_a_dropped_prompts"], metrics["eval_b_dropped_prompts"]) == (0, 1)
    assert metrics["eval_a_pair_accuracy"] == metrics["eval_b_pair_accuracy"]


def test_dropped_rows_are_logged_in_one_line(tokenizer, tmp_path, caplog):
    long = {"prompt": "Long ", "completions": ["x" * 200, "y", "z"], "ranks": [1, 2, 3]}
    with caplog.at_level(logging.WARNING, logger="instruct_trl"):
        make(fresh_model(), tokenizer, tmp_path, [*RANKINGS, long], max_length=100)
    lines = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("the train dataset, of 9 prompts: dropped 1 completions longer than max_length=100")


def test_compute_metrics_sees_every_score(tokenizer, tmp_path):
    seen = []
    trainer = RankingRewardTrainer(
        fresh_model(),
        config(tmp_path, per_device_eval_batch_size=3),
        train_dataset=Dataset.from_list(RANKINGS),
        eval_dataset=Dataset.from_list(RANKINGS),
        processing_class=tokenizer,
        compute_metrics=lambda prediction: seen.append(prediction.predictions) or {"mine": 1.0},
    )
    assert trainer.evaluate()["eval_mine"] == 1.0
    assert seen[0].shape == (8, 4)
    expected = RewardScorer(trainer.model, tokenizer)([RANKINGS[1]["prompt"]] * 2, RANKINGS[1]["completions"])
    assert seen[0][1].tolist() == pytest.approx([*expected, -100, -100], abs=1e-5)


def test_training_logs(tokenizer, tmp_path):
    trainer = make(fresh_model(), tokenizer, tmp_path, max_steps=1, per_device_train_batch_size=8)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert {"loss", "pair_accuracy", "margin", "mean_score", "tied_prompts", "num_tokens"} <= set(logged)
    assert logged["tied_prompts"] == 1
    length = sum(len(ids) for row in trainer.train_dataset for ids in row["input_ids"])
    assert logged["num_tokens"] == length


def test_resumed_equals_uninterrupted(tokenizer, tmp_path):
    kwargs = {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 4}
    kwargs |= {"save_strategy": "steps", "save_steps": 2}
    whole = make(fresh_model(), tokenizer, tmp_path, **kwargs)
    whole.train()
    resumed = make(fresh_model(), tokenizer, tmp_path, **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_the_defaults_are_the_papers(tmp_path):
    args = RankingRewardConfig(str(tmp_path))
    assert (args.learning_rate, args.num_train_epochs, args.adam_beta1, args.adam_beta2) == (9e-6, 1, 0.9, 0.95)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64
    assert (args.lr_scheduler_type, args.lr_scheduler_kwargs) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})
    assert (args.disable_dropout, args.max_length, args.max_prompt_length, args.warmup_steps) == (True, 2048, None, 0)
    assert RankingRewardConfig(str(tmp_path), lr_scheduler_type="linear").lr_scheduler_kwargs in (None, {})
    with pytest.raises(ValueError, match="max_prompt_length is 0; it must be at least 1"):
        RankingRewardConfig(str(tmp_path), max_prompt_length=0)


def test_learning_rate_falls_to_a_tenth(tokenizer, tmp_path):
    trainer = make(fresh_model(), tokenizer, tmp_path)
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    for _ in range(10):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(9e-7)


def test_a_stream_trains(tokenizer, tmp_path):
    trainer = RankingRewardTrainer(
        fresh_model(),
        config(tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        train_dataset=IterableDataset.from_generator(lambda: iter(RANKINGS)),
        processing_class=tokenizer,
    )
    assert math.isfinite(trainer.train().training_loss)


PASSES = {
    "whole": {},
    "two_passes": {"two_pass": True, "max_tokens_per_batch": 60},
    "pieces": {"max_tokens_per_batch": 40},
}


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """8 prompts as 1 × 8, and as 2 processes × 2 × 2, also in pieces; 9 to evaluate: one is filled in, and cut off."""
    _train_and_save(tmp_path / "one", 8, 1)
    processes(2, __file__, tmp_path)
    weights, metrics = torch.load(tmp_path / "one" / "result.pt")
    assert metrics.pop("processes") == 1
    for name in PASSES:
        other_weights, other_metrics = torch.load(tmp_path / name / "result.pt")
        assert other_metrics.pop("processes") == 2
        torch.testing.assert_close(other_weights, weights, rtol=1e-5, atol=1e-5, msg=name)
        assert other_metrics == pytest.approx(metrics, abs=1e-4), name


def _train_and_save(path, batch, accumulation, **passes):
    from conftest import tokenizer

    shape = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    fixed = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    order = {"train_sampling_strategy": "sequential", "per_device_eval_batch_size": 2, "max_steps": 2}
    rows = [*RANKINGS, RANKINGS[0]]
    made = tokenizer.__wrapped__() if hasattr(tokenizer, "__wrapped__") else tokenizer._get_wrapped_function()()
    trainer = make(fresh_model(), made, path, eval_rows=rows, **shape, **fixed, **order, **passes)
    trainer.train()
    exact = ("loss", "accuracy", "tau", "score", "tied")
    metrics = {key: float(value) for key, value in trainer.evaluate().items() if any(word in key for word in exact)}
    metrics["processes"] = trainer.accelerator.num_processes
    if trainer.args.process_index == 0:
        weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
        torch.save((weights, metrics), f"{path}/result.pt")


if __name__ == "__main__":
    for each, settings in PASSES.items():
        _train_and_save(Path(sys.argv[1]) / each, 2, 2, **settings)
    leave_process_group()
