"""What stands in a row: text, messages, numbers and truth values, in every kind of dataset.

What a chat template should render is what it renders of the messages as they stand in this file.
"""

import pytest
from conftest import tiny_config
from datasets import Dataset, IterableDataset, Value
from ppo_helpers import make as make_ppo
from ranking_helpers import fresh_model
from ranking_helpers import make as make_ranking
from transformers import LlamaForCausalLM

from instruct_trl import InstructSFTConfig, InstructSFTTrainer, RewardScorer
from instruct_trl.data.encoding import as_written, without_padding
from instruct_trl.data.pretraining import PretrainingStream, tokenize_pretraining
from instruct_trl.data.ranking import prepare_ranking_dataset
from instruct_trl.data.rows import check_sft_dataset, check_text, filter_prompts
from instruct_trl.evaluation.selection import _validation_pairs, as_prompts
from instruct_trl.models.generation import generate_completions

ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if 'tool_calls' in m %}{{ m['tool_calls'] | tojson }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def schema(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def sft(policy, tokenizer, path, dataset, **kwargs):
    args = InstructSFTConfig(str(path), report_to="none", gradient_checkpointing=False, max_steps=1, **kwargs)
    return InstructSFTTrainer(policy, args, train_dataset=dataset, processing_class=tokenizer)


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"here is empty \(None\)"),
        ("", r"here is empty \(''\)"),
        (" \n", r"here is empty \(' \\n'\)"),
        ([], r"here is empty \(\[\]\)"),
        (7, r"here is an int \(7\).*cast_column"),
        (0.5, r"here is a float \(0.5\)"),
        (True, r"here is a bool \(True\)"),
        ({"text": "x"}, r"here is a dict.*\{'text': 'x'\}"),
        ("ab\ud83d", r"here holds '\\ud83d' at character 2"),
        (["x"], r"here: message 0 is 'x'"),
        ([user("x"), {"content": "y"}], "here: message 1 has no 'role'"),
        ([{"role": 3, "content": "y"}], "here: message 0 has no 'role'"),
        ([{"role": "user", "text": "y"}], "here: message 0 has no 'content'"),
        ([user(None), assistant("x")], "here: message 0 has no 'content'"),
        ([user(3)], r"here: message 0: 'content' is an int \(3\)"),
        ([user({"a": 1})], "here: message 0: 'content' is a dict"),
        ([user("x"), assistant("  ")], r"here is empty: the last message's 'content' is '  '"),
        ([user("ab\udc00")], r"here: message 0 holds '\\udc00'"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place_and_value(value, message):
    with pytest.raises(ValueError, match=message):
        check_text(value, "here")


@pytest.mark.parametrize(
    "value",
    [
        "7",
        "a\x00b",
        "\U0001f600\u202e",
        [{"role": "system", "content": ""}, user("x")],
        [user("x"), call("f", x=1)],
        [user("x"), {**call("f", x=1), "content": None}, {"role": "tool", "content": "3"}],
        [user([{"type": "text", "text": "x"}])],
    ],
)
def test_odd_texts_and_messages_pass(value):
    check_text(value, "here")


def test_messages_are_no_text_of_pretraining():
    with pytest.raises(ValueError, match="here is a list of messages, and text belongs there"):
        check_text([user("x")], "here", messages=False)


BAD = [(None, "is empty"), ("  ", "is empty"), (5, r"is an int \(5\)")]


def column(good, bad):
    """Four cells, the third one bad; a number makes all of them numbers, as a csv file does."""
    return [bad] * 4 if isinstance(bad, int) else [good, good, bad, good]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_every_kind_of_dataset_names_the_row(policy, tokenizer, tmp_path, bad, message):
    texts, row = column("text", bad), 0 if isinstance(bad, int) else 2
    pairs = {"prompt": ["q"] * 4, "completion": texts}
    checks = {
        "completion": lambda: sft(policy, tokenizer, tmp_path, Dataset.from_dict(pairs)),
        "text": lambda: sft(policy, tokenizer, tmp_path, Dataset.from_dict({"text": texts})),
        "column 'prompt'": lambda: filter_prompts(Dataset.from_dict({"prompt": texts}), tokenizer, None, "prompts"),
        "prompts: column 'prompt'": lambda: as_prompts(Dataset.from_dict({"prompt": texts})),
        "column 'completion'": lambda: _validation_pairs(Dataset.from_dict(pairs)),
        "column 'text'": lambda: tokenize_pretraining(Dataset.from_dict({"text": texts}), tokenizer),
        "pretraining_dataset: column 'text'": lambda: PretrainingStream(
            Dataset.from_dict({"text": texts}), tokenizer, max_length=8
        ),
    }
    for place, check in checks.items():
        with pytest.raises(ValueError, match=rf"{place}.*, row {row} {message}"):
            check()
    with pytest.raises(ValueError, match=rf"Prompt {row} {message}"):
        generate_completions(policy, tokenizer, texts, max_new_tokens=2)


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_streams_are_checked_as_they_flow(tokenizer, bad, message):
    texts = column("text", bad)
    row = texts.index(bad)
    prompts = Dataset.from_dict({"prompt": texts}).to_iterable_dataset()
    pairs = Dataset.from_dict({"prompt": ["q"] * 4, "completion": texts}).to_iterable_dataset()
    streams = [
        filter_prompts(prompts, tokenizer, None, "the stream"),
        check_sft_dataset(pairs, tokenizer, None, "text", "the stream"),
    ]
    for stream in streams:
        with pytest.raises(ValueError, match=rf"the stream: column .*, row {row} {message}"):
            list(stream)


def test_numbers_read_as_text_are_text(policy, tokenizer, tmp_path):
    numbers = Dataset.from_dict({"prompt": ["1+1=", "1+2="] * 4, "completion": [2, 3] * 4})
    rows = sft(policy, tokenizer, tmp_path, numbers.cast_column("completion", Value("string"))).train_dataset
    assert tokenizer.decode(rows[0]["input_ids"]) == "1+1=2<|eos|>"


def test_what_formatting_func_makes_is_checked(policy, tokenizer, tmp_path):
    args = InstructSFTConfig(str(tmp_path), report_to="none")
    rows = Dataset.from_dict({"q": ["a", "b"]})
    with pytest.raises(ValueError, match=r"text that formatting_func makes of the row \{'q': 'b'\} is empty \(None\)"):
        InstructSFTTrainer(
            policy, args, train_dataset=rows, processing_class=tokenizer,
            formatting_func=lambda row: "text" if row["q"] == "a" else None,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a"}], "has no column 'prompt' or 'messages' or 'text'"),
        ([{"prompt": "a"}], "has no column 'completion'"),
        ([{"prompt": "a", "completion": [assistant("b")]}], "the prompt is plain text and the completion is a list"),
        ([{"messages": []}, {"messages": [user("a")]}], r"column 'messages', row 0 is empty \(\[\]\)"),
        ([{"conversations": [{"from": "user"}]}], "column 'conversations', row 0: message 0 has no 'content'"),
    ],
)
def test_rows_of_demonstrations_are_refused(tokenizer, rows, message):
    with pytest.raises(ValueError, match=message):
        check_sft_dataset(Dataset.from_list(rows), tokenizer, None, "text", "the train dataset")


def test_text_and_messages_in_one_column_are_refused(tokenizer):
    rows = [{"prompt": "a"}, {"prompt": [user("a")]}]
    with pytest.raises(ValueError, match="row 1 is a list of messages and row 0 is plain text"):
        filter_prompts(Dataset.from_list(rows, on_mixed_types="use_json"), tokenizer, None, "prompts")


def test_normalize_names_the_row(reward_model, tokenizer, tmp_path):
    trainer = make_ranking(reward_model, tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"the demonstrations: column 'completion', row 1 is empty \(None\)"):
        trainer.normalize(Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}]))


