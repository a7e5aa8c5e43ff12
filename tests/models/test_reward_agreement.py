"""Training's score is everybody's later: trainer, RewardScorer, PPO, TRL, plain transformers; whole, LoRA, QLoRA."""

import json
import math

import pytest
import torch
from agreement_helpers import (
    FLOAT32,
    classifier,
    clone,
    examples,
    finished_ids,
    largest_gap,
    plain_rewards,
    ppo_trainer,
    rewards_everywhere,
    rewards_in,
    saved_bias,
    trained,
    trainer_rewards,
    trl_trainer,
    with_bos,
)
from conftest import tiny_config
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig
from ranking_helpers import RANKINGS, config, eos_as_pad, make
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM
from trl import RewardConfig, RewardTrainer

from benchmarks import bare_path_gap
from instruct_trl._upstream import keep_4bit_trainable
from instruct_trl.models.loading import load_reward_model
from instruct_trl.models.reward import RewardScorer
from instruct_trl.trainers.ranking_reward import RankingRewardTrainer


def tokenizer_of(kind, tokenizer, **kwargs):
    """Tokenizer and vocabulary size of the model that comes with it, before RankingRewardTrainer sees either."""
    if kind == "distinct pad":
        return clone(tokenizer, eos_token="<|eos|>", pad_token="<|pad|>", **kwargs), 258
    if kind == "no pad":  # nothing in its vocabulary to pad with: the trainer makes a token and a row of embeddings
        return clone(eos_as_pad(), eos_token="<|endoftext|>", **kwargs), 257
    if kind == "pad is eos":
        return clone(eos_as_pad(), eos_token="<|endoftext|>", pad_token="<|endoftext|>", **kwargs), 257
    return with_bos(tokenizer, **kwargs), 259


CASES = [
    ("distinct pad", "right", False),
    ("distinct pad", "left", False),
    ("distinct pad", "left", True),
    ("no pad", "right", False),
    ("no pad", "left", True),
    ("pad is eos", "left", False),
    ("bos", "right", False),
    ("bos", "right", True),
]


@pytest.mark.parametrize(("kind", "padding_side", "conversational"), CASES)
def test_all_routes_agree(tokenizer, tmp_path, kind, padding_side, conversational):
    tokenizer, size = tokenizer_of(kind, tokenizer, padding_side=padding_side)
    if kind == "no pad":
        assert tokenizer.pad_token is None
    model = classifier(vocab_size=size, pad_token_id=None)
    trainer = trained(model, tokenizer, tmp_path, conversational=conversational)
    saved = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert saved.padding_side == padding_side
    assert saved.pad_token_id not in (None, saved.eos_token_id)
    rewards = rewards_everywhere(trainer, tmp_path, conversational=conversational)
    assert len(set(rewards["trainer"])) > 10  # not all alike, so that order counts
    spread, by_route = largest_gap(rewards)
    assert spread < FLOAT32, by_route


def test_bf16_weights(tokenizer, tmp_path):
    """A bf16 number has 8 bits, so that one unit in its last place is up to 2⁻⁷ of it; routes sum in other orders."""
    trainer = trained(classifier(), tokenizer, tmp_path)
    trainer.model.to(torch.bfloat16)
    trainer.save_model(str(tmp_path / "rm"))
    rewards = rewards_everywhere(trainer, tmp_path)
    assert RewardScorer(tmp_path / "rm").model.dtype == torch.bfloat16
    spread, by_route = largest_gap(rewards)
    scores = [abs(reward - saved_bias(tmp_path / "rm")) for reward in rewards["trainer"]]
    assert spread <= 2 * 2**-7 * max(scores), by_route


