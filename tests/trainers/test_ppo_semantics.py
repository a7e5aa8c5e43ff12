"""What DESIGN section 5 says of rollout, update and checkpoint, where test_ppo_ptx_trainer.py does not hold it yet."""

import copy
import statistics
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import torch
from conftest import tiny_config
from datasets import Dataset
from ppo_helpers import PROMPTS, make
from ppo_reference import choices, kl, state_values
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from instruct_trl import RewardScorer, value_model_from_reward_model
from instruct_trl.trainers.ppo_rollout import whiten

EOS = 256
QUESTIONS = ["hi", "hello you", "a"]
# Finished, cut at the limit of 8 tokens, and nothing but the EOS.
ANSWERS = [[64, 65, EOS], [66, 67, 68, 69, 70, 71, 72, 73], [EOS]]  # "ab", "cdefghij", ""


def rows(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def roll(trainer, prompts, answers):
    """The trainer's own rollout of these prompts, given answers in the place of sampled ones."""
    trainer._generate_single_turn = lambda *args, **kwargs: ([list(answer) for answer in answers], None)
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])


def alone(classifier, ids):
    """Score at the last of these tokens, by plain transformers, bias not included."""
    with torch.no_grad():
        return classifier.score(classifier.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]).item()


def constant_critic(reward_model):
    """A value model that says 0 everywhere, so that returns are discounted rewards and nothing else."""
    critic = value_model_from_reward_model(reward_model)
    critic.classifier.load_state_dict({"score.weight": torch.zeros(1, 16)}, strict=False)
    critic.config.reward_bias = 0.0
    return critic


def make_ragged(policy):
    with torch.no_grad():
        policy.lm_head.weight[EOS] *= 30  # likely after some tokens only: answers of several lengths


def watch(trainer):
    """The micro-batches that it trains on, as a list of (prompt token ids, answer length), one a row."""
    seen, prepare = [], trainer._prepare_inputs

    def prepare_and_tell(batch):
        inputs = prepare(batch)
        pairs = zip(inputs["prompt_ids"], inputs["prompt_mask"].bool(), strict=True)
        prompts = [tuple(ids[mask].tolist()) for ids, mask in pairs]
        seen.append(list(zip(prompts, inputs["completion_mask"].sum(dim=1).tolist(), strict=True)))
        return inputs

    trainer._prepare_inputs = prepare_and_tell
    return seen


