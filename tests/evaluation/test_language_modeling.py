"""The mean token loss on text and on pairs equals transformers' own loss and the evaluation loss of TRL's trainer."""

import math

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from instruct_trl.evaluation.language_modeling import mean_token_loss


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
