"""Shared prefixes against one row a completion: the same rewards and the same gradients, in every family."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig

from instruct_trl.data.pairs import pad_rows
from instruct_trl.data.prefix_layout import Grid, GroupedRows, PrefixLayout, common_prefix_length
from instruct_trl.models.prefix_sharing import PrefixSharing, ScoringRoute
from instruct_trl.models.scores import score_rows

SIZES = {"vocab_size": 64, "num_labels": 1, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **NO_DROPOUT},
    "gpt_neox": {**LLAMA_LIKE, "rotary_pct": 0.25},
    "llama": LLAMA_LIKE,
    "mistral": {**LLAMA_LIKE, "sliding_window": 4},
    "qwen2": {**LLAMA_LIKE, **MIXED, "use_sliding_window": True},
    "qwen3": LLAMA_LIKE,
    "gemma2": {**LLAMA_LIKE, **MIXED, "query_pre_attn_scalar": 8},
    "gemma3_text": {**LLAMA_LIKE, **MIXED, "query_pre_attn_scalar": 8},
    "phi3": {**LLAMA_LIKE, "sliding_window": 5},
    "opt": {**LLAMA_LIKE, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
}
# Lengths 9 to 12 exceed the windows of 4 and 5; prefixes of 6, 1 and 3 tokens; K of 3, 2 and 1.
ROWS = [
    [[5, 6, 7, 8, 9, 10, 11, 12, 13, 1], [5, 6, 7, 8, 9, 10, 20, 1], [5, 6, 7, 8, 9, 10, 30, 31, 32, 33, 34, 1]],
    [[40, 41, 42, 1], [40, 50, 51, 52, 53, 54, 55, 56, 1]],
    [[60, 61, 62, 63]],
]


def batch_of(groups):
    rows = [row for group in groups for row in group]
    prefixes = [common_prefix_length(group) for group in groups]
    return GroupedRows(*pad_rows(rows, 0).values(), torch.tensor([len(g) for g in groups]), torch.tensor(prefixes))


def plain(model, batch):
    return score_rows(model, batch.input_ids, batch.attention_mask)


def make(family, attention="eager", **kwargs):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **kwargs})
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():  # OPT and GPT-2 initialise so small that a wrong mask would hardly show
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model, scores):
    weights = torch.linspace(-1, 1, len(scores))
    model.zero_grad()
    (scores * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_and_gradients_equal_the_plain_route(family, attention):
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("transformers' sdpa refuses Gemma 2's soft capping")
    model, batch = make(family, attention), batch_of(ROWS)
    expected = plain(model, batch)
    expected_gradients = gradients(model, expected)
    sharing = PrefixSharing(model)
    assert sharing.obstacle is None
    scores, tokens = sharing.score(model, batch)
    shared_gradients = gradients(model, scores)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)
    # By hand: prefixes 6 + 1 + 3, own tokens (4 + 2 + 6) + (3 + 8) + 1.
    assert tokens == 10 + 12 + 11 + 1


def test_a_grid_gives_back_what_it_was_given():
    tokens = torch.arange(12.0).view(6, 2)
    for lengths in ([1, 3, 2], [2, 2, 2], [0, 6], [6]):
        grid = Grid(torch.tensor(lengths))
        rows = grid.pad(tokens)
        assert rows.shape == (len(lengths), max(lengths), 2)
        assert torch.equal(torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)]), tokens)
        assert torch.equal(grid.unpad(rows), tokens)


def test_the_packed_row_by_hand():
    layout = PrefixLayout.of(batch_of([[[5, 6, 7], [5, 8, 9, 10]], [[11, 12]]]))
    # Prefixes [5] and [11]; own tokens [6, 7], [8, 9, 10], [12].
    assert layout.input_ids.tolist() == [[5, 11, 6, 7, 8, 9, 10, 12]]
    assert layout.position_ids.tolist() == [[0, 0, 1, 2, 1, 2, 3, 1]]
    assert layout.last.tolist() == [3, 6, 7]
    assert layout.owner.tolist() == [0, 0, 1]
    assert layout.cut == 2


@pytest.mark.parametrize("window", [None, 2])
def test_the_block_mask_of_flex_attention_is_the_same_visibility(window):
    """Both say who sees whom; here against plain loops over the packed row."""
    groups = [[[5, 6, 7], [5, 6, 9, 10]], [[11, 12], [13]]]
    layout = PrefixLayout.of(batch_of(groups))
    dense = layout.block_mask(window).mask_mod(0, 0, *torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"))
    # (prompt, completion or None, position) of each packed token: prefixes [5 6], []; own [7], [9 10], [11 12], [13].
    tokens = [(0, None, 0), (0, None, 1), (0, 0, 2), (0, 1, 2), (0, 1, 3), (1, 2, 0), (1, 2, 1), (1, 3, 0)]
    for i, (prompt, completion, position) in enumerate(tokens):
        for j, (of_prompt, of_completion, of_position) in enumerate(tokens):
            seen = prompt == of_prompt and of_completion in (None, completion) and of_position <= position
            seen = seen and (window is None or position - of_position < window)
            assert dense[i, j] == seen, (i, j)


def test_flex_attention_scores_the_same():
    """Forward alone: on the CPU FlexAttention has no backward."""
    model = make("llama", "flex_attention").eval()
    reference = make("llama", "eager").eval()
    with torch.no_grad():
        scores, _ = PrefixSharing(model).score(model, batch_of(ROWS))
        torch.testing.assert_close(scores, plain(reference, batch_of(ROWS)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradient_checkpointing_changes_nothing(attention):
    """Layers run again in the backward pass, after the forward is over; shared and plain ones side by side."""
    model, batch = make("mistral", attention).train(), batch_of(ROWS)
    sharing = PrefixSharing(model)
    expected = gradients(model, plain(model, batch))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with sharing.active():
        shared = gradients(model, sharing.score(model, batch)[0])
        with sharing.inactive():
            scores = plain(model, batch)
        not_shared = gradients(model, scores)
    for name, gradient in expected.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(not_shared[name], gradient, rtol=1e-3, atol=1e-4)
    assert model.config._attn_implementation == attention


def test_lora_and_bf16():
    torch.manual_seed(0)
    model = get_peft_model(make("qwen3", "sdpa"), LoraConfig(r=4, task_type="SEQ_CLS", init_lora_weights=False))
    batch = batch_of(ROWS)
    expected = gradients(model, plain(model, batch))
    shared = gradients(model, PrefixSharing(model).score(model, batch)[0])
    assert any("lora_A" in name for name in shared)
    for name, gradient in expected.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        scores, _ = PrefixSharing(model).score(model, batch)
        reference = plain(model, batch)
    # bfloat16 has 8 bits: both routes are that far from float32, and no further from each other.
    exact = plain(model, batch)
    rounding = (reference - exact).abs().max()
    assert 0 < rounding < 0.2
    assert (scores - exact).abs().max() < 3 * rounding


@pytest.mark.parametrize(("half", "accepted"), [(True, True), (False, False)])
def test_half_precision_is_allowed_its_rounding(half, accepted, monkeypatch):
    """A gap of 2 %: rounding in bf16, an error in float32. accelerate's autocast sits on the model's own forward."""
    model, said, score = make("llama", "sdpa"), [], PrefixSharing.score

    def off_by_a_fiftieth(self, *args):
        scores, tokens = score(self, *args)
        return scores * 1.02, tokens

    monkeypatch.setattr(PrefixSharing, "score", off_by_a_fiftieth)
    torch.nn.init.normal_(model.score.weight, std=2.0)
    if half:
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    route = ScoringRoute(model, "auto", said.append)
    route(model, batch_of(ROWS))
    assert route.shares == accepted
    assert len(said) == (not accepted)


UNFIT = {
    "bloom": ({"hidden_size": 16, "n_layer": 1, "n_head": 2}, "AttentionInterface"),
    "qwen3_next": (
        {
            **LLAMA_LIKE,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 2,
            "num_experts_per_tok": 1,
        },
        "recurrent",
    ),
}


@pytest.mark.parametrize("family", UNFIT)
def test_what_cannot_share_says_why_and_goes_on(family):
    sizes, reason = UNFIT[family]
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **{**SIZES, **sizes}))
    said = []
    route = ScoringRoute(model, "auto", said.append)
    assert len(said) == 1
    assert reason in said[0]
    assert not route.shares
    torch.testing.assert_close(route(model, batch_of(ROWS)), plain(model, batch_of(ROWS)))
    with pytest.raises(ValueError, match=f"prefix_sharing='on'.*{reason}"):
        ScoringRoute(model, "on", said.append)


def test_another_attention_implementation_is_named():
    model = make("llama", "sdpa")
    model.config._attn_implementation_internal = "flash_attention_2"
    assert "'flash_attention_2'" in PrefixSharing(model).obstacle


def test_a_model_that_shares_wrongly_is_caught_by_the_first_batch(monkeypatch):
    """A family that we know nothing about: here one whose completions would not see their prompt."""
    masks = PrefixLayout._visible

    def blind(self, window):
        prompt, completion = masks(self, window)
        completion = completion.clone()
        completion[..., : self.prompts.shape[1]] = False
        return prompt, completion

    monkeypatch.setattr(PrefixLayout, "_visible", blind)
    model, said = make("llama", "sdpa"), []
    route = ScoringRoute(model, "auto", said.append)
    scores = route(model, batch_of(ROWS))
    torch.testing.assert_close(scores, plain(model, batch_of(ROWS)))
    assert len(said) == 1
    assert "one prompt differ" in said[0]
    with pytest.raises(ValueError, match="one prompt differ"):
        ScoringRoute(model, "on", said.append)(model, batch_of(ROWS))


def test_a_layer_that_bypasses_the_shared_attention_is_caught(monkeypatch):
    model, said = make("llama", "sdpa"), []
    route = ScoringRoute(model, "auto", said.append)
    model.config.num_hidden_layers = 3  # as if one layer had an attention of its own
    route(model, batch_of(ROWS))
    assert "2 of 3 layers" in said[0]
    assert not route.shares


def test_off_computes_every_row():
    model = make("llama", "sdpa")
    route = ScoringRoute(model, "off", pytest.fail)
    route(model, batch_of(ROWS))
    # 6 rows, each padded to 12.
    assert route.take_counts() == {"computed": 6 * 12, "padding": 6 * 12 - (10 + 8 + 12 + 4 + 9 + 4)}
    route = ScoringRoute(model, "on", pytest.fail)
    route(model, batch_of(ROWS))
    assert route.take_counts() == {"computed": 34, "padding": 0}


def test_a_4_bit_base_with_an_adapter(tmp_path):
    """Quantised weights, trained adapter and head: the same rewards and gradients with and without sharing."""
    pytest.importorskip("bitsandbytes")
    make("llama", hidden_size=64, head_dim=16, intermediate_size=64).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["score"]
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config, num_labels=1)
    assert any(p.dtype == torch.uint8 for p in model.parameters())
    lora = LoraConfig(r=4, task_type="SEQ_CLS", init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model, batch = get_peft_model(model, lora), batch_of(ROWS)
    expected_scores = plain(model, batch)
    expected = gradients(model, expected_scores)
    scores, _ = PrefixSharing(model).score(model, batch)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-4, atol=1e-4)
    shared = gradients(model, scores)
    assert any("lora_B" in name for name in shared)
    for name, gradient in expected.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-3, atol=1e-3)
