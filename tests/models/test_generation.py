"""Sampling whole answers, and the mean token loss: against transformers' own generate, loss and trl's trainer."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig
from trl import SFTConfig, SFTTrainer

from instruct_trl.evaluation.language_modeling import mean_token_loss
from instruct_trl.models.generation import RolloutGenerate, contiguous_head_input, generate_completions


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


def test_a_uniform_model_pays_log_vocabulary_a_token(policy, tokenizer):
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    loss, tokens = mean_token_loss(policy, tokenizer, ["abcd", "ab"], batch_size=2)
    assert tokens == 4  # 3 + 1: a row's first token has no prediction
    assert loss == pytest.approx(math.log(258), abs=1e-6)


def test_text_loss_is_transformers_loss(policy, tokenizer):
    text = "the quick brown fox"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    expected = policy(input_ids=ids, labels=ids).loss.item()
    assert mean_token_loss(policy, tokenizer, [text]) == (pytest.approx(expected, abs=1e-5), len(text) - 1)
    assert mean_token_loss(policy, tokenizer, [ids[0].tolist()])[0] == pytest.approx(expected, abs=1e-5)


def test_pair_loss_is_trls_evaluation_loss(policy, tokenizer, tmp_path):
    message = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "hello"}]
    for pairs in ([("ab", "cde"), ("a long prompt", "z")], [message]):
        data = Dataset.from_list([{"prompt": p, "completion": c} for p, c in pairs])
        # One batch, so that the mean of TRL's batch means is the mean over tokens.
        args = SFTConfig(tmp_path, use_cpu=True, bf16=False, report_to=[], per_device_eval_batch_size=8)
        trainer = SFTTrainer(policy, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
        expected = trainer.evaluate()["eval_loss"]
        assert mean_token_loss(policy, tokenizer, pairs, batch_size=1)[0] == pytest.approx(expected, abs=1e-5)


def test_loss_of_several_rows_is_weighted_by_their_tokens(policy, tokenizer):
    (a, n), (b, m) = (mean_token_loss(policy, tokenizer, [text]) for text in ("abcdefgh", "xyz"))
    both, tokens = mean_token_loss(policy, tokenizer, ["xyz", "abcdefgh"], batch_size=2)
    assert (n, m, tokens) == (7, 2, 9)
    assert both == pytest.approx((7 * a + 2 * b) / 9, abs=1e-5)


def test_max_length_cuts_rows(policy, tokenizer):
    cut = mean_token_loss(policy, tokenizer, ["abcdefgh"], max_length=4)
    assert cut[0] == pytest.approx(mean_token_loss(policy, tokenizer, ["abcd"])[0], abs=1e-6)
    assert cut[1] == 3


def test_nothing_to_score_and_odd_items_are_refused(policy, tokenizer):
    with pytest.raises(ValueError, match="No token to score in 1 rows"):
        mean_token_loss(policy, tokenizer, [("abcdef", "x")], max_length=4)
    with pytest.raises(ValueError, match="Expected a text"):
        mean_token_loss(policy, tokenizer, [{"prompt": "a"}])
