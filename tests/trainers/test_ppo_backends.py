"""Answers from elsewhere: transformers' continuous batching, really run, and vLLM at TRL's interface to it.

No vLLM runs here. TRL's own `VLLMGeneration` does, in both modes, over an engine that stands in the place of vLLM's
`LLM` and of TRL's HTTP client: it knows the weights that it was sent, and nothing else.
"""

import copy
import inspect
import math
import os
from types import SimpleNamespace

import pytest
import torch
from ppo_helpers import PROMPTS, make
from ppo_reference import choices
from trl.generation import vllm_generation

EOS, TEMPERATURE, LOW, HIGH = 256, 0.8, 0.8, 1.2
# Few pages: left alone, the cache takes half of the machine's memory.
CONTINUOUS = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"num_blocks": 64, "page_size": 32, "max_batch_tokens": 256},
}


def rows(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def real(ids, mask):
    return tuple(i for i, m in zip(ids.tolist(), mask.tolist(), strict=True) if m)


def pairs(batch):
    """(prompt, answer) token ids of each row."""
    columns = [batch[f"{part}_{kind}"] for part in ("prompt", "completion") for kind in ("ids", "mask")]
    return [(real(a, b), real(c, d)) for a, b, c, d in zip(*columns, strict=True)]


# vLLM ----------------------------------------------------------------------------------------------------------------


class Engine:
    """A model of its own, without weights; its log-probs are off by up to 0.4 nats, and one of them is missing."""

    def __init__(self, policy):
        self.policy, self.model = policy, copy.deepcopy(policy)
        for parameter in self.model.parameters():
            parameter.data.fill_(math.nan)
        self.pushes, self.requests, self.reported = [], [], {}

    def load(self, named):
        mine = dict(self.model.named_parameters())
        for name, tensor in named:
            if name == next(iter(mine)):
                self.pushes.append([])
            self.pushes[-1].append(name)
            mine[name].data.copy_(tensor)

    @torch.no_grad()
    def sample(self, prompt, temperature, limit):
        answer, logps = [], []
        while len(answer) < limit and EOS not in answer:
            logits = self.model(input_ids=torch.tensor([prompt + answer])).logits[0, -1]
            chances = torch.softmax(logits / temperature, dim=0)
            answer.append(int(torch.multinomial(chances, 1)))
            logps.append(math.log(chances[answer[-1]]) + 0.4 * math.sin(answer[-1] + len(answer)))
        if len(answer) > 2:
            logps[2] = math.nan
        self.reported[tuple(prompt), tuple(answer)] = logps
        return answer, logps

    def answer(self, prompts, n, temperature, limit):
        self.requests.append((len(prompts), n, [torch.equal(a, b) for a, b in self.both()]))
        return [self.sample(prompt, temperature, limit) for prompt in prompts for _ in range(n)]

    def both(self):
        return zip(self.model.parameters(), self.policy.parameters(), strict=True)


class Client:
    """In the place of TRL's client of a vLLM server."""

    engine: Engine

    def __init__(self, **_):
        pass

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, named_params):
        named = list(named_params)
        assert metadata == [(name, str(tensor.dtype)[6:], list(tensor.shape)) for name, tensor in named]
        self.engine.load(named)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, n, temperature, max_tokens, **_):
        answers = self.engine.answer(prompts, n, temperature, max_tokens)
        logps = [[[None if math.isnan(x) else x] for x in logps] for _, logps in answers]
        return {"prompt_ids": prompts, "completion_ids": [ids for ids, _ in answers], "logprobs": logps}


class LLM:
    """In the place of vLLM's engine in the trainer's own process."""

    engine: Engine

    def __init__(self, **_):
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.engine.load))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, sampling_params, use_tqdm):
        ids, given = [prompt["prompt_token_ids"] for prompt in prompts], sampling_params
        outputs = [
            SimpleNamespace(
                token_ids=answer,
                logprobs=[{t: SimpleNamespace(rank=1, logprob=x)} for t, x in zip(answer, logps, strict=True)],
            )
            for answer, logps in self.engine.answer(ids, given.n, given.temperature, given.max_tokens)
        ]
        return [SimpleNamespace(prompt_token_ids=i, outputs=[o]) for i, o in zip(ids, outputs, strict=True)]


