"""Which rows are of the same prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def prompt_key(prompt: Any) -> str:
    """A short name of a prompt (text, messages or token ids) by its content, the same on every machine."""
    text = json.dumps(prompt, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def prompt_keys(prompts: Iterable[Any]) -> list[str]:
    """The names of several; equal prompts have equal names."""
    return [prompt_key(prompt) for prompt in prompts]
