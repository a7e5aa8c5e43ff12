"""A chat model behind an OpenAI-compatible endpoint as a judge, on the web or on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instruct_trl.judges import wording
from instruct_trl.judges.base import Answer, Pair, Question, Reply, as_text, digest
from instruct_trl.judges.chat import ChatEndpoint, Usage


class EndpointJudge:
    """Asks a chat model which answer is better, each pair in both orders, since models favour a position.

    A pair is won only where both orders name the same answer; where they differ it is a tie, as in Zheng et al. 2023
    (section 3.4), and counted as `flipped` where they name opposite winners. A pair with an order that has no verdict
    is invalid. Equal answers are a tie and are not asked about. Questions about an answer go in one request.

    Args:
        base_url, model: the server (up to /v1) and the model's name there; see `ChatEndpoint`.
        criterion: what makes an answer better, in a sentence or two.
        both_orders: False asks once, the model's answer first or second by a hash of the pair: half the cost, and
            the preference for a position averages out over many prompts instead of within each.
        temperature, max_tokens: of the judge's replies.
        cache: a file for the replies: a run that broke goes on, a second run costs nothing.
        kwargs: `api_key`, `workers`, `attempts`, `timeout`, `price_in`, `price_out` of `ChatEndpoint`, and `options`,
            further fields of the request.

    Attributes:
        cut: replies that were cut at `max_tokens`, or inside a reasoning model's thoughts; each is invalid.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        criterion: str = wording.CRITERION,
        both_orders: bool = True,
        temperature: float = 0.0,
        max_tokens: int = 512,
        cache: str | Path | None = None,
        **kwargs: Any,
    ):
        options = {"temperature": temperature, "max_tokens": max_tokens, **(kwargs.pop("options", None) or {})}
        self.endpoint = ChatEndpoint(base_url, model, cache=cache, options=options, **kwargs)
        self.criterion, self.both_orders = criterion, both_orders
        self.cut = 0

    @property
    def name(self) -> str:
        return self.endpoint.model

    @property
    def usage(self) -> Usage:
        """Requests, tokens and cost so far."""
        return self.endpoint.usage

    def compare(self, pairs: Sequence[Pair]) -> list[Reply]:
        asked = [pair for pair in pairs if not pair.same]
        orders = [order for pair in asked for order in self._orders(pair)]
        chats = [self._chat(pair, first) for pair, first in orders]
        said = iter(zip(orders, self._ask(chats, f"comparing by {self.name}"), strict=True))
        replies = []
        for pair in pairs:
            texts = [] if pair.same else [next(said) for _ in self._orders(pair)]
            replies.append(_combine([(first, text) for (_, first), text in texts]))
        return replies

    def _ask(self, chats: Sequence[wording.Messages], desc: str) -> list[str | None]:
        """The conclusion of each reply; None for one that was cut, which has no verdict whatever stands in it."""
        texts = self.endpoint.ask(chats, desc=desc)
        whole = [None if self.endpoint.was_cut(chat) else text for chat, text in zip(chats, texts, strict=True)]
        said = [None if text is None else wording.conclusion(text) for text in whole]
        if cut := said.count(None):
            self.cut += cut
            print(f"== {self.name}: {self.cut_line(cut)}")
        return said

    def cut_line(self, cut: int) -> str:
        """A line for a log or a report about so many replies that were cut."""
        return (
            f"{cut:,} replies were cut at max_tokens={self.endpoint.options['max_tokens']} before they ended and count "
            "as invalid. Give a judge that reasons more: --judge_max_tokens."
        )

    def _orders(self, pair: Pair) -> list[tuple[Pair, bool]]:
        """(pair, whether the model's answer comes first), for each time that the pair is asked about."""
        if self.both_orders:
            return [(pair, True), (pair, False)]
        name = digest(as_text(pair.answer.prompt), *sorted([pair.answer.text, pair.baseline.text]))
        lower = pair.answer.text < pair.baseline.text
        return [(pair, lower == (int(name, 16) % 2 == 0))]

    def _chat(self, pair: Pair, first: bool) -> wording.Messages:
        texts = [pair.answer.text, pair.baseline.text]
        a, b = texts if first else reversed(texts)
        return wording.comparison(as_text(pair.answer.prompt), a, b, self.criterion)

    def rate(self, answers: Sequence[Answer], questions: Sequence[Question]) -> list[dict[str, Reply]]:
        chats = [wording.rating(answer, questions) for answer in answers]
        return [
            {question.name: Reply(None, wording.CUT) for question in questions}
            if text is None
            else wording.read_rating(text, questions)
            for text in self._ask(chats, f"rating by {self.name}")
        ]


def _combine(orders: list[tuple[bool, str | None]]) -> Reply:
    """One reply from the verdicts of one pair; none asked means equal answers."""
    values = []
    for first, text in orders:
        if text is None:
            return Reply(None, wording.CUT)
        verdict = wording.read_comparison(text)
        if verdict is None:
            return Reply(None, text.strip()[-200:] or "an empty reply")
        values.append(verdict if first else 1 - verdict)
    if len(set(values)) == 1:
        return Reply(values[0])
    return Reply(0.5, flipped=set(values) == {0.0, 1.0})
