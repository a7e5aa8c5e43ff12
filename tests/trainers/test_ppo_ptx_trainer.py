"""PPOPtxTrainer on a tiny model: every sentence of the algorithm that a test can hold it to."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from ppo_helpers import PROMPTS, TEXTS, make
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from instruct_trl import PPOPtxConfig, PPOPtxTrainer, RewardScorer, value_model_from_reward_model


def rows(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


@pytest.mark.parametrize(("per_device", "accumulation"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_512_over_64_in_miniature_is_8_optimizer_steps_an_iteration(
    tmp_path, policy, scorer, tokenizer, per_device, accumulation
):
    trainer = make(
        tmp_path, policy, scorer, tokenizer, generation_batch_size=64, per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation, total_episodes=64, ptx_ratio=1,
        prompts=Dataset.from_dict({"prompt": ["a"] * 64}),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 8
    assert trainer.pretraining.stream.position == 64


def test_ratio_is_1_on_the_first_minibatch_and_moves_after(tmp_path, policy, scorer, tokenizer):
    trainer = make(tmp_path, policy, scorer, tokenizer)
    trainer.train()
    ratios = rows(trainer, "ratio")
    assert ratios[0] == pytest.approx(1, abs=1e-5)
    assert ratios[4] == pytest.approx(1, abs=1e-5)  # the second iteration's first
    assert abs(ratios[1] - 1) > 1e-5


def test_kl_is_0_while_the_policy_is_its_reference(tmp_path, policy, scorer, tokenizer):
    trainer = make(tmp_path, policy, scorer, tokenizer, beta=0.0)
    trainer.train()
    kl = rows(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert abs(kl[1]) > 1e-6  # reported although beta is 0


def test_a_policy_that_another_trainer_has_used_gets_a_reference_of_its_own(tmp_path, policy, scorer, tokenizer):
    make(tmp_path / "first", policy, scorer, tokenizer)  # TRL sets a forward on the policy
    trainer = make(tmp_path / "second", policy, scorer, tokenizer)
    trainer.train()
    assert [entry["kl"] for entry in trainer.state.log_history if "kl" in entry][-1] != 0


def test_the_reference_is_the_policy_passed_in_not_the_one_on_disk(tmp_path, policy, scorer, tokenizer):
    policy.save_pretrained(tmp_path / "old")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    with torch.no_grad():
        loaded.lm_head.weight.mul_(2.0)
    trainer = make(tmp_path, loaded, scorer, tokenizer)
    torch.testing.assert_close(trainer.ref_model.lm_head.weight, loaded.lm_head.weight)
    assert trainer.ref_model.lm_head.weight is not loaded.lm_head.weight


def test_the_value_model_starts_as_an_independent_copy_of_the_reward_model(tmp_path, policy, reward_model, tokenizer):
    reward_model.config.reward_bias = 0.7
    before = copy.deepcopy(reward_model.state_dict())
    trainer = make(tmp_path, policy, RewardScorer(reward_model, tokenizer), tokenizer)
    text = "hello there"
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    value = trainer.critic.unwrapped(ids, torch.ones_like(ids))[0, -1].item()
    assert value == pytest.approx(RewardScorer(reward_model, tokenizer)([text], [""])[0], abs=1e-5)
    trainer.train()
    for name, tensor in reward_model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not torch.equal(trainer.critic.unwrapped.classifier.score.weight, reward_model.score.weight)


def test_a_value_does_not_see_the_token_it_judges(reward_model):
    value_model = value_model_from_reward_model(reward_model).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    changed = ids.clone()
    changed[0, 3] = 100
    a, b = (value_model(x, torch.ones_like(x))[0] for x in (ids, changed))
    torch.testing.assert_close(a[:3], b[:3])  # V for the choice of token 3 is read at token 2
    assert (a[3:] - b[3:]).abs().min() > 1e-6


def test_values_to_keep_projects_the_last_tokens_only(reward_model):
    value_model = value_model_from_reward_model(reward_model)
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 8, 10]])
    projected = []
    value_model.classifier.score.register_forward_hook(lambda module, args, output: projected.append(args[0].shape))
    every, last = value_model(ids, torch.ones_like(ids)), value_model(ids, torch.ones_like(ids), values_to_keep=2)
    torch.testing.assert_close(last, every[:, -2:])
    assert projected == [(2, 5, 16), (2, 2, 16)]


def test_values_do_not_depend_on_the_side_of_the_padding(reward_model):
    value_model = value_model_from_reward_model(reward_model).eval()
    ids = torch.tensor([[5, 6, 7]])
    padded = torch.tensor([[257, 257, 5, 6, 7]])
    plain = value_model(ids, torch.ones_like(ids))
    left = value_model(padded, torch.tensor([[0, 0, 1, 1, 1]]))[:, 2:]
    torch.testing.assert_close(plain, left, atol=1e-5, rtol=1e-5)


def gradients(trainer):
    """The policy's gradient just before the first optimizer step, clipping off."""
    caught = {}
    original = trainer._clip_grad_norm
    trainer.args.max_steps = 1

    def catch(model):
        caught.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
        return original(model)

    trainer._clip_grad_norm = catch
    trainer.train()
    return caught