# -- rankings ---------------------------------------------------------------------------------------------------------

RANKED = {"prompt": "q", "completions": ["a", "bb", "c"], "ranks": [1, 2, 3]}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**RANKED, "ranks": ["1", "2", "3"]}, r"row 0: ranks\[0\] is '1'.*without quotes"),
        ({**RANKED, "ranks": [True, False, True]}, r"row 0: ranks\[0\] is True"),
        ({**RANKED, "ranks": "[1, 2, 3]"}, r"row 0: 'ranks' must be a list .* got '\[1, 2, 3\]'.*json lines"),
        ({**RANKED, "completions": '["a", "b"]'}, r"row 0: 'completions' must be a list .*json lines"),
        ({**RANKED, "completions": None}, "row 0: 'completions' must be a list .* got None"),
        ({**RANKED, "weight": "2"}, "row 0: 'weight' is '2'.*without quotes"),
        ({**RANKED, "weight": True}, "row 0: 'weight' is True"),
        ({**RANKED, "truncated": True}, "row 0: 'truncated' must be a list with one entry per completion, got True"),
        ({**RANKED, "truncated": [0, 1, 0]}, r"row 0: truncated\[0\] is 0. Write true where"),
        ({**RANKED, "truncated": ["no", "no", "no"]}, r"row 0: truncated\[0\] is 'no'"),
        ({**RANKED, "prompt": 5}, r"row 0: the prompt is an int \(5\)"),
        ({**RANKED, "prompt": {"text": "q"}}, "row 0: the prompt is a dict"),
        ({**RANKED, "completions": ["a", "b", 3]}, r"row 0: completion 2 is an int \(3\)"),
        ({**PAIR, "margin": "0.5"}, "row 0: 'margin' is '0.5'.*without quotes"),
        ({**PAIR, "prompt": None}, r"row 0: the prompt is empty \(None\)"),
        ({**PAIR, "rejected": None}, r"row 0: 'rejected' is empty \(None\)"),
        ({**PAIR, "chosen": 1, "rejected": 2}, r"row 0: 'chosen' is an int \(1\)"),
        ({"prompt": "q", "completions": ["a", "b"], "pairs": [[True, False]]}, r"pairs\[0\] is \[True, False\]"),
        ({"prompt": "q", "completions": ["a", "b"], "pairs": "[[0, 1]]"}, r"'pairs' must be .*'\[\[0, 1\]\]'.*csv"),
        ({"prompt": "q", "completions": ["a", "b"], "scores": ["a", "b"]}, r"scores\[0\] is 'a'"),
    ],
)
def test_rows_of_rankings_are_refused_with_their_value(tokenizer, row, message):
    dataset = Dataset.from_list([row], on_mixed_types="use_json")
    with pytest.raises(ValueError, match=message):
        prepare_ranking_dataset(dataset, tokenizer)