@pytest.mark.parametrize("algorithm", ["PPO", "GRPO", "RLOO"])
def test_the_reward_of_a_rollout(tokenizer, tmp_path, algorithm):
    """One real step: what the algorithm logs as reward equals plain transformers on the answers that it sampled."""
    trained(classifier(), tokenizer, tmp_path)
    folder, seen = tmp_path / "rm", []
    if algorithm == "PPO":
        trainer = ppo_trainer(folder, tmp_path / "ppo")
        metric = "score"
    else:
        trainer = trl_trainer(
            algorithm, RewardScorer(folder), tokenizer, tmp_path / "trl", max_steps=1, max_completion_length=8
        )
        metric = "reward"
    calculate = trainer._calculate_rewards

    def spy(inputs, prompts, completions, completion_ids):
        seen.append((prompts, completions, completion_ids))
        return calculate(inputs, prompts, completions, completion_ids)

    trainer._calculate_rewards = spy
    trainer.args.max_steps = 1
    trainer.train()
    logged = next(log[metric] for log in trainer.state.log_history if metric in log)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    expected = []
    for prompts, completions, ids in seen[:1]:
        for prompt, completion, row in zip(prompts, completions, ids, strict=True):
            assert completion == tokenizer.decode(row, skip_special_tokens=True)
            tokens = [*tokenizer(prompt)["input_ids"], *row]  # as drawn: tokenising the text might spell it otherwise
            expected.append(plain(input_ids=torch.tensor([tokens])).logits.item() + saved_bias(folder))
    assert logged == pytest.approx(math.fsum(expected) / len(expected), abs=FLOAT32)


def test_ppo_takes_a_path_object(tokenizer, tmp_path):
    trained(classifier(), tokenizer, tmp_path)
    trainer = ppo_trainer(tmp_path / "rm", tmp_path / "ppo", reward=tmp_path / "rm")
    rewards = rewards_in(trainer, *examples())
    assert rewards == pytest.approx(RewardScorer(tmp_path / "rm")(*examples()), abs=FLOAT32)


