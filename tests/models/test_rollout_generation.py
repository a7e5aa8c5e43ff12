"""Sampling without ended rows equals transformers' `generate`, and the log-probs kept are those of the model."""

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from instruct_trl.models.generation import RolloutGenerate, replaced_generate
from instruct_trl.models.logprobs import completion_logps

EOS, PAD, LIMIT = 256, 257, 12
LENGTHS = [1, 3, 3, 5, 7, 7, 9, 20]  # of the answers; the last one is cut at the limit


class EndAfter:
    """A logits processor: the row whose prompt begins with token n draws EOS as its n-th token, not before."""

    def __init__(self, prompt_width):
        self.prompt_width = prompt_width

    def __call__(self, input_ids, scores):
        first = input_ids.gather(1, (input_ids != PAD).int().argmax(dim=1, keepdim=True)).squeeze(1)
        scores[:, [EOS, PAD]] = float("-inf")
        ends = first == input_ids.size(1) - self.prompt_width + 1
        scores[ends] = float("-inf")
        scores[ends, EOS] = 0.0
        return scores


@pytest.fixture
def gpt2():
    """Absolute positions: a row that is continued at the wrong place gives other tokens."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 258}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD))
    with torch.no_grad():
        model.transformer.wpe.weight *= 20
    return model.eval()


def prompts():
    rows = [[length, *range(30, 30 + i % 3)] for i, length in enumerate(LENGTHS)]
    ids = torch.tensor([[PAD] * (3 - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def config(**kwargs):
    settings = {"max_new_tokens": LIMIT, "eos_token_id": EOS, "pad_token_id": PAD, "disable_compile": True}
    return GenerationConfig(**{**settings, **kwargs})


def rows_computed(model, generate, **kwargs):
    """What `generate` returns, and over how many rows its forwards ran in all."""
    rows = []
    handle = model.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    output = generate(**prompts(), logits_processor=[EndAfter(3)], **kwargs)
    handle.remove()
    return output, sum(rows)


@pytest.mark.parametrize("family", ["policy", "gpt2"])
def test_greedy_answers_are_generates_own_for_less_work(request, family):
    model = request.getfixturevalue(family).eval()
    expected, all_rows = rows_computed(model, model.generate, generation_config=config(do_sample=False))
    generate = RolloutGenerate(model, [EOS])
    found, fewer_rows = rows_computed(model, generate, generation_config=config(do_sample=False))
    assert found.tolist() == expected.tolist()
    assert all_rows == 8 * LIMIT
    # 3 of 8 rows have ended after 3 tokens, 3 of 5 after 7, 1 of 2 after 9: 8·3 + 5·4 + 2·2 + 1·3
    assert fewer_rows == 24 + 20 + 4 + 3


@pytest.mark.parametrize("drop_ended", [True, False])
@pytest.mark.parametrize("family", ["policy", "gpt2"])
def test_the_samplers_log_probs_are_those_of_a_forward(request, family, drop_ended):
    model = request.getfixturevalue(family).eval()
    generate = RolloutGenerate(model, [EOS], drop_ended=drop_ended, temperature=0.7)
    torch.manual_seed(1)
    rows = generate(**prompts(), generation_config=config(do_sample=True, temperature=0.7, top_k=0))
    answers = rows[:, 3:]
    ended = (answers == EOS).int()
    mask = (ended.cumsum(dim=1) - ended == 0).long()
    attention_mask = torch.cat([prompts()["attention_mask"], mask], dim=1)
    with torch.no_grad():
        expected, _ = completion_logps(model, rows, attention_mask, answers.size(1), temperature=0.7)
    assert generate.logps.shape == (8, LIMIT)
    kept = generate.logps[:, : answers.size(1)] * mask
    torch.testing.assert_close(kept, expected, atol=1e-5, rtol=1e-5)
    assert expected.min() < -4  # they do differ from nothing


@pytest.mark.parametrize("eos_as_pad", [True, False])
def test_a_forward_beyond_the_end_changes_nothing(policy, eos_as_pad):
    """Processes that step together go on with their slowest, and transformers may undo a step on some devices."""
    policy.eval()
    settings = config(do_sample=True, top_k=0, pad_token_id=EOS if eos_as_pad else PAD)
    torch.manual_seed(1)
    plain = RolloutGenerate(policy, [EOS], temperature=1.0)
    expected = plain(**prompts(), logits_processor=[EndAfter(3)], generation_config=settings)
    own = policy.generate

    def one_more(**kwargs):
        output = own(**kwargs)
        for criterion in kwargs["stopping_criteria"]:  # ended rows draw the pad token in that step
            criterion(torch.full((len(output.sequences), 1), settings.pad_token_id), None)
        for _ in range(2):
            policy(input_ids=output.sequences[:, -1:])
        return output

    policy.generate = one_more
    torch.manual_seed(1)
    generate = RolloutGenerate(policy, [EOS], temperature=1.0)
    found = generate(**prompts(), logits_processor=[EndAfter(3)], generation_config=settings)
    assert found.tolist() == expected.tolist()
    assert (found[-1, 3:] != EOS).all()  # the open answer goes on to the limit
    torch.testing.assert_close(generate.logps, plain.logps)


def test_settings_that_look_at_the_whole_answer_are_left_to_one_call(policy):
    policy.eval()
    settings = config(do_sample=False, min_new_tokens=2)
    expected, all_rows = rows_computed(policy, policy.generate, generation_config=settings)
    found, rows = rows_computed(policy, RolloutGenerate(policy, [EOS]), generation_config=settings)
    assert found.tolist() == expected.tolist()
    assert rows == all_rows


def test_generate_is_put_back(policy):
    with replaced_generate(policy, RolloutGenerate(policy, [EOS])):
        assert isinstance(policy.generate, RolloutGenerate)
    assert "generate" not in vars(policy)
    mine = policy.generate = lambda **kwargs: None
    with pytest.raises(RuntimeError), replaced_generate(policy, RolloutGenerate(policy, [EOS])):
        raise RuntimeError
    assert policy.generate is mine
