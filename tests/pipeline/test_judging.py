"""The evaluation's judges: asked about the answers on disk, waited for, and refused with the option to set."""

import csv
import json
from dataclasses import replace

import pytest

from instruct_trl.evaluation.tasks import TaskScore
from instruct_trl.judges import EndpointJudge
from instruct_trl.pipeline import benchmarking
from instruct_trl.pipeline.benchmarking import TaskArguments, measure_tasks
from instruct_trl.pipeline.evaluating import EvaluateArguments
from instruct_trl.pipeline.functions import try_judges
from instruct_trl.pipeline.judging import JudgeArguments, check_judges, judge_answers, make_judge
from instruct_trl.report.data import ModelResult, ReportData, load_report_data, save_report_data


@pytest.fixture
def run(tmp_path):
    models = {
        name: {"completions": [f"{word} {i}" for i in range(3)], "ended": [True] * 3}
        for name, word in (("base", "no"), ("SFT", "fine"), ("PPO-ptx", "so good"))
    }
    (tmp_path / "answers.json").write_text(json.dumps({"prompts": ["p", "q", "r"], "models": models}))
    return EvaluateArguments(run_dir=str(tmp_path), batch_size=2, dataset_name="mine")


def test_without_judges_nothing_is_asked(run):
    assert judge_answers(run, JudgeArguments(), run.run) == {"judged": [], "ratings": [], "judge_notes": []}
    with pytest.raises(ValueError, match="name an endpoint or people in judges"):
        judge_answers(run, JudgeArguments(questions=["likert"]), run.run)


def test_a_function_judges_and_the_report_takes_it(run, monkeypatch):
    (run.run / "judge_of_mine.py").write_text(
        "def score(prompts, completions, **_):\n    return list(map(len, completions))\n"
    )
    monkeypatch.chdir(run.run)
    result = judge_answers(run, JudgeArguments(judges=["judge_of_mine:score"], judge_prompts=2), run.run)
    assert [(row["judge"], row["model"], row["mean"], row["n"]) for row in result["judged"]] == [
        ("score", "base", 0.0, 2),
        ("score", "PPO-ptx", 1.0, 2),
    ]
    data = ReportData("r", [ModelResult("SFT"), ModelResult("PPO-ptx")], **result)
    assert load_report_data(save_report_data(data, run.run / "report.json")) == data
    # Kept for later runs, which ask somebody else or nobody; asked again, a judge is not there twice.
    again = judge_answers(run, JudgeArguments(judges=["people"]), run.run)
    assert again["judged"] == result["judged"]
    assert len(again["judge_notes"]) == 1
    assert judge_answers(run, JudgeArguments(), run.run) == again
    judge_answers(run, JudgeArguments(judges=["judge_of_mine:score"], judge_prompts=1), run.run)
    assert [row["n"] for row in judge_answers(run, JudgeArguments(), run.run)["judged"]] == [1, 1]


def test_people_are_waited_for_and_then_counted(run):
    settings = JudgeArguments(judges=["people"], questions=["likert"])
    waiting = judge_answers(run, settings, run.run)
    assert waiting["judged"] == []
    assert [note.split(" rows wait")[0] for note in waiting["judge_notes"]] == ["6", "9"]
    for name, fill in (("compare", {"better": "tie"}), ("rate", {"quality": "4"})):
        path = run.run / "people" / f"{name}.csv"
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row | fill for row in csv.DictReader(file)]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    result = judge_answers(run, settings, run.run)
    assert [(row["model"], row["mean"], row["ties"]) for row in result["judged"]] == [
        ("base", 0.5, 3),
        ("PPO-ptx", 0.5, 3),
    ]
    assert [(row["model"], row["mean"]) for row in result["ratings"]] == [("base", 4.0), ("SFT", 4.0), ("PPO-ptx", 4.0)]


@pytest.mark.parametrize(
    ("judge", "changes", "message"),
    [
        ("localhost:8000/v1", {}, "There is no judge 'localhost:8000/v1'.*a URL such as http"),
        ("ftp://server/v1", {}, "'ftp://server/v1'; give a URL such as"),
        ("http://localhost:port/v1", {}, "'http://localhost:port/v1'; give a URL such as"),
        ("http://localhost:9/v1", {"judge_model": "m", "judge_key": "sk-5ec2e7"}, "never the key itself"),
        ("nowhere:score", {}, "--judges nowhere:score: no such function"),
        ("somebody", {}, "There is no judge 'somebody'. Give 'reward_model', 'people'"),
        ("http://localhost:9/v1", {}, "needs a model's name: --judge_model"),
        ("http://localhost:9/v1", {"judge_model": "m", "judge_key": "NO_SUCH_KEY"}, "no variable 'NO_SUCH_KEY'"),
    ],
)
def test_a_judge_that_cannot_be_made_says_what_to_set(run, judge, changes, message):
    with pytest.raises(ValueError, match=message):
        make_judge(judge, run, replace(JudgeArguments(), **changes), run.run)