def test_cut_answers_agree(tokenizer, tmp_path):
    """An answer without EOS: `truncated` in rankings, in scoring, and ids that do not end in EOS in RL."""
    rows = [{**row, "truncated": [True] * len(row["completions"])} for row in RANKINGS]
    trainer = trained(classifier(), tokenizer, tmp_path)
    folder, (prompts, completions) = tmp_path / "rm", examples()
    cut = [ids[:-1] for ids in finished_ids(tokenizer, completions)]
    cut_trainer = RankingRewardTrainer(
        trainer.model,
        config(tmp_path / "cut"),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    scorer = RewardScorer(folder)
    grpo = trl_trainer("GRPO", scorer, tokenizer, tmp_path / "grpo")
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rewards = {
        "trainer": trainer_rewards(cut_trainer),
        "truncated": scorer(prompts, completions, truncated=[True] * len(prompts)),
        "completion_ids": scorer(prompts, completions, completion_ids=cut),
        "GRPO": grpo._calculate_rewards([{"prompt": p} for p in prompts], prompts, completions, cut)[:, 0].tolist(),
        "plain": [
            plain(input_ids=tokenizer(p + c, return_tensors="pt")["input_ids"]).logits.item() + scorer.reward_bias
            for p, c in zip(prompts, completions, strict=True)
        ],
    }
    assert largest_gap(rewards)[0] < FLOAT32, largest_gap(rewards)[1]
    finished = scorer(prompts, completions)
    assert max(abs(a - b) for a, b in zip(finished, rewards["truncated"], strict=True)) > 0.05


def test_evaluation_records_hold_the_same_rewards(tokenizer, tmp_path):
    trainer = trained(classifier(), tokenizer, tmp_path)
    trainer.evaluate()
    records = [reward for record in trainer.evaluation_records for reward in record["rewards"]]
    assert records == pytest.approx(trainer_rewards(trainer), abs=FLOAT32)
    assert records == pytest.approx(RewardScorer(tmp_path / "rm")(*examples()), abs=FLOAT32)


def test_the_head_is_trained_and_saved(tokenizer, tmp_path):
    model = classifier()
    before = model.score.weight.detach().clone()
    trainer = trained(model, tokenizer, tmp_path)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").score.weight
    assert torch.equal(saved, trainer.model.score.weight)
    assert (saved - before).abs().max() > 1e-3


@pytest.mark.parametrize("conversational", [False, True])
def test_pairs_get_the_rewards_of_trl_reward_trainer(tokenizer, tmp_path, conversational):
    """K = 2: one model in our trainer and in TRL's, each over its own tokenisation of the same rows."""
    texts = [("Say hi. ", "Hi!", "No."), ("2+2? ", "It is four.", "5"), ("Why? ", "because", "so what")]
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts]
    if conversational:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows = [{key: [{"role": roles[key], "content": text}] for key, text in row.items()} for row in rows]
    model, data = classifier(), Dataset.from_list(rows)
    ours = RankingRewardTrainer(
        model, config(tmp_path), train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    args = RewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
    theirs = RewardTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    model.eval()
    (batch,) = theirs.get_eval_dataloader()
    loss, outputs = theirs.compute_loss(model, dict(batch), return_outputs=True)
    chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
    result = ours.predict(ours.eval_dataset)
    expected = torch.stack([chosen, rejected], dim=1).detach()
    torch.testing.assert_close(torch.as_tensor(result.predictions), expected, atol=FLOAT32, rtol=0)
    assert result.metrics["test_loss"] == pytest.approx(loss.item(), abs=FLOAT32)


@pytest.mark.parametrize(("kind", "conversational"), [("distinct pad", False), ("distinct pad", True), ("bos", False)])
def test_the_bare_path_is_another_score(tokenizer, tmp_path, kind, conversational):
    """TRL given the folder scores prompt + completion as a new text: no EOS, no BOS, no bias. Chats keep their EOS."""
    tokenizer, size = tokenizer_of(kind, tokenizer)
    trained(classifier(vocab_size=size), tokenizer, tmp_path, conversational=conversational)
    folder, (prompts, completions) = tmp_path / "rm", examples(conversational)
    scorer = RewardScorer(folder)
    grpo = trl_trainer("GRPO", str(folder), AutoTokenizer.from_pretrained(folder), tmp_path / "grpo")
    bare = torch.tensor(rewards_in(grpo, prompts, completions))
    difference = torch.tensor(scorer(prompts, completions)) - bare
    if conversational:
        torch.testing.assert_close(difference, torch.full_like(difference, scorer.reward_bias), atol=FLOAT32, rtol=0)
        return
    tokens = [
        tokenizer(p + c, add_special_tokens=False)["input_ids"] for p, c in zip(prompts, completions, strict=True)
    ]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    alone = torch.tensor([model(input_ids=torch.tensor([row])).logits.item() for row in tokens])
    torch.testing.assert_close(bare, alone, atol=FLOAT32, rtol=0)
    assert (difference - scorer.reward_bias).abs().max() > 0.05
    assert plain_rewards(model, tokenizer, prompts, completions) != pytest.approx(bare.tolist(), abs=0.05)


def test_the_benchmark_of_the_bare_path(tokenizer, tmp_path, capsys):
    """Its figures, on a tiny model, against sums over the rewards of the two routes."""
    with pytest.raises(SystemExit, match="There is no folder .*nowhere.*make demo"):
        bare_path_gap.main([str(tmp_path / "nowhere")])
    trained(classifier(), tokenizer, tmp_path)
    folder, rankings = tmp_path / "rm", tmp_path / "test.jsonl"
    with pytest.raises(SystemExit, match="There is no file .*test.jsonl"):
        bare_path_gap.main([str(folder), str(rankings)])
    rankings.write_text("\n".join(json.dumps(row) for row in RANKINGS))
    bare_path_gap.main([str(folder), str(rankings), "--batch_size", "5"])
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[:1].isalpha())
    ours = RewardScorer(folder)(*examples())
    grpo = trl_trainer("GRPO", str(folder), AutoTokenizer.from_pretrained(folder), tmp_path / "grpo")
    bare = rewards_in(grpo, *examples())
    gap = sum(abs(a - b) for a, b in zip(ours, bare, strict=True)) / len(ours)
    assert float(printed["mean absolute difference"]) == pytest.approx(gap, abs=1e-4)
    pairs = flips = right = start = 0
    for row in RANKINGS:
        places = range(start, start := start + len(row["completions"]))
        for i in places:
            for j in places[: places.index(i)]:
                pairs += 1
                flips += (ours[i] > ours[j]) != (bare[i] > bare[j])
                rank = row["ranks"][i - places[0]] - row["ranks"][j - places[0]]
                right += (rank < 0 and ours[i] > ours[j]) or (rank > 0 and ours[i] < ours[j])
    assert int(printed["pairs of one prompt"]) == pairs == 21
    assert float(printed["share of pairs whose order flips"]) == pytest.approx(flips / pairs, abs=1e-4)
    assert int(printed["ranked pairs"]) == 14
    assert float(printed["pair accuracy, RewardScorer"]) == pytest.approx(right / 14, abs=1e-4)


# LoRA ---------------------------------------------------------------------------------------------------------------


def lora():
    return LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"])


def save_base(path, tokenizer, kind="causal", dtype=torch.float32, **kwargs):
    """A base model on disk, a causal LM or a classifier with a trained head; returns its path."""
    torch.manual_seed(0)
    model = classifier(**kwargs) if kind == "classifier" else LlamaForCausalLM(tiny_config(**kwargs))
    model.to(dtype).save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    return str(path / "base")


