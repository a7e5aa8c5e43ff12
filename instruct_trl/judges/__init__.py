"""Judges say which of two answers is better, and rate single answers. `Judge` in base.py shows how to add one."""

from instruct_trl.judges.base import FLAGS, QUESTIONS, Answer, Judge, Pair, Question, Reply, ScoreJudge, find_questions
from instruct_trl.judges.endpoint import EndpointJudge
from instruct_trl.judges.people import PeopleJudge, WaitingForPeople
from instruct_trl.judges.tally import JudgedWinRate, Rating, compare_models, rate_models, win_rate_difference

__all__ = ["FLAGS", "QUESTIONS", "Answer", "Judge", "Pair", "Question", "Reply", "find_questions"]
__all__ += ["EndpointJudge", "PeopleJudge", "WaitingForPeople", "ScoreJudge"]
__all__ += ["JudgedWinRate", "Rating", "compare_models", "rate_models", "win_rate_difference"]
