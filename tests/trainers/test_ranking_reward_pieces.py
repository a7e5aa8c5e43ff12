"""Sharing, pieces and two passes: routes to the same training, and what the log says of them."""

import json

import pytest
import torch
from conftest import tiny_config
from peft import LoraConfig
from ranking_helpers import RANKINGS, fresh_model, make
from transformers import LlamaForSequenceClassification, OPTConfig, OPTForSequenceClassification

from instruct_trl import RewardScorer
from instruct_trl.data.encoding import prompt_keys
from instruct_trl.data.ranking_batch import RankingCollator, fill, prompt_pieces, row_pieces, take_prompts
from instruct_trl.trainers.ranking_reward import RankingRewardConfig

# Two prompts a forward, two forwards a step: eight prompts in two steps. SGD shows gradients plainly.
STEPS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.5,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}
ROUTES = {
    "shared": {"prefix_sharing": "on"},
    "shared, checkpointed": {"prefix_sharing": "on", "gradient_checkpointing": True},
    "shared, in pieces": {"prefix_sharing": "on", "max_tokens_per_batch": 40},
    "shared, each prompt": {"prefix_sharing": "on", "max_tokens_per_batch": 1},
    "shared, two passes": {"prefix_sharing": "on", "two_pass": True},
    "shared, two passes in pieces": {"prefix_sharing": "on", "two_pass": True, "max_tokens_per_batch": 40},
    "plain, in pieces": {"prefix_sharing": "off", "max_tokens_per_batch": 40},
    "plain, two passes": {"prefix_sharing": "off", "two_pass": True},
}


def train(tokenizer, path, **kwargs):
    trainer = make(fresh_model(), tokenizer, path, **{**STEPS, **kwargs})
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "pair_accuracy" in entry]
    return trainer, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, logs


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_is_the_same_training(tokenizer, tmp_path, route):
    _, expected, expected_logs = train(tokenizer, tmp_path / "a", prefix_sharing="off")
    trainer, weights, logs = train(tokenizer, tmp_path / "b", **ROUTES[route])
    assert trainer.model.config._attn_implementation == "sdpa"
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)
    for entry, expected_entry in zip(logs, expected_logs, strict=True):
        for name in ("loss", "pair_accuracy", "margin", "mean_score", "num_tokens", "tied_prompts"):
            assert entry[name] == pytest.approx(expected_entry[name], abs=1e-4), name


def test_the_log_shows_what_sharing_saves(tokenizer, tmp_path):
    _, _, shared = train(tokenizer, tmp_path / "a", prefix_sharing="on")
    _, _, plain = train(tokenizer, tmp_path / "b", prefix_sharing="off")
    # In bytes: each prompt once and each completion with its EOS once; all first letters but "here"/"there" differ.
    by_hand = sum(len(row["prompt"]) + sum(len(c) + 1 for c in row["completions"]) for row in RANKINGS)
    checked = shared[-1]["tokens_computed"] - by_hand
    # Completions of one prompt that begin alike share more: "they" and "you" do not, "me" neither.
    assert checked == 0
    assert plain[-1]["tokens_computed"] > 1.5 * shared[-1]["tokens_computed"]
    assert [entry["padding_share"] for entry in shared] == [0.0, 0.0]
    assert plain[-1]["padding_share"] > 0
    rows = sum(
        len(row["prompt"]) * len(row["completions"]) + sum(len(c) + 1 for c in row["completions"]) for row in RANKINGS
    )
    assert plain[-1]["num_tokens"] == shared[-1]["num_tokens"] == rows


def test_evaluation_shares_too_and_leaves_records(tokenizer, tmp_path):
    rows = [{**row, "labeler": f"labeler {index % 2}"} for index, row in enumerate(RANKINGS)]
    trainer = make(fresh_model(), tokenizer, tmp_path, eval_rows=rows, prefix_sharing="on", max_tokens_per_batch=30)
    trainer.model.config.reward_bias = 0.25
    trainer.evaluate()
    scorer = RewardScorer(trainer.model, tokenizer, prefix_sharing="off")
    assert len(trainer.evaluation_records) == len(rows)
    for record, row in zip(trainer.evaluation_records, rows, strict=True):
        expected = scorer(prompts=[row["prompt"]] * len(row["completions"]), completions=row["completions"])
        assert record["rewards"] == pytest.approx(expected, abs=1e-4)
        assert record["labeler"] == row["labeler"]
        assert record["prompt_length"] == len(row["prompt"])
        assert record["lengths"] == [len(completion) + 1 for completion in row["completions"]]
        better = {(w, k) for w, a in enumerate(row["ranks"]) for k, b in enumerate(row["ranks"]) if a < b}
        assert {tuple(pair) for pair in record["pairs"]} == better
    assert [record["prompt_key"] for record in trainer.evaluation_records] == prompt_keys(row["prompt"] for row in rows)


