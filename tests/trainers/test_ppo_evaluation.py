"""PPO's evaluation: means over rows by hand, and the win rate of policies that always say one thing."""

import copy
import random
from collections import Counter
from statistics import fmean, stdev

import conftest
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from ppo_helpers import PROMPTS, make
from ppo_killed import fresh
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer

from instruct_trl import PPOPtxConfig, PPOPtxTrainer, value_model_from_reward_model
from instruct_trl.trainers.ppo_evaluation import Evaluation, ReferenceScores, answer_statistics, check_win_rate

A, B, C = 64, 65, 66  # token ids of "a", "b", "c"
EVALUATE = {"per_device_eval_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2}


def rows(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def say(model, *tokens):
    """Make it always say the first of these tokens; the others wait for hidden coordinates 1, 2, ... to be raised."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.mlp.gate_proj.weight.fill_(0.1)
            layer.mlp.up_proj.weight.fill_(0.1)
        model.model.embed_tokens.weight.fill_(1.0)  # so every hidden state is all ones
        model.lm_head.weight.zero_()
        for coordinate, token in enumerate(tokens):
            model.lm_head.weight[token, coordinate] = 100.0 if coordinate == 0 else 60.0
    return model


def trainer_with(tmp_path, policy, reward, tokenizer, reward_model, **kwargs):
    settings = {"eval_prompts": PROMPTS.select(range(8)), "ptx_coef": 0.0, "total_episodes": 16, **EVALUATE, **kwargs}
    value_model = value_model_from_reward_model(reward_model)
    return make(tmp_path, policy, reward, tokenizer, value_model=value_model, **settings)


def test_wins_count_one_ties_half_and_prompts_without_a_score_not(tmp_path, policy, tokenizer, reward_model):
    # Score of the policy's "b..." and of the reference's "a..." to each prompt: 3 wins, 2 ties, 1 loss, 2 missing.
    table = dict(zip(PROMPTS["prompt"], [(2, 1)] * 3 + [(1, 1)] * 2 + [(0, 1), (None, 1), (1, None)], strict=False))
    asked = Counter()

    def reward(prompts, completions, **_):
        assert set(completions) <= {"a" * 8, "b" * 8}
        asked.update(text[0] for text in completions)
        return [table[prompt]["ba".index(text[0])] for prompt, text in zip(prompts, completions, strict=True)]

    trainer = trainer_with(
        tmp_path, say(policy, B), reward, tokenizer, reward_model, per_device_eval_batch_size=8,
        local_rollout_forward_batch_size=3,
    )  # fmt: skip
    say(trainer.ref_model, A)
    for evaluations in (1, 2):
        found = trainer.evaluate()
        assert found["eval_win_rate"] == pytest.approx((3 + 2 / 2) / 6)
        assert found["eval_win_rate_prompts"] == 6
        interval = binomtest(4, 6).proportion_ci(method="wilson")
        assert (found["eval_win_rate_low"], found["eval_win_rate_high"]) == pytest.approx(tuple(interval))
        # Nothing of the reference's is in the other metrics, and it was asked once.
        assert found["eval_score"] == pytest.approx((2 * 3 + 1 * 2 + 0 + 1) / 7)
        assert asked == {"b": 8 * evaluations, "a": 8}
    assert trainer._logs["completion"].count("b" * 8) == len(trainer._logs["completion"])


def test_several_answers_a_prompt_count_as_one_prompt():
    nan = float("nan")
    scores, prompts = ReferenceScores(), [{"prompt": "x"}] * 2 + [{"prompt": "y"}] * 2
    places = scores.places(prompts)
    assert scores.lacks(places)
    scores.keep(places, torch.tensor([0.0, 1.0, 0.0, nan]))
    # x: a win and a tie; y: a win, and a pair without a score.
    scores.compare(places, torch.tensor([2.0, 1.0, 1.0, 5.0]))
    found = scores.metrics()
    assert (found["win_rate"], found["win_rate_prompts"]) == ((0.75 + 1.0) / 2, 2)


def test_rows_of_one_prompt_widen_the_interval_of_the_win_rate():
    """Two prompts in five rows each, all of one won and all of the other lost: two coins, not ten."""
    scores = ReferenceScores()
    places = scores.places([{"prompt": prompt, "answer": i} for prompt in "xy" for i in range(5)])
    scores.keep(places, torch.zeros(10))
    scores.compare(places, torch.tensor([1.0] * 5 + [-1.0] * 5))
    found = scores.metrics()
    assert (found["win_rate"], found["win_rate_prompts"]) == (0.5, 10)
    expected = binomtest(1, 2).proportion_ci(method="wilson")
    assert (found["win_rate_low"], found["win_rate_high"]) == pytest.approx(tuple(expected))


def test_scores_are_found_again_in_another_order_and_ties_allow_for_rounding():
    scores, x, y = ReferenceScores(), {"prompt": "x", "answer": 1}, {"prompt": "x", "answer": 2}
    scores.keep(scores.places([x, y, y]), torch.tensor([1.0, 2.0, 3.0]))
    scores.start()
    places = scores.places([dict(y), dict(y), dict(x)])
    assert not scores.lacks(places)
    scores.compare(places, torch.tensor([2.0 + 1e-6, 2.9, 1.1]))
    found = scores.metrics()
    assert (found["win_rate"], found["win_rate_prompts"]) == (((0.5 + 0.0) / 2 + 1.0) / 2, 2)


def test_without_any_pair_of_scores_there_is_no_rate():
    scores = ReferenceScores()
    places = scores.places([{"prompt": "x"}])
    scores.keep(places, torch.tensor([1.0]))
    scores.compare(places, torch.tensor([float("nan")]))
    assert scores.metrics() == {"win_rate_prompts": 0}


def test_evaluation_leaves_training_as_it_is(tmp_path, reward_model, tokenizer, policy):
    def noisy(completion_ids, **_):
        return [random.random() + torch.rand(()).item() + len(ids) for ids in completion_ids]

    def metrics(**kwargs):
        # Each trainer patches the forward of its own policy.
        trainer = trainer_with(
            tmp_path, copy.deepcopy(policy), noisy, tokenizer, reward_model, total_episodes=32, **kwargs
        )
        random.seed(3)
        trainer.train()
        logs = [row for row in trainer.state.log_history if "score" in row or "ratio" in row]
        timed = ("time/", "step_time", "episodes_per_second")
        return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in logs], trainer

    without, _ = metrics(eval_strategy="no")
    with_it, trainer = metrics()
    assert len(rows(trainer, "eval_win_rate")) == 4
    assert len(without) == len(with_it) == 8
    assert without == with_it


def test_the_references_answers_follow_from_seed_and_prompts(tmp_path, policy, scorer, tokenizer, reward_model):
    trainer = trainer_with(tmp_path, policy, scorer, tokenizer, reward_model)
    score = trainer.evaluate()["eval_score"]
    first = dict(trainer.evaluation.reference._scores)
    torch.manual_seed(7)
    assert trainer.evaluate()["eval_score"] == score  # the noise is the step's
    trainer.state.global_step = 1
    assert trainer.evaluate()["eval_score"] != score
    trainer.evaluation.reference = ReferenceScores()
    torch.manual_seed(99)
    with torch.no_grad():
        policy.lm_head.weight.mul_(-1)  # whatever the policy has become
    trainer.evaluate()
    assert trainer.evaluation.reference._scores == first
    assert len(set(first.values())) == 8


@pytest.mark.parametrize("trained_before", [False, True])
def test_with_adapters_the_reference_is_the_policy_without_them_or_with_the_old_ones(
    tmp_path, policy, tokenizer, reward_model, trained_before
):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], layers_to_transform=[1], r=1)

    def steer(model, coordinate):
        for name, weight in model.named_parameters():
            if ".default." in name:
                weight.data.fill_(1.0 if "lora_A" in name else 0.0)
                if "lora_B" in name:
                    weight.data[coordinate] = 10.0

    heard = Counter()

    def reward(completions, **_):
        heard.update(text[0] for text in completions)
        return [float(text[0] == "b") for text in completions]

    say(policy, A, B, C)
    if trained_before:
        policy = get_peft_model(policy, config)
        steer(policy, 2)
    args = PPOPtxConfig(
        str(tmp_path), generation_batch_size=16, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        total_episodes=16, max_completion_length=4, ptx_coef=0.0, report_to="none", per_device_eval_batch_size=4,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = PPOPtxTrainer(
        policy, reward, args, PROMPTS, PROMPTS.select(range(8)), processing_class=tokenizer,
        peft_config=None if trained_before else config, value_model=value_model_from_reward_model(reward_model),
    )  # fmt: skip
    steer(trainer.model, 1)
    trainable = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert trainer.evaluate()["eval_win_rate"] == 1.0
    assert heard == {"b": 8, "c" if trained_before else "a": 8}
    assert trainer.model.active_adapter == "default"
    assert [name for name, weight in trainer.model.named_parameters() if weight.requires_grad] == trainable


def test_the_best_checkpoint_by_win_rate_comes_back(tmp_path, policy, tokenizer, reward_model):
    def shrinking(prompts, trainer_state, **_):
        return [-float(trainer_state.global_step)] * len(prompts)

    trainer = trainer_with(
        tmp_path, policy, shrinking, tokenizer, reward_model, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_win_rate",
    )  # fmt: skip
    trainer.train()
    # At step 2 both answers score -2; at step 4 the policy's score -4, and the reference's are those of step 2.
    assert rows(trainer, "eval_win_rate") == [0.5, 0.0]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert trainer.state.best_metric == 0.5
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    torch.testing.assert_close(policy.lm_head.weight, best.lm_head.weight)
    assert not torch.equal(best.lm_head.weight, last.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint-2").eos_token_id == 256


def test_switched_off_nothing_is_sampled_from_the_reference(tmp_path, policy, tokenizer, reward_model):
    heard = []

    def reward(completions, **_):
        heard.extend(completions)
        return [0.0] * len(completions)

    trainer = trainer_with(tmp_path, policy, reward, tokenizer, reward_model, eval_win_rate=False)
    assert not [name for name in trainer.evaluate() if "win" in name]
    assert len(heard) == 8


@pytest.mark.parametrize("name", ["use_vllm", "use_transformers_continuous_batching", "rollout_func"])
def test_samplers_without_the_reference_are_named_in_one_line(tmp_path, caplog, name):
    args = PPOPtxConfig(str(tmp_path), report_to="none")
    rollout_func = object() if name == "rollout_func" else None
    if rollout_func is None:
        setattr(args, name, True)
    assert not check_win_rate(args, PROMPTS, rollout_func)
    assert len(caplog.records) == 1
    assert name in caplog.text
    args.metric_for_best_model = "win_rate"
    with pytest.raises(ValueError, match=name):
        check_win_rate(args, PROMPTS, rollout_func)


def test_a_best_model_by_a_win_rate_that_is_switched_off_is_refused(tmp_path):
    args = PPOPtxConfig(str(tmp_path), report_to="none", eval_win_rate=False, metric_for_best_model="eval_win_rate")
    with pytest.raises(ValueError, match="switched off"):
        check_win_rate(args, PROMPTS, None)


# Means over rows ------------------------------------------------------------------------------------------------------

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
