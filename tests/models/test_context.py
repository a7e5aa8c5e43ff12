"""What does not fit into a model's context is found before training, in every model that reads it."""

import copy

import pytest
import torch
from conftest import tiny_config
from datasets import Dataset, IterableDataset
from ppo_helpers import make as make_ppo
from ranking_helpers import fresh_model
from ranking_helpers import make as make_ranking
from transformers import (
    BloomConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MptConfig,
    OPTConfig,
    XLNetConfig,
)

from instruct_trl import InstructSFTConfig, InstructSFTTrainer, RewardScorer, select_checkpoint
from instruct_trl.evaluation.language_modeling import mean_token_loss
from instruct_trl.models.context import check_rows_fit, context_length

LONG = {"prompt": "q" * 20, "completion": "a" * 60}  # 81 tokens with EOS
SHORT = {"prompt": "q" * 5, "completion": "a" * 5}


def gpt2(context):
    sizes = {"n_positions": context, "n_embd": 16, "n_layer": 1, "n_head": 2}
    torch.manual_seed(1)
    return GPT2ForSequenceClassification(
        GPT2Config(vocab_size=258, num_labels=1, pad_token_id=257, eos_token_id=256, bos_token_id=256, **sizes)
    )


def causal(context):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(max_position_embeddings=context))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 256, 257
    return model


def classifier(context):
    torch.manual_seed(1)
    return LlamaForSequenceClassification(tiny_config(num_labels=1, max_position_embeddings=context))


def test_the_context_by_every_name():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
    cases = [
        (GPT2Config(n_positions=64), 64),
        (OPTConfig(max_position_embeddings=48), 48),
        (MptConfig(max_seq_len=32), 32),
        (BloomConfig(), None),
        (XLNetConfig(), None),
        (causal(77), 77),
        (tiny_config(rope_parameters=yarn), 512),  # 128 positions, stretched fourfold
    ]
    assert [context_length(model) for model, _ in cases] == [length for _, length in cases]


def test_tokenised_rows_are_measured_whatever_their_form():
    model = causal(4)
    ask = {"model": model, "role": "the model", "remedy": "Set max_length={context}."}
    fine = Dataset.from_dict({"input_ids": [[1, 2, 3, 4], [1]]})
    assert check_rows_fit(fine, "data", **ask) is fine
    lists = Dataset.from_dict({"input_ids": [[[1], [1, 2]], [[1, 2], [1, 2, 3, 4, 5]]]})
    message = r"Row 1 of data \(one of 1 that do not fit, of 2\) has 5 tokens, .* at most 4 .* Set max_length=4\."
    with pytest.raises(ValueError, match=message):
        check_rows_fit(lists, "data", **ask)
    packed = Dataset.from_dict({"input_ids": [[1] * 6], "seq_lengths": [[4, 2]]})  # each part begins at position 0
    assert check_rows_fit(packed, "data", **ask) is packed
    with pytest.raises(ValueError, match=r"data\[far\]"):
        check_rows_fit({"near": fine, "far": lists}, "data", **ask)
    stream = check_rows_fit(IterableDataset.from_generator(lambda: iter(lists)), "data", **ask)
    with pytest.raises(ValueError, match="Row 1 of data has 5 tokens"):
        list(stream)


# PPO: (policy, value model, reference), reward model ------------------------------------------------------------------


@pytest.mark.parametrize("short", ["policy", "reward model", "value model", "reference model"])
@pytest.mark.parametrize("streamed", [False, True])
def test_ppo_finds_the_model_that_is_too_short(tmp_path, tokenizer, short, streamed):
    context = {"policy": 128, "reward model": 128, "value model": 128, "reference model": 128, short: 30}
    rows = [{"prompt": "q" * 9}] * 8 + [{"prompt": "q" * 20}] * 8
    prompts = IterableDataset.from_generator(lambda: iter(rows)) if streamed else Dataset.from_list(rows)

    def build(limit):
        return make_ppo(
            tmp_path, causal(context["policy"]), RewardScorer(gpt2(context["reward model"]), tokenizer), tokenizer,
            prompts=prompts, value_model=classifier(context["value model"]), ptx_coef=0.0, max_completion_length=limit,
            ref_model=causal(context["reference model"]), max_steps=4,
        )  # fmt: skip

    with pytest.raises(
        ValueError, match=f"(?i)the {short} .* at most 30 tokens .* prompt of 20 .*row 8.*1024.* 31 tog"
    ):
        list(build(11).train_dataset)
    trainer = build(10)  # 20 + 10 fit
    assert len(list(trainer.train_dataset)) == 16


def test_a_shorter_max_prompt_length_drops_what_would_not_fit(tmp_path, tokenizer):
    prompts = Dataset.from_list([{"prompt": "q" * 9}] * 16 + [{"prompt": "q" * 20}])
    kwargs = {"prompts": prompts, "ptx_coef": 0.0, "max_completion_length": 11}
    trainer = make_ppo(
        tmp_path, causal(30), RewardScorer(classifier(30), tokenizer), tokenizer, max_prompt_length=19, **kwargs
    )
    assert len(trainer.train_dataset) == 16
    with pytest.raises(ValueError, match=r"set max_prompt_length=19, by which"):
        make_ppo(tmp_path, causal(30), RewardScorer(classifier(30), tokenizer), tokenizer, **kwargs)


