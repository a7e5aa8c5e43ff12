"""The reply of a chat server: its text and counts. A reply of another kind is refused, and the error shows it."""

from __future__ import annotations

import json
from typing import Any

EXPECTED = (
    "An OpenAI-compatible chat API replies in JSON with choices[0].message.content. Check that the URL is that of such "
    "a server (it usually ends in /v1)"
)
_CUT = {"length", "max_tokens", "model_length"}  # how servers call an end at the longest length


class NoJson(ValueError):
    """A reply that is no JSON: perhaps cut on its way, so that it is worth another try."""


def parse_body(body: bytes, url: str) -> Any:
    """The JSON of a reply.

    Raises:
        RuntimeError: a web page, which another try would not change.
        NoJson: anything else that is no JSON.
    """
    try:
        return json.loads(body)
    except ValueError:
        start = body[:200].decode("utf-8", "replace").strip()
        if start.startswith("<"):
            raise RuntimeError(
                f"{url} replied with a web page, not as the chat API does: {start!r}. {EXPECTED}."
            ) from None
        raise NoJson(f"a reply that is no JSON ({start!r}). {EXPECTED}") from None


def read_entry(raw: Any, url: str) -> dict[str, Any]:
    """`content` ("" where there is none), `finish_reason`, and counts of tokens (None where the server gives none).

    Raises:
        RuntimeError: JSON of another shape.
    """
    try:
        choice = raw["choices"][0]
        content = choice["message"].get("content")
        finish = choice.get("finish_reason")
        counts = raw.get("usage")
    except (KeyError, IndexError, TypeError, AttributeError):
        content, finish, counts = raw, None, None
    if not isinstance(content, str | None):
        raise RuntimeError(f"{url} replied, but not as the chat API does: {json.dumps(raw)[:200]}. {EXPECTED}.")
    counts = counts if isinstance(counts, dict) else {}
    tokens = {name: counts.get(name) for name in ("prompt_tokens", "completion_tokens")}
    known = {name: count if isinstance(count, int) else None for name, count in tokens.items()}
    return {"content": content or "", "finish_reason": finish, **known}


def was_cut(entry: dict[str, Any]) -> bool:
    """Whether the server stopped this reply at its longest length, before the model had ended it."""
    return str(entry.get("finish_reason")).casefold() in _CUT
