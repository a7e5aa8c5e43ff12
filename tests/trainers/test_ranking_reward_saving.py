"""What RankingRewardTrainer leaves behind: the bias, the pad token, adapters, the model card. Saved equals reloaded."""

import json
import logging

import pytest
import torch
from conftest import tiny_config
from datasets import Dataset
from peft import LoraConfig
from ranking_helpers import DEMONSTRATIONS, RANKINGS, eos_as_pad, fresh_model, make, pairs_of
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from instruct_trl.models.loading import load_reward_model
from instruct_trl.models.reward import RewardScorer


@pytest.mark.parametrize("conversational", [False, True])
def test_normalize_makes_demonstrations_average_zero(tokenizer, tmp_path, conversational):
    rows = DEMONSTRATIONS
    if conversational:
        role = {"prompt": "user", "completion": "assistant"}
        rows = [{key: [{"role": role[key], "content": text}] for key, text in row.items()} for row in rows]
    trainer = make(fresh_model(), tokenizer, tmp_path)
    with torch.no_grad():
        trainer.model.score.weight += 1.0
    bias = trainer.normalize(Dataset.from_list(rows))
    assert abs(bias) > 0.1
    trainer.save_model(str(tmp_path / "rm"))
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["reward_bias"] == bias
    scores = RewardScorer(tmp_path / "rm")([row["prompt"] for row in rows], [row["completion"] for row in rows])
    assert sum(scores) == pytest.approx(0.0, abs=1e-5)
    assert trainer.normalize(Dataset.from_list(rows)) == pytest.approx(bias)  # the bias is not applied twice


def test_normalize_refuses_what_it_cannot_use(tokenizer, tmp_path):
    trainer = make(fresh_model(), tokenizer, tmp_path, max_length=30)
    with pytest.raises(ValueError, match="the demonstrations has no column 'completion'.*Did you mean 'completions'"):
        trainer.normalize(Dataset.from_list([{"prompt": "a", "completions": ["b"]}]))
    with pytest.raises(ValueError, match="none of 1 rows fits max_length=30"):
        trainer.normalize(Dataset.from_list([{"prompt": "a", "completion": "b" * 40}]))


def test_saved_and_reloaded_scores_are_equal(tokenizer, tmp_path):
    trainer = make(fresh_model(), tokenizer, tmp_path, max_steps=2, learning_rate=1e-2)
    trainer.train()
    trainer.normalize(Dataset.from_list(DEMONSTRATIONS))
    trainer.save_model(str(tmp_path / "rm"))
    before = RewardScorer(trainer.model, tokenizer)(*pairs_of(RANKINGS))
    assert RewardScorer(tmp_path / "rm")(*pairs_of(RANKINGS)) == before
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert plain.config.num_labels == 1


@pytest.mark.parametrize("base", ["causal", "causal_with_eos_as_pad"])
def test_saved_and_reloaded_adapter_scores_are_equal(tokenizer, tmp_path, base):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(vocab_size=257 if base == "causal_with_eos_as_pad" else 258)).save_pretrained(
        tmp_path / "base"
    )
    if base == "causal_with_eos_as_pad":
        tokenizer = eos_as_pad()
    tokenizer.save_pretrained(tmp_path / "base")
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"])
    path = str(tmp_path / "base")
    trainer = make(path, None, tmp_path / "out", peft_config=lora, max_steps=3, learning_rate=1e-2)
    trainer.train()
    bias = trainer.normalize(Dataset.from_list(DEMONSTRATIONS))
    trainer.save_model(str(tmp_path / "rm"))
    before = RewardScorer(trainer.model, trainer.processing_class)(*pairs_of(RANKINGS))
    scorer = RewardScorer(tmp_path / "rm")
    assert scorer.reward_bias == bias
    if base == "causal":  # plain transformers finds the adapter, too
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", num_labels=1)
        assert plain.active_adapters() == ["default"]
    assert scorer.processing_class.pad_token_id != scorer.processing_class.eos_token_id
    assert scorer(*pairs_of(RANKINGS)) == pytest.approx(before, abs=1e-6)
    untrained = RewardScorer(fresh_model(vocab_size=260), trainer.processing_class)(*pairs_of(RANKINGS))
    assert untrained != pytest.approx(before, abs=1e-2)


@pytest.mark.parametrize("by_name", [False, True])
def test_pad_that_is_eos_is_replaced_and_saved(tokenizer, tmp_path, caplog, by_name):
    tokenizer = eos_as_pad()
    model = fresh_model(vocab_size=257)
    if by_name:
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        model, tokenizer = str(tmp_path / "base"), None
    with caplog.at_level(logging.WARNING, logger="instruct_trl"):
        trainer = make(model, tokenizer, tmp_path, max_steps=1)
    assert sum("pad token was its EOS token" in record.getMessage() for record in caplog.records) == 1
    trainer.train()
    trainer.save_model(str(tmp_path / "rm"))
    model, saved = load_reward_model(tmp_path / "rm")
    assert (saved.pad_token, saved.pad_token_id, saved.eos_token_id) == ("<|pad|>", 257, 256)
    assert (model.config.pad_token_id, model.get_input_embeddings().weight.shape[0]) == (257, 258)


def test_model_card_names_the_paper(tokenizer, tmp_path):
    trainer = make(fresh_model(), tokenizer, tmp_path)
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "2203.02155" in card
    assert "ranking-reward" in card
    assert "ouyang2022training" in card
