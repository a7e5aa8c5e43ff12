"""Keys, tokens and passwords do not reach what is written; words that only look alike do."""

import json
import os
import sys

import pytest

from instruct_trl.redaction import redact, redact_command, redact_settings

HUB = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("--push_to_hub true --hub_token abc", "--push_to_hub true --hub_token ***"),
        ("--hub_token=abc --seed 1", "--hub_token=*** --seed 1"),
        (f"--dataset_name {HUB} x", "--dataset_name *** x"),
        ("--judge_key OPENAI_API_KEY", "--judge_key OPENAI_API_KEY"),
        ("--judge_key sk-proj-0123456789abcdef", "--judge_key ***"),
        ("--judge_key 0123456789abcdef", "--judge_key ***"),
        ("--eos_token <|im_end|> --pad_token x", "--eos_token <|im_end|> --pad_token x"),
        ("--max_tokens 5 --judges http://me:pw@host/v1", "--max_tokens 5 --judges http://***@host/v1"),
        ("--model_name_or_path hf_cache/model --api-key=Q1", "--model_name_or_path hf_cache/model --api-key=Q1"),
    ],
)
def test_command_lines(given, shown):
    assert " ".join(redact_command(given.split(" "))) == shown


def test_mappings_on_a_command_line_and_in_settings():
    kwargs = {"token": "secret words", "dtype": "bfloat16", "headers": {"Authorization": "Basic Zm9v", "n": [1, HUB]}}
    hidden = {"token": "***", "dtype": "bfloat16", "headers": {"Authorization": "***", "n": [1, "***"]}}
    assert redact_settings({"model_init_kwargs": kwargs}) == {"model_init_kwargs": hidden}
    assert json.loads(redact_command(["--model_init_kwargs", json.dumps(kwargs)])[1]) == hidden
    assert redact_command(["--env", "HF_TOKEN=abc", "{'token': 'a b', 'n': 1}"]) == [
        "--env",
        "HF_TOKEN=***",
        "{'token': ***, 'n': 1}",
    ]


def test_text_keeps_what_is_no_key():
    plain = "hf_home/x sk-learn https://host/v1 eos_token a token, the key: https://huggingface.co/@me"
    assert redact(plain) == plain
    assert redact("Authorization: Bearer abc.def, then") == "Authorization: Bearer ***, then"


def test_a_reports_command_has_no_token(monkeypatch):
    from instruct_trl.pipeline.evaluation_report import command_line

    monkeypatch.setattr(sys, "argv", ["/home/me/recipes/ppo_ptx.py", "--hub_token", "abc", "--seed", "3"])
    assert command_line() == "accelerate launch recipes/ppo_ptx.py --hub_token *** --seed 3"


def test_tokens_leave_the_arguments_that_trainers_write_beside_a_model(tmp_path, monkeypatch):
    from instruct_trl import InstructSFTConfig
    from instruct_trl.pipeline.arguments import RunArguments, parse_recipe

    monkeypatch.setenv("HF_TOKEN", "before")
    (tmp_path / "c.yaml").write_text("seed: 1\n")
    argv = ["--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path), "--bf16", "false"]
    argv += ["--model_init_kwargs", json.dumps({"token": HUB, "dtype": "float32"})]
    _, args = parse_recipe((RunArguments, InstructSFTConfig), "sft", "", [*argv, "--hub_token", HUB])
    assert os.environ["HF_TOKEN"] == HUB
    assert args.hub_token is None
    assert args.model_init_kwargs == {"dtype": "float32"}
    with pytest.raises(ValueError, match=r"'\*\*\*'"):
        parse_recipe((RunArguments, InstructSFTConfig), "sft", "", [*argv, "--hub_tokne", HUB])


@pytest.mark.parametrize("key", ["0A1B2C3D4E5F60718293A4B5C6D7E8F9", "A1B2C3D4E5F60718293A4B5C6D7E8F90"])
def test_a_key_of_capitals_is_no_name_of_a_variable(key):
    from instruct_trl.pipeline.judging import _api_key

    assert redact_settings({"judge_key": key}) == {"judge_key": "***"}
    with pytest.raises(ValueError, match="never the key itself") as error:
        _api_key(key)
    assert key not in str(error.value)
    assert redact_settings({"judge_key": "AZURE_OPENAI_KEY2"}) == {"judge_key": "AZURE_OPENAI_KEY2"}


def test_what_is_refused_shows_no_password(tmp_path):
    from instruct_trl.models.model_files import check_model_path
    from instruct_trl.pipeline.arguments import read_yaml
    from instruct_trl.pipeline.loading import load_splits

    (tmp_path / "token").write_text(HUB)
    refused = [
        (load_splits, "https://me:secret@host/rows.jsonl"),
        (check_model_path, "https://me:secret@host/model"),
        (read_yaml, tmp_path / "token"),
    ]
    for check, given in refused:
        with pytest.raises(ValueError) as error:
            check(given)
        assert not any(word in str(error.value) for word in ("secret", HUB))