def test_a_steps_gradient_is_that_of_ppo_plus_gamma_times_that_of_pretraining(
    tmp_path, policy, reward_model, tokenizer
):
    gamma, made = 3.0, {}
    for name, coef in (("both", gamma), ("ppo", 0.0)):
        scorer = RewardScorer(copy.deepcopy(reward_model), tokenizer)
        trainer = make(tmp_path, copy.deepcopy(policy), scorer, tokenizer, ptx_coef=coef, max_grad_norm=1e9)
        made[name] = gradients(trainer)
    # The pretraining term on its own, by plain autograd over the same 8 texts: 4 episodes a minibatch, ratio 2.
    order = torch.randperm(64, generator=torch.Generator().manual_seed(42)).tolist()[:8]
    model, total, count = copy.deepcopy(policy), 0.0, 0
    for i in order:
        ids = torch.tensor([tokenizer(TEXTS[i]["text"])["input_ids"][:32]])
        logps = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
        total = total - logps[torch.arange(len(ids[0]) - 1), ids[0, 1:]].sum()
        count += len(ids[0]) - 1
    (total / count).backward()
    for name, parameter in model.named_parameters():
        expected = made["ppo"][name] + gamma * parameter.grad
        torch.testing.assert_close(made["both"][name], expected, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_does_not_change_the_gradient(tmp_path, policy, reward_model, tokenizer, accumulation):
    found = []
    for per_device, steps in ((8, 1), (8 // accumulation, accumulation)):
        scorer = RewardScorer(copy.deepcopy(reward_model), tokenizer)
        trainer = make(
            tmp_path, copy.deepcopy(policy), scorer, tokenizer, generation_batch_size=8, total_episodes=8,
            per_device_train_batch_size=per_device, gradient_accumulation_steps=steps, max_grad_norm=1e9, ptx_ratio=1,
        )  # fmt: skip
        found.append(gradients(trainer))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=2e-6, rtol=1e-3)


def test_max_grad_norm_holds_for_policy_and_value(tmp_path, policy, scorer, tokenizer):
    trainer = make(
        tmp_path, policy, scorer, tokenizer, optim="sgd", learning_rate=1.0, value_learning_rate=1.0,
        max_grad_norm=1e-3, value_max_grad_norm=1e-4, total_episodes=16, weight_decay=0.0,
    )  # fmt: skip
    before = [copy.deepcopy(m.state_dict()) for m in (policy, trainer.critic.unwrapped)]
    trainer.args.max_steps = 1
    trainer.train()
    for old, model, limit in zip(before, (policy, trainer.critic.unwrapped), (1e-3, 1e-4), strict=True):
        moved = sum((model.state_dict()[n] - t).square().sum() for n, t in old.items() if t.is_floating_point())
        assert moved.sqrt().item() == pytest.approx(limit, rel=1e-2)  # SGD with LR 1 moves by the clipped gradient


def test_advantages_are_white_over_the_rollout_and_the_score_is_on_the_last_token(tmp_path, policy, scorer, tokenizer):
    trainer = make(tmp_path, policy, scorer, tokenizer, beta=0.0, gae_lambda=1.0)
    trainer.model.train()
    rollout = trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS["prompt"]])
    mask = rollout["loss_mask"].bool()
    white = rollout["advantages"][mask]
    assert white.mean().abs() < 1e-6
    assert white.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    # λ = 1, no discount, β = 0: the return of every token is the answer's score.
    for row in range(len(mask)):
        torch.testing.assert_close(
            rollout["returns"][row][mask[row]],
            rollout["scores"][row].expand(int(mask[row].sum())),
            atol=1e-5,
            rtol=1e-5,
        )


