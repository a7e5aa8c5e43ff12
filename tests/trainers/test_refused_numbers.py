"""Guards numbers, files and models that are refused by name before anything is trained or sampled."""

import json

import pytest
from datasets import Dataset

from instruct_trl import InstructSFTConfig, InstructSFTTrainer, PPOPtxConfig, RankingRewardConfig
from instruct_trl.data.encoding import template_kwargs
from instruct_trl.data.rows import read_json
from instruct_trl.models.loading import load_causal_model
from instruct_trl.pipeline.arguments import RunArguments, read_yaml

CONFIGS = [InstructSFTConfig, PPOPtxConfig, RankingRewardConfig]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", -2),
        ("gradient_accumulation_steps", 0),
        ("gradient_accumulation_steps", 1.5),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("learning_rate", [1, 2]),
        ("learning_rate", "fast"),
        ("weight_decay", float("nan")),
        ("max_grad_norm", -1.0),
    ],
)
def test_numbers_that_train_nothing_are_refused(tmp_path, config, name, value):
    with pytest.raises(ValueError, match=rf"{name} is .*; it must be a (whole )?number, at least [01]\."):
        config(str(tmp_path), **{name: value})


@pytest.mark.parametrize("config", CONFIGS)
def test_a_learning_rate_that_a_yaml_reads_as_text_is_one(tmp_path, config):
    assert float(config(str(tmp_path), learning_rate="1e-4").learning_rate) == 1e-4
    assert config(str(tmp_path), learning_rate=0).learning_rate == 0
    assert config(str(tmp_path), max_grad_norm=float("inf")).max_grad_norm == float("inf")


def test_cpu_threads_are_at_least_one():
    with pytest.raises(ValueError, match="--cpu_threads is 0; it must be a whole number, at least 1"):
        RunArguments(cpu_threads=0)


def test_a_key_that_comes_twice_is_refused_with_its_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 1\nlearning_rate: 1\nseed: 2\n")
    with pytest.raises(ValueError, match=r"c\.yaml, line 3, column 1: .*'seed' comes twice"):
        read_yaml(path)
    path.write_text("a: {x: 1}\nb: {x: 2}\n")
    assert read_yaml(path) == {"a": {"x": 1}, "b": {"x": 2}}


def test_a_broken_record_of_a_run_is_named(tmp_path):
    path = tmp_path / "stage.finished.json"
    path.write_text('{"settings": {"a": 1')
    with pytest.raises(ValueError, match=r"stage\.finished\.json is broken or cut short.*move it away"):
        read_json(path)
    path.write_text(json.dumps({"a": 1}))
    assert read_json(path) == {"a": 1}


def test_settings_of_the_template_that_are_none_are_named():
    with pytest.raises(ValueError, match="'tools' is '{broken', which is not valid JSON"):
        template_kwargs({"tools": "{broken"})
    with pytest.raises(ValueError, match="'chat_template_kwargs' is 'quiet'; give a dictionary"):
        template_kwargs({"chat_template_kwargs": "quiet"})


def test_a_classifier_is_no_language_model(tmp_path, reward_model, tokenizer):
    reward_model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    with pytest.raises(ValueError, match=r"rm' is a classifier \(LlamaForSequenceClassification\)"):
        load_causal_model(tmp_path / "rm")
    rows = Dataset.from_list([{"prompt": "q", "completion": "a"}] * 4)
    with pytest.raises(ValueError, match="is a classifier"):
        InstructSFTTrainer(str(tmp_path / "rm"), InstructSFTConfig(str(tmp_path / "out")), train_dataset=rows)


def test_messages_that_are_text_and_a_tokenizer_without_eos_are_named(tmp_path, policy, tokenizer):
    args = InstructSFTConfig(str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match="column 'messages', row 0 is plain text. Give a list of messages"):
        InstructSFTTrainer(
            policy, args, train_dataset=Dataset.from_list([{"messages": "hi"}] * 4), processing_class=tokenizer
        )
    policy.save_pretrained(tmp_path / "m")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "m")
    rows = Dataset.from_list([{"prompt": "q", "completion": "a"}] * 4)
    with pytest.raises(ValueError, match="has no EOS token"):
        InstructSFTTrainer(str(tmp_path / "m"), args, train_dataset=rows)
