"""Sampling whole answers, and rollouts without ended rows: against transformers' own `generate`."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from instruct_trl.models.generation import (
    RolloutGenerate,
    contiguous_head_input,
    generate_completions,
    replaced_generate,
)
from instruct_trl.models.logprobs import completion_logps


def make_it_say(model, token):
    """Make the next token always `token`: its logit is |h|², all others 0."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 100.0
        model.model.norm.weight.fill_(0.0)
        model.model.norm.register_forward_hook(lambda module, args, output: torch.ones_like(output))


def test_greedy_is_transformers_greedy_for_each_prompt_alone(policy, tokenizer):
    prompts = ["abc", "a much longer prompt than the first", "x"]
    got = generate_completions(policy, tokenizer, prompts, max_new_tokens=6, temperature=0, batch_size=2)
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    for prompt, (text, ids, truncated) in zip(prompts, got, strict=True):
        alone = policy.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=6, do_sample=False)
        expected = alone[0, len(prompt) :].tolist()  # one byte a character
        assert ids == expected
        assert truncated == (tokenizer.eos_token_id not in expected)
        assert text == tokenizer.decode(expected, skip_special_tokens=True)


def test_answers_of_a_prompt_stand_together(policy, tokenizer):
    got = generate_completions(
        policy, tokenizer, ["a", "bbbb"], max_new_tokens=3, temperature=0, num_return_sequences=3, batch_size=4
    )
    assert len(got) == 6
    assert got[0] == got[1] == got[2]
    assert got[3] == got[4] == got[5]
    assert got[0].token_ids != got[3].token_ids


@pytest.mark.parametrize("lora", [False, True])
def test_the_head_reads_contiguous_states_while_sampling_and_what_it_is_given_afterwards(policy, tokenizer, lora):
    contiguous = []
    policy.lm_head.register_forward_hook(lambda module, args, output: contiguous.append(args[0].is_contiguous()))
    model = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj", "lm_head"])) if lora else policy
    generate_completions(model, tokenizer, ["abc", "defg"], max_new_tokens=1)
    RolloutGenerate(model, [tokenizer.eos_token_id])(
        **tokenizer(["abc", "defg"], return_tensors="pt", padding=True),
        generation_config=GenerationConfig(max_new_tokens=1, pad_token_id=tokenizer.pad_token_id),
    )
    assert contiguous == [True, True]
    with pytest.raises(RuntimeError, match="stop"), contiguous_head_input(model):
        raise RuntimeError("stop")
    model(**tokenizer(["abc", "defg"], return_tensors="pt", padding=True), logits_to_keep=1)
    assert contiguous[2:] == [False]


def test_contiguous_states_give_the_logits_of_a_frozen_head(policy, tokenizer):
    policy.requires_grad_(False)
    rows = tokenizer(["abc", "defg"], return_tensors="pt", padding=True)
    with contiguous_head_input(policy):
        found = policy(**rows, logits_to_keep=1).logits
    torch.testing.assert_close(found, policy(**rows).logits[:, -1:])


def test_eos_ends_an_answer_and_is_kept_in_its_ids(policy, tokenizer):
    make_it_say(policy, tokenizer.eos_token_id)
    assert generate_completions(policy, tokenizer, ["ab"], max_new_tokens=4) == [("", [tokenizer.eos_token_id], False)]


def test_an_answer_without_eos_counts_as_cut(policy, tokenizer):
    letter = tokenizer("z")["input_ids"][0]
    make_it_say(policy, letter)
    assert generate_completions(policy, tokenizer, ["ab"], max_new_tokens=4) == [("zzzz", [letter] * 4, True)]


def test_a_tokenizer_that_pads_with_eos_gives_the_same_answers(policy, tokenizer):
    prompts = ["abc", "a longer prompt"]
    before = generate_completions(policy, tokenizer, prompts, max_new_tokens=5)
    tokenizer.pad_token = tokenizer.eos_token
    assert generate_completions(policy, tokenizer, prompts, max_new_tokens=5) == before


def test_samples_follow_the_models_distribution_whatever_its_generation_config_says(policy, tokenizer):
    # Logits 0 for "a" and ln 3 for "b", minus infinity (nearly) for the rest: b has probability 3/4, at T = 0.5 9/10.
    policy.generation_config.top_k = 1
    a, b = tokenizer("ab")["input_ids"]
    with torch.no_grad():
        policy.lm_head.weight.fill_(-1000 / 16)
        policy.lm_head.weight[a] = 0.0
        policy.lm_head.weight[b] = math.log(3) / 16
    policy.model.norm.register_forward_hook(lambda module, args, output: torch.ones_like(output))
    for temperature, expected in ((1.0, 0.75), (0.5, 0.9)):
        got = generate_completions(
            policy, tokenizer, ["x"], max_new_tokens=100, temperature=temperature, num_return_sequences=20
        )
        share = sum(text.count("b") for text, _, _ in got) / 2000
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / 2000)


def test_noise_depends_on_the_seed_and_leaves_torch_and_the_model_as_they_were(policy, tokenizer):
    policy.train()
    state = torch.get_rng_state()
    first = generate_completions(policy, tokenizer, ["abc", "d"], max_new_tokens=8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.training
    torch.rand(7)
    assert generate_completions(policy, tokenizer, ["abc", "d"], max_new_tokens=8, seed=1) == first
    assert generate_completions(policy, tokenizer, ["abc", "d"], max_new_tokens=8, seed=2) != first


def test_messages_go_through_the_chat_template(policy, tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    as_text = "<|user|>hi<|eos|><|assistant|>"
    got = generate_completions(policy, tokenizer, [messages], max_new_tokens=5, temperature=0)
    assert got == generate_completions(policy, tokenizer, [as_text], max_new_tokens=5, temperature=0)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        (["ok", "  "], {}, r"Prompt 1 is empty \('  '\)"),
        (["ok", []], {}, r"Prompt 1 is empty \(\[\]\)"),
        (
            ["x" * 125],
            {},
            "prompt 0 of 125 tokens and an answer of max_new_tokens=4, 129 together",
        ),
        (["ok"], {"temperature": -1}, "temperature must be 0"),
        (["ok"], {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_input_is_refused_by_name(policy, tokenizer, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate_completions(policy, tokenizer, prompts, max_new_tokens=4, **options)


def test_a_tokenizer_without_eos_is_refused(policy, tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        generate_completions(policy, tokenizer, ["ok"], max_new_tokens=4)


# Rollouts -----------------------------------------------------------------------------------------------------------

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