def test_a_row_without_truncated_is_finished(tokenizer):
    rows = [{**RANKED, "truncated": [True, False, False]}, {**RANKED, "truncated": None}]
    first, second = prepare_ranking_dataset(Dataset.from_list(rows), tokenizer)[0]["input_ids"]
    assert [ids[-1] == 256 for ids in first] == [False, True, True]
    assert [ids[-1] == 256 for ids in second] == [True, True, True]


def test_two_answers_to_what_is_better_are_refused(tokenizer):
    rows = Dataset.from_list([{**PAIR, "completions": ["b", "a"], "ranks": [1, 2]}])
    with pytest.raises(ValueError, match="'completions' beside 'chosen' and 'rejected'.*Remove"):
        prepare_ranking_dataset(rows, tokenizer)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_users_own_columns_do_no_harm(tokenizer, streamed):
    own = {"input_ids": "x", "tied": "no", "labels": "z", "length": 3, "pairs_id": 1}
    plain, odd = (Dataset.from_list([row] * 2) for row in (RANKED, {**RANKED, **own}))
    if streamed:
        plain, odd = plain.to_iterable_dataset(), odd.to_iterable_dataset()
    assert list(prepare_ranking_dataset(odd, tokenizer)[0]) == list(prepare_ranking_dataset(plain, tokenizer)[0])


