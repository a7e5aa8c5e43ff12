"""What RankingRewardTrainer refuses before training: one clear ValueError each."""

import pytest
from conftest import tiny_config
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from ranking_helpers import RANKINGS, fresh_model, make
from transformers import LlamaForSequenceClassification


@pytest.mark.parametrize("trained_head", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["score"]}])
def test_adapters_that_train_the_head_are_accepted(tokenizer, tmp_path, trained_head):
    make(fresh_model(), tokenizer, tmp_path, peft_config=LoraConfig(target_modules=["q_proj"], **trained_head))


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_adapters_that_freeze_the_head_are_refused(tokenizer, tmp_path, task):
    lora = LoraConfig(task_type=task, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="freezes the score head.*task_type='SEQ_CLS'"):
        make(fresh_model(), tokenizer, tmp_path, peft_config=lora)
    with pytest.raises(ValueError, match="is frozen.*task_type='SEQ_CLS'"):
        make(get_peft_model(fresh_model(), LoraConfig(target_modules=["q_proj"])), tokenizer, tmp_path)


def test_virtual_tokens_are_refused(tokenizer, tmp_path):
    prompt_tuning = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PromptTuningConfig adds virtual tokens"):
        make(fresh_model(), tokenizer, tmp_path, peft_config=prompt_tuning)


@pytest.mark.parametrize("by_name", [False, True])
def test_more_than_one_label_is_refused(tokenizer, tmp_path, by_name):
    model = LlamaForSequenceClassification(tiny_config(num_labels=2))
    if by_name:
        model.save_pretrained(tmp_path / "two")
        model = str(tmp_path / "two")
    with pytest.raises(ValueError, match="num_labels=2; a reward model has one label"):
        make(model, tokenizer, tmp_path)


@pytest.mark.parametrize("path", ["./nowhere", "no-such/model"])
def test_a_path_that_is_not_there_is_refused(tokenizer, tmp_path, path):
    with pytest.raises(ValueError, match=f"There is no model.*{path}"):
        make(path, tokenizer, tmp_path)


def test_a_tokenizer_without_eos_is_refused(tokenizer, tmp_path):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="The tokenizer has no EOS token"):
        make(fresh_model(), tokenizer, tmp_path)


def test_bad_data_is_refused_before_training(tokenizer, tmp_path):
    for eval_rows, rows in ((None, [{**RANKINGS[1], "ranks": [1]}]), ([{**RANKINGS[1], "ranks": [1]}], RANKINGS)):
        name = "train" if eval_rows is None else "eval"
        with pytest.raises(ValueError, match=f"the {name} dataset, row 0: 2 completions but 1 ranks"):
            make(fresh_model(), tokenizer, tmp_path, rows, eval_rows=eval_rows)


def test_a_model_in_memory_needs_its_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="pass its tokenizer as processing_class"):
        make(fresh_model(), None, tmp_path)


def test_pad_token_set_to_eos_is_refused(tokenizer, tmp_path):
    with pytest.warns(FutureWarning, match="pad_token"), pytest.raises(ValueError, match="is the EOS token"):
        make(fresh_model(), tokenizer, tmp_path, pad_token="<|eos|>")
