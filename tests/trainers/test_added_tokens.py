"""Tokens that were added for a training: their rows come back with the adapter, or the lack of them is refused."""

import pytest
import ranking_helpers
import torch
from peft import get_peft_model
from ppo_helpers import make as make_ppo
from role_helpers import reward_lora, save_pieces, sft_lora
from safetensors.torch import load_file
from test_instruct_sft import DEMONSTRATIONS, InstructSFTTrainer
from test_instruct_sft import config as sft_config
from test_saved_adapters import start
from transformers import AutoModelForCausalLM

from instruct_trl import RewardScorer, RoleAdapters
from instruct_trl.models.adapters import put_adapter_on, resize_token_rows, token_rows
from instruct_trl.models.loading import check_token_rows, load_causal_model, load_policy_and_tokenizer

IDS = torch.tensor([[1, 258, 2, 261, 256]])  # of 258 rows the base has, and four more
WAYS = {
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "single rows": {"trainable_token_indices": [258, 259, 260, 261]},
    "not trained": {},
    "low rank": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.fixture
def grown(tokenizer):
    """The tokenizer with four tokens more, 258 to 261."""
    tokenizer.add_tokens([f"<new{number}>" for number in range(4)])
    return tokenizer


@pytest.fixture
def base(tmp_path, tokenizer):
    """Made before the tokenizer grows."""
    return save_pieces(tmp_path, tokenizer)


def sft(base, grown, way, out):
    """SFT on a base whose rows were added with random numbers, saved; the trainer."""
    model = AutoModelForCausalLM.from_pretrained(base / "base")
    torch.manual_seed(7)
    model.resize_token_embeddings(262, mean_resizing=False)
    model.get_output_embeddings().weight.data[258:] = torch.randn(4, model.config.hidden_size)
    args = sft_config(out, num_train_epochs=1, save_strategy="no", residual_dropout=0)
    lora = sft_lora(**WAYS[way])
    trainer = InstructSFTTrainer(model, args, train_dataset=DEMONSTRATIONS, processing_class=grown, peft_config=lora)
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.mark.parametrize("way", ["not trained", "low rank"])
def test_an_sft_adapter_comes_back_with_its_rows(base, grown, way, tmp_path):
    trainer = sft(base, grown, way, tmp_path / "out")
    with torch.no_grad():
        expected = trainer.model.eval()(IDS).logits
        found = load_policy_and_tokenizer(tmp_path / "out")[0](IDS).logits
    assert found.shape[-1] == 262
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["whole", "single rows"])
def test_so_do_rows_that_it_trained_wherever_it_is_read(base, grown, way, tmp_path):
    """By selection, below a reward adapter, and as the policy of PPO with a reference that is its copy."""
    trainer = sft(base, grown, way, tmp_path / "out")
    with torch.no_grad():
        expected = trainer.model.eval()(IDS).logits
        found = load_policy_and_tokenizer(tmp_path / "out")[0](IDS).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    folder, reward = str(tmp_path / "out"), str(tmp_path / "rm2")
    raters = ranking_helpers.make(folder, None, reward, peft_config=reward_lora(), max_steps=1, learning_rate=1e-2)
    merged = trainer.model.merge_and_unload().get_input_embeddings().weight
    torch.testing.assert_close(raters.model.get_input_embeddings().weight, merged, atol=1e-6, rtol=1e-6)
    raters.save_model()
    pairs = ["<new1> q"], ["<new3>"]
    scores = RewardScorer(raters.model, raters.processing_class)(*pairs)
    assert RewardScorer(reward)(*pairs) == pytest.approx(scores, abs=1e-6)
    ppo = start("ppo", folder, tmp_path / "ppo", reward=reward)
    with torch.no_grad():
        torch.testing.assert_close(ppo.model.eval()(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    ppo.train()
    assert next(row["kl"] for row in ppo.state.log_history if "kl" in row) == 0


@pytest.mark.parametrize("way", WAYS)
def test_one_base_refuses_more_tokens_than_it_has_rows(base, way, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base / "base")
    model.resize_token_embeddings(262, mean_resizing=False)
    get_peft_model(model, sft_lora(**WAYS[way])).save_pretrained(tmp_path / "out")
    says = "out' was trained with 262 token rows, and the base has 258.*Make the grown"
    with pytest.raises(ValueError, match="has trainable_token_indices.*merge it" if way == "single rows" else says):
        RoleAdapters(base / "base", tmp_path / "out", base / "rm")


def test_one_base_whose_tokenizer_has_more_is_refused_before_training(base, grown, tmp_path):
    grown.save_pretrained(base / "sft")
    roles = RoleAdapters(base / "base", base / "sft", base / "rm")
    with pytest.raises(ValueError, match="The policy has 258 token rows.*ids up to 261"):
        make_ppo(tmp_path, None, None, None, role_adapters=roles, ptx_coef=0.0)


@pytest.mark.parametrize("way", ["whole", "single rows", "not trained"])
def test_a_reward_adapter_on_a_base_that_grew_scores_as_in_its_trainer(base, grown, way, tmp_path):
    """Its base is named by a path, so the trainer grows it, before the adapter lies on it."""
    ways = {"whole": {"modules_to_save": ["embed_tokens", "score"]}, "not trained": {}}
    lora = reward_lora(**(ways[way] if way in ways else WAYS[way]))
    rows = [{"prompt": "<new0> q", "completions": ["<new1>", "<new2> no"], "ranks": [1, 2]}] * 8
    trainer = ranking_helpers.make(
        str(base / "base"), grown, tmp_path / "out", rows=rows, peft_config=lora, max_steps=2, learning_rate=1e-2
    )
    before = trainer.model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    moved = (trainer.model.get_input_embeddings().weight - before).abs().amax(dim=1)[258:261]
    assert (moved > 1e-4).all() if way != "not trained" else (moved == 0).all()
    pairs = ["<new0> q"], ["<new2> no"]
    scores = RewardScorer(trainer.model, grown)(*pairs)
    trainer.save_model()
    assert RewardScorer(tmp_path / "out")(*pairs) == pytest.approx(scores, abs=1e-6)


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(policy, tmp_path, tokenizer, kind):
    tokenizer.add_tokens(["<new>"])
    other = {"value_model": ranking_helpers.fresh_model(vocab_size=259)} if kind == "ppo" else {}
    says = r"has 258 token rows.*ids up to 258.*'<new>'.*resize_token_embeddings\(259\)"
    with pytest.raises(ValueError, match=says):
        start(kind, policy, tmp_path, tokenizer, reward=lambda prompts, **_: [0.0] * len(prompts), **other)


def test_critic_and_reward_model_are_asked_as_well(policy, reward_model, scorer, tmp_path, tokenizer):
    policy.resize_token_embeddings(259, mean_resizing=False)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="The reward model, of which the critic is a copy, has 258 token rows"):
        make_ppo(tmp_path, policy, scorer, tokenizer, ptx_coef=0.0)
    with pytest.raises(ValueError, match="The value model has 258 token rows"):
        make_ppo(tmp_path, policy, scorer, tokenizer, value_model=ranking_helpers.fresh_model(), ptx_coef=0.0)
    with pytest.raises(ValueError, match="The reward model has 258 token rows"):
        make_ppo(
            tmp_path, policy, scorer, tokenizer, value_model=ranking_helpers.fresh_model(vocab_size=259), ptx_coef=0.0
        )


def test_a_vocabulary_larger_than_the_tokenizer_stays_as_it_is(tmp_path, tokenizer):
    """Bases are padded to round numbers; upstream's AutoPeftModel cuts them to the tokenizer."""
    root = save_pieces(tmp_path, tokenizer, vocab_size=264)
    assert token_rows(load_causal_model(root / "sft")) == 264
    check_token_rows(load_causal_model(root / "base"), tokenizer, "it")


def test_new_rows_are_the_mean_of_the_old_ones(policy):
    means = [layer.weight.detach().mean(dim=0) for layer in (policy.get_input_embeddings(), policy.lm_head)]
    resize_token_rows(policy, 260)
    for layer, mean in zip((policy.get_input_embeddings(), policy.lm_head), means, strict=True):
        assert layer.weight.shape[0] == 260
        torch.testing.assert_close(layer.weight[258:], mean.expand(2, -1), atol=1e-6, rtol=1e-6)


def test_rows_are_not_added_under_an_adapter(base):
    model = put_adapter_on(AutoModelForCausalLM.from_pretrained(base / "base"), base / "sft")
    resize_token_rows(model, 260)  # the embedding is the base's
    model.get_base_model().set_input_embeddings(torch.nn.Sequential(model.get_input_embeddings()))
    model.get_input_embeddings().weight = model.get_input_embeddings()[0].weight
    with pytest.raises(ValueError, match=r"an adapter lies on its embedding.*resize_token_embeddings\(261\)"):
        resize_token_rows(model, 261)


def test_what_peft_leaves_out_is_in_the_file(base, grown, tmp_path):
    """With an adapter on the embedding, PEFT saves that one alone, and the head's new rows would be lost."""
    trainer = sft(base, grown, "low rank", tmp_path / "out")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.lm_head.weight"], trainer.model.get_output_embeddings().weight)


def test_a_token_that_stands_for_pictures_needs_no_row(policy, tokenizer):
    """Gemma 3's tokenizer has one, and its model of text has no row for it."""
    tokenizer.add_tokens(["<picture>"], special_tokens=True)
    with pytest.raises(ValueError, match="no embedding: '<picture>'"):
        check_token_rows(policy, tokenizer, "it")
    tokenizer.image_token = "<picture>"
    check_token_rows(policy, tokenizer, "it")
