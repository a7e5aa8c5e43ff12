"""Labelers of the user's: imported by name, tried before anything is sampled, and one number taken for each answer."""

import json
import sys
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from instruct_trl.evaluation.selection import score_answers
from instruct_trl.judges import Answer, Pair, ScoreJudge
from instruct_trl.models.generation import Completion
from instruct_trl.models.reward_functions import one_number_each
from instruct_trl.pipeline import evaluating, sampling, selecting
from instruct_trl.pipeline.arguments import RunArguments, parse_recipe
from instruct_trl.pipeline.evaluating import EvaluateArguments
from instruct_trl.pipeline.functions import STAND_INS, load_function, load_labeler, prepare_data, try_labeler
from instruct_trl.pipeline.sampling import SampleArguments
from instruct_trl.pipeline.selecting import SelectArguments
from instruct_trl.pipeline.stage import FINISHED

RIGHT = [
    [1, 0.5],
    (1, 0.5),
    np.array([1, 0.5]),
    np.array([1, 0.5], dtype=np.float16),
    [np.float32(1), np.float64(0.5)],
    [np.array(1), np.array(0.5)],
    torch.tensor([1, 0.5], dtype=torch.bfloat16, requires_grad=True),
    [torch.tensor(1.0), torch.tensor(0.5, requires_grad=True)],
    [True, Fraction(1, 2)],
    [Decimal(1), Decimal("0.5")],
    (score for score in (1, 0.5)),
    {"a": 1, "b": 0.5}.values(),
]
WRONG = [
    (None, "gave None for 2 answers"),
    (1.0, r"gave 1.0 \(float\) for 2 answers"),
    (True, r"gave True \(bool\) for 2 answers"),
    (torch.tensor(1.0), r"gave 1.0 \(Tensor\) for 2 answers"),
    ("ab", r"gave 'ab' \(str\) for 2 answers"),
    ({0: 1.0, 1: 2.0}, r"gave \{0: 1.0, 1: 2.0\} \(dict\)"),
    ([1.0], "gave 1 scores for 2 answers"),
    (np.ones(3), "gave 3 scores for 2 answers"),
    (torch.ones(0), "gave 0 scores for 2 answers"),
    (["1.0", "2.0"], r"gave '1.0' \(str\) for answer 0"),
    (np.array(["1", "2"]), r"gave '1' \(str\) for answer 0"),
    ([1.0, [2.0]], r"gave \[2.0\] \(list\) for answer 1"),
    (torch.ones(2, 1), r"gave \[1.0\] \(list\) for answer 0"),
    ([1.0, 1j], r"gave 1j \(complex\) for answer 1"),
]


def test_one_number_for_each_answer_is_taken_in_whatever_holds_them():
    for scores in RIGHT:
        assert one_number_each(scores, 2, "It") == [1.0, 0.5]
    assert one_number_each([None, float("inf")], 2, "It") == [None, float("inf")]


@pytest.mark.parametrize(("scores", "message"), WRONG)
def test_anything_else_is_refused_by_name_wherever_a_function_scores(scores, message):
    function = lambda **_: scores  # noqa: E731
    with pytest.raises(ValueError, match=f"^The labeler {message}.*one number for each answer"):
        score_answers(function, ["p", "q"], [Completion("x", [1], False)] * 2, "The labeler")
    with pytest.raises(ValueError, match=f"^The judge 'mine' {message}"):
        ScoreJudge(function, "mine").compare([Pair(Answer("p", "x"), Answer("p", "y"))])


