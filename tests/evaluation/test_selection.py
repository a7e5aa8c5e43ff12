"""Selection of an SFT checkpoint: on models that always say one letter, so that each number has a closed form."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy import stats

from instruct_trl.evaluation.estimates import Estimate, mean_interval
from instruct_trl.evaluation.selection import (
    CheckpointRow,
    SelectionResult,
    _choose,
    as_prompts,
    as_scorer,
    find_checkpoints,
    score_answers,
    select_checkpoint,
)
from instruct_trl.models.generation import Completion
from instruct_trl.models.reward import RewardScorer
from instruct_trl.report.selection_report import finding, selection_markdown, write_selection

WORTH = {"a": 1.0, "b": 5.0, "c": 2.0}
SCORE = Estimate(0.1, 0.05, 0.15, 9)
PROMPTS = ["short", "a longer prompt"]


def say(policy, token):
    """The hidden state is all ones (16 of them), the logit of `token` 100, all others 0."""
    with torch.no_grad():
        policy.model.embed_tokens.weight.fill_(1.0)
        for layer in policy.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        policy.lm_head.weight.zero_()
        policy.lm_head.weight[token] = 100 / 16


@pytest.fixture
def run(policy, tokenizer, tmp_path):
    """checkpoint-10 says a, checkpoint-20 b, checkpoint-100 c."""
    for letter, step in (("a", 10), ("b", 20), ("c", 100)):
        say(policy, tokenizer(letter)["input_ids"][0])
        folder = tmp_path / "run" / f"checkpoint-{step}"
        policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": step / 10}))
    return tmp_path / "run"


def worth(prompts, completions, completion_ids, **kwargs):
    return [WORTH[text[0]] + 2 * (prompt == PROMPTS[1]) for prompt, text in zip(prompts, completions, strict=True)]


def test_the_highest_reward_is_picked_and_every_number_is_right(run, tmp_path):
    validation = Dataset.from_list([{"prompt": "p", "completion": "aaa"}, {"prompt": "p", "completion": "aac"}])
    out = tmp_path / "report"
    result = select_checkpoint(
        run, worth, Dataset.from_dict({"prompt": PROMPTS}), validation_dataset=validation, max_new_tokens=4,
        output_dir=out,
    )  # fmt: skip
    assert result.best == str(run / "checkpoint-20")
    assert result.best_by_loss == str(run / "checkpoint-10")
    assert [row.step for row in result.rows] == [10, 20, 100]  # by number, not by name
    assert [row.epoch for row in result.rows] == [1, 2, 10]
    # Two prompts worth w and w + 2: mean w + 1, and too few for an interval.
    assert [row.rm_score for row in result.rows] == [Estimate(mean, None, None, 2) for mean in (2, 6, 3)]
    # A token said costs 0, another one 100; the EOS of each row is never said. a: 5 of 8 said, b: none, c: 1.
    assert [row.validation_loss for row in result.rows] == pytest.approx([300 / 8, 100, 700 / 8], rel=1e-5)
    assert [row.truncated for row in result.rows] == [1, 1, 1]
    saved = json.loads((out / "selection.json").read_text())
    assert saved["rows"][0]["rm_score"] == {"mean": 2, "low": None, "high": None, "n": 2}
    assert saved["best"] == result.best
    assert [row["rm_score"]["mean"] for row in saved["rows"]] == [2, 6, 3]
    assert [row["scores"] for row in saved["rows"]] == [[1, 3], [5, 7], [2, 4]]
    assert (saved["runner_up"]["checkpoint"], saved["runner_up"]["mean"]) == (str(run / "checkpoint-100"), 3)
    write_selection(result, out)
    assert json.loads((out / "selection.json").read_text()) == {"finding": finding(result), **saved}
    table = (out / "selection.md").read_text()
    assert finding(result) in table
    assert "The RM score picks epoch 2; the validation loss would pick epoch 1." in table
    assert "| checkpoint-20 | 2 | 6.000 | 100.0000 | 100% | RM score |" in table
    assert all(
        path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        for path in (out / "selection.png", out / "dark" / "selection.png")
    )


def test_the_same_checkpoint_twice_scores_the_same_since_the_noise_is_shared(policy, tokenizer, tmp_path):
    for name in ("checkpoint-1", "checkpoint-2"):
        policy.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)

    def first_byte(prompts, completions, completion_ids, **kwargs):
        return [float(ids[0]) for ids in completion_ids]

    first, second = select_checkpoint(tmp_path, first_byte, PROMPTS, max_new_tokens=4, seed=3).rows
    assert first.rm_score == second.rm_score
    assert (first.step, first.epoch) == (1, None)  # no trainer_state.json: the folder's number
    assert first.validation_loss is None


def test_a_list_without_losses_picks_by_reward_alone(run):
    result = select_checkpoint([run / "checkpoint-100", run / "checkpoint-10"], worth, PROMPTS, max_new_tokens=1)
    assert result.best == str(run / "checkpoint-100")
    assert result.best_by_loss is None
    assert "The RM score picks epoch 10." in selection_markdown(result)


def test_a_reward_model_scores_as_its_scorer_does(run, reward_model, tokenizer):
    reward_model.config.reward_bias = 0.5
    scorer = RewardScorer(reward_model, tokenizer)
    row = select_checkpoint([run / "checkpoint-10"], scorer, PROMPTS, max_new_tokens=3).rows[0]
    letter = tokenizer("a")["input_ids"]
    expected = [scorer(prompts=[p], completions=["aaa"], completion_ids=[letter * 3])[0] for p in PROMPTS]
    assert row.rm_score.mean == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_models_and_paths_become_scorers_and_functions_stay(reward_model, tokenizer):
    scorer = as_scorer(reward_model, tokenizer)
    assert isinstance(scorer, RewardScorer)
    assert as_scorer(scorer) is scorer
    assert as_scorer(worth) is worth
    with pytest.raises(ValueError, match="reward_model must be a path"):
        as_scorer(3)


def test_conversations_are_scored_as_messages():
    seen = {}

    def spy(prompts, completions, completion_ids, **kwargs):
        seen.update(completions=completions)
        return [0.0]

    score_answers(spy, [[{"role": "user", "content": "hi"}]], [Completion("hello", [1], False)])
    assert seen["completions"] == [[{"role": "assistant", "content": "hello"}]]


def chosen(*scores, prompts=None):
    """The choice among checkpoints with these scores of each prompt."""
    rows = [
        CheckpointRow(f"run/checkpoint-{step}", step, float(step), mean_interval(row), None, 0.0, list(row))
        for step, row in enumerate(scores, start=1)
    ]
    return _choose(rows, prompts or [str(i) for i in range(len(scores[0]))])


def test_a_lead_is_told_from_noise_prompt_by_prompt():
    """The prompts differ by 10, the checkpoints by less: only pairs of answers to one prompt can tell."""
    rng = np.random.default_rng(0)
    level, noise = rng.normal(0, 10, 60), rng.normal(0, 1, (3, 60))
    noise -= noise.mean(axis=1, keepdims=True)
    worse, same, best = level - 1 + noise[0], level + noise[1], level + 0.1 + noise[2]
    result = chosen(worse, same, best, worse)
    assert result.best == "run/checkpoint-3"
    assert (result.runner_up.checkpoint, result.last.checkpoint) == ("run/checkpoint-2", "run/checkpoint-4")
    for gap, expected in ((result.runner_up, best - same), (result.last, best - worse)):
        interval = stats.t.interval(0.95, 59, loc=expected.mean(), scale=stats.sem(expected))
        assert gap.mean == pytest.approx(expected.mean())
        assert (gap.low, gap.high) == pytest.approx(interval, abs=0.05)
    assert (result.runner_up.is_clear, result.last.is_clear) == (False, True)
    _, first, second = finding(result).split(". Its ")
    assert "over the runner-up, epoch 2, cannot be told from noise (95 % interval over 60 prompts −0." in first
    assert "over the last checkpoint, epoch 4, is more than noise (95 % interval over 60 prompts +" in second


def test_a_lead_on_repeated_prompts_counts_prompts():
    """A lead on two of every three prompts, each asked ten times: clear over 300 rows, not over 30 prompts."""
    gain = [(1.0 if prompt % 3 else -1.4) for prompt in range(30) for _ in range(10)]
    rows = chosen([0.0] * 300, gain)
    prompts = chosen([0.0] * 300, gain, prompts=[str(i // 10) for i in range(300)])
    assert (rows.runner_up.is_clear, prompts.runner_up.is_clear) == (True, False)
    assert prompts.runner_up.n == 30
    assert prompts.last is None


def test_equal_checkpoints_and_few_prompts_are_said_plainly():
    same = chosen([1.0, 2.0] * 10, [1.0, 2.0] * 10)
    assert same.best == "run/checkpoint-1"
    assert (same.runner_up.low, same.runner_up.high, same.runner_up.is_clear) == (0, 0, False)
    assert "lead of 0.000 over the runner-up and last checkpoint, epoch 2, cannot be told from noise" in finding(same)
    few = chosen([1.0, 2.0], [2.0, 3.0])
    assert few.runner_up.is_clear is None
    assert "cannot be said: 2 different prompts are too few for an interval." in finding(few)
    assert finding(chosen([1.0, 2.0])) == "The RM score picks epoch 1."


def test_agreement_is_said_in_one_sentence():
    row = CheckpointRow("run/checkpoint-5", 5, 1.0, SCORE, 2.0, 0.0)
    text = selection_markdown(SelectionResult(row.checkpoint, row.checkpoint, [row]))
    assert "The RM score picks epoch 1, and so does the validation loss." in text
    assert "| RM score and loss |" in text


def test_no_checkpoints_says_where_it_looked(tmp_path):
    with pytest.raises(ValueError, match=rf"No checkpoints in '{tmp_path}': looked for checkpoint-\*"):
        find_checkpoints(tmp_path)
    with pytest.raises(ValueError, match="No checkpoint at .*nowhere"):
        find_checkpoints([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="empty list"):
        find_checkpoints([])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (Dataset.from_dict({"prompts": ["a", "b"]}), "prompts has no column 'prompt'.*rename_column"),
        (["a", ""], r"prompts: column 'prompt', row 1 is empty \(''\)"),
        (["a", None], r"column 'prompt', row 1 is empty \(None\)"),
        (["a"], "prompts has 1 rows; at least 2"),
        (["a"] * 3, "All 3 rows of prompts are the same prompt, 'a'"),
    ],
)
def test_bad_prompts_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        as_prompts(prompts)


@pytest.mark.parametrize("scores", [[float("nan"), 0.0], [0.0, float("inf")], [0.0, None], [0.0], None])
def test_scores_that_are_not_finite_numbers_are_refused(scores):
    answers = [Completion("x", [1], False)] * 2
    with pytest.raises(ValueError, match="The reward function '<lambda>' gave"):
        score_answers(lambda **kwargs: scores, PROMPTS, answers)


def test_a_score_that_is_none_is_named_with_prompt_and_answer():
    answers = [Completion("fine", [1], False), Completion("dull", [2], False)]
    with pytest.raises(ValueError, match=f"gave None for prompt 1 \\({PROMPTS[1]!r}\\), answer 'dull'"):
        score_answers(lambda **kwargs: [0.0, None], PROMPTS, answers, "The labeler")


def test_validation_data_needs_its_columns(run):
    with pytest.raises(ValueError, match="validation_dataset has no column 'completion'"):
        select_checkpoint(run, worth, PROMPTS, validation_dataset=Dataset.from_dict({"prompt": ["a"]}))


def test_a_checkpoints_name_is_shown_as_it_is():
    rows = [CheckpointRow(f"run/<b>|*{step}*", step, None, SCORE, None, 0.0) for step in (1, 2)]
    text = selection_markdown(SelectionResult(rows[0].checkpoint, None, rows))
    assert r"picks &lt;b&gt;\|\*1\*." in text
    assert r"| &lt;b&gt;\|\*2\* |" in text