@pytest.mark.parametrize(
    ("rows", "said"), [([{**PAIR, "margin": 1.0}, PAIR], "no"), ([PAIR, {**PAIR, "margin": 1}], "a")]
)
def test_a_margin_on_some_rows_of_a_stream_is_refused(tokenizer, rows, said):
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match=f"row 1: {said} 'margin' here, unlike the rows before"):
        list(prepare_ranking_dataset(stream, tokenizer)[0])


def test_a_first_row_without_messages_is_named(reward_model, tokenizer, tmp_path):
    rows = [
        {"prompt": p, "completions": [[assistant("x")], [assistant("y")]], "ranks": [1, 2]} for p in ([], [user("a")])
    ]
    with pytest.raises(ValueError, match=r"row 0: the prompt is empty \(\[\]\)"):
        make_ranking(reward_model, tokenizer, tmp_path, rows)


# -- templates --------------------------------------------------------------------------------------------------------


def test_a_template_that_refuses_names_the_row(policy, reward_model, tokenizer, tmp_path):
    tokenizer.chat_template = ALTERNATE
    good, bad = [user("a")], [user("a"), user("b")]
    ranked = [{"prompt": p, "completions": [[assistant("x")], [assistant("y")]], "ranks": [1, 2]} for p in (good, bad)]
    shown = [{"prompt": p, "completion": [assistant("x")]} for p in (good, bad)]
    talks = [{"messages": [*p, assistant("x")]} for p in (good, bad)]
    prompts = Dataset.from_list([{"prompt": p} for p in (good, bad)])
    trainer = make_ranking(reward_model, tokenizer, tmp_path)
    checks = [
        lambda: prepare_ranking_dataset(Dataset.from_list(ranked), tokenizer),
        lambda: filter_prompts(prompts, tokenizer, None, "prompts"),
        lambda: list(filter_prompts(prompts.to_iterable_dataset(), tokenizer, 50, "prompts")),
        lambda: sft(policy, tokenizer, tmp_path, Dataset.from_list(shown)),
        lambda: sft(policy, tokenizer, tmp_path, Dataset.from_list(talks)),
        lambda: list(check_sft_dataset(Dataset.from_list(talks).to_iterable_dataset(), tokenizer, None, "text", "it")),
        lambda: trainer.normalize(Dataset.from_list(shown)),
        lambda: generate_completions(policy, tokenizer, [good, bad], max_new_tokens=2),
    ]
    for check in checks:
        with pytest.raises(ValueError, match=r"(row|Prompt) 1: the chat template refuses .*Roles must alternate"):
            check()


def test_messages_without_a_template_are_refused(tokenizer):
    tokenizer.chat_template = None
    rows = Dataset.from_list([{"prompt": [user("a")], "completions": [[assistant("x")]] * 2, "ranks": [1, 2]}])
    with pytest.raises(ValueError, match="row 0: these are messages, and the tokenizer has no chat template"):
        prepare_ranking_dataset(rows, tokenizer)


# -- what Arrow adds --------------------------------------------------------------------------------------------------

PROMPT = [user("q"), call("add", a=1), {"role": "tool", "content": "3"}, user("and?")]
TWO = [schema("add", a={"type": "integer"}), schema("weather", city={"type": "string", "enum": ["Oslo", None]})]
CALLS = [[call("weather", city="Oslo")], [call("add", a=2)], [assistant("no")]]