def test_a_missing_eos_is_penalised_and_an_eos_that_is_also_the_pad_still_ends_an_answer(
    tmp_path, policy, tokenizer, reward_model
):
    tokenizer.pad_token = tokenizer.eos_token
    values = value_model_from_reward_model(reward_model)
    with torch.no_grad():
        policy.lm_head.weight[256] *= 0  # logit 0 everywhere, as likely as any: answers of both kinds
    ones = lambda prompts, completions, **_: [1.0] * len(prompts)  # noqa: E731
    trainer = make(
        tmp_path, policy, ones, tokenizer, value_model=values, missing_eos_penalty=5.0, max_completion_length=64
    )
    trainer.model.train()
    rollout = trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS["prompt"]])
    lengths = rollout["completion_mask"].sum(dim=1)
    ended = rollout["completion_ids"].gather(1, lengths[:, None] - 1)[:, 0] == 256
    assert 0 < ended.sum() < len(ended)
    assert rollout["scores"].tolist() == [1.0 if e else -4.0 for e in ended]
    assert (lengths[~ended] == 64).all()


def test_scores_that_are_none_are_counted_and_left_out(tmp_path, policy, tokenizer, reward_model):
    values = value_model_from_reward_model(reward_model)
    half = lambda prompts, completions, **_: [None if i % 2 else 1.0 for i in range(len(prompts))]  # noqa: E731
    trainer = make(tmp_path, policy, half, tokenizer, value_model=values)
    trainer.train()
    assert rows(trainer, "unscored_fraction") == [0.5, 0.5]
    assert rows(trainer, "score")[0] == pytest.approx(1.0)


def test_a_function_of_weight_0_does_not_turn_a_missing_score_into_0(tmp_path, policy, tokenizer, reward_model):
    values = value_model_from_reward_model(reward_model)
    half = lambda prompts, completions, **_: [None if i % 2 else 1.0 for i in range(len(prompts))]  # noqa: E731
    logged = lambda prompts, completions, **_: [7.0] * len(prompts)  # noqa: E731
    trainer = make(tmp_path, policy, [half, logged], tokenizer, value_model=values, reward_weights=[1.0, 0.0])
    trainer.train()
    assert rows(trainer, "unscored_fraction") == [0.5, 0.5]
    assert rows(trainer, "score")[0] == pytest.approx(1.0)


def test_plain_ppo_needs_no_pretraining_data(tmp_path, policy, scorer, tokenizer):
    trainer = make(tmp_path, policy, scorer, tokenizer, ptx_coef=0.0)
    trainer.train()
    assert trainer.pretraining is None
    assert not rows(trainer, "ptx_loss")


