"""Guards where an answer ends and what it is drawn from: the same in sampling, rollouts and scoring."""

import pytest
import torch
from conftest import tiny_config
from ppo_helpers import make
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from instruct_trl import PPOPtxConfig, RewardScorer
from instruct_trl.data.encoding import ending_ids
from instruct_trl.models.generation import generate_completions, neutral_generation_config

EOS, PAD, END, LETTER = 256, 257, 258, 64
TURNS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SHAPES = {
    "top_k": 1, "top_p": 0.1, "min_p": 0.9, "typical_p": 0.1, "epsilon_cutoff": 0.2, "eta_cutoff": 0.2,
    "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "suppress_tokens": [0, 1, 2], "begin_suppress_tokens": [3],
    "min_new_tokens": 6, "temperature": 0.01, "bad_words_ids": [[4]], "sequence_bias": [[[5], 9.0]],
    "forced_eos_token_id": EOS, "exponential_decay_length_penalty": [1, 9.0], "num_beams": 2, "max_new_tokens": 1,
}  # fmt: skip


@pytest.fixture
def turns(tokenizer):
    """The tokenizer with `<|end|>` (258), with which its chat template closes a turn."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = TURNS
    return tokenizer


def one_of(*tokens):
    """A causal LM that draws one of `tokens` each time, with equal chances."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(vocab_size=260))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[list(tokens)] = 50.0
        model.model.norm.weight.zero_()
    model.model.norm.register_forward_hook(lambda module, args, output: torch.ones_like(output))
    return model


def test_the_ending_ids_come_from_tokenizer_configs_and_template(turns, policy, reward_model):
    assert ending_ids(turns) == [EOS, END]
    policy.generation_config.eos_token_id = [EOS, 11]
    policy.config.eos_token_id = 12
    assert ending_ids(turns, policy) == [EOS, 11, 12, END]
    reward_model.config.eos_token_id = [12, 13]
    assert ending_ids(turns, reward_model) == [EOS, 12, 13, END]


@pytest.mark.parametrize(
    "template",
    [
        None,
        TURNS.replace("<|end|>", ""),
        TURNS.replace("<|end|>", "."),
        TURNS.replace("m['content']", "''"),
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_without_a_token_that_closes_a_turn_adds_none(turns, template):
    turns.chat_template = template
    assert ending_ids(turns) == [EOS]


@pytest.mark.parametrize("where", ["generation config", "chat template"])
def test_an_answer_ends_at_the_end_of_the_turn(turns, where):
    model = one_of(LETTER, END)
    if where == "generation config":
        model.generation_config.eos_token_id, turns.chat_template = [EOS, END], None
    prompts = [f"question {i}" for i in range(24)]
    answers = generate_completions(model, turns, prompts, max_new_tokens=24)
    assert not any(answer.truncated for answer in answers)
    letter = turns.decode([LETTER])
    for answer in answers:
        assert answer.token_ids == [LETTER] * (len(answer.token_ids) - 1) + [END]
        assert answer.text == letter * (len(answer.token_ids) - 1)
    mean = sum(len(answer.token_ids) for answer in answers) / len(answers)
    assert 1.3 < mean < 3.0  # tokens up to the first end at a chance of a half: 2


@pytest.mark.parametrize("where", ["generation config", "chat template"])
def test_a_rollout_ends_at_the_end_of_the_turn(tmp_path, turns, where):
    model = one_of(LETTER, END)
    if where == "generation config":
        model.generation_config.eos_token_id, turns.chat_template = [EOS, END], None
    torch.manual_seed(1)
    reward = LlamaForSequenceClassification(tiny_config(vocab_size=260, num_labels=1))
    settings = {"ptx_coef": 0, "learning_rate": 0.0, "total_episodes": 16, "max_completion_length": 24}
    trainer = make(tmp_path, model, RewardScorer(reward, turns), turns, **settings)
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "eos_rate" in entry)
    assert log["eos_rate"] == 1.0
    assert log["completions/mean_length"] < 4


def test_a_scorer_sees_that_an_answer_ended_at_the_end_of_its_turn(turns):
    torch.manual_seed(1)
    scorer = RewardScorer(LlamaForSequenceClassification(tiny_config(vocab_size=260, num_labels=1)), turns)
    chat, answer = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]
    ids = turns("a")["input_ids"]
    ended, cut = scorer([chat] * 2, [answer] * 2, completion_ids=[[*ids, END], ids])
    assert [ended, cut] == pytest.approx(scorer([chat] * 2, [answer] * 2, truncated=[False, True]), abs=1e-6)
    assert ended != pytest.approx(cut, abs=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_a_checkpoints_generation_config_does_not_shape_what_is_sampled(policy, tokenizer, name):
    prompts = ["abc", "defgh"]
    plain = generate_completions(policy, tokenizer, prompts, max_new_tokens=8, seed=3)
    setattr(policy.generation_config, name, SHAPES[name])
    policy.generation_config.do_sample = True
    assert generate_completions(policy, tokenizer, prompts, max_new_tokens=8, seed=3) == plain
    assert getattr(policy.generation_config, name) == SHAPES[name]  # the checkpoint keeps its own


def test_nor_what_a_rollout_is_drawn_from(tmp_path, policy, tokenizer, reward_model):
    drawn = {}

    def reward(completion_ids, **kwargs):
        drawn[len(drawn)] = completion_ids
        return [0.0] * len(completion_ids)

    settings = {"ptx_coef": 0, "learning_rate": 0.0, "total_episodes": 16, "value_model": reward_model}
    for shapes in ({}, {name: SHAPES[name] for name in ("min_p", "typical_p", "suppress_tokens", "min_new_tokens")}):
        for name, value in shapes.items():
            setattr(policy.generation_config, name, value)
        make(tmp_path, policy, reward, tokenizer, **settings).train()
    assert drawn[0] == drawn[1]


def test_the_config_comes_back_after_an_error(policy):
    own = policy.generation_config
    seen = []
    with pytest.raises(TypeError), neutral_generation_config(policy):
        seen.append(policy.generation_config.eos_token_id) or len(None)
    assert seen == [None]
    assert policy.generation_config is own


@pytest.mark.parametrize("name", ["suppress_tokens", "typical_p", "min_new_tokens", "do_sample", "stop_strings"])
def test_generation_kwargs_that_log_probs_cannot_follow_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"generation_kwargs holds '{name}'"):
        PPOPtxConfig(str(tmp_path), generation_kwargs={name: 1, "use_cache": True})
    assert PPOPtxConfig(str(tmp_path), generation_kwargs={"use_cache": True}).generation_kwargs == {"use_cache": True}
