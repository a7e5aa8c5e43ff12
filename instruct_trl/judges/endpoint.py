"""A chat model behind an OpenAI-compatible server as a judge, on the web or on this machine.

The `openai` client sends the requests: it waits, tries again and gives up. It also reads keys and headers from the
environment, and would send them to whatever server it is given. `EndpointJudge` sends only what its caller names.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from tqdm.auto import tqdm

from instruct_trl.judges import wording
from instruct_trl.judges.base import Answer, Pair, Question, Reply, as_text, digest

_LOCAL = ("localhost", "127.0.0.1", "::1")
# What the client may send beside the body; the last two it reads itself. Everything else came from the environment.
_SENT = {
    *("host", "content-type", "content-length", "accept", "accept-encoding", "connection", "user-agent"),
    *("x-stainless-raw-response", "x-stainless-retry-count"),
}
_SHORTEST_SECRET = 6  # characters; a shorter key is a placeholder such as "x", which any reply may contain
_CUT = {"length", "max_tokens", "model_length"}  # finish reasons of a reply that reached its longest length
_EXPECTED = (
    "An OpenAI-compatible chat API replies in JSON with choices[0].message.content. Check that the URL is that of such "
    "a server (it usually ends in /v1)"
)
_REMEDIES = {
    400: "The server does not take this request; look at its message and at the model's name.",
    401: "Set the API key.",
    403: "The API key may not use this model.",
    404: "Check the URL (it usually ends in /v1) and the model's name.",
    429: "Send fewer requests at a time, --judge_workers, or wait.",
}


@dataclass
class Usage:
    """The requests so far and their cost.

    Attributes:
        price_in, price_out: of a million prompt tokens and a million completion tokens, in your currency.
        requests, cached: replies from the server, and from the cache.
        retries: requests that failed and were sent again.
        prompt_tokens, completion_tokens: of `requests`, by the server's own count.
        uncounted: replies without a token count; their cost is not in `cost`.
        cost, saved: the cost of `requests`, and what `cached` cost when they were made.
    """

    price_in: float = 0.0
    price_out: float = 0.0
    requests: int = 0
    cached: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    cost: float = 0.0
    saved: float = 0.0

    def line(self) -> str:
        """One line for a log or a report."""
        text = (
            f"{self.requests:,} requests now ({self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion "
            f"tokens), {self.cached:,} from the cache, {self.retries:,} retries"
        )
        if self.price_in or self.price_out:
            text += f"; cost {self.cost:.4f} now, {self.saved:.4f} earlier"
        return text + (f"; {self.uncounted:,} replies without a token count" if self.uncounted else "")

    def add(self, entry: dict[str, Any], cached: bool) -> None:
        """Count one reply."""
        prompt, completion = (entry.get(name) or 0 for name in ("prompt_tokens", "completion_tokens"))
        cost = (prompt * self.price_in + completion * self.price_out) / 1e6
        self.uncounted += entry.get("prompt_tokens") is None
        if cached:
            self.cached, self.saved = self.cached + 1, self.saved + cost
            return
        self.requests, self.cost = self.requests + 1, self.cost + cost
        self.prompt_tokens, self.completion_tokens = self.prompt_tokens + prompt, self.completion_tokens + completion


class ReplyCache:
    """Replies by key in a JSON-lines file (None: in memory). Each is written as it comes: a broken run loses none."""

    def __init__(self, path: str | Path | None):
        self.path = None if path is None else Path(path)
        self.replies: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        text = self.path.read_text(encoding="utf-8") if self.path and self.path.exists() else ""
        self._mend = text != "" and not text.endswith("\n")  # the last run was killed while it wrote
        for line in text.split("\n"):  # splitlines would also cut at U+2028, which a reply may hold
            with suppress(json.JSONDecodeError, KeyError, TypeError):  # half a line; the reply is asked for again
                entry = json.loads(line)
                if isinstance(entry["content"], str):
                    self.replies[entry["key"]] = entry

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Keep a reply; it is on disk before this returns."""
        with self._lock:
            self.replies[key] = {"key": key, **entry}
            if self.path is None:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("\n" if self._mend else "") + json.dumps(self.replies[key]) + "\n")
            self._mend = False


