"""What PPO runs in which state: gradients, train mode, precision, clocks, optimizers, checkpointing."""

import copy
import time

import pytest
import torch
from peft import LoraConfig
from ppo_helpers import PROMPTS, TEXTS, make
from transformers import Trainer

from instruct_trl import PPOPtxConfig, value_model_from_reward_model
from instruct_trl.trainers import stopwatch
from instruct_trl.trainers.stopwatch import Stopwatch


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def distance(one, two):
    return max((one[name] - two[name]).abs().max().item() for name in one)


def test_sampling_has_no_gradients_beside_it_and_texts_always_run_in_train_mode(tmp_path, policy, scorer, tokenizer):
    trainer = make(
        tmp_path, policy, scorer, tokenizer, eval_prompts=PROMPTS.select(range(2)), eval_strategy="steps", eval_steps=4,
        gradient_checkpointing=True, eval_win_rate=False, per_device_eval_batch_size=2,
    )  # fmt: skip
    generate, backward, gradients, modes, kept = trainer._generate_single_turn, trainer.pretraining.backward, [], [], []

    def watched_generate(*args, **kwargs):
        parameters = [*trainer.model.parameters(), *trainer.critic.model.parameters()]
        gradients.append(sum(parameter.grad is not None for parameter in parameters))
        return generate(*args, **kwargs)

    def watched_backward(model):
        modes.append(model.training)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            loss = backward(model)
        kept.append(sum(sizes))
        return loss

    trainer._generate_single_turn, trainer.pretraining.backward = watched_generate, watched_backward
    trainer.train()
    assert gradients == [0] * 4  # two iterations, and an evaluation after each
    assert modes == [True] * 16
    assert max(kept) < 2 * min(kept)  # texts differ in length; without checkpointing it is 7 times as much


@pytest.mark.parametrize("bf16", [False, True])
def test_functions_of_the_users_run_outside_autocast(tmp_path, policy, scorer, reward_model, tokenizer, bf16):
    seen = []

    def logit(completion_ids, **_):
        seen.append(torch.is_autocast_enabled("cpu"))
        ids = torch.tensor([[int(ids[0]), 7] for ids in completion_ids])
        with torch.no_grad():
            return reward_model(input_ids=ids).logits.squeeze(1).numpy().tolist()

    trainer = make(
        tmp_path, policy, [logit, scorer], tokenizer, value_model=value_model_from_reward_model(reward_model),
        bf16=bf16, ptx_coef=0.0, total_episodes=16,
    )  # fmt: skip
    inside = []
    scorer.model.model.layers[0].register_forward_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    trainer.train()
    assert set(seen) == {False}
    own = scorer(prompts=["a"], completions=["b"])
    assert own == copy.deepcopy(scorer)(prompts=["a"], completions=["b"])  # outside the trainer as ever
    assert inside[:2] == [False, bf16]  # of the same model
    assert not inside[-1]


def test_an_accelerator_is_waited_for_where_a_stage_begins_and_ends(monkeypatch):
    """A device that works off its queue when it is waited for: the time counts where it was caused."""
    queue, now = [], [0.0]

    def synchronize(device):
        assert device.type == "meta"
        now[0] += sum(queue)
        queue.clear()

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    watch = Stopwatch(torch.device("meta"))
    watch.start_iteration()
    with watch("update"):
        queue.append(5.0)
        with watch("pretraining"):
            queue.append(3.0)
        queue.append(1.0)
    with watch("value_update"):
        queue.append(2.0)
    assert watch.finish_iteration(episodes=22) == {
        "time/update": 6.0,
        "time/pretraining": 3.0,
        "time/value_update": 2.0,
        "time/iteration": 11.0,
        "episodes_per_second": 2.0,
    }