def rendered(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"]


def test_rankings_are_rendered_as_they_were_written(tokenizer):
    scorer = RewardScorer(fresh_model(max_position_embeddings=1024), tokenizer)
    tokenizer.chat_template = TOOLS
    dataset = Dataset.from_list([{"prompt": PROMPT, "completions": CALLS, "ranks": [1, 2, 3], "tools": TWO}])
    assert dataset[0]["prompt"][0]["tool_calls"] is None  # Arrow did add something
    want = [rendered(tokenizer, [*PROMPT, *completion], tools=TWO) for completion in CALLS]
    assert prepare_ranking_dataset(dataset, tokenizer)[0][0]["input_ids"] == want
    row = dataset[0]
    scores = scorer(prompts=[row["prompt"]] * 3, completions=row["completions"], tools=[row["tools"]] * 3)
    assert scores == scorer(prompts=[PROMPT] * 3, completions=CALLS, tools=[TWO] * 3)


def test_demonstrations_are_rendered_as_they_were_written(tokenizer, tmp_path):
    policy = LlamaForCausalLM(tiny_config(max_position_embeddings=1024))
    tokenizer.chat_template = TOOLS
    kwargs = [{"chat_template_kwargs": {"mood": "odd"}}, {}]
    rows = [{"prompt": PROMPT, "completion": CALLS[i], "tools": TWO, **kwargs[i]} for i in range(2)]
    got = sft(policy, tokenizer, tmp_path, Dataset.from_list(rows), max_length=None).train_dataset["input_ids"]
    assert list(got) == [rendered(tokenizer, [*PROMPT, *CALLS[i]], tools=TWO) for i in range(2)]


@pytest.mark.parametrize("streamed", [False, True])
def test_prompts_come_back_as_they_were_written(tokenizer, streamed):
    tokenizer.chat_template = TOOLS
    dataset = Dataset.from_list([{"prompt": PROMPT, "n": 1}, {"prompt": [user("q")], "n": 2}])
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    got = list(filter_prompts(dataset, tokenizer, None, "prompts"))
    assert got == [{"prompt": PROMPT, "n": 1}, {"prompt": [user("q")], "n": 2}]


def test_ppo_reads_prompts_as_they_were_written(tmp_path, policy, tokenizer, reward_model):
    tokenizer.chat_template = TOOLS
    seen = []

    def reward(prompts, **_):
        seen.extend(prompts)
        return [0.0] * len(prompts)

    prompts = Dataset.from_list(
        [{"prompt": [user("q"), call("f", x=i), {"role": "tool", "content": "3"}]} for i in range(16)]
    )
    options = {"value_model": reward_model, "ptx_coef": 0.0, "total_episodes": 16, "gradient_accumulation_steps": 8}
    trainer = make_ppo(tmp_path, policy, reward, tokenizer, prompts=prompts, max_completion_length=2, **options)
    trainer.train()
    assert sorted(prompt[1]["tool_calls"][0]["function"]["arguments"]["x"] for prompt in seen) == list(range(16))
    assert all(
        message.keys() <= {"role", "content", "tool_calls"} and None not in message.values()
        for p in seen
        for message in p
    )


def test_sampling_reads_prompts_as_they_were_written(policy, tokenizer):
    tokenizer.chat_template = TOOLS
    prompt = PROMPT[:3]
    padded = Dataset.from_list([{"prompt": prompt}])[0]["prompt"]
    assert padded != prompt
    one, other = (generate_completions(policy, tokenizer, [p], max_new_tokens=8, seed=1) for p in (padded, prompt))
    assert one == other


def test_nulls_that_a_user_wrote_stay():
    messages = [user("q"), {**call("f", x=None), "content": None}]
    assert as_written(messages) == messages
    kept = Dataset.from_list([{"messages": messages}], on_mixed_types="use_json")
    assert without_padding(kept)[0]["messages"] == messages


def test_content_null_beside_tool_calls_is_rendered(tokenizer):
    prompt = [user("q"), {**call("f", x=1), "content": None}, {"role": "tool", "content": "3"}]
    rows = Dataset.from_list([{"prompt": prompt, "completions": [[assistant("a")], [assistant("b")]], "ranks": [1, 2]}])
    [text, _] = map(tokenizer.decode, prepare_ranking_dataset(rows, tokenizer)[0][0]["input_ids"])
    assert text == "<|user|>q<|eos|><|assistant|><|eos|><|tool|>3<|eos|><|assistant|>a<|eos|>"


def test_columns_that_are_not_text_are_not_read_to_check_rows():
    from instruct_trl.data.rows import check_rows

    seen = []
    rows = Dataset.from_dict({"text": ["a", "b"], "image": [1, 2]})
    assert check_rows(rows, lambda row, index: seen.append((index, dict(row))), ["text"]) is rows
    assert seen == [(0, {"text": "a"}), (1, {"text": "b"})]
