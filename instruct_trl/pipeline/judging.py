"""More judges of an evaluation's answers, asked after sampling: they can be changed, added or waited for."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol
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
from instruct_trl.pipeline.arguments import require_at_least
from instruct_trl.pipeline.functions import load_function, names_a_function
from instruct_trl.pipeline.stage import write_json
from instruct_trl.redaction import looks_like_variable

RESULT = "judged.json"

Result = dict[str, list[Any]]  # "judged", "ratings" and "judge_notes"


@dataclass
class JudgeArguments:
    """Who else judges the answers, beside the labeler."""

    judges: list[str] = field(
        default_factory=list,
        metadata={
            "help": "'reward_model', 'people', 'module:function', or the URL of an OpenAI-compatible server, up to /v1."
        },
    )
    questions: list[str] = field(
        default_factory=list,
        metadata={"help": "Ask endpoints and people about every answer: 'likert', 'flags', or single flags."},
    )
    judge_prompts: int | None = field(
        default=None, metadata={"help": "Judge only this many prompts, from the first on. Default: all."}
    )
    judge_model: str = field(default="", metadata={"help": "Endpoint: the model's name on the server."})
    judge_key: str = field(
        default="",
        metadata={"help": "Endpoint: the environment variable that holds the API key. Default: send no key."},
    )
    judge_both_orders: bool = field(
        default=True, metadata={"help": "Endpoint: ask about each pair twice, with the answers swapped."}
    )
    judge_max_tokens: int = field(default=512, metadata={"help": "Endpoint: the most tokens per reply."})
    judge_workers: int = field(default=4, metadata={"help": "Endpoint: requests at a time."})
    judge_price_in: float = field(default=0.0, metadata={"help": "Endpoint: price of a million prompt tokens."})
    judge_price_out: float = field(default=0.0, metadata={"help": "Endpoint: price of a million completion tokens."})
    judge_criterion: str = field(
        default="", metadata={"help": "Endpoint, people: what makes an answer better. Default: a general sentence."}
    )
    people_file_type: str = field(default="csv", metadata={"help": "People: 'csv' or 'jsonl'."})

    def __post_init__(self) -> None:
        require_at_least(self, judge_prompts=1, judge_max_tokens=1, judge_workers=1)
        require_at_least(self, judge_price_in=0.0, judge_price_out=0.0)
        # A judge that gives scores answers no questions.
        if find_questions(self.questions) and not any(name == "people" or _is_url(name) for name in self.judges):
            raise ValueError("questions need someone to answer them: name an endpoint or people in judges.")


class JudgedRun(Protocol):
    """The settings of a run that judges need; `run` is its folder."""

    seed: int
    batch_size: int
    reward_model_path: str | None

    @property
    def run(self) -> Path: ...


def _is_url(name: str) -> bool:
    return "://" in name


def check_judges(run: JudgedRun, settings: JudgeArguments, folder: Path) -> list[ScoreJudge]:
    """Refuse judges that could not be asked, before any answer is sampled; nothing is written and no one is asked.

    Returns:
        The judges that are the user's functions, to be tried on a stand-in for an answer.

    Raises:
        ImportError: an endpoint without the `openai` package.
        ValueError: whatever `make_judge` finds, or a reward model that is not there.
    """
    from instruct_trl.models.model_files import check_model_path

    if "reward_model" in settings.judges:
        check_model_path(run.reward_model_path or str(run.run / "reward_model"))
    made = [make_judge(name, run, settings, folder) for name in settings.judges if name != "reward_model"]
    return [judge for judge in made if isinstance(judge, ScoreJudge)]


def judge_answers(run: JudgedRun, settings: JudgeArguments, folder: Path, baseline: str = "SFT") -> Result:
    """Ask every judge about the answers in `folder`; returns the rows of `judged`, `ratings` and `judge_notes`.

    `folder/judged.json` keeps what judges said in earlier runs, which is returned as well. A judge that is asked again
    replaces its old result, but its ratings only if questions are asked again. The replies of endpoints are kept in
    `folder/judges`, people's files in `folder/people`. If people have not filled in theirs yet, a note says so.

    Raises:
        ValueError: no such judge or question, an endpoint without a model's name or key, a file that cannot be read.
        RuntimeError: an endpoint failed for good.
    """
    questions = find_questions(settings.questions)
    path = folder / RESULT
    said: dict[str, Result] = read_json(path) if path.exists() else {}
    for name in settings.judges:
        key = f"{name} {settings.judge_model}" if _is_url(name) else name  # one server may hold several judges
        judge = make_judge(name, run, settings, folder)
        now = _ask(judge, settings.judge_prompts, folder, baseline, questions)
        if _is_url(name):  # two servers may hold a model of one name
            for row in now["judged"] + now["ratings"]:
                row["judge"] = f"{judge.name} at {urlsplit(name).netloc}"
        if not questions:
            now["ratings"] = said.get(key, {}).get("ratings", [])
        said[key] = now
        write_json(path, said)
    return {part: [row for of in said.values() for row in of[part]] for part in ("judged", "ratings", "judge_notes")}


def _ask(judge: Judge, count: int | None, folder: Path, baseline: str, questions: list[Question]) -> Result:
    """One judge's rows, about the answers to the first `count` prompts."""
    data = read_json(folder / "answers.json")
    prompts = data["prompts"][:count]
    answers = {name: row["completions"][:count] for name, row in data["models"].items()}
    cut = {name: [not ended for ended in row["ended"][:count]] for name, row in data["models"].items()}
    result: Result = {"judged": [], "ratings": [], "judge_notes": []}

    def compare() -> None:
        wins = compare_models(judge, prompts, answers, baseline, cut)
        result["judged"] = [judged_row(win) for win in wins.values()]

    def rate() -> None:
        result["ratings"] = [asdict(row) for row in rate_models(judge, prompts, answers, questions, cut)]

    for ask in [compare] + [rate] * (bool(questions) and not isinstance(judge, ScoreJudge)):
        try:
            ask()
        except WaitingForPeople as waiting:
            print(f"== Judges: {waiting}")
            result["judge_notes"].append(str(waiting))
    result["judge_notes"] += _notes(judge)
    return result