@pytest.fixture
def engine(policy, monkeypatch):
    with torch.no_grad():
        policy.lm_head.weight[EOS] *= 30  # likely after some tokens only: answers of several lengths
    engine = Engine(policy)
    for name, stand_in in (("VLLMClient", Client), ("LLM", LLM)):
        monkeypatch.setattr(stand_in, "engine", engine, raising=False)
        monkeypatch.setattr(vllm_generation, name, stand_in, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    environment = dict(os.environ)  # in which the colocated mode sets RANK and others
    yield engine
    os.environ.clear()
    os.environ.update(environment)


def weights_of(old, reported, correction):
    """The factor of each token's loss: π_old over the sampler's, a token or an answer, cut or zeroed outside a range.

    A token without a log-prob of the sampler's counts as agreed on.
    """
    if correction is None:
        return [1.0] * len(old)
    gaps = [0.0 if math.isnan(x) else p - x for p, x in zip(old, reported, strict=True)]
    level, action = correction.split("_")
    ratios = [math.exp(gap) for gap in ([sum(gaps)] * len(gaps) if level == "sequence" else gaps)]
    if action == "truncate":
        return [min(max(ratio, LOW), HIGH) for ratio in ratios]
    return [ratio if LOW <= ratio <= HIGH else 0.0 for ratio in ratios]


def expected_loss(policy, batch, minibatch, old_logps, reported, correction, epsilon):
    """−Σ w·min(ρA, clip(ρ)A) over the tokens of a micro-batch, divided by those of its minibatch; all w."""
    total, factors = 0.0, []
    for row, (prompt, answer) in enumerate(pairs(batch)):
        old = old_logps[prompt, answer]
        weights = weights_of(old, reported[prompt, answer], correction)
        now = [x.item() for x in choices(policy, list(prompt), list(answer), TEMPERATURE)[0]]
        for t, weight in enumerate(weights):
            ratio, advantage = math.exp(now[t] - old[t]), batch["advantages"][row, t].item()
            clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
            total -= weight * min(ratio * advantage, clipped * advantage)
        factors += weights
    return total / sum(len(answer) for _, answer in minibatch), factors


@pytest.mark.parametrize(
    ("mode", "correction", "n"),
    [
        ("server", "token_truncate", 1),
        ("server", "sequence_truncate", 2),
        ("colocate", "token_mask", 1),
        ("colocate", "sequence_mask", 1),
        ("colocate", None, 1),
    ],
)
def test_vllm_has_the_policys_weights_and_its_log_probs_correct_the_loss(
    tmp_path, policy, scorer, tokenizer, engine, mode, correction, n
):
    trainer = make(
        tmp_path, policy, scorer, tokenizer, use_vllm=True, vllm_mode=mode, num_generations=n, temperature=TEMPERATURE,
        vllm_importance_sampling_correction=correction is not None, epsilon=0.01, ptx_coef=0.0,
        vllm_importance_sampling_mode=correction or "token_mask", vllm_importance_sampling_clip_min=LOW,
        vllm_importance_sampling_clip_max=HIGH,
    )  # fmt: skip
    old_logps, losses, factors = {}, [], []
    rollout, loss = trainer._generate_and_score_completions, trainer._compute_loss

    def rollout_and_note(inputs):
        batch = rollout(inputs)
        for prompt, answer in pairs(batch):
            logps = choices(policy, list(prompt), list(answer), TEMPERATURE)[0]
            old_logps[prompt, answer] = [x.item() for x in logps]
        return batch

    def loss_and_compare(model, inputs):
        found = loss(model, inputs)
        place = trainer._step % 8  # micro-batches of a rollout; 2 of them are a minibatch
        minibatch = [pair for i in (0, 1) for pair in pairs(trainer._buffered_inputs[place - place % 2 + i])]
        with torch.no_grad():
            expected, used = expected_loss(
                policy, inputs, minibatch, old_logps, engine.reported, correction, trainer.args.epsilon
            )
        losses.append((found.item(), expected))
        factors.extend(used)
        return found

    trainer._generate_and_score_completions, trainer._compute_loss = rollout_and_note, loss_and_compare
    trainer.train()
    assert len(losses) == 16
    assert [found for found, _ in losses] == pytest.approx([expected for _, expected in losses], abs=2e-5, rel=1e-4)
    assert len({len(answer) for _, answer in engine.reported}) > 2
    # All weights, once an iteration, as the policy's are at that moment. A server samples a prompt's answers at once.
    assert engine.pushes == [[name for name, _ in policy.named_parameters()]] * 2
    group = n if mode == "server" else 1
    assert [(prompts, k) for prompts, k, _ in engine.requests] == [(16 // group, group)] * 2
    assert all(all(same) for _, _, same in engine.requests)
    assert [rows(trainer, "ratio")[i] for i in (0, 4)] == pytest.approx([1, 1], abs=1e-5)
    assert rows(trainer, "kl")[0] == pytest.approx(0, abs=1e-5)
    if correction is not None:
        assert 1.0 in factors or "sequence" in correction  # where the log-prob is missing
        assert {LOW, HIGH} <= set(factors) if "truncate" in correction else 0.0 in factors
        assert rows(trainer, "sampling/importance_sampling_ratio/mean")


def test_vllm_samples_evaluations_too_and_the_win_rate_is_left_out(tmp_path, policy, scorer, tokenizer, engine, caplog):
    trainer = make(
        tmp_path, policy, scorer, tokenizer, use_vllm=True, eval_prompts=PROMPTS.select(range(8)),
        per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=4,
    )  # fmt: skip
    trainer.train()
    assert len(rows(trainer, "eval_score")) == 2
    assert not rows(trainer, "eval_win_rate")
    assert "eval_win_rate is left out: use_vllm=True" in caplog.text
    assert [prompts for prompts, _, _ in engine.requests] == [16, 4, 4, 16, 4, 4]
    assert all(all(same) for _, _, same in engine.requests)
    assert len(engine.pushes) == 3  # for the rollouts and evaluations of steps 0, 4 and 8


def test_vllm_gets_the_adapters_merged(tmp_path, policy, scorer, tokenizer, engine):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=2))
    base = copy.deepcopy(policy.model.layers[0].self_attn.q_proj.base_layer.weight)
    engine.both = lambda: zip(
        engine.model.parameters(), copy.deepcopy(adapted).merge_and_unload().parameters(), strict=True
    )
    trainer = make(tmp_path, adapted, scorer, tokenizer, use_vllm=True, learning_rate=1e-2)
    trainer.train()
    assert all(all(same) for _, _, same in engine.requests)
    assert len(engine.pushes) == 2
    assert not torch.equal(engine.model.model.layers[0].self_attn.q_proj.weight, base)  # the trained adapter is in it
    assert not any(module.merged for module in adapted.modules() if hasattr(module, "merged"))


def test_the_engine_is_called_as_the_client_is():
    """What `Client` takes, TRL's client takes; `Client` would not notice a new name."""
    names = {"prompts", "n", "temperature", "max_tokens", "logprobs"}
    real_client = vllm_generation.VLLMClient
    assert names <= set(inspect.signature(real_client.generate).parameters)
    assert list(inspect.signature(real_client.update_named_params).parameters) == ["self", "metadata", "named_params"]


# Continuous batching -------------------------------------------------------------------------------------------------


def test_continuous_batching_answers_as_generate_does(tmp_path, policy, scorer, tokenizer):
    with torch.no_grad():
        policy.lm_head.weight.mul_(1e4)  # sure of every token, so that sampling has no choice
    plain = copy.deepcopy(policy)
    trainer = make(tmp_path, policy, scorer, tokenizer, **CONTINUOUS)
    trainer.model.train()
    found = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS["prompt"]])
    for prompt, (ids, answer) in zip(PROMPTS["prompt"], pairs(found), strict=True):
        alone = torch.tensor([tokenizer(prompt)["input_ids"]])
        assert list(ids) == alone[0].tolist()
        expected = plain.generate(alone, attention_mask=torch.ones_like(alone), do_sample=False, max_new_tokens=8)
        assert list(answer) == expected[0, alone.size(1) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_continuous_batching_trains_and_evaluates(tmp_path, policy, scorer, tokenizer, bf16):
    trainer = make(
        tmp_path, policy, scorer, tokenizer, bf16=bf16, eval_prompts=PROMPTS.select(range(8)), eval_steps=4,
        per_device_eval_batch_size=4, eval_strategy="steps", **CONTINUOUS,
    )  # fmt: skip
    generate, kept = trainer._generate_single_turn, []

    def state():
        tensors = [
            *policy.parameters(),
            *policy.buffers(),
            *(p.grad for p in policy.parameters() if p.grad is not None),
        ]
        return [tensor.clone() for tensor in tensors], [module.training for module in policy.modules()]

    def generate_and_compare(*args, **kwargs):
        before = state()
        answers = generate(*args, **kwargs)
        after = state()
        # TRL casts the policy to bf16 to sample from it: what is trained must not be rounded.
        same = [a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True)]
        kept.append((all(same), before[1] == after[1], len(before[0])))
        return answers

    trainer._generate_single_turn = generate_and_compare
    trainer.train()
    state_without_gradients = len([*policy.parameters(), *policy.buffers()])
    assert kept == [(True, True, state_without_gradients)] * 6  # sampling has the room that gradients would take
    assert trainer.state.global_step == 8
    # Rollout and update pad a row differently, by which bf16 rounds differently; its numbers are 1/256 apart near 1.
    assert [rows(trainer, "ratio")[i] for i in (0, 4)] == pytest.approx([1, 1], abs=1e-3 if bf16 else 1e-5)
    assert rows(trainer, "kl")[0] == 0
    assert len(rows(trainer, "score")) == len(rows(trainer, "eval_score")) == 2
