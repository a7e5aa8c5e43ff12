"""More judges of an evaluation's answers, asked after sampling: they can be changed, added or waited for."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from instruct_trl.data.rows import read_json
from instruct_trl.judges import (
    EndpointJudge,
    Judge,
    PeopleJudge,
    Question,
    ScoreJudge,
    WaitingForPeople,
    compare_models,
    find_questions,
    rate_models,
)
from instruct_trl.judges.endpoint import check_url
from instruct_trl.judges.tally import judged_row
from instruct_trl.judges.wording import CRITERION
from instruct_trl.models.model_files import check_model_path
from instruct_trl.pipeline.arguments import require_at_least, setting
from instruct_trl.pipeline.evaluating import SFT, EvaluateArguments
from instruct_trl.pipeline.functions import load_function, names_a_function
from instruct_trl.pipeline.stage import write_json
from instruct_trl.redaction import looks_like_variable

Result = dict[str, list[Any]]  # "judged", "ratings" and "judge_notes"


@dataclass
class JudgeArguments:
    """Who else judges the answers, beside the labeler."""

    judges: list[str] = setting(
        [], "'reward_model', 'people', 'module:function', or the URL of an OpenAI-compatible server, up to /v1."
    )
    questions: list[str] = setting(
        [], "Ask endpoints and people about every answer: 'likert', 'flags', or single flags."
    )
    judge_prompts: int | None = setting(None, "Judge only this many prompts, from the first on. Default: all.")
    judge_model: str = setting("", "Endpoint: the model's name on the server.")
    judge_key: str = setting("", "Endpoint: the environment variable that holds the API key. Default: send no key.")
    judge_both_orders: bool = setting(True, "Endpoint: ask about each pair twice, with the answers swapped.")
    judge_max_tokens: int = setting(512, "Endpoint: the most tokens per reply.")
    judge_workers: int = setting(4, "Endpoint: requests at a time.")
    judge_price_in: float = setting(0.0, "Endpoint: price of a million prompt tokens.")
    judge_price_out: float = setting(0.0, "Endpoint: price of a million completion tokens.")
    judge_criterion: str = setting("", "Endpoint, people: what makes an answer better. Default: a general sentence.")
    people_file_type: str = setting("csv", "People: 'csv' or 'jsonl'.")

    def __post_init__(self) -> None:
        require_at_least(self, judge_prompts=1, judge_max_tokens=1, judge_workers=1)
        require_at_least(self, judge_price_in=0.0, judge_price_out=0.0)
        # A judge that gives scores answers no questions.
        if find_questions(self.questions) and not any(name == "people" or _is_url(name) for name in self.judges):
            raise ValueError("questions need someone to answer them: name an endpoint or people in judges.")


def _is_url(name: str) -> bool:
    return "://" in name


def check_judges(run: EvaluateArguments, settings: JudgeArguments, folder: Path) -> list[ScoreJudge]:
    """Refuse judges that could not be asked, before any answer is sampled; nothing is written and no one is asked.

    Returns:
        The judges that are the user's functions, to be tried on a stand-in for an answer.
    """
    if "reward_model" in settings.judges:
        check_model_path(run.reward_path)
    made = [make_judge(name, run, settings, folder) for name in settings.judges if name != "reward_model"]
    return [judge for judge in made if isinstance(judge, ScoreJudge)]


def judge_answers(run: EvaluateArguments, settings: JudgeArguments, folder: Path) -> Result:
    """Ask every judge about the answers in `folder`; returns the rows of `judged`, `ratings` and `judge_notes`.

    `folder/judged.json` keeps the results of earlier runs, which are returned as well. A judge that is asked again
    replaces its old result, but its ratings only if questions are asked again. The replies of endpoints are kept in
    `folder/judges`, people's files in `folder/people`. If people have not filled in theirs yet, a note says so.
    """
    questions = find_questions(settings.questions)
    path = folder / "judged.json"
    said: dict[str, Result] = read_json(path) if path.exists() else {}
    for name in settings.judges:
        key = f"{name} {settings.judge_model}" if _is_url(name) else name  # one server may hold several judges
        judge = make_judge(name, run, settings, folder)
        now = _ask(judge, settings.judge_prompts, folder, questions)
        if _is_url(name):  # two servers may hold a model of one name
            for row in now["judged"] + now["ratings"]:
                row["judge"] = f"{judge.name} at {urlsplit(name).netloc}"
        if not questions:
            now["ratings"] = said.get(key, {}).get("ratings", [])
        said[key] = now
        write_json(path, said)
    return {part: [row for of in said.values() for row in of[part]] for part in ("judged", "ratings", "judge_notes")}


def _ask(judge: Judge, count: int | None, folder: Path, questions: list[Question]) -> Result:
    """One judge's rows, about the answers to the first `count` prompts."""
    data = read_json(folder / "answers.json")
    prompts = data["prompts"][:count]
    answers = {name: row["completions"][:count] for name, row in data["models"].items()}
    cut = {name: [not ended for ended in row["ended"][:count]] for name, row in data["models"].items()}
    result: Result = {"judged": [], "ratings": [], "judge_notes": []}
    notes = result["judge_notes"]

    def ask(part: str) -> None:
        if part == "judged":
            result[part] = [judged_row(win) for win in compare_models(judge, prompts, answers, SFT, cut).values()]
        else:
            result[part] = [asdict(row) for row in rate_models(judge, prompts, answers, questions, cut)]

    for part in ["judged"] + ["ratings"] * (bool(questions) and not isinstance(judge, ScoreJudge)):
        try:
            ask(part)
        except WaitingForPeople as waiting:
            print(f"== Judges: {waiting}")
            notes.append(str(waiting))
    if isinstance(judge, EndpointJudge):
        print(f"== {judge.name}: {judge.usage.line()}")
        notes += [f"{judge.name}: {judge.usage.line()}."]
        notes += [f"{judge.name}: {judge.cut_line(judge.cut)}"] if judge.cut else []
    if isinstance(judge, PeopleJudge) and judge.agreement:
        share, pairs = judge.agreement
        notes += [f"{judge.name}: two of them gave the same verdict {100 * share:.0f} % of the time ({pairs:,} pairs)."]
    return result