def test_without_an_accelerator_nothing_is_waited_for(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", None)
    watch = Stopwatch(torch.device("cpu"))
    with watch("x"):
        time.sleep(0.01)
    assert watch.finish_iteration(1)["time/x"] >= 0.01


@pytest.mark.parametrize(("iterations", "said"), [(10, True), (2, False)])
def test_a_warm_up_longer_than_the_run_is_said(tmp_path, policy, scorer, tokenizer, capsys, iterations, said):
    trainer = make(tmp_path, policy, scorer, tokenizer, warmup_iterations=iterations, ptx_coef=0.0, max_steps=1)
    trainer.args.max_steps = 8
    trainer.create_optimizer()
    trainer.create_scheduler(8)
    assert ("the warm-up of 40 steps is longer than the run of 8" in capsys.readouterr().out) == said


@pytest.mark.parametrize("setting", [{"torch_compile": True}, {"torch_compile_backend": "eager"}])
def test_torch_compile_is_refused(tmp_path, setting):
    with pytest.raises(ValueError, match="torch_compile=True does not work with PPO-ptx"):
        PPOPtxConfig(str(tmp_path), report_to="none", **setting)


def test_texts_may_be_streamed(tmp_path, policy, scorer, tokenizer, capsys):
    kwargs = {"save_strategy": "steps", "save_steps": 6, "pretraining_dataset": TEXTS.to_iterable_dataset()}
    first = make(tmp_path, copy.deepcopy(policy), scorer, tokenizer, **kwargs)
    assert "on streamed pretraining texts" in capsys.readouterr().out
    first.train()
    second = make(tmp_path, copy.deepcopy(policy), scorer, tokenizer, **kwargs)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert first.pretraining.stream.position == second.pretraining.stream.position == 64
    assert distance(weights(first.model), weights(second.model)) == 0


@pytest.mark.parametrize("optim", ["adafactor", "sgd"])
def test_policy_and_critic_train_and_resume_with_any_optimizer(tmp_path, policy, scorer, tokenizer, optim):
    kwargs = {
        "optim": optim, "ptx_coef": 0.0, "save_strategy": "steps", "save_steps": 2, "total_episodes": 16,
        "value_learning_rate": 1e-3,
    }  # fmt: skip
    first = make(tmp_path, copy.deepcopy(policy), scorer, tokenizer, **kwargs)
    before = {"policy": weights(first.model), "critic": weights(first.critic.unwrapped)}
    first.train()
    second = make(tmp_path, copy.deepcopy(policy), scorer, tokenizer, **kwargs)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, of in (("policy", lambda trainer: trainer.model), ("critic", lambda trainer: trainer.critic.unwrapped)):
        assert distance(before[name], weights(of(first))) > 1e-5
        assert distance(weights(of(first)), weights(of(second))) == 0


class WithTrainMode(torch.optim.SGD):
    def train(self):
        pass


@pytest.mark.parametrize(
    ("made", "reason"),
    [((WithTrainMode, {}), "train mode of its own"), ((torch.optim.SGD, {"params": []}), "groups of its own")],
)
def test_an_optimizer_that_cannot_train_the_critic_is_refused(
    tmp_path, policy, scorer, tokenizer, monkeypatch, made, reason
):
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda args, model: made)
    with pytest.raises(ValueError, match=f"optim='adamw_torch_fused' .*{reason}.*Choose"):
        make(tmp_path, policy, scorer, tokenizer, ptx_coef=0.0, optim="adamw_torch_fused")


def test_reentrant_checkpointing_of_adapters_gives_the_same_weights(tmp_path, policy, scorer, tokenizer):
    ends = []
    for reentrant in (None, True, False):
        trainer = make(
            tmp_path, copy.deepcopy(policy), scorer, tokenizer, total_episodes=16, ptx_coef=0.5,
            gradient_checkpointing=reentrant is not None, gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
        )  # fmt: skip
        trainer.train()
        ends.append(weights(trainer.model))
        assert max(weight.abs().max() for name, weight in ends[-1].items() if "lora_B" in name) > 0
    assert distance(ends[0], ends[1]) < 1e-6
    assert distance(ends[0], ends[2]) < 1e-6
