"""InstructSFTTrainer: the paper's schedule, dropout without a trace, the pretraining mix, selection by RM score."""

import copy
import logging
import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTTrainer

from instruct_trl import InstructSFTConfig, InstructSFTTrainer, RewardScorer
from instruct_trl.models.dropout import residual_branches

DEMONSTRATIONS = Dataset.from_list([{"prompt": f"say {i}:", "completion": f" {i}{i}"} for i in range(8)])
PROMPTS = ["say 1:", "please say 2:"]


def config(tmp_path, **kwargs):
    small = {
        "num_train_epochs": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "report_to": [],
        "gradient_accumulation_steps": 1, "selection_max_new_tokens": 4, "logging_steps": 1, "disable_tqdm": True,
        "max_length": 64,
    }  # fmt: skip
    return InstructSFTConfig(tmp_path, **{**small, **kwargs})


def make(tmp_path, policy, tokenizer, *, train=DEMONSTRATIONS, evaluate=DEMONSTRATIONS, settings=None, **kwargs):
    return InstructSFTTrainer(
        copy.deepcopy(policy), config(tmp_path, **(settings or {})), train_dataset=train, eval_dataset=evaluate,
        processing_class=tokenizer, **kwargs,
    )  # fmt: skip


def lengths(prompts, completions, **kwargs):
    return [float(len(text)) for text in completions]


# -- the schedule -----------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers(tmp_path):
    args = InstructSFTConfig(tmp_path)
    assert (args.num_train_epochs, args.learning_rate, args.adam_beta1, args.adam_beta2) == (16, 9.65e-6, 0.9, 0.95)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32
    assert (args.residual_dropout, args.pretraining_fraction, args.max_length) == (0.2, 0.0, 2048)
    assert (args.save_strategy, args.eval_strategy, args.save_total_limit) == ("epoch", "epoch", None)


def test_the_learning_rate_falls_by_a_cosine_to_a_tenth_without_warm_up(policy, tokenizer, tmp_path):
    trainer = make(tmp_path, policy, tokenizer)
    trainer.create_optimizer_and_scheduler(num_training_steps=100)
    rates = []
    for _ in range(101):
        rates.append(trainer.lr_scheduler.get_last_lr()[0] / 1e-2)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    # cos: 1 at the start, 0 in the middle, −1 at the end, over the upper nine tenths
    assert (rates[0], rates[50], rates[100]) == pytest.approx((1.0, 0.55, 0.1))
    assert rates[25] == pytest.approx(0.55 + 0.45 * math.sqrt(0.5))


# -- dropout ----------------------------------------------------------------------------------------------------------


class CountHooks(TrainerCallback):
    def __init__(self):
        self.during = set()

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.during |= {len(branch._forward_hooks) for branch in residual_branches(model)}


def test_dropout_is_there_while_training_and_gone_afterwards(policy, tokenizer, tmp_path):
    counter = CountHooks()
    trainer = make(tmp_path, policy, tokenizer, callbacks=[counter])
    trainer.train()
    assert counter.during == {1}
    assert {len(branch._forward_hooks) for branch in residual_branches(trainer.model)} == {0}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    ids = torch.arange(10)[None]
    torch.testing.assert_close(saved.train()(ids).logits, saved.eval()(ids).logits, rtol=0, atol=0)
    torch.testing.assert_close(saved(ids).logits, trainer.model.eval()(ids).logits, rtol=0, atol=0)


def test_without_dropout_it_is_trls_trainer(policy, tokenizer, tmp_path):
    ours = make(tmp_path, policy, tokenizer, settings={"residual_dropout": 0.0})
    ours.train()
    theirs = SFTTrainer(
        copy.deepcopy(policy), config(tmp_path), train_dataset=DEMONSTRATIONS, eval_dataset=DEMONSTRATIONS,
        processing_class=tokenizer,
    )  # fmt: skip
    theirs.train()
    for (name, a), (_, b) in zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    dropped = make(tmp_path, policy, tokenizer)
    dropped.train()
    assert not torch.equal(dropped.model.lm_head.weight, ours.model.lm_head.weight)