def check_url(url: str) -> SplitResult:
    """The parts of a server's URL. The error shows no secret.

    Raises:
        ValueError: not an http(s) URL up to /v1, or one that holds a user, a password or a query.
    """
    key = "put a key into an environment variable, and name that: --judge_key VARIABLE."
    if "@" in url:
        raise ValueError(
            "The judge's URL holds a user or a password (something before an @), which reports and logs would show. "
            f"Give the URL without it; {key}"
        )
    if "?" in url or "#" in url:
        shown = url.split("?")[0].split("#")[0]
        raise ValueError(f"The judge's URL {shown!r} is followed by a query (? or #). Give it up to /v1; {key}")
    with suppress(ValueError):  # a port that is no number, or half an IPv6 address
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    raise ValueError(f"base_url is {url!r}; give a URL such as http://localhost:8000/v1.")


class EndpointJudge:
    """Asks a chat model which answer is better, in both orders, since models favour a position.

    A pair is won only if both orders name the same answer (Zheng et al. 2023, section 3.4). If they differ it is a
    tie, and it is counted as `flipped` if they name opposite winners. A pair with an order that has no verdict is
    invalid. Equal answers are a tie and are not asked about. All questions about an answer go in one request.

    Args:
        base_url: the server, up to and including /v1, such as http://localhost:8000/v1.
        model: the model's name on that server.
        criterion: what makes an answer better, in a sentence or two.
        both_orders: False asks once, and a hash of the pair decides which answer comes first. That halves the cost;
            the preference for a position then averages out over many prompts instead of within each.
        temperature, max_tokens: of the judge's replies.
        options: more fields of the request (`seed`, ...).
        api_key: sent as a bearer token to this URL alone; None sends none.
        cache: a file for the replies: a broken run goes on from it, and a second run costs nothing.
        workers: requests at a time.
        attempts: how often a request is sent before the run gives up.
        timeout: seconds to wait for a reply.
        price_in, price_out: see `Usage`.

    Attributes:
        cut: replies that were cut at `max_tokens`, or inside a reasoning model's thoughts; each is invalid.

    Raises:
        ImportError: the `openai` package is missing.
        ValueError: not an http(s) URL, counts below 1, or a key that no header can carry.
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
        options: dict[str, Any] | None = None,
        api_key: str | None = None,
        cache: str | Path | None = None,
        workers: int = 4,
        attempts: int = 8,
        timeout: float = 120.0,
        price_in: float = 0.0,
        price_out: float = 0.0,
    ):
        host = check_url(base_url).hostname
        if workers < 1 or attempts < 1 or timeout <= 0:
            raise ValueError(f"workers, attempts and timeout must be above 0, got {workers}, {attempts}, {timeout}.")
        self._key = (api_key or "").strip()  # files and secrets end in a newline
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError("The API key holds characters that no header can carry, such as a line break inside it.")
        self.name, self.base_url, self._url = model, base_url.rstrip("/"), f"{base_url.rstrip('/')}/chat/completions"
        self.criterion, self.both_orders, self.workers, self.cut = criterion, both_orders, workers, 0
        self.options = {"temperature": temperature, "max_tokens": max_tokens, **(options or {})}
        self.usage, self.cache, self._lock = Usage(price_in, price_out), ReplyCache(cache), threading.Lock()
        try:
            import openai
        except ImportError as error:
            raise ImportError("A chat judge needs the openai package: pip install 'instruct-trl[judge]'.") from error
        # A redirect would carry the key to another host; a proxy cannot reach a server on this machine.
        http = openai.DefaultHttpxClient(
            follow_redirects=False,
            trust_env=host not in _LOCAL,
            event_hooks={"request": [self._send_only_ours], "response": [self._refuse_broken]},
        )
        self._client = openai.OpenAI(
            base_url=self.base_url,
            api_key=self._key or "none",  # without one, the client would look for a key in the environment
            max_retries=attempts - 1,
            timeout=timeout,
            http_client=http,
        )

    def compare(self, pairs: Sequence[Pair]) -> list[Reply]:
        """Ask about each pair, in one order or both."""
        asked = [(place, first) for place, pair in enumerate(pairs) for first in self._orders(pair)]
        chats = []
        for place, first in asked:
            texts = [pairs[place].answer.text, pairs[place].baseline.text]
            a, b = texts if first else reversed(texts)
            chats.append(wording.comparison(as_text(pairs[place].answer.prompt), a, b, self.criterion))
        verdicts: list[list[tuple[bool, str | None]]] = [[] for _ in pairs]
        for (place, first), said in zip(asked, self._conclusions(chats, f"comparing by {self.name}"), strict=True):
            verdicts[place].append((first, said))
        return [_combine(orders) for orders in verdicts]

    def rate(self, answers: Sequence[Answer], questions: Sequence[Question]) -> list[dict[str, Reply]]:
        """Ask about each answer, all questions at once."""
        said = self._conclusions([wording.rating(answer, questions) for answer in answers], f"rating by {self.name}")
        cut = {question.name: Reply(None, wording.CUT) for question in questions}
        return [dict(cut) if text is None else wording.read_rating(text, questions) for text in said]

    def ask(self, chats: Sequence[wording.Messages], desc: str = "judging") -> list[str]:
        """The text of the reply to each chat; "" without text. Equal chats are sent once.

        Raises:
            RuntimeError: a request failed for good. The replies that came before are in the cache.
        """
        keys = [self._name(chat) for chat in chats]
        missing = {key: chat for key, chat in zip(keys, chats, strict=True) if key not in self.cache.replies}
        for key in set(keys) - set(missing):
            self.usage.add(self.cache.replies[key], cached=True)
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(self._fetch, key, chat) for key, chat in missing.items()]
            try:
                for future in tqdm(futures, desc=desc, disable=None if futures else True):
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # nothing more is paid for after the first failure
                raise
        return [self.cache.replies[key]["content"] for key in keys]

    def cut_line(self, cut: int) -> str:
        """A line for a log or a report about this many cut replies."""
        return (
            f"{cut:,} replies were cut at max_tokens={self.options['max_tokens']} before they ended and count as "
            "invalid. Give a judge that reasons more: --judge_max_tokens."
        )

    def _orders(self, pair: Pair) -> list[bool]:
        """Whether the model's answer comes first, for each time that the pair is asked about."""
        if pair.same:
            return []
        if self.both_orders:
            return [True, False]
        # A hash of both texts, whichever is the model's: swapped models get the same requests.
        texts = [pair.answer.text, pair.baseline.text]
        even = int(digest(as_text(pair.answer.prompt), *sorted(texts)), 16) % 2 == 0
        return [(texts[0] < texts[1]) == even]

    def _conclusions(self, chats: Sequence[wording.Messages], desc: str) -> list[str | None]:
        """The conclusion of each reply. A reply that was cut is None: it has no verdict, whatever stands in it."""
        said: list[str | None] = []
        for chat, text in zip(chats, self.ask(chats, desc=desc), strict=True):
            finish = self.cache.replies.get(self._name(chat), {}).get("finish_reason")
            said.append(None if str(finish).casefold() in _CUT else wording.conclusion(text))
        if cut := said.count(None):
            self.cut += cut
            print(f"== {self.name}: {self.cut_line(cut)}")
        return said

    # One request ------------------------------------------------------------------------------------------------------

    def _name(self, chat: wording.Messages) -> str:
        """The key of a chat in the cache: another server, model, wording or option asks anew."""
        return digest(self.base_url, json.dumps({"model": self.name, "messages": chat, **self.options}, sort_keys=True))

    def _fetch(self, key: str, chat: wording.Messages) -> None:
        # Half a surrogate pair, which a prompt may hold and UTF-8 has not, becomes "?".
        messages = [{role: text.encode("utf-8", "replace").decode() for role, text in m.items()} for m in chat]
        entry = {"model": self.name, **self._read(self._post(messages))}
        self.cache.add(key, entry)
        with self._lock:
            self.usage.add(entry, cached=False)

    def _post(self, messages: Any) -> bytes:
        """The body of the server's reply."""
        import openai

        create = self._client.chat.completions.with_raw_response.create
        try:
            return create(model=self.name, messages=messages, extra_body=self.options).content
        except openai.APIStatusError as error:
            status, said = error.status_code, self._hidden(error.response.content or error.response.reason_phrase)
            remedy = _REMEDIES.get(status, "Check the URL: redirects are not followed." if status < 400 else "")
            problem, failed = f"HTTP {status}: {said[:500]}. {remedy}".strip(), error.request
            if status < 500 and status not in (408, 409, 429):
                raise RuntimeError(f"{self._url} refused with {problem}") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            problem, failed = f"{type(cause).__name__}: {cause}.", error.request
        raise RuntimeError(
            f"{self._url} gave no answer to {1 + int(failed.headers.get('x-stainless-retry-count', 0))} requests. The "
            f"last one ended with {problem} Earlier replies are kept: start the server or wait, then run this again."
        )

    def _send_only_ours(self, request: Any) -> None:
        """Before a request leaves: drop every header that the caller has not asked for, and set the key or none."""
        for name in set(request.headers) - _SENT:
            del request.headers[name]
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        with self._lock:
            self.usage.retries += request.headers.get("x-stainless-retry-count", "0") != "0"

    def _refuse_broken(self, response: Any) -> None:
        """A reply that is not JSON was perhaps cut on its way: the client tries again. A web page would come again."""
        import httpx2

        body = response.read()
        if response.is_success and not body.lstrip().startswith(b"<"):
            try:
                json.loads(body)
            except ValueError:
                start = self._hidden(body)[:200]
                raise httpx2.DecodingError(f"a reply that is not valid JSON ({start!r}). {_EXPECTED}") from None

    def _hidden(self, said: bytes | str) -> str:
        """A server's words without the API key, which it may send back; they go into the cache and into errors."""
        text = said if isinstance(said, str) else said.decode("utf-8-sig", "replace").strip()
        return text.replace(self._key, "[API key]") if len(self._key) >= _SHORTEST_SECRET else text

    def _read(self, body: bytes) -> dict[str, Any]:
        """`content` ("" if there is none), `finish_reason`, and token counts (None if the server gives none)."""
        text = self._hidden(body)
        if text.startswith("<"):
            raise RuntimeError(f"{self._url} replied with a web page: {text[:200]!r}. {_EXPECTED}.")
        raw = json.loads(text)
        try:
            content, finish = raw["choices"][0]["message"].get("content"), raw["choices"][0].get("finish_reason")
            counts = raw["usage"] if isinstance(raw.get("usage"), dict) else {}
        except (KeyError, IndexError, TypeError, AttributeError):
            content, finish, counts = False, None, {}
        if not isinstance(content, str | None):
            raise RuntimeError(f"{self._url} replied, but not as the chat API does: {text[:200]}. {_EXPECTED}.")
        found = {name: counts.get(name) for name in ("prompt_tokens", "completion_tokens")}
        tokens = {name: count if isinstance(count, int) else None for name, count in found.items()}
        return {"content": content or "", "finish_reason": finish, **tokens}


def _combine(orders: list[tuple[bool, str | None]]) -> Reply:
    """One reply from the verdicts on one pair: (whether the model's answer came first, the conclusion)."""
    values = set()
    for first, text in orders:
        if text is None:
            return Reply(None, wording.CUT)
        verdict = wording.read_comparison(text)
        if verdict is None:
            return Reply(None, text.strip()[-200:] or "an empty reply")
        values.add(verdict if first else 1 - verdict)
    return Reply(values.pop()) if len(values) == 1 else Reply(0.5, flipped=values == {0.0, 1.0})