@pytest.mark.parametrize(("accumulation", "epochs", "steps"), [(8, 1, 1), (2, 2, 8)])
def test_ratio_steps_and_texts_with_one_step_an_iteration_and_with_inner_epochs(
    tmp_path, policy, scorer, tokenizer, accumulation, epochs, steps
):
    make_ragged(policy)
    trainer = make(
        tmp_path, policy, scorer, tokenizer, gradient_accumulation_steps=accumulation, num_iterations=epochs,
        temperature=0.7, ptx_ratio=8, local_rollout_forward_batch_size=3,
    )  # fmt: skip
    trainer.train()
    ratios = rows(trainer, "ratio")
    assert trainer.state.global_step == len(ratios) == 2 * steps
    assert len(rows(trainer, "score")) == 2  # rollouts
    assert [ratios[0], ratios[steps]] == pytest.approx([1, 1], abs=1e-5)
    assert trainer.pretraining.stream.position == 8 * 32 * epochs
    if epochs > 1:
        assert abs(ratios[steps // 2] - 1) > 1e-5  # the second epoch's first minibatch is judged by the old policy


def test_the_trainer_reads_the_value_of_a_choice_before_it_is_made(tmp_path, policy, scorer, tokenizer, reward_model):
    trainer = make(tmp_path, policy, scorer, tokenizer)
    batch = {k: v for k, v in roll(trainer, QUESTIONS, ANSWERS).items() if k.endswith(("_ids", "_mask"))}
    values = trainer.critic.completion_values(batch)
    for row, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        expected = torch.stack(state_values(reward_model, tokenizer(question)["input_ids"], answer))
        torch.testing.assert_close(values[row, : len(answer)], expected, atol=1e-5, rtol=1e-5)
    changed = {**batch, "completion_ids": batch["completion_ids"].clone()}
    changed["completion_ids"][1, 3] = 65
    after = trainer.critic.completion_values(changed)
    torch.testing.assert_close(after[1, :4], values[1, :4])
    assert (after[1, 4:] - values[1, 4:]).abs().min() > 1e-6


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_score_and_bias_land_on_the_eos_or_on_the_last_token_of_a_cut_answer(
    tmp_path, policy, reward_model, tokenizer, pad_is_eos
):
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    reward_model.config.reward_bias = 0.7
    trainer = make(
        tmp_path, policy, RewardScorer(reward_model, tokenizer), tokenizer, value_model=constant_critic(reward_model),
        beta=0.0, discount=0.5, gae_lambda=1.0, whiten_advantages=False,
    )  # fmt: skip
    rollout = roll(trainer, QUESTIONS, ANSWERS)
    for row, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        score = alone(reward_model, tokenizer(question)["input_ids"] + answer) + 0.7
        assert rollout["scores"][row].item() == pytest.approx(score, abs=1e-5)
        # Worth the whole score at its own token and half as much at each token before: it is on the last one.
        expected = [score * 0.5 ** (len(answer) - 1 - t) for t in range(len(answer))]
        expected += [0.0] * (rollout["returns"].size(1) - len(answer))
        assert rollout["returns"][row].tolist() == pytest.approx(expected, abs=1e-5)
    assert rollout["loss_mask"].sum(dim=1).tolist() == [len(answer) for answer in ANSWERS]
    assert trainer._metrics["train"]["eos_rate"] == [pytest.approx(2 / 3)]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_penalty_follows_the_estimator_and_the_log_is_always_k1(
    tmp_path, policy, reward_model, tokenizer, estimator
):
    nothing = lambda prompts, **_: [0.0] * len(prompts)  # noqa: E731
    plain = copy.deepcopy(policy)
    trainer = make(
        tmp_path, policy, nothing, tokenizer, value_model=constant_critic(reward_model), beta=0.5, gae_lambda=1.0,
        kl_estimator=estimator, whiten_advantages=False,
    )  # fmt: skip
    with torch.no_grad():
        trainer.ref_model.lm_head.weight.add_(0.2 * torch.randn(258, 16))
    reference = copy.deepcopy(plain)
    reference.load_state_dict(trainer.ref_model.state_dict())
    rollout = roll(trainer, QUESTIONS, ANSWERS)
    sums = []
    for row, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        ids, n = tokenizer(question)["input_ids"], len(answer)
        both = [[x.item() for x in choices(m, ids, answer, 1.0)[0]] for m in (plain, reference)]
        found = [kl(p, q, estimator) for p, q in zip(*both, strict=True)]
        assert rollout["kl"][row, :n].tolist() == pytest.approx(found, abs=1e-5)
        assert rollout["returns"][row, 0].item() == pytest.approx(-0.5 * sum(found), abs=1e-4)
        sums.append(sum(kl(p, q, "k1") for p, q in zip(*both, strict=True)))
    assert trainer._metrics["train"]["kl"] == [pytest.approx(statistics.fmean(sums), abs=1e-4)]
    assert trainer._metrics["train"]["objective"] == [pytest.approx(-0.5 * statistics.fmean(sums), abs=1e-4)]


def test_two_answers_a_prompt_have_no_group_baseline(tmp_path, policy, reward_model, tokenizer):
    prompts_seen = []

    def counting(prompts, **_):
        prompts_seen.append(prompts)
        return [float(i) for i in range(len(prompts))]

    trainer = make(
        tmp_path, policy, counting, tokenizer, value_model=constant_critic(reward_model), num_generations=2, beta=0.0,
        gae_lambda=1.0, whiten_advantages=False, total_episodes=16,
    )  # fmt: skip
    rollout = roll(trainer, ["a", "a", "b", "b"], [[65, EOS], [66, EOS], [67, EOS], [68, EOS]])
    assert rollout["advantages"].tolist() == [[0.0] * 2, [1.0] * 2, [2.0] * 2, [3.0] * 2]
    del trainer._generate_single_turn
    trainer.train()
    assert trainer.state.global_step == 4
    assert [prompts_seen[1].count(p) for p in set(prompts_seen[1])] == [2] * 8


def test_several_rewards_one_of_them_async_are_summed_by_weight(tmp_path, policy, reward_model, tokenizer):
    def length(completion_ids, **_):
        return [float(len(ids)) for ids in completion_ids]

    async def first(completion_ids, **_):
        return [float(ids[0]) for ids in completion_ids]

    trainer = make(
        tmp_path, policy, [length, RewardScorer(reward_model, tokenizer), first], tokenizer,
        reward_weights=[0.5, 3.0, -2.0],
    )  # fmt: skip
    scores = roll(trainer, QUESTIONS, ANSWERS)["scores"].tolist()
    for question, answer, score in zip(QUESTIONS, ANSWERS, scores, strict=True):
        judged = alone(reward_model, tokenizer(question)["input_ids"] + answer)
        assert score == pytest.approx(0.5 * len(answer) + 3.0 * judged - 2.0 * answer[0], rel=1e-5)
    assert trainer._metrics["train"]["rewards/length/mean"] == [4.0]


def other_language():
    """A reward model whose tokenizer has other ids: EOS 0, byte b at b + 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={"<|end|>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    torch.manual_seed(5)
    model = LlamaForSequenceClassification(tiny_config(num_labels=1, eos_token_id=0))
    return model, PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|end|>")


@pytest.mark.parametrize("row", [1, 0])
def test_a_reward_model_with_another_tokenizer_reads_the_text_in_its_own(
    tmp_path, policy, reward_model, tokenizer, row
):
    judge, its_tokenizer = other_language()
    trainer = make(
        tmp_path, policy, RewardScorer(judge, its_tokenizer), tokenizer,
        value_model=value_model_from_reward_model(reward_model),
    )  # fmt: skip
    score = roll(trainer, QUESTIONS, ANSWERS)["scores"][row].item()
    text = QUESTIONS[row] + tokenizer.decode(ANSWERS[row], skip_special_tokens=True)
    ids = its_tokenizer(text)["input_ids"] + ([0] if ANSWERS[row][-1] == EOS else [])
    assert score == pytest.approx(alone(judge, ids), abs=1e-5)


def test_conversations_are_rolled_out_scored_and_trained(tmp_path, policy, scorer, tokenizer, reward_model):
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS["prompt"]]
    trainer = make(
        tmp_path, policy, scorer, tokenizer, prompts=Dataset.from_dict({"prompt": prompts}), total_episodes=16
    )
    rollout = roll(trainer, prompts[:1], ANSWERS[:1])
    opening = tokenizer("<|user|>hello 0<|eos|><|assistant|>")["input_ids"]
    assert rollout["prompt_ids"][0].tolist() == opening
    judged = alone(reward_model, opening + ANSWERS[0])  # the template closes an answer with the EOS
    assert rollout["scores"].item() == pytest.approx(judged, abs=1e-5)
    del trainer._generate_single_turn
    trainer.train()
    assert trainer.state.global_step == 4


def test_prompts_may_be_streamed(tmp_path, policy, scorer, tokenizer):
    trainer = make(tmp_path, policy, scorer, tokenizer, prompts=PROMPTS.to_iterable_dataset())
    seen = watch(trainer)
    trainer.train()
    assert trainer.state.global_step == 8
    known = {tuple(tokenizer(p)["input_ids"]) for p in PROMPTS["prompt"]}
    for start in (0, 8):
        assert {prompt for batch in seen[start : start + 8] for prompt, _ in batch} == known


def test_whitening_counts_the_tokens_of_the_other_processes():
    """Process 1 of 2; the other one's tensors stand in for what gathering would bring."""
    mine, others = [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]], [[5.0, 6.0, 7.0, 9.0], [8.0, 0.0, 0.0, 0.0]]
    theirs = {torch.float32: torch.tensor(others), torch.bool: torch.tensor(others) > 0}
    accelerator: Any = SimpleNamespace(
        process_index=1,
        gather=lambda tensor: torch.cat([theirs[tensor.dtype], tensor]),
        pad_across_processes=lambda tensor, dim: torch.nn.functional.pad(tensor, (0, 4 - tensor.size(dim))),
    )
    white = whiten(accelerator, torch.tensor(mine), torch.tensor(mine) > 0)
    mean, deviation = statistics.fmean(range(1, 10)), statistics.pstdev(range(1, 10))
    expected = [[(x - mean) / deviation if x else 0.0 for x in row] for row in mine]
    torch.testing.assert_close(white, torch.tensor(expected))


def test_minibatches_are_random_and_sorted_by_length_inside_only(tmp_path, policy, scorer, tokenizer):
    make_ragged(policy)
    trainer = make(tmp_path, policy, scorer, tokenizer)
    seen = watch(trainer)
    trainer.train()
    partitions = []
    for start in (0, 8):  # 2 iterations of 8 micro-batches; 2 of them are a minibatch
        minibatches = [seen[i] + seen[i + 1] for i in range(start, start + 8, 2)]
        lengths = [[len(prompt) + length for prompt, length in minibatch] for minibatch in minibatches]
        assert all(found == sorted(found) for found in lengths)
        together = sum(lengths, [])
        assert together != sorted(together)  # the rollout as a whole is not sorted
        prompts = [prompt for minibatch in minibatches for prompt, _ in minibatch]
        assert len(set(prompts)) == 16  # everyone once
        partitions.append({frozenset(prompt for prompt, _ in minibatch) for minibatch in minibatches})
    assert not partitions[0] & partitions[1]
    in_order = [tuple(tokenizer(p)["input_ids"]) for p in PROMPTS["prompt"]]
    assert not partitions[0] & {frozenset(in_order[i : i + 4]) for i in range(0, 16, 4)}


def test_the_warm_up_of_both_models_starts_at_a_tenth(tmp_path, policy, scorer, tokenizer):
    trainer = make(tmp_path, policy, scorer, tokenizer, warmup_iterations=1, value_learning_rate=5e-3)
    rates, step = [], trainer.critic.step

    def step_and_tell(taken):
        rates.append(trainer.critic.optimizer.param_groups[0]["lr"])
        return step(taken)

    trainer.critic.step = step_and_tell
    trainer.train()
    for found, peak in ((rows(trainer, "learning_rate"), 1e-3), (rates, 5e-3)):
        shares = [rate / peak for rate in found]
        assert shares == pytest.approx([0.1, 0.325, 0.55, 0.775, 1, 1, 1, 1])  # a straight line over 4 steps


def test_a_resumed_run_takes_up_both_schedules(tmp_path, policy, reward_model, tokenizer):
    def run(folder, resume=None):
        scorer = RewardScorer(copy.deepcopy(reward_model), tokenizer)
        trainer = make(
            folder, copy.deepcopy(policy), scorer, tokenizer, lr_scheduler_type="linear", value_learning_rate=1e-2,
            total_episodes=16, save_strategy="steps", save_steps=2,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "run")
    again = run(tmp_path / "again", str(tmp_path / "run" / "checkpoint-2"))
    assert rows(whole, "learning_rate") == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert rows(again, "learning_rate") == pytest.approx(rows(whole, "learning_rate"))
    assert again.critic.scheduler.get_last_lr() == whole.critic.scheduler.get_last_lr()
    assert set(whole.critic.scheduler.get_last_lr()) == {0.0}
    for name, tensor in whole.critic.unwrapped.state_dict().items():
        torch.testing.assert_close(again.critic.unwrapped.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.fixture
def evaluated(tmp_path, policy, scorer, tokenizer):
    trainer = make(
        tmp_path, policy, scorer, tokenizer, eval_prompts=PROMPTS.select(range(8)), per_device_eval_batch_size=4,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_score", total_episodes=16, log_completions=True,
    )  # fmt: skip
    trainer.train()
    return trainer


def test_the_best_checkpoint_by_score_comes_back_and_completions_are_written(evaluated, policy, tmp_path):
    scores = rows(evaluated, "eval_score")
    assert len(set(scores)) == 2
    best = tmp_path / f"checkpoint-{2 * (1 + scores.index(max(scores)))}"
    assert evaluated.state.best_model_checkpoint == str(best)
    saved = AutoModelForCausalLM.from_pretrained(best)
    torch.testing.assert_close(policy.lm_head.weight, saved.lm_head.weight)
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert sorted(table["prompt"]) == sorted(PROMPTS["prompt"])
    assert table["reward_model"].mean() == pytest.approx(rows(evaluated, "score")[0], abs=1e-5)


def test_the_completions_table_shows_ppos_advantages(evaluated, tmp_path):
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert table["advantage"].abs().max() > 0


def test_evaluation_reports_a_win_rate_against_the_reference(evaluated):
    assert any("win" in key for row in evaluated.state.log_history for key in row if key.startswith("eval_"))