def merge(model, tokenizer, folder):
    """What a user does: merge, save as a plain model."""
    model.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def plain_adapter(folder, loader=AutoModelForSequenceClassification, **kwargs):
    """The adapter's folder read by upstream alone, with what its documentation asks for: one label, dtype, pad id."""
    model = loader.from_pretrained(folder, num_labels=1, **{"dtype": torch.float32, **kwargs})
    model.config.pad_token_id = AutoTokenizer.from_pretrained(folder).pad_token_id
    return model


@pytest.mark.parametrize(
    ("kind", "conversational", "dtype"),
    [
        ("causal", False, torch.float32),
        ("causal", True, torch.float32),
        ("classifier", False, torch.float32),
        ("no pad", False, torch.float32),
        ("causal", False, torch.bfloat16),  # TRL trains it in float32; `dtype` in reward_config.json says so
    ],
)
def test_adapter_alone_and_merged_agree(tokenizer, tmp_path, kind, conversational, dtype):
    tokenizer = clone(tokenizer, eos_token="<|eos|>", pad_token="<|pad|>", padding_side="left")
    size = {"vocab_size": 258}
    if kind == "no pad":
        tokenizer, size = clone(eos_as_pad(), eos_token="<|endoftext|>"), {"vocab_size": 257}
    base = save_base(tmp_path, tokenizer, kind, dtype, **size)
    trainer = trained(base, None, tmp_path, conversational=conversational, peft_config=lora())
    # transformers alone refuses an adapter whose embeddings have grown; peft's own class grows them.
    loader = AutoPeftModelForSequenceClassification if kind == "no pad" else AutoModelForSequenceClassification
    plain = plain_adapter(tmp_path / "rm", loader)
    alone = rewards_everywhere(trainer, tmp_path, conversational=conversational, plain=plain)
    assert largest_gap(alone)[0] < FLOAT32, largest_gap(alone)[1]
    assert len(set(alone["trainer"])) > 10
    merge(*load_reward_model(tmp_path / "rm"), tmp_path / "merged from the folder")
    merge(trainer.model, trainer.processing_class, tmp_path / "merged in memory")  # the trainer is of no use then
    for name in ("merged from the folder", "merged in memory"):
        assert saved_bias(tmp_path / name) == saved_bias(tmp_path / "rm")
        merged = {"adapter": alone["trainer"]}
        merged |= rewards_everywhere(None, tmp_path, name=name, conversational=conversational)
        assert largest_gap(merged)[0] < FLOAT32, (name, largest_gap(merged)[1])


def test_an_adapter_with_a_grown_embedding_is_refused_by_plain_transformers(tokenizer, tmp_path):
    """Loudly, so that nobody is given another score: merged, or read by RewardScorer or peft, it is fine."""
    base = save_base(tmp_path, clone(eos_as_pad(), eos_token="<|endoftext|>"), vocab_size=257)
    trained(base, None, tmp_path, peft_config=lora())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        plain_adapter(tmp_path / "rm")