def _notes(judge: Judge) -> list[str]:
    if isinstance(judge, EndpointJudge):
        print(f"== {judge.name}: {judge.usage.line()}")
        cut = [f"{judge.name}: {judge.cut_line(judge.cut)}"] if judge.cut else []
        return [f"{judge.name}: {judge.usage.line()}.", *cut]
    if isinstance(judge, PeopleJudge) and judge.agreement:
        share, count = judge.agreement
        return [f"{judge.name}: two of them gave the same verdict {100 * share:.0f} % of the time ({count:,} pairs)."]
    return []


def make_judge(name: str, run: JudgedRun, settings: JudgeArguments, folder: Path) -> Judge:
    """The judge that `JudgeArguments.judges` names.

    Raises:
        ValueError: no such judge; an endpoint without a model's name, with a key that is not set, or with a URL that
            cannot be used; a function that cannot be imported.
    """
    criterion = settings.judge_criterion or CRITERION
    if name == "people":
        return PeopleJudge(folder / "people", file_type=settings.people_file_type, seed=run.seed, criterion=criterion)
    if name == "reward_model":
        from instruct_trl import RewardScorer

        return ScoreJudge(
            RewardScorer(run.reward_model_path or str(run.run / "reward_model"), batch_size=run.batch_size),
            "reward model",
        )
    if _is_url(name):
        return _endpoint(name, criterion, settings, folder)
    if names_a_function(name):
        return ScoreJudge(load_function(name, "judges"), name.partition(":")[2])
    shown = name.rpartition("@")[2]  # what stands before an @ may be a password
    raise ValueError(
        f"There is no judge {shown!r}. Give 'reward_model', 'people', 'module:function', or a URL such as "
        "http://localhost:8000/v1."
    )


def _endpoint(url: str, criterion: str, settings: JudgeArguments, folder: Path) -> EndpointJudge:
    check_url(url)
    if not settings.judge_model:
        raise ValueError(f"The judge at {url} needs a model's name: --judge_model.")
    key = os.environ.get(settings.judge_key, "").strip() if settings.judge_key else None
    if key == "":
        raise ValueError(_no_key(settings.judge_key))
    return EndpointJudge(
        url,
        settings.judge_model,
        criterion=criterion,
        api_key=key,
        both_orders=settings.judge_both_orders,
        max_tokens=settings.judge_max_tokens,
        workers=settings.judge_workers,
        price_in=settings.judge_price_in,
        price_out=settings.judge_price_out,
        cache=folder / "judges" / (re.sub(r"[^\w.-]+", "_", settings.judge_model) + ".jsonl"),
    )


def _no_key(variable: str) -> str:
    """The error for a variable that is not set. It does not show a key that was given instead of a variable's name."""
    if not looks_like_variable(variable):
        return (
            "judge_key is the name of no environment variable that is set. Give the name of the one that holds the API "
            "key, such as --judge_key OPENAI_API_KEY, and never the key itself."
        )
    return f"The environment has no variable {variable!r} with the API key; set it first."
