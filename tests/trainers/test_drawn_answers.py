"""Guards that a reward model reads what the policy read and drew, whatever the tokenizer or the template would make."""

import logging

import pytest
import torch
from conftest import tiny_config
from datasets import Dataset
from ppo_helpers import make
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from instruct_trl import RewardScorer
from instruct_trl.data.encoding import encode_prompt, encode_text, tokenize_drawn, tokenize_pair, what_template_rewrites
from instruct_trl.data.pretraining import PretrainingStream, tokenize_pretraining
from instruct_trl.data.ranking import prepare_ranking_dataset
from instruct_trl.evaluation.selection import score_answers
from instruct_trl.models.generation import Completion

EOS = 256
HEAD, FOOT = "{% for m in messages %}[{{ m['role'] }}]", "<|eos|>{% endfor %}"
OPEN = "{% if add_generation_prompt %}[assistant]{% endif %}"
TEMPLATES = {
    "plain": HEAD + "{{ m['content'] }}" + FOOT + OPEN,
    "trims": HEAD + "{{ m['content'] | trim }}" + FOOT + OPEN,
    "drops thoughts": HEAD + "{{ m['content'].split('</think>')[-1] }}" + FOOT + OPEN,
    "adds thoughts": HEAD
    + "{% if m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}"
    + FOOT
    + OPEN,
    "sets a blank before": HEAD + " {{ m['content'] | trim }} " + FOOT + OPEN,
}
CHAT = [{"role": "user", "content": "2+2?"}]
ANSWERS = ["4", "  4 ", "two and two</think>4", "<think>x</think>\n\n4", ""]