def test_lora_with_sharing_trains_the_adapter(tokenizer, tmp_path):
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"])
    weights = []
    for sharing in ("on", "off"):
        torch.manual_seed(3)
        trainer = make(
            fresh_model(), tokenizer, tmp_path / sharing, peft_config=config, prefix_sharing=sharing, **STEPS
        )
        trainer.train()
        weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-5)


def test_a_scorer_shares_the_prompt_of_several_completions(reward_model, tokenizer):
    prompts = ["Tell me. ", "Why? ", "Tell me. ", "Tell me. ", "Why? ", "Alone. "]
    completions = ["yes", "no", "maybe", "never", "because", "single"]
    shared = RewardScorer(reward_model, tokenizer, batch_size=4, prefix_sharing="on")
    plain = RewardScorer(reward_model, tokenizer, batch_size=4, prefix_sharing="off")
    assert shared(prompts, completions) == pytest.approx(plain(prompts, completions), abs=1e-5)
    # Batches of at most four rows: "Why?" twice and "Alone." first, then "Tell me." three times.
    assert shared._route.take_counts()["computed"] == 5 + 3 + 8 + 7 + 7 + 9 + 4 + 6 + 6
    assert reward_model.config._attn_implementation == "sdpa"


def test_pieces_hold_the_budget_and_lose_nothing():
    def row(prefix, *own):
        return {"input_ids": [[1] * prefix + [2 + i] * n for i, n in enumerate(own)], "ranks": list(range(len(own)))}

    batch = RankingCollator(0)([row(5, 3, 3), row(10, 20, 1), row(2, 1, 1, 1), row(4, 4, 4)])
    # Shared costs: 5+6, 10+21, 2+3, 4+8; longest first: prompts 1, 0, 3, 2.
    assert prompt_pieces(batch, 30, shared=True) == [[1], [0, 3, 2]]
    assert prompt_pieces(batch, 25, shared=True) == [[1], [0, 3], [2]]
    # Rows padded to the longest of the group: 2·30, 2·8, 4·8, 7·8.
    assert prompt_pieces(batch, 32, shared=False) == [[1], [0, 3], [2]]
    assert prompt_pieces(batch, None, shared=True) == [[0, 1, 2, 3]]
    assert row_pieces(batch, None, shared=True) == [[row] for row in range(9)]
    assert row_pieces(batch, 20, shared=True) == [[0, 1], [2], [3, 4, 5, 6], [7, 8]]
    piece = take_prompts(batch, [3, 2])
    assert piece["input_ids"].tolist() == [[1] * 4 + [2] * 4, [1] * 4 + [3] * 4] + [
        [1, 1, token, 0, 0, 0, 0, 0] for token in (2, 3, 4)
    ]
    assert piece["ranks"].tolist() == [[0, 1, 0], [0, 1, 2]]
    assert fill([], len, 3) == []


def test_refusals(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="prefix_sharing must be"):
        RankingRewardConfig(str(tmp_path), prefix_sharing="yes")
    with pytest.raises(ValueError, match="max_tokens_per_batch is 0; it must be at least 1"):
        RankingRewardConfig(str(tmp_path), max_tokens_per_batch=0)
    with pytest.raises(ValueError, match="two_pass needs disable_dropout=True"):
        RankingRewardConfig(str(tmp_path), two_pass=True, disable_dropout=False)
    sizes = {
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    opt = OPTForSequenceClassification(OPTConfig(vocab_size=258, num_labels=1, dropout=0.1, pad_token_id=257, **sizes))
    model = make(opt, tokenizer, tmp_path, two_pass=True).model.train()
    rows = {"input_ids": torch.arange(1, 65).view(8, 8), "attention_mask": torch.ones(8, 8, dtype=torch.long)}
    assert torch.equal(model(**rows).logits, model(**rows).logits)


def test_tokens_computed_go_on_after_a_resume(tokenizer, tmp_path):
    kwargs = {**STEPS, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    whole = make(fresh_model(), tokenizer, tmp_path / "whole", **kwargs)
    whole.train()
    resumed = make(fresh_model(), tokenizer, tmp_path / "whole", **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    last = [[e for e in t.state.log_history if "tokens_computed" in e][-1] for t in (whole, resumed)]
    assert last[0]["tokens_computed"] == last[1]["tokens_computed"]
    saved = json.loads((tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["log_history"][-1]["tokens_computed"] == last[0]["tokens_computed"]


def test_on_refuses_a_model_that_cannot_share(tokenizer, tmp_path):
    model = LlamaForSequenceClassification(tiny_config(num_labels=1))
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="prefix_sharing='on'.*flash_attention_2"):
        make(model, tokenizer, tmp_path, prefix_sharing="on")