def test_the_finished_run_is_readable_by_plain_transformers(tmp_path, policy, scorer, tokenizer):
    trainer = make(tmp_path, policy, scorer, tokenizer)
    trainer.train()
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    torch.testing.assert_close(saved.lm_head.weight, policy.lm_head.weight)
    ema = AutoModelForCausalLM.from_pretrained(tmp_path / "ema")
    assert not torch.equal(ema.lm_head.weight, saved.lm_head.weight)
    value = AutoModelForSequenceClassification.from_pretrained(tmp_path / "value")
    torch.testing.assert_close(value.score.weight, trainer.critic.unwrapped.classifier.score.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "<|eos|>"


@pytest.mark.parametrize("save_steps", [2, 4])
def test_a_resumed_run_walks_the_same_path(tmp_path, policy, reward_model, tokenizer, save_steps):
    """At an iteration's boundary (4 steps) and inside one (2), over a second epoch of prompts."""

    def run(folder, resume=None, **kwargs):
        scorer = RewardScorer(copy.deepcopy(reward_model), tokenizer)
        trainer = make(
            folder, copy.deepcopy(policy), scorer, tokenizer, total_episodes=48, save_strategy="steps",
            save_steps=save_steps, **kwargs,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "run")
    again = run(tmp_path / "again", resume=str(tmp_path / "run" / f"checkpoint-{save_steps}"))
    skip = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time", "episodes_per_second"}
    after = [row for row in whole.state.log_history if row["step"] > save_steps and "loss" in row]
    resumed = [row for row in again.state.log_history if row["step"] > save_steps and "loss" in row]
    assert len(after) == len(resumed) == 12 - save_steps
    for one, two in zip(after, resumed, strict=True):
        for key in one.keys() - skip:
            if not key.startswith("time/"):
                assert two[key] == pytest.approx(one[key], abs=1e-5), (one["step"], key)
    for a, b in ((whole.model, again.model), (whole.critic.unwrapped, again.critic.unwrapped)):
        for name, tensor in a.state_dict().items():
            torch.testing.assert_close(b.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)
    for mine, other in zip(whole.ema.shadow, again.ema.shadow, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_evaluation_reports_score_and_kl(tmp_path, policy, scorer, tokenizer):
    trainer = make(
        tmp_path, policy, scorer, tokenizer, per_device_eval_batch_size=4, eval_prompts=PROMPTS.select(range(8)),
        eval_strategy="steps", eval_steps=4,
    )  # fmt: skip
    trainer.train()
    assert len(rows(trainer, "eval_score")) == 2
    objective = [s - 0.02 * kl for s, kl in zip(rows(trainer, "eval_score"), rows(trainer, "eval_kl"), strict=True)]
    assert rows(trainer, "eval_loss") == pytest.approx([-value for value in objective], abs=1e-4)


def test_a_lora_policy_has_the_base_as_its_reference_and_trains_its_adapter_alone(tmp_path, policy, scorer, tokenizer):
    from peft import LoraConfig

    policy.save_pretrained(tmp_path / "base")
    before = copy.deepcopy(policy.state_dict())
    args = PPOPtxConfig(
        str(tmp_path / "run"), generation_batch_size=16, per_device_train_batch_size=4, gradient_accumulation_steps=1,
        total_episodes=32, max_completion_length=8, ptx_ratio=1, learning_rate=1e-2, warmup_iterations=0,
        logging_steps=1, save_strategy="no", gradient_checkpointing=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = PPOPtxTrainer(
        str(tmp_path / "base"), scorer, args, PROMPTS, processing_class=tokenizer, pretraining_dataset=TEXTS,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4),
    )  # fmt: skip
    trainer.train()
    assert trainer.ref_model is None
    kl = rows(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert abs(kl[1]) > 1e-6
    for name, tensor in trainer.model.get_base_model().state_dict().items():
        if "lora" not in name:
            torch.testing.assert_close(tensor, before[name.replace("base_layer.", "")])
    trainer.save_model()
    assert (tmp_path / "run" / "policy" / "adapter_config.json").exists()
    assert (tmp_path / "run" / "ema" / "adapter_config.json").exists()


def test_trackers_get_the_metrics(tmp_path, policy, scorer, tokenizer, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make(tmp_path, policy, scorer, tokenizer, report_to="tensorboard", total_episodes=16)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    logged = [event.value for event in events.Scalars("train/score")]
    assert logged == pytest.approx(rows(trainer, "score"))


def test_resuming_something_else_is_refused(tmp_path, policy, scorer, tokenizer):
    trainer = make(tmp_path, policy, scorer, tokenizer)
    (tmp_path / "checkpoint-1").mkdir()
    policy.save_pretrained(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text(
        json.dumps({"log_history": [], "global_step": 1, "train_batch_size": 2})
    )
    with pytest.raises(ValueError, match="not written by PPOPtxTrainer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