def test_the_head_is_trained_and_saved_under_lora(tokenizer, tmp_path):
    initial = {}

    def remember(trainer):
        initial["score"] = trainer.model.base_model.model.score.modules_to_save["default"].weight.detach().clone()

    base = save_base(tmp_path, tokenizer)
    trainer = trained(base, None, tmp_path, peft_config=lora(), prepare=remember)
    now = trainer.model.base_model.model.score.modules_to_save["default"].weight
    assert (now - initial["score"]).abs().max() > 1e-3
    saved = load_file(tmp_path / "rm" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(saved, now)
    reloaded = load_reward_model(tmp_path / "rm")[0].merge_and_unload()
    assert torch.equal(reloaded.score.weight, now)


def test_ppo_takes_a_peft_model_in_memory(tokenizer, tmp_path):
    trainer = trained(save_base(tmp_path, tokenizer), None, tmp_path, peft_config=lora())
    rewards = rewards_in(ppo_trainer(tmp_path / "rm", tmp_path / "ppo", reward=trainer.model), *examples())
    assert rewards == pytest.approx(trainer_rewards(trainer), abs=FLOAT32)


# 4-bit bases --------------------------------------------------------------------------------------------------------

# bitsandbytes' CPU kernel wants outputs in multiples of 32, and a block is 64 weights.
SIZES = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def quantization():
    """4-bit NF4, float32 arithmetic."""
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def trained_in_4bit(path, tokenizer, quantization, **kwargs):
    base = save_base(path, tokenizer, **SIZES)
    options = {"model_init_kwargs": {"quantization_config": quantization}, **kwargs}
    return trained(base, None, path, peft_config=lora(), **options)


def test_qlora_trains_in_float32(tokenizer, tmp_path, quantization):
    """TRL casts adapters and head to bf16 on a 4-bit base, where float32 hidden states then meet a bf16 head."""
    trainer = trained_in_4bit(tmp_path, tokenizer, quantization)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_qlora_adapter_agrees_on_the_4bit_base(tokenizer, tmp_path, quantization):
    trainer = trained_in_4bit(tmp_path, tokenizer, quantization)
    folder, (prompts, completions) = tmp_path / "rm", examples()
    saved = AutoTokenizer.from_pretrained(folder)
    scorer = RewardScorer(*load_reward_model(folder, quantization_config=quantization))
    plain = plain_adapter(folder, quantization_config=quantization)
    keep_4bit_trainable(plain)  # else, on CPUs with AVX512-BF16, bitsandbytes computes in bf16: 1e-3 off
    rewards = {
        "trainer": trainer_rewards(trainer),
        "RewardScorer in memory": RewardScorer(trainer.model, trainer.processing_class)(prompts, completions),
        "RewardScorer of the folder": RewardScorer(folder)(prompts, completions),
        "the folder's base in 4 bits by hand": scorer(prompts, completions),
        "PPO": rewards_in(ppo_trainer(folder, tmp_path / "ppo", reward=scorer), prompts, completions),
        "GRPO": rewards_in(trl_trainer("GRPO", scorer, saved, tmp_path / "grpo"), prompts, completions),
        "RLOO": rewards_in(trl_trainer("RLOO", scorer, saved, tmp_path / "rloo"), prompts, completions),
        "plain": [r + saved_bias(folder) for r in plain_rewards(plain, saved, prompts, completions)],
    }
    assert largest_gap(rewards)[0] < FLOAT32, largest_gap(rewards)[1]


def test_qlora_merged_into_float32_differs_by_the_quantisation_error_alone(tokenizer, tmp_path, quantization):
    """Merged into the base's own weights, rewards move; merged into the 4-bit weights written out, they do not."""
    from bitsandbytes.functional import dequantize_4bit

    trainer = trained_in_4bit(tmp_path, tokenizer, quantization)
    folder, rewards = tmp_path / "rm", torch.tensor(trainer_rewards(trainer))
    merged, saved = _on_float32_base(folder), AutoTokenizer.from_pretrained(folder)
    merge(merged, saved, tmp_path / "merged")
    gap = (torch.tensor(RewardScorer(tmp_path / "merged")(*examples())) - rewards).abs().max()
    assert 1e-3 < gap < 0.5 * rewards.std()  # 0.15 standard deviations here: worth knowing, and no failure

    exact, quantised = _on_float32_base(folder), dict(trainer.model.named_modules())
    for name, module in exact.named_modules():
        weight = getattr(quantised.get(name), "weight", None)
        if isinstance(module, torch.nn.Linear) and hasattr(weight, "quant_state"):
            module.weight.data = dequantize_4bit(weight.data, weight.quant_state).float()
    merge(exact, saved, tmp_path / "exact")
    assert RewardScorer(tmp_path / "exact")(*examples()) == pytest.approx(rewards.tolist(), abs=FLOAT32)


def _on_float32_base(folder):
    """The adapter on its base in float32, whatever the base was in training; its bias included."""
    model = plain_adapter(folder, AutoPeftModelForSequenceClassification)
    model.config.reward_bias = saved_bias(folder)
    return model


def test_a_4bit_base_has_gradients_after_evaluation(tokenizer, tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    if not functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes does not pack")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    options = {"model_init_kwargs": {"quantization_config": quantization}, "peft_config": lora()}
    base = save_base(tmp_path, tokenizer, **SIZES)
    trainer = make(base, None, tmp_path / "out", eval_rows=RANKINGS, **options)

    trainer.evaluate()
    trainer.model.train()
    (batch,) = trainer.get_train_dataloader()
    trainer.compute_loss(trainer.model, batch).backward()
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trainable) == 9  # A and B of two projections in two layers, and the head
    assert [name for name, parameter in trainable.items() if parameter.grad is None] == []
