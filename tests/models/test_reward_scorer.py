"""RewardScorer and its pieces: where the score is read, pad tokens, loading, the TRL reward-function interface."""

import pytest
import torch
from conftest import tiny_config
from ranking_helpers import eos_as_pad
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from instruct_trl.data.encoding import pad_rows, tokenize_pair
from instruct_trl.models.loading import ensure_distinct_pad_token, load_reward_model
from instruct_trl.models.reward import RewardScorer
from instruct_trl.models.scores import score_rows
from instruct_trl.models.value import ValueModel

PROMPTS = ["What is up?", "Hi", "A longer prompt than the others"]
COMPLETIONS = ["The sky.", "Hello there, how are you?", "No"]


def chat(texts, role):
    return [[{"role": role, "content": text}] for text in texts]


def clone(tokenizer, **special):
    """The same vocabulary with other special tokens."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)


def alone(model, ids):
    """Reference score: the row forwarded alone and unpadded, its backbone's last state times the head's weights."""
    with torch.no_grad():
        hidden = model.eval().base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return (model.score.weight[0] @ hidden).item()


def test_scores_equal_rows_forwarded_alone(reward_model, tokenizer):
    scores = RewardScorer(reward_model, tokenizer, batch_size=2)(PROMPTS, COMPLETIONS)
    for prompt, completion, score in zip(PROMPTS, COMPLETIONS, scores, strict=True):
        ids = tokenizer(prompt + completion + "<|eos|>")["input_ids"]
        assert score == pytest.approx(alone(reward_model, ids), abs=1e-6)


def test_conversations_are_scored_through_the_chat_template(reward_model, tokenizer):
    prompts, completions = chat(PROMPTS, "user"), chat(COMPLETIONS, "assistant")
    scores = RewardScorer(reward_model, tokenizer)(prompts=prompts, completions=completions)
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        ids = tokenizer.apply_chat_template(prompt + completion, return_dict=True)["input_ids"]
        assert score == pytest.approx(alone(reward_model, ids), abs=1e-6)


def test_the_last_token_is_found_by_length_even_if_it_is_the_pad_token(reward_model, tokenizer):
    rows = [[5, 6, tokenizer.pad_token_id], [7], [8, tokenizer.pad_token_id, 9, 10]]
    scores = score_rows(reward_model.eval(), **pad_rows(rows, tokenizer.pad_token_id))
    assert scores.tolist() == pytest.approx([alone(reward_model, row) for row in rows], abs=1e-6)


def test_learned_positions_and_missing_pad_id(tokenizer):
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "num_labels": 1}
    model = GPT2ForSequenceClassification(GPT2Config(**sizes))
    scores = RewardScorer(model, tokenizer)(PROMPTS, COMPLETIONS)
    for prompt, completion, score in zip(PROMPTS, COMPLETIONS, scores, strict=True):
        ids = tokenizer(prompt + completion + "<|eos|>")["input_ids"]
        assert score == pytest.approx(alone(model, ids), abs=1e-5)


def test_order_and_batch_size_do_not_matter(reward_model, tokenizer):
    one, many = RewardScorer(reward_model, tokenizer, batch_size=1), RewardScorer(reward_model, tokenizer, batch_size=8)
    assert one(PROMPTS, COMPLETIONS) == pytest.approx(many(PROMPTS, COMPLETIONS), abs=1e-6)
    assert many(PROMPTS[::-1], COMPLETIONS[::-1])[::-1] == pytest.approx(many(PROMPTS, COMPLETIONS), abs=1e-6)
    assert many([], []) == []


def test_bias_is_added_once(reward_model, tokenizer):
    scorer = RewardScorer(reward_model, tokenizer)
    plain = scorer(PROMPTS, COMPLETIONS)
    assert scorer.reward_bias == 0.0
    reward_model.config.reward_bias = 2.5
    assert scorer(PROMPTS, COMPLETIONS) == pytest.approx([score + 2.5 for score in plain], abs=1e-6)
    assert scorer.reward_bias == 2.5


def test_truncated_completions_get_no_eos(reward_model, tokenizer):
    ids = [tokenizer(text)["input_ids"] for text in COMPLETIONS]
    ids[1] = [*ids[1], tokenizer.eos_token_id]
    scores = RewardScorer(reward_model, tokenizer)(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=ids)
    ends = ["", "<|eos|>", ""]
    for prompt, completion, end, score in zip(PROMPTS, COMPLETIONS, ends, scores, strict=True):
        expected = alone(reward_model, tokenizer(prompt + completion + end)["input_ids"])
        assert score == pytest.approx(expected, abs=1e-6)


def test_an_empty_answer_is_scored_at_its_eos(reward_model, tokenizer):
    (score,) = RewardScorer(reward_model, tokenizer)(["Hi"], [""], [[tokenizer.eos_token_id]])
    assert score == pytest.approx(alone(reward_model, tokenizer("Hi<|eos|>")["input_ids"]), abs=1e-6)


def test_it_is_a_trl_reward_function(reward_model, tokenizer):
    from trl.trainer.utils import get_callable_name

    scorer = RewardScorer(reward_model, tokenizer)
    assert get_callable_name(scorer) == "reward_model"
    extra = {"trainer_state": None, "some_column": [1, 2, 3], "log_metric": print}
    scores = scorer(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=None, **extra)
    assert all(isinstance(score, float) for score in scores)


def test_training_mode_is_given_back_and_no_gradient_is_kept(reward_model, tokenizer):
    reward_model.train()
    RewardScorer(reward_model, tokenizer)(PROMPTS, COMPLETIONS)
    assert reward_model.training


def test_unequal_lengths_and_broken_models_are_refused(reward_model, tokenizer):
    scorer = RewardScorer(reward_model, tokenizer)
    with pytest.raises(ValueError, match="3 prompts but 2 completions"):
        scorer(PROMPTS, COMPLETIONS[:2])
    with pytest.raises(ValueError, match="3 prompts but 1 completion_ids"):
        scorer(PROMPTS, COMPLETIONS, [[1]])
    with pytest.raises(ValueError, match="Make both plain text, or both lists of messages"):
        scorer(chat(["Hi"], "user"), ["Hello"])
    reward_model.score.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="gave nan for row"):
        scorer(PROMPTS, COMPLETIONS)


def test_more_than_one_label_is_refused(tokenizer, tmp_path):
    model = LlamaForSequenceClassification(tiny_config(num_labels=3))
    with pytest.raises(ValueError, match="num_labels=3; a reward model has one label"):
        RewardScorer(model, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_labels=3"):
        RewardScorer(tmp_path)


@pytest.mark.parametrize("path", ["./nowhere/rm", "/nowhere/at/all", "outputs/rm", "nowhere"])
def test_a_path_that_is_not_there_is_named(path):
    with pytest.raises(ValueError, match=f"There is no model.*{path}"):
        load_reward_model(path)


def test_an_encoder_that_pools_first_is_refused(tokenizer):
    sizes = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=16, num_labels=1))
    model.forward = lambda input_ids, attention_mask, use_cache: model.classifier(torch.zeros(len(input_ids), 16))
    with pytest.raises(ValueError, match="a reward model needs a decoder"):
        RewardScorer(model, tokenizer)(PROMPTS, COMPLETIONS)


def test_saved_and_reloaded_scores_are_equal(reward_model, tokenizer, tmp_path):
    reward_model.config.reward_bias = -0.75
    before = RewardScorer(reward_model, tokenizer)(PROMPTS, COMPLETIONS)
    reward_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    after = RewardScorer(tmp_path)
    assert after.reward_bias == -0.75
    assert after(PROMPTS, COMPLETIONS) == before


def test_a_model_in_memory_needs_its_tokenizer(reward_model):
    with pytest.raises(ValueError, match="pass its tokenizer as processing_class"):
        RewardScorer(reward_model)


def test_a_good_pad_token_is_kept(reward_model, tokenizer):
    before = tokenizer.pad_token_id
    assert ensure_distinct_pad_token(tokenizer, reward_model) is None
    assert (tokenizer.pad_token_id, reward_model.config.pad_token_id, len(tokenizer)) == (before, before, 258)


@pytest.mark.parametrize("pad", [{}, {"pad_token": "<|eos|>"}])
def test_a_spare_special_token_becomes_the_pad(reward_model, tokenizer, pad):
    spare = tokenizer.convert_tokens_to_ids("<|pad|>")
    other = clone(tokenizer, eos_token="<|eos|>", additional_special_tokens=["<|pad|>"], **pad)
    line = ensure_distinct_pad_token(other, reward_model)
    assert f"'<|pad|>' (id {spare}, already in its vocabulary)" in line
    assert (other.pad_token_id, reward_model.config.pad_token_id, len(other)) == (spare, spare, 258)


def test_a_new_pad_token_grows_the_model():
    fresh = eos_as_pad()
    model = LlamaForSequenceClassification(
        tiny_config(vocab_size=257, num_labels=1, pad_token_id=256, eos_token_id=256)
    )
    line = ensure_distinct_pad_token(fresh, model)
    assert "was its EOS token '<|endoftext|>'" in line
    assert "'<|pad|>' (id 257, added to it)" in line
    assert model.get_input_embeddings().weight.shape[0] == 258
    assert model.config.pad_token_id == 257
    assert len(RewardScorer(model, fresh)(PROMPTS, COMPLETIONS)) == 3


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        tokenize_pair(tokenizer, "a", "b")


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_head_is_computed_in_float32(reward_model, weights, autocast):
    """Against the float32 product of the same hidden states: reward model, and critic."""
    with torch.no_grad():
        reward_model.score.weight.mul_(40)  # scores of about 3, where bf16 numbers lie 0.016 apart
    model = reward_model.to(weights)
    ids = torch.randint(0, 256, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    seen = []
    model.score.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = score_rows(model, ids, mask)
        values = ValueModel(model)(ids, mask)
    for found, hidden in zip((scores, values[:, -1]), seen, strict=True):
        expected = hidden[:, -1].double() @ model.score.weight.double().T
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected[:, 0], atol=1e-6, rtol=1e-6)
    assert "forward" not in vars(model.score)
    values.sum().backward()
    assert model.score.weight.grad is not None