def make_judge(name: str, run: EvaluateArguments, settings: JudgeArguments, folder: Path) -> Judge:
    """The judge that `JudgeArguments.judges` names."""
    criterion = settings.judge_criterion or CRITERION
    if name == "people":
        return PeopleJudge(folder / "people", file_type=settings.people_file_type, seed=run.seed, criterion=criterion)
    if name == "reward_model":
        from instruct_trl import RewardScorer

        return ScoreJudge(RewardScorer(run.reward_path, batch_size=run.batch_size), "reward model")
    if names_a_function(name):
        return ScoreJudge(load_function(name, "judges"), name.partition(":")[2])
    if not _is_url(name):
        shown = name.rpartition("@")[2]  # a password may stand before an @
        raise ValueError(
            f"There is no judge {shown!r}. Give 'reward_model', 'people', 'module:function', or a URL "
            "such as http://localhost:8000/v1."
        )
    check_url(name)
    if not settings.judge_model:
        raise ValueError(f"The judge at {name} needs a model's name: --judge_model.")
    return EndpointJudge(
        name,
        settings.judge_model,
        criterion=criterion,
        api_key=_api_key(settings.judge_key),
        both_orders=settings.judge_both_orders,
        max_tokens=settings.judge_max_tokens,
        workers=settings.judge_workers,
        price_in=settings.judge_price_in,
        price_out=settings.judge_price_out,
        cache=folder / "judges" / (re.sub(r"[^\w.-]+", "_", settings.judge_model) + ".jsonl"),
    )


def _api_key(variable: str) -> str | None:
    """The key in an environment variable. An error does not show a key that was given instead of a variable's name."""
    if not variable:
        return None
    if key := os.environ.get(variable, "").strip():
        return key
    if looks_like_variable(variable):
        raise ValueError(f"The environment has no variable {variable!r} with the API key; set it first.")
    raise ValueError(
        "judge_key is the name of no environment variable that is set. Give the name of the one that holds the API "
        "key, such as --judge_key OPENAI_API_KEY, and never the key itself."
    )
