"""Judges: who says which of two answers is better, and what an answer is like."""

from instruct_trl.judges.base import FLAGS, QUESTIONS, Answer, Judge, Pair, Question, Reply, find_questions
from instruct_trl.judges.endpoint import EndpointJudge
from instruct_trl.judges.people import PeopleJudge, WaitingForPeople
from instruct_trl.judges.scores import ScoreJudge
from instruct_trl.judges.tally import (
    JudgedWinRate,
    Rating,
    compare_models,
    rate_models,
    win_rate_difference,
)

__all__ = [
    "FLAGS",
    "QUESTIONS",
    "Answer",
    "EndpointJudge",
    "Judge",
    "JudgedWinRate",
    "Pair",
    "PeopleJudge",
    "Question",
    "Rating",
    "Reply",
    "ScoreJudge",
    "WaitingForPeople",
    "compare_models",
    "find_questions",
    "rate_models",
    "win_rate_difference",
]