@pytest.mark.parametrize(
    "start", ["http://me:pa/ss@", "HTTPS://me:pass@", "https://[me:pass@", "me:pass@", "ftp://pass@"]
)
def test_a_password_in_a_url_is_refused_and_shown_nowhere(run, start, capsys):
    with pytest.raises(ValueError) as error:
        judge_answers(run, JudgeArguments(judges=[f"{start}localhost:2/v1"], judge_model="m"), run.run)
    text = str(error.value) + capsys.readouterr().out
    assert "pa" not in text.replace("password", "")
    assert "--judge_key" in text or "There is no judge 'localhost:2/v1'" in text
    assert [path.name for path in run.run.iterdir()] == ["answers.json"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge_prompts": 0}, "--judge_prompts is 0; it must be a whole number, at least 1"),
        ({"judge_workers": -2}, "--judge_workers is -2"),
        ({"judge_price_in": float("nan")}, "--judge_price_in is nan; it must be a number, at least 0.0"),
        ({"questions": ["humour"], "judges": ["people"]}, "no question 'humour'"),
        ({"questions": ["likert"], "judges": ["reward_model", "mine:score"]}, "name an endpoint or people"),
    ],
)
def test_settings_out_of_range_are_refused_as_they_are_read(settings, message):
    with pytest.raises(ValueError, match=message):
        JudgeArguments(**settings)


def test_every_judge_is_looked_at_before_one_is_asked(run, tmp_path, monkeypatch):
    (tmp_path / "a_judge.py").write_text("def score(prompts, completions, **_):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    (judge,) = check_judges(run, JudgeArguments(judges=["people", "a_judge:score"]), tmp_path)
    for judges, message in (
        (["people", "mystery"], "no judge 'mystery'"),
        (["people", "reward_model"], "no model folder '.*reward_model'"),
        (["people", "a_judge:scores"], "has no 'scores'. Did you mean a_judge:score?"),
    ):
        with pytest.raises(ValueError, match=message):
            check_judges(run, JudgeArguments(judges=judges), tmp_path)
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts] == before
    with pytest.raises(ValueError, match="'score' gave 1 scores for 2 answers.*trial.*Nothing was sampled"):
        try_judges([judge], [[{"role": "user", "content": "hi"}]])


def test_two_servers_with_one_models_name_stay_apart(run, monkeypatch):
    monkeypatch.setattr(EndpointJudge, "ask", lambda self, chats, desc: ["Verdict: A"] * len(chats))
    urls = ["http://localhost:1/v1", "http://localhost:2/v1"]
    result = judge_answers(run, JudgeArguments(judges=urls, judge_model="m"), run.run)
    assert {row["judge"] for row in result["judged"]} == {"m at localhost:1", "m at localhost:2"}


def test_two_models_of_one_server_stay_apart_and_ratings_are_kept_where_no_question_is_put(run, monkeypatch):
    replies = {"quality": "quality: 6", "Verdict": "Verdict: A"}
    answer = lambda chat: next(text for word, text in replies.items() if word in chat[-1]["content"])  # noqa: E731
    monkeypatch.setattr(EndpointJudge, "ask", lambda self, chats, desc: [answer(chat) for chat in chats])
    url = "http://localhost:1/v1"
    judge_answers(run, JudgeArguments(judges=[url], judge_model="m", questions=["likert"]), run.run)
    judge_answers(run, JudgeArguments(judges=[url], judge_model="n"), run.run)
    result = judge_answers(run, JudgeArguments(judges=[url], judge_model="m"), run.run)
    assert [row["judge"] for row in result["judged"]] == ["m at localhost:1"] * 2 + ["n at localhost:1"] * 2
    assert {(row["judge"], row["mean"]) for row in result["ratings"]} == {("m at localhost:1", 6.0)}


def test_tasks_are_added_and_kept(run, monkeypatch):
    run = replace(run, base_model="b", sft_model="s", ppo_model="p")
    run = replace(run, other_models=["prompted=b"], prefixes=["prompted=shots.txt"])  # no task is asked behind a prefix
    monkeypatch.setattr(benchmarking, "load_causal_lm", lambda path: (path, None))
    asked = []

    def run_tasks(model, tokenizer, tasks, **kwargs):
        asked.append((model, *tasks))
        return {task: TaskScore(0.5, 0.4, 0.6, 2, task, "acc", [1.0, 0.0]) for task in tasks}

    monkeypatch.setattr(benchmarking, "run_tasks", run_tasks)
    one, two = (TaskArguments(tasks=tasks, task_data="hub") for tasks in (["boolq"], ["boolq", "squad"]))
    assert list(measure_tasks(run, one)["SFT"]) == ["boolq"]
    assert list(measure_tasks(run, two)["PPO-ptx"]) == ["boolq", "squad"]
    assert asked == [(model, task) for task in ("boolq", "squad") for model in "bsp"]  # none twice
    assert list(measure_tasks(run, TaskArguments())["base"]) == ["boolq", "squad"]  # what earlier runs found
    with pytest.raises(ValueError, match="limit: None there, 5 now.*tasks/boolq away to redo it"):
        measure_tasks(run, replace(one, task_limit=5))
