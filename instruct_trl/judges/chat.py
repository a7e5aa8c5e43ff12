"""An OpenAI-compatible chat endpoint: retries with back-off, answers kept on disk, tokens and money counted.

Plain urllib. `huggingface_hub.InferenceClient` speaks this protocol too, but sends the stored Hugging Face token to
whatever URL it is given when no key is.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import SplitResult, urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from tqdm.auto import tqdm

from instruct_trl.judges.base import digest
from instruct_trl.judges.replies import NoJson, parse_body, read_entry, was_cut

Messages = list[dict[str, str]]

TRANSIENT = {408, 409, 425, 429}  # beside all from 500 on
LONGEST_WAIT = 60.0  # seconds
_SHORTEST_SECRET = 6  # characters; a shorter key is a placeholder such as "x", and a part of any reply
_REMEDIES = {
    400: "The server does not take this request; look at its message and at the model's name",
    401: "Set the API key",
    403: "The API key may not use this model",
    404: "Check the URL (it usually ends in /v1) and the model's name",
}


@dataclass
class Usage:
    """What the endpoint was asked and what it cost, this run and from the cache.

    Attributes:
        requests, cached: replies that the endpoint gave now, and that lay on disk.
        retries: requests that failed and were sent again.
        prompt_tokens, completion_tokens: of `requests`, by the endpoint's own count.
        cached_prompt_tokens, cached_completion_tokens: of `cached`.
        uncounted: replies without a count of tokens; their cost is not in `cost`.
        price_in, price_out: of a million prompt tokens and a million completion tokens, in your currency.
    """

    requests: int = 0
    cached: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0
    cached_completion_tokens: int = 0
    uncounted: int = 0
    price_in: float = 0.0
    price_out: float = 0.0

    @property
    def cost(self) -> float:
        """Of this run's requests."""
        return (self.prompt_tokens * self.price_in + self.completion_tokens * self.price_out) / 1e6

    @property
    def saved(self) -> float:
        """What the replies from the cache cost when they were made."""
        return (self.cached_prompt_tokens * self.price_in + self.cached_completion_tokens * self.price_out) / 1e6

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
        counts = entry.get("prompt_tokens"), entry.get("completion_tokens")
        prompt, completion = (int(count or 0) for count in counts)
        self.uncounted += counts[0] is None
        if cached:
            self.cached, self.cached_prompt_tokens = self.cached + 1, self.cached_prompt_tokens + prompt
            self.cached_completion_tokens += completion
        else:
            self.requests, self.prompt_tokens = self.requests + 1, self.prompt_tokens + prompt
            self.completion_tokens += completion


class ReplyCache:
    """Replies by key in one JSON-lines file, written one by one: a run that breaks loses none.

    Args:
        path: the file, made at the first reply; None keeps them in memory.
    """

    def __init__(self, path: str | Path | None):
        self.path = None if path is None else Path(path)
        self.replies: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._mend = False
        if self.path is not None and self.path.exists():
            text = self.path.read_text(encoding="utf-8")
            self._mend = bool(text) and not text.endswith("\n")  # the last run was killed while it wrote
            for line in text.split("\n"):  # splitlines would also cut at U+2028, which a reply may hold
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
            if isinstance(entry["content"], str):
                self.replies[entry["key"]] = entry
        except (json.JSONDecodeError, KeyError, TypeError):
            return  # half a line; the reply is asked for again

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Keep a reply, on disk before this returns."""
        with self._lock:
            self.replies[key] = {"key": key, **entry}
            if self.path is None:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("\n" if self._mend else "") + json.dumps(self.replies[key]) + "\n")
            self._mend = False


class _NoRedirect(HTTPRedirectHandler):
    """A redirect would carry the API key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def check_url(url: str) -> SplitResult:
    """The parts of a server's URL, refused where it could not be asked or holds a secret; no secret is in the message.

    Raises:
        ValueError: not an http(s) URL up to /v1, or one that holds a user, a password or a query.
    """
    if "@" in url:
        raise ValueError(
            "The judge's URL holds a user or a password (something before an @). It would stand in reports and logs: "
            "give the URL without it, put the key into an environment variable, and name that: --judge_key VARIABLE."
        )
    if "?" in url or "#" in url:
        raise ValueError(
            f"The judge's URL {url.split('?')[0].split('#')[0]!r} is followed by a query (? or #), which is not "
            "sent. Give it up to /v1; put a key into an environment variable, and name that: --judge_key VARIABLE."
        )
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or half an IPv6 address
        valid = False
    if not valid:
        raise ValueError(f"base_url is {url!r}; give a URL such as http://localhost:8000/v1.")
    return parts