def test_gradient_checkpointing_changes_nothing(policy, tokenizer, tmp_path):
    weights = []
    for checkpointing in (True, False):
        trainer = make(tmp_path, policy, tokenizer, settings={"gradient_checkpointing": checkpointing})
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name])


# -- data -------------------------------------------------------------------------------------------------------------


def test_pretraining_rows_are_scored_in_full_and_demonstrations_on_the_completion(policy, tokenizer, tmp_path, caplog):
    texts = Dataset.from_dict({"text": ["some pretraining text", "another one"]})
    with caplog.at_level(logging.INFO, logger="instruct_trl"):
        trainer = make(tmp_path, policy, tokenizer, settings={"pretraining_fraction": 0.2}, pretraining_dataset=texts)
    rows = list(trainer.train_dataset)
    whole = [row for row in rows if -100 not in row["labels"]]
    assert len(rows) == 10
    assert sorted(tokenizer.decode(row["input_ids"]) for row in whole) == ["another one", "some pretraining text"]
    scored = [[i for i in row["labels"] if i != -100] for row in rows if row not in whole]
    assert sorted(tokenizer.decode(ids) for ids in scored) == [f" {i}{i}{tokenizer.eos_token}" for i in range(8)]
    assert "2 of 10 training examples (20.0 %), from 2 texts, beside 8 demonstrations" in caplog.text
    assert len(trainer.eval_dataset) == 8
    assert math.isfinite(trainer.train().training_loss)


def test_rows_that_are_cut_or_dropped_are_counted(policy, tokenizer, tmp_path, caplog):
    train = Dataset.from_list([
        {"prompt": "p", "completion": "fits"},
        {"prompt": "p", "completion": "x" * 20},
        {"prompt": "p" * 30, "completion": "its prompt alone fills the limit"},
    ])  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="instruct_trl"):
        trainer = make(tmp_path, policy, tokenizer, train=train, settings={"max_length": 16})
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("instruct_trl")]
    assert ours == [
        "train data: 2 of 3 rows are longer than max_length=16 tokens and were cut; 1 were dropped since nothing to "
        "learn from was left."
    ]
    assert [len(ids) for ids in trainer.train_dataset["input_ids"]] == [6, 16]


# -- selection --------------------------------------------------------------------------------------------------------


def test_the_checkpoint_with_the_highest_score_is_loaded_at_the_end(policy, tokenizer, tmp_path):
    means = iter([1.0, 5.0, 2.0])

    def scripted(prompts, completions, **kwargs):
        mean = next(means)
        return [mean - 1, mean + 1]

    trainer = make(
        tmp_path, policy, tokenizer, settings={"num_train_epochs": 3}, reward_model=scripted, selection_prompts=PROMPTS
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["eval_rm_score"] for entry in logs] == [1, 5, 2]
    # m − 1 and m + 1: standard deviation √2, over √2 prompts
    assert [entry["eval_rm_score_se"] for entry in logs] == pytest.approx([1, 1, 1])
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert torch.equal(trainer.model.lm_head.weight, best["lm_head.weight"])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{s}" for s in (2, 4, 6)]


def test_selection_does_not_touch_the_training(policy, tokenizer, tmp_path):
    torch.manual_seed(0)
    histories = []
    for kwargs in ({}, {"reward_model": lengths, "selection_prompts": PROMPTS}):
        folder = tmp_path / str(len(histories))
        trainer = make(folder, policy, tokenizer, **kwargs)
        trainer.train()
        histories.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert histories[0] == histories[1]
    last = [load_file(tmp_path / str(i) / "checkpoint-4" / "model.safetensors") for i in (0, 1)]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_every_evaluation_answers_under_the_same_noise(policy, tokenizer, tmp_path):
    answers = []

    def spy(prompts, completions, **kwargs):
        answers.append(completions)
        return [0.0, 1.0]

    settings = {"selection_max_new_tokens": 12}
    trainer = make(tmp_path, policy, tokenizer, settings=settings, reward_model=spy, selection_prompts=PROMPTS)
    trainer.evaluate()
    torch.rand(5)
    trainer.evaluate()
    assert answers[0] == answers[1]