def test_evaluation_prompts_count_too(tmp_path, tokenizer):
    sets = {"near": Dataset.from_list([{"prompt": "q"}]), "far": Dataset.from_list([{"prompt": "q" * 25}])}
    with pytest.raises(ValueError, match=r"prompt of 25 tokens \(eval_dataset\[far\], row 0"):
        make_ppo(
            tmp_path, causal(30), RewardScorer(classifier(128), tokenizer), tokenizer, eval_prompts=sets, ptx_coef=0.0
        )


def test_pretraining_texts_are_cut_at_the_context_and_counted(tmp_path, tokenizer, capsys):
    texts = Dataset.from_list([{"text": "t" * 50}] * 3 + [{"text": "t" * 10}])
    trainer = make_ppo(
        tmp_path, causal(40), RewardScorer(classifier(128), tokenizer), tokenizer, pretraining_dataset=texts,
        ptx_max_length=2048,
    )  # fmt: skip
    assert sorted({len(row) for row in trainer.pretraining.stream.draw(8)}) == [10, 40]
    assert "3 cut at the policy's context of 40, below ptx_max_length=2048 tokens" in capsys.readouterr().out


# The other trainers, scoring and evaluation ---------------------------------------------------------------------------


def test_ranking_rows(tokenizer, tmp_path):
    rows = [{"prompt": "q" * 5, "completions": ["a", "bb"], "ranks": [1, 2]}] * 4
    long = {"prompt": "q" * 20, "completions": ["a", "b" * 60], "ranks": [1, 2]}
    model = fresh_model(max_position_embeddings=64)
    with pytest.raises(ValueError, match=r"Row 4 of train_dataset .* 81 tokens, .* at most 64 .*Set max_length=64"):
        make_ranking(copy.deepcopy(model), tokenizer, tmp_path, rows=[*rows, long])
    with pytest.raises(ValueError, match="Row 1 of eval_dataset"):
        make_ranking(copy.deepcopy(model), tokenizer, tmp_path, rows=rows, eval_rows=[rows[0], long])
    trainer = make_ranking(model, tokenizer, tmp_path, rows=[*rows, {**long, "completions": ["a", "b" * 43]}])  # 64
    assert trainer.data_reports["train"].dropped_prompts == 0
    with pytest.raises(ValueError, match="Row 1 of the demonstrations has 81 tokens"):
        trainer.normalize(Dataset.from_list([SHORT, LONG]))


def sft(path, tokenizer, rows, **kwargs):
    parts = {name: kwargs.pop(name) for name in ("reward_model", "selection_prompts", "eval_dataset") if name in kwargs}
    settings = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "eval_strategy": "no", **kwargs}
    args = InstructSFTConfig(str(path), **settings)
    return InstructSFTTrainer(
        causal(64), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **parts
    )


def test_demonstrations(tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match=r"Row 2 of train_dataset .*81 tokens.*at most 64.*Set max_length=64, by which"
    ):
        sft(tmp_path, tokenizer, [SHORT, SHORT, LONG])
    assert max(map(len, sft(tmp_path, tokenizer, [SHORT, LONG], max_length=64).train_dataset["input_ids"])) == 64


def test_packed_demonstrations_count_by_their_parts(tokenizer, tmp_path):
    trainer = sft(tmp_path, tokenizer, [SHORT] * 16, packing=True, max_length=128)
    assert max(map(len, trainer.train_dataset["input_ids"])) > 64 > max(map(max, trainer.train_dataset["seq_lengths"]))


def test_selection_prompts_in_model_and_reward_model(tokenizer, tmp_path):
    ask = {
        "selection_prompts": ["q" * 20, "q" * 30],
        "eval_dataset": Dataset.from_list([SHORT]),
        "eval_strategy": "epoch",
    }
    for rm_context, limit, named in ((128, 35, "The model"), (50, 21, "The reward model")):
        scorer = RewardScorer(classifier(rm_context), tokenizer)
        message = f"{named} .*prompt 1 of 30 tokens and an answer of selection_max_new_tokens={limit}, {limit + 30} tog"
        with pytest.raises(ValueError, match=message):
            sft(tmp_path, tokenizer, [SHORT], reward_model=scorer, selection_max_new_tokens=limit, **ask)
        sft(tmp_path, tokenizer, [SHORT], reward_model=scorer, selection_max_new_tokens=limit - 1, **ask)


def test_a_row_too_long_to_score_is_named(tokenizer):
    scorer = RewardScorer(gpt2(64), tokenizer)
    message = r"Row 1 \(prompt 'qqqqqqqqqqqqqqqqqqqq'\) has 81 tokens, but the reward model .* at most 64"
    with pytest.raises(ValueError, match=message):
        scorer(prompts=["q", LONG["prompt"]], completions=["a", LONG["completion"]])
    assert len(scorer(prompts=[LONG["prompt"]], completions=["a" * 43])) == 1  # 64 with EOS


def test_checkpoints_are_not_sampled_for_a_reward_model_that_is_too_short(tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match=r"The reward model .* at most 30 .* prompt 0 of 20 tokens .* max_new_tokens=11"
    ):
        select_checkpoint([tmp_path], RewardScorer(classifier(30), tokenizer), ["q" * 20, "q"], max_new_tokens=11)


def test_texts_whose_loss_is_measured(tokenizer):
    with pytest.raises(ValueError, match=r"Row 1 has 50 tokens, .* at most 40 .* Pass max_length=40"):
        mean_token_loss(causal(40), tokenizer, ["t" * 10, "t" * 50])
    assert mean_token_loss(causal(40), tokenizer, ["t" * 10, "t" * 50], max_length=40)[1] == 9 + 39