MODULES = {
    "fine_labeler": "def score(**_):\n    return [0.0, 1.0]\nclass Late:\n    async def __call__(self):\n        pass\n"
    "late = Late()\nnumber = 3\nnothing = None\n",
    "broken_labeler": "def score(:\n",
    "needy_labeler": "import no_such_package_at_all\n",
    "leaving_labeler": "raise SystemExit(2)\n",
    "failing_labeler_module": "1 / 0\n",
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:score", "no such function; there is no module 'nowhere'.*folder that holds it"),
        ("nowhere.deeper:score", "no such function; there is no module 'nowhere.deeper'"),
        (
            "fine_labeler:skore",
            "no such function; the module 'fine_labeler' has no 'skore'. Did you mean fine_labeler:score",
        ),
        ("fine_labeler:nothing", "the module 'fine_labeler' has no 'nothing'"),
        ("fine_labeler:number", r"'number' is 3 \(int\), not a function"),
        ("fine_labeler:late", "is async"),
        ("broken_labeler:score", r"'broken_labeler' cannot be imported \(SyntaxError: .*line 1"),
        ("needy_labeler:score", r"'needy_labeler' cannot be imported \(ModuleNotFoundError: .*no_such_package_at_all"),
        ("leaving_labeler:score", r"'leaving_labeler' cannot be imported \(SystemExit: 2"),
        ("failing_labeler_module:score", "ZeroDivisionError: division by zero"),
        ("fine_labeler", "not of the form 'module:function'"),
        ("fine_labeler:", "not of the form 'module:function'"),
        (":score", "not of the form 'module:function'"),
        ("./fine_labeler.py:score", "without .py"),
        ("", "not of the form 'module:function'"),
    ],
)
def test_a_function_that_cannot_be_had_is_named_with_the_modules_own_error(tmp_path, monkeypatch, name, message):
    for module, text in MODULES.items():
        (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    run = RunArguments(dataset_name="mine.jsonl", cpu_threads=1)
    with pytest.raises(ValueError, match=f"^--labeler {name}.*{message}"):
        load_labeler(name, run)
    assert load_function("fine_labeler:score", "labeler")() == [0.0, 1.0]
    del sys.modules["fine_labeler"]


def test_a_labeler_that_takes_run_dir_gets_the_runs_folder_and_none_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "labeler_of_runs.py").write_text(
        "def score(prompts, completions, run_dir, **_):\n    return [run_dir + c for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    run = RunArguments(run_dir="r/")
    assert load_labeler("labeler_of_runs:score", run)(prompts=["p"], completions=["c"]) == ["r/c"]
    with pytest.raises(ValueError, match="No labeler is given. Set --labeler module:function"):
        load_labeler(None, run)


def test_a_preparing_step_is_called_once_with_the_settings_beside_the_config(tmp_path, monkeypatch):
    (tmp_path / "preparing_step.py").write_text(
        "def write(folder, rows=1):\n    (folder / 'd.txt').write_text('x' * rows)\n    return {'rows': rows}\n"
    )
    monkeypatch.chdir(tmp_path)
    run = RunArguments(run_dir="run", prepare="preparing_step:write")
    run.config_folder = tmp_path
    (tmp_path / "data.yaml").write_text("rowz: 3\n")
    with pytest.raises(ValueError, match="data.yaml: unknown key 'rowz'. Did you mean 'rows'"):
        prepare_data(run)
    (tmp_path / "data.yaml").write_text("rows: 3\n")
    for _ in range(2):
        prepare_data(run)
        assert (run.run / "data" / "d.txt").read_text() == "xxx"
        monkeypatch.setattr("preparing_step.write", lambda folder, rows: pytest.fail("called again"))
    assert json.loads((run.run / "data" / FINISHED).read_text())["summary"] == {"rows": 3}


def test_a_preparing_step_that_takes_a_seed_gets_the_runs_and_what_is_there_stays(tmp_path, monkeypatch):
    (tmp_path / "seeded_step.py").write_text("def write(folder, seed=0):\n    (folder / str(seed)).touch()\n")
    monkeypatch.chdir(tmp_path)

    def prepare(run_dir, *argv):
        argv = ["--prepare", "seeded_step:write", "--run_dir", run_dir, "--cpu_threads", "1", *argv]
        (run,) = parse_recipe((SampleArguments,), "sample", "Help.", argv)
        prepare_data(run)
        return {path.name for path in (run.run / "data").iterdir()} & set("0123456789")

    assert prepare("run", "--seed", "7") == {"7"}
    assert prepare("run") == prepare("run", "--seed", "8") == {"7"}
    assert prepare("plain") == prepare("plain", "--seed", "8") == {"0"}
    assert prepare("variant", "--seed", "8", "--output_dir", "elsewhere") == {"0"}


def test_a_labeler_is_called_as_it_will_be_and_no_more_than_once(tokenizer):
    seen = []

    def score(prompts, completions, completion_ids, **_):
        seen.append((prompts, completions, completion_ids))
        return [0.0, 1.0]

    messages = [{"role": "user", "content": "hi"}]
    try_labeler(score, [messages, messages], tokenizer, "mine:score")
    ((prompts, completions, ids),) = seen
    assert prompts == [messages, messages]
    assert completions == [[{"role": "assistant", "content": text}] for text in STAND_INS]
    assert [tokenizer.decode(row) for row in ids] == list(STAND_INS)


@pytest.mark.parametrize(
    "body", ["return ['good'] * len(prompts)", "return [1.0]", "raise KeyError('a')", "return [None, 1]"]
)
def test_a_labeler_that_fails_is_refused_before_anything_is_sampled(tmp_path, monkeypatch, policy, tokenizer, body):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p"}\n{"prompt": "q"}\n')
    policy.save_pretrained(tmp_path / "m")
    module = f"labeler_{abs(hash(body))}"
    (tmp_path / f"{module}.py").write_text(f"def score(prompts, completions, **_):\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    for where in (sampling, evaluating):
        monkeypatch.setattr(where, "load_causal_lm", lambda path: (SimpleNamespace(device="cpu"), tokenizer))
        monkeypatch.setattr(where, "sample_answers", lambda *_, **__: pytest.fail("sampled"))
    monkeypatch.setattr("instruct_trl.RewardScorer", lambda *_, **__: None)
    common = {"run_dir": "run", "dataset_name": "prompts.jsonl", "labeler": f"{module}:score", "cpu_threads": 1}
    message = "This came from a trial of the labeler '.*Nothing was sampled yet"
    with pytest.raises(ValueError, match=message):
        sampling.sample_rankings(SampleArguments(model_name_or_path="m", **common), tmp_path)
    run = EvaluateArguments(sft_model="m", ppo_model="m", reward_model_path="m", **common)
    with pytest.raises(ValueError, match=message):
        evaluating.evaluate_models(run, tmp_path)


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (SampleArguments, {"num_completions": 1}, "--num_completions is 1; it must be a whole number, at least 2"),
        (SampleArguments, {"num_completions": "4"}, "--num_completions is '4'"),
        (SampleArguments, {"num_completions": True}, "--num_completions is True"),
        (SampleArguments, {"temperature": -1.0}, "--temperature is -1.0; it must be a number, at least 0.0"),
        (EvaluateArguments, {"temperature": float("nan")}, "--temperature is nan"),
        (EvaluateArguments, {"temperature": float("inf")}, "--temperature is inf"),
        (EvaluateArguments, {"max_text_length": 1}, "--max_text_length is 1"),
        (SelectArguments, {"batch_size": 0}, "--batch_size is 0"),
        (SelectArguments, {"max_completion_length": 2.5}, "--max_completion_length is 2.5; it must be a whole number"),
    ],
)
def test_numbers_out_of_range_are_refused_as_they_are_read(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(cpu_threads=1, **changes)


def test_the_same_answer_four_times_is_not_ranked(tmp_path):
    run = SampleArguments(run_dir=str(tmp_path), temperature=0.0, cpu_threads=1)
    with pytest.raises(ValueError, match="--temperature is 0, which gives the same answer every time"):
        sampling.sample_rankings(run, tmp_path)


def test_models_that_are_not_there_are_named_by_their_option(tmp_path, policy):
    policy.save_pretrained(tmp_path / "m")
    here, gone = str(tmp_path / "m"), str(tmp_path / "gone")
    given = {"sft_model": here, "ppo_model": here, "reward_model_path": here, "other_models": [f"more={here}"]}
    run = EvaluateArguments(run_dir=str(tmp_path), dataset_name="d.jsonl", cpu_threads=1, **given)
    evaluating.check_model_folders(run, evaluating.model_paths(run))
    for option in given:
        changed = replace(run, **{option: [f"more={gone}"] if option == "other_models" else gone})
        with pytest.raises(ValueError, match=f"^--{option}.*There is no model folder '{gone}'"):
            evaluating.check_model_folders(changed, evaluating.model_paths(changed))
    (tmp_path / "sft" / "checkpoint-1").mkdir(parents=True)
    select = SelectArguments(run_dir=str(tmp_path), dataset_name="d.jsonl", reward_model_path=gone, cpu_threads=1)
    with pytest.raises(ValueError, match=f"no model folder '{gone}'"):
        selecting.select_and_copy(select, tmp_path)