def said(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", ["plain", "trims", "drops thoughts", "adds thoughts"])
def test_a_row_holds_the_answer_as_it_is(tokenizer, name, answer, truncated):
    tokenizer.chat_template = TEMPLATES[name]
    row = tokenize_pair(tokenizer, CHAT, said(answer), truncated=truncated)
    assert tokenizer.decode(row) == f"[user]2+2?<|eos|>[assistant]{answer}" + ("" if truncated else "<|eos|>")
    drawn = tokenizer(answer)["input_ids"]
    assert row == tokenize_drawn(tokenizer, CHAT, drawn, truncated=truncated)
    assert row == [*encode_prompt(tokenizer, CHAT), *drawn, *([] if truncated else [EOS])]


def test_blanks_that_a_template_sets_before_an_answer_stay(tokenizer):
    tokenizer.chat_template = TEMPLATES["sets a blank before"]
    whole = tokenizer.apply_chat_template([*CHAT, *said("4")], tokenize=True, return_dict=True)["input_ids"]
    assert tokenize_pair(tokenizer, CHAT, said("4")) == whole
    assert tokenizer.decode(tokenize_pair(tokenizer, CHAT, said("4"), truncated=True)).endswith("[assistant] 4")


def test_tool_calls_and_dialogues_are_the_templates(tokenizer):
    tokenizer.chat_template = TEMPLATES["plain"]
    dialogue = [*said("a"), {"role": "user", "content": "b"}, *said("c")]
    whole = "[user]2+2?<|eos|>[assistant]a<|eos|>[user]b<|eos|>[assistant]c"
    assert tokenizer.decode(tokenize_pair(tokenizer, CHAT, dialogue)) == whole + "<|eos|>"
    assert tokenizer.decode(tokenize_pair(tokenizer, CHAT, dialogue, truncated=True)) == whole


def test_an_answer_goes_on_where_the_prompt_began_it(tokenizer):
    tokenizer.chat_template = TEMPLATES["plain"]
    prompt = [*CHAT, *said("The answer is")]
    opened = "[user]2+2?<|eos|>[assistant]The answer is"
    assert tokenizer.decode(encode_prompt(tokenizer, prompt)) == opened
    assert tokenizer.decode(tokenize_pair(tokenizer, prompt, said(" 4."))) == opened + " 4.<|eos|>"
    assert tokenize_drawn(tokenizer, prompt, tokenizer(" 4.")["input_ids"]) == tokenize_pair(
        tokenizer, prompt, said(" 4.")
    )
    rows = Dataset.from_list([{"prompt": prompt, "completions": [said(" 4."), said(" 5.")], "ranks": [1, 2]}])
    assert prepare_ranking_dataset(rows, tokenizer)[0][0]["input_ids"][0] == tokenize_pair(
        tokenizer, prompt, said(" 4.")
    )


def test_a_template_that_cannot_leave_a_turn_open_is_named(tokenizer):
    tokenizer.chat_template = TEMPLATES["drops thoughts"]
    with pytest.raises(ValueError, match="ends in an assistant message, 'x</think>y'.*rewrites that message"):
        encode_prompt(tokenizer, [*CHAT, *said("x</think>y")])


def test_a_template_that_hides_the_answer_is_named(tokenizer):
    tokenizer.chat_template = HEAD + FOOT + OPEN
    with pytest.raises(ValueError, match="does not show the content"):
        tokenize_pair(tokenizer, CHAT, said("4"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_log_names_what_a_template_rewrites(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    line = what_template_rewrites(tokenizer)
    found = {words for words in ("thoughts before </think>", "blanks around an answer") if line and words in line}
    expected = {
        "plain": set(),
        "trims": {"blanks around an answer"},
        "drops thoughts": {"thoughts before </think>"},
        "adds thoughts": {"thoughts before </think>", "blanks around an answer"},
        "sets a blank before": set(),
    }
    assert found == expected[name]


def with_bos(tokenizer):
    """The tokenizer, which now puts `<s>` before every text."""
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATES["plain"]
    pair = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[pair])
    return tokenizer


def test_a_rendered_chat_has_one_bos(tokenizer):
    with_bos(tokenizer)
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert rendered.startswith("<s>")
    for ids in (encode_prompt(tokenizer, CHAT), encode_prompt(tokenizer, rendered), encode_text(tokenizer, rendered)):
        assert tokenizer.decode(ids) == rendered
    assert tokenize_pair(tokenizer, rendered, "4") == tokenize_pair(tokenizer, CHAT, said("4"))
    assert encode_text(tokenizer, "plain") == [tokenizer.bos_token_id, *encode_text(tokenizer, "plain")[1:]]
    assert encode_text(tokenizer, "<s><s>x")[:3] == [tokenizer.bos_token_id] * 3  # both are the user's


def test_pretraining_texts_have_one_bos(tokenizer):
    with_bos(tokenizer)
    texts = Dataset.from_dict({"text": ["<s>a text", "a text"]})
    expected = tokenizer("a text")["input_ids"]
    assert expected[0] == tokenizer.bos_token_id
    stream = PretrainingStream(texts, tokenizer, max_length=32)
    assert stream.draw(2) == [expected] * 2
    assert tokenize_pretraining(texts, tokenizer)["input_ids"] == [expected] * 2


def test_demonstrations_of_rendered_chats_have_one_bos(tmp_path, tokenizer):
    from instruct_trl import InstructSFTConfig, InstructSFTTrainer

    with_bos(tokenizer)
    model = LlamaForCausalLM(tiny_config(vocab_size=260))
    args = InstructSFTConfig(str(tmp_path), report_to="none")
    prompt = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    for row in ({"prompt": prompt, "completion": "4"}, {"text": prompt + "4"}):
        trainer = InstructSFTTrainer(
            model, args, train_dataset=Dataset.from_list([row] * 4), processing_class=tokenizer
        )
        assert tokenizer.decode(trainer.train_dataset[0]["input_ids"]) == prompt + "4<|eos|>"


def test_the_reward_model_reads_the_tokens_that_were_drawn(scorer, monkeypatch):
    rows = []
    monkeypatch.setattr(scorer, "_score", lambda batch, prompts: rows.extend(batch) or [0.0] * len(batch))
    tokenizer = scorer.processing_class
    broken = tokenizer("é")["input_ids"][:1]  # half of a letter, which its text shows as a replacement character
    assert tokenizer(tokenizer.decode(broken))["input_ids"] != broken
    scorer(["q"], [tokenizer.decode(broken)], [[*broken, EOS]])
    scorer(["q"], [tokenizer.decode(broken)], [broken])
    assert rows == [[*tokenizer("q")["input_ids"], *broken, EOS], [*tokenizer("q")["input_ids"], *broken]]


def test_foreign_tokens_are_read_as_text_and_the_log_says_so_once(scorer, caplog):
    foreign = [[7, 8, 9]] * 3  # another tokenizer's "yes"
    with caplog.at_level(logging.WARNING):
        scores = scorer(["q"] * 3, ["yes"] * 3, foreign, truncated=[False, True, False])
    assert scores == pytest.approx(scorer(["q"] * 3, ["yes"] * 3, truncated=[False, True, False]), abs=1e-6)
    assert caplog.text.count("reads the text of answers") == 1


def test_truncated_reaches_every_scorer():
    seen = []

    def function(prompts, completions, truncated, **kwargs):
        seen.extend(truncated)
        return [0.0] * len(prompts)

    score_answers(function, ["a", "b"], [Completion("x", [1, 2], False), Completion("y", [3, 4], True)])
    assert seen == [False, True]


def spied(trainer):
    """Rows that the trainer's reward model reads while it trains."""
    (scorer,), rows = trainer.reward_funcs, []
    score = scorer._score
    scorer._score = lambda batch, prompts: rows.extend(batch) or score(batch, prompts)
    trainer.train()
    return rows


@pytest.mark.parametrize("name", ["drops thoughts", "trims"])
def test_in_ppo_policy_and_reward_model_read_the_same_tokens(tmp_path, tokenizer, policy, reward_model, name):
    tokenizer.chat_template = "{% if quiet %}(quiet){% endif %}" + TEMPLATES[name]
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": f"q{i} "}]} for i in range(16)])
    settings = {"ptx_coef": 0, "learning_rate": 0.0, "total_episodes": 16, "chat_template_kwargs": {"quiet": True}}
    trainer = make(tmp_path, policy, RewardScorer(reward_model, tokenizer), tokenizer, prompts=prompts, **settings)
    drawn = []
    generate = trainer._generate_single_turn

    def keep(prompt_ids, *args, **kwargs):
        answers = generate(prompt_ids, *args, **kwargs)
        drawn.extend([*p, *a] for p, a in zip(prompt_ids, answers[0], strict=True))
        return answers

    trainer._generate_single_turn = keep
    rows = spied(trainer)
    assert rows == drawn  # with this template an answer ends in EOS and nothing follows
    assert all(tokenizer.decode(row).startswith("(quiet)[user]q") for row in rows)


def test_special_tokens_in_an_answer_reach_reward_functions_and_the_reward_model(tmp_path, tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>"]})
    texts = []
    torch.manual_seed(0)
    policy = LlamaForCausalLM(tiny_config(vocab_size=259))
    with torch.no_grad():
        policy.lm_head.weight[258] *= 50  # often
    reward_model = LlamaForSequenceClassification(tiny_config(vocab_size=259, num_labels=1))

    def function(completions, completion_ids, **kwargs):
        texts.extend(zip(completions, completion_ids, strict=True))
        return [0.0] * len(completions)

    settings = {"ptx_coef": 0, "learning_rate": 0.0, "total_episodes": 16, "value_model": reward_model}
    make(tmp_path, policy, function, tokenizer, **settings).train()
    assert any("<answer>" in text for text, _ in texts)
    for text, ids in texts:
        assert text == tokenizer.decode([i for i in ids if i != EOS])