class ChatEndpoint:
    """Asks `base_url`/chat/completions.

    Args:
        base_url: up to and including /v1, such as http://localhost:8000/v1.
        model: the model's name there.
        api_key: sent as a bearer token to this URL alone; None sends none.
        cache: file of the `ReplyCache`.
        options: further fields of the request (`temperature`, `max_tokens`, `seed`, ...).
        workers: requests under way at a time.
        attempts: how often a request is sent before the run gives up.
        timeout: seconds to wait for a reply.
        price_in, price_out: of a million tokens; see `Usage`.

    Raises:
        ValueError: not an http(s) URL, counts below 1, or a key that no header can carry.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        cache: str | Path | None = None,
        options: dict[str, Any] | None = None,
        workers: int = 4,
        attempts: int = 6,
        timeout: float = 120.0,
        price_in: float = 0.0,
        price_out: float = 0.0,
    ):
        parts = check_url(base_url)
        if workers < 1 or attempts < 1 or timeout <= 0:
            raise ValueError(f"workers, attempts and timeout must be above 0, got {workers}, {attempts}, {timeout}.")
        self.base_url, self.model, self.options = base_url.rstrip("/"), model, dict(options or {})
        self.workers, self.attempts, self.timeout = workers, attempts, timeout
        self.usage = Usage(price_in=price_in, price_out=price_out)
        self.cache = ReplyCache(cache)
        api_key = (api_key or "").strip()  # files and secrets end in a newline
        if not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("The API key holds characters that no header can carry, such as a line break inside it.")
        self._api_key = api_key.encode()
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")  # a proxy could not reach these
        handlers = [_NoRedirect(), *([ProxyHandler({})] if local else [])]
        self._opener: OpenerDirector = build_opener(*handlers)
        self._lock = threading.Lock()

    def ask(self, chats: Sequence[Messages], desc: str = "judging") -> list[str]:
        """The reply's text to each chat, in their order; equal chats are sent once; "" where the reply has no text.

        Raises:
            RuntimeError: a request failed for good. Replies that had come are in the cache; run again to go on.
        """
        keys = [self._key(chat) for chat in chats]
        missing = {key: chat for key, chat in zip(keys, chats, strict=True) if key not in self.cache.replies}
        for key in dict.fromkeys(keys):
            if key not in missing:
                self.usage.add(self.cache.replies[key], cached=True)
        if missing:
            self._ask_missing(missing, desc)
        return [self.cache.replies[key]["content"] for key in keys]

    def was_cut(self, chat: Messages) -> bool:
        """Whether the reply to this chat, asked before, was stopped at its longest length."""
        return was_cut(self.cache.replies.get(self._key(chat), {}))

    def _ask_missing(self, missing: dict[str, Messages], desc: str) -> None:
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(self._fetch, key, chat) for key, chat in missing.items()]
            try:
                for future in tqdm(futures, desc=desc, disable=None):
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # nothing more is paid for after the first failure
                raise

    def _key(self, chat: Messages) -> str:
        return digest(self.base_url, json.dumps(self._body(chat), sort_keys=True))

    def _body(self, chat: Messages) -> dict[str, Any]:
        return {"model": self.model, "messages": chat, **self.options}

    def _fetch(self, key: str, chat: Messages) -> None:
        entry = {"model": self.model, **read_entry(self._post(self._body(chat)), self.base_url)}
        self.cache.add(key, entry)
        with self._lock:
            self.usage.add(entry, cached=False)

    def _without_key(self, body: bytes) -> bytes:
        """The reply of a server without the API key, which a server may send back; replies go into cache and errors."""
        return body.replace(self._api_key, b"[API key]") if len(self._api_key) >= _SHORTEST_SECRET else body

    def _post(self, body: dict[str, Any]) -> Any:
        url = f"{self.base_url}/chat/completions"
        request = Request(url, json.dumps(body).encode("utf-8"), self._headers, method="POST")
        for attempt in range(self.attempts):
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    return parse_body(self._without_key(response.read()), url)
            except HTTPError as error:
                if error.code not in TRANSIENT and error.code < 500:
                    said = self._without_key(error.read() or str(error.reason).encode())
                    raise RuntimeError(_refusal(url, error.code, said)) from None
                problem, wait = f"HTTP {error.code}", _retry_after(error)
            except NoJson as error:
                problem, wait = str(error), None
            except (OSError, HTTPException) as error:
                problem, wait = f"{type(error).__name__}: {error}", None
            if attempt + 1 < self.attempts:
                with self._lock:
                    self.usage.retries += 1
                time.sleep(back_off(attempt) if wait is None else min(wait, LONGEST_WAIT))
        raise RuntimeError(
            f"{url} failed {self.attempts} times, last with {problem}. The replies that had come are kept; start the "
            "server or wait, and run again to go on."
        )


def back_off(attempt: int) -> float:
    """Seconds before the next try: 1, 2, 4, ... up to a minute, each shortened at random by up to a half."""
    return min(2.0**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)


def _retry_after(error: HTTPError) -> float | None:
    """The seconds that the server asks to wait, where it says so in seconds."""
    value = error.headers.get("Retry-After", "") if error.headers else ""
    return float(value) if value.replace(".", "", 1).isdigit() else None


def _refusal(url: str, code: int, said: bytes) -> str:
    remedy = _REMEDIES.get(code, "Check the URL: redirects are not followed" if code < 400 else "")
    shown = said[:500].decode("utf-8", "replace").strip()
    return f"{url} refused with HTTP {code}: {shown}. " + (f"{remedy}." if remedy else "")