def test_a_reward_model_gives_the_mean_of_its_scorer(policy, reward_model, tokenizer, tmp_path):
    seen = []
    scorer = RewardScorer(reward_model, tokenizer)

    def recorded(**kwargs):
        seen.append(scorer(**kwargs))
        return seen[-1]

    scores = [
        make(tmp_path, policy, tokenizer, reward_model=judge, selection_prompts=PROMPTS).evaluate()["eval_rm_score"]
        for judge in (scorer, recorded)
    ]
    assert scores[0] == pytest.approx(sum(seen[0]) / 2)
    assert scores[0] == scores[1]


def test_of_several_evaluation_sets_one_carries_the_score(policy, tokenizer, tmp_path):
    sets = {"one": DEMONSTRATIONS, "two": DEMONSTRATIONS}
    calls = []

    def count(prompts, completions, **kwargs):
        calls.append(1)
        return [0.0, 1.0]

    trainer = make(tmp_path, policy, tokenizer, evaluate=sets, reward_model=count, selection_prompts=PROMPTS)
    assert trainer.evaluate()["eval_rm_score"] == 0.5
    assert len(calls) == 1


def test_a_metric_of_the_users_choice_stays(policy, tokenizer, tmp_path):
    settings = {"metric_for_best_model": "loss", "load_best_model_at_end": True}
    trainer = make(tmp_path, policy, tokenizer, settings=settings, reward_model=lengths, selection_prompts=PROMPTS)
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("loss", False)
    other = make(
        tmp_path, policy, tokenizer, settings={"load_best_model_at_end": True}, reward_model=lengths,
        selection_prompts=PROMPTS,
    )  # fmt: skip
    assert (other.args.metric_for_best_model, other.args.greater_is_better) == ("rm_score", True)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(policy, tokenizer, tmp_path):
    settings = {"load_best_model_at_end": False, "metric_for_best_model": "rm_score"}
    kwargs = {"settings": settings, "reward_model": lengths, "selection_prompts": PROMPTS}
    whole = make(tmp_path, policy, tokenizer, **kwargs)
    whole.train()
    resumed = make(tmp_path, policy, tokenizer, **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def test_without_an_evaluation_set_evaluation_is_off(policy, tokenizer, tmp_path):
    trainer = make(tmp_path, policy, tokenizer, evaluate=None, settings={"num_train_epochs": 1})
    trainer.train()
    assert not [entry for entry in trainer.state.log_history if "eval_loss" in entry]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual_dropout": 1.0}, r"residual_dropout is 1.0; it must be in \[0, 1\)"),
        ({"pretraining_fraction": 1.0}, r"pretraining_fraction is 1.0; it must be in \[0, 1\)"),
        ({"pretraining_fraction": -0.5}, r"pretraining_fraction is -0.5; it must be in \[0, 1\)"),
        ({"selection_temperature": -1.0}, "selection_temperature is -1.0; it must be 0"),
        ({"selection_max_new_tokens": 0}, "selection_max_new_tokens is 0; it must be at least 1"),
        ({"selection_batch_size": 0}, "selection_batch_size is 0; it must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        InstructSFTConfig(tmp_path, **options)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"settings": {"pretraining_fraction": 0.1}}, "no pretraining_dataset is given"),
        ({"reward_model": lengths}, "without selection_prompts"),
        ({"selection_prompts": PROMPTS}, "without a reward_model"),
        (
            {"reward_model": lengths, "selection_prompts": Dataset.from_dict({"prompts": PROMPTS})},
            "selection_prompts has no column 'prompt'",
        ),
        (
            {"reward_model": lengths, "selection_prompts": ["ok", " "]},
            "selection_prompts: column 'prompt', row 1 is empty",
        ),
        ({"reward_model": lengths, "selection_prompts": PROMPTS, "evaluate": None}, "pass an eval_dataset"),
        (
            {"reward_model": lengths, "selection_prompts": PROMPTS, "settings": {"eval_strategy": "no"}},
            "set eval_strategy to 'epoch'",
        ),
    ],
)
def test_bad_input_is_refused_before_training(policy, tokenizer, tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, policy, tokenizer, **kwargs)


def test_a_tokenizer_without_eos_is_refused(policy, tokenizer, tmp_path):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        make(tmp_path, policy, tokenizer)
