"""Further judges of an evaluation's answers, asked after sampling: they may be changed, added or waited for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from instruct_trl.data.checks import read_json
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
from instruct_trl.judges.chat import check_url
from instruct_trl.judges.tally import judged_row, rating_row
from instruct_trl.pipeline.arguments import require_at_least
from instruct_trl.pipeline.functions import load_function, names_a_function
from instruct_trl.pipeline.stage import write_json
from instruct_trl.redaction import looks_like_variable

RESULT = "judged.json"


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
        metadata={"help": "Put to endpoints and people about every answer: 'likert', 'flags', or single flags."},
    )
    judge_prompts: int | None = field(
        default=None, metadata={"help": "Judge the first so many prompts only. Default: all."}
    )
    judge_model: str = field(default="", metadata={"help": "Endpoint: the model's name there."})
    judge_key: str = field(
        default="",
        metadata={"help": "Endpoint: the environment variable that holds the API key; none is sent without."},
    )
    judge_both_orders: bool = field(
        default=True, metadata={"help": "Endpoint: ask about each pair twice, its answers exchanged."}
    )
    judge_max_tokens: int = field(default=512, metadata={"help": "Endpoint: longest reply."})
    judge_workers: int = field(default=4, metadata={"help": "Endpoint: requests under way at a time."})
    judge_price_in: float = field(default=0.0, metadata={"help": "Endpoint: price of a million prompt tokens."})
    judge_price_out: float = field(default=0.0, metadata={"help": "Endpoint: price of a million completion tokens."})
    judge_criterion: str = field(
        default="", metadata={"help": "Endpoint, people: what makes an answer better. Default: a general sentence."}
    )
    people_file_type: str = field(default="csv", metadata={"help": "People: 'csv' or 'jsonl'."})

    def __post_init__(self) -> None:
        require_at_least(self, judge_prompts=1, judge_max_tokens=1, judge_workers=1)
        require_at_least(self, judge_price_in=0.0, judge_price_out=0.0)
        if find_questions(self.questions) and not any(_may_be_asked(name) for name in self.judges):
            raise ValueError("questions need someone to answer them: name an endpoint or people in judges.")


def _is_url(name: str) -> bool:
    return "://" in name


def _may_be_asked(name: str) -> bool:
    """Whether this judge answers questions; one that gives scores does not."""
    return name == "people" or _is_url(name)


def check_judges(run: Any, settings: JudgeArguments, folder: Path) -> list[ScoreJudge]:
    """Refuse judges that could not be asked, before any answer is sampled; nothing is written and no one is asked.

    Returns:
        The judges that are functions of the user's, to be tried on a stand-in for an answer.

    Raises:
        ValueError: whatever `make_judge` finds, or a reward model that is not there.
    """
    from instruct_trl.models.model_files import check_model_path

    if "reward_model" in settings.judges:
        check_model_path(run.reward_model_path or str(run.run / "reward_model"))
    made = [make_judge(name, run, settings, folder) for name in settings.judges if name != "reward_model"]
    return [judge for judge in made if isinstance(judge, ScoreJudge)]


def judge_answers(run: Any, settings: JudgeArguments, folder: Path) -> dict[str, Any]:
    """Ask every judge about the answers in `folder`; returns `judged`, `ratings` and `judge_notes`.

    What judges said in earlier runs is in `folder/judged.json` and is returned with the rest; asked again, a judge's
    old result is replaced, its ratings only where questions are put to it again. Replies of an endpoint are kept in
    `folder/judges`, people's files are in `folder/people`. Where people have not filled in theirs yet, a note says so
    and the rest goes on.

    Raises:
        ValueError: a judge or question that is none, an endpoint without a model's name or key, a file that cannot be
            read.
        RuntimeError: an endpoint that failed for good.
    """
    questions = find_questions(settings.questions)
    path = folder / RESULT
    said: dict[str, Any] = read_json(path) if path.exists() else {}
    for name in settings.judges:
        key = f"{name} {settings.judge_model}" if _is_url(name) else name  # one server may hold several judges
        now = _ask(name, run, settings, folder, questions)
        if not questions:
            now["ratings"] = said.get(key, {}).get("ratings", [])
        said[key] = now
        write_json(path, said)
    return {part: [row for of in said.values() for row in of[part]] for part in ("judged", "ratings", "judge_notes")}


def _ask(name: str, run: Any, settings: JudgeArguments, folder: Path, questions: list[Question]) -> dict[str, Any]:
    """One judge's `judged`, `ratings` and `judge_notes`."""
    from instruct_trl.pipeline.evaluating import SFT

    data = read_json(folder / "answers.json")
    prompts = data["prompts"][: settings.judge_prompts]
    models = data["models"].items()
    answers = {name: row["completions"][: settings.judge_prompts] for name, row in models}
    cut = {name: [not ended for ended in row["ended"][: settings.judge_prompts]] for name, row in models}
    judge, rated = make_judge(name, run, settings, folder), None
    notes: list[str] = []
    wins = _unless_waiting(partial(compare_models, judge, prompts, answers, SFT, cut), notes)
    if questions and not isinstance(judge, ScoreJudge):
        rated = _unless_waiting(partial(rate_models, judge, prompts, answers, questions, cut), notes)
    # Two servers may hold a model of one name.
    shown = {"judge": f"{judge.name} at {urlsplit(name).netloc}"} if isinstance(judge, EndpointJudge) else {}
    return {
        "judged": [judged_row(win) | shown for win in (wins or {}).values()],
        "ratings": [rating_row(rating) | shown for rating in rated or []],
        "judge_notes": notes + _notes(judge),
    }


def _unless_waiting(ask: Callable[[], Any], notes: list[str]) -> Any:
    """What `ask` returns, or None and a note where people have not filled in their file yet."""
    try:
        return ask()
    except WaitingForPeople as waiting:
        print(f"== Judges: {waiting}")
        notes.append(str(waiting))
        return None


def make_judge(name: str, run: Any, settings: JudgeArguments, folder: Path) -> Judge:
    """The judge of that name; see `JudgeArguments.judges`.

    Raises:
        ValueError: there is no such judge; an endpoint without a model's name, with a key that is not set, or with a
            URL that cannot be used; a function that cannot be imported.
    """
    from instruct_trl.judges.wording import CRITERION

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
    if settings.judge_key and not os.environ.get(settings.judge_key, "").strip():
        raise ValueError(_no_key(settings.judge_key))
    return EndpointJudge(
        url,
        settings.judge_model,
        criterion=criterion,
        api_key=os.environ[settings.judge_key] if settings.judge_key else None,
        both_orders=settings.judge_both_orders,
        max_tokens=settings.judge_max_tokens,
        workers=settings.judge_workers,
        price_in=settings.judge_price_in,
        price_out=settings.judge_price_out,
        cache=folder / "judges" / (re.sub(r"[^\w.-]+", "_", settings.judge_model) + ".jsonl"),
    )


def _no_key(variable: str) -> str:
    """The error for a variable that is not set. A key that was given in place of a variable's name is not shown."""
    if not looks_like_variable(variable):
        return (
            "judge_key is the name of no environment variable that is set. Give the name of the one that holds the API "
            "key, such as --judge_key OPENAI_API_KEY, and never the key itself."
        )
    return f"The environment has no variable {variable!r} with the API key; set it first."


def _notes(judge: Judge) -> list[str]:
    if isinstance(judge, EndpointJudge):
        print(f"== {judge.name}: {judge.usage.line()}")
        cut = [f"{judge.name}: {judge.cut_line(judge.cut)}"] if judge.cut else []
        return [f"{judge.name}: {judge.usage.line()}.", *cut]
    if isinstance(judge, PeopleJudge) and judge.agreement:
        share, count = judge.agreement
        return [f"{judge.name}: two of them gave the same verdict {100 * share:.0f} % of the time ({count:,} pairs)."]
    return []
