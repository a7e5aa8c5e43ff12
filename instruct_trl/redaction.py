"""Keys, tokens and passwords kept out of what is written, printed or put into a report."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"

# User and password in https://user:password@host; keys of a hub, a model server, a repository or a cloud, as they are
# documented to begin; and what follows "Bearer".
_KEYS = re.compile(
    r"(?<=://)[^/\s@'\"]+(?=@)"
    r"|\bhf_(?=[a-z0-9]*[A-Z]|[a-z0-9]{20})[A-Za-z0-9]{4,}"
    r"|\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}"
    r"|\b(?:gh[opsur]|github_pat|glpat|xox[abprs])[-_][A-Za-z0-9_-]{10,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{30,}|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_.-]{10,}"
    r"|(?<=[Bb]earer )\s*[^\s'\",]+"
)
_SECRET_NAME = re.compile(
    r"(?:^|[_-])(?:token|secret|password|passwd|passphrase|authorization|credentials?|pat)$", re.I
)
_KEY_NAME = re.compile(r"(?:^|[_-])(?:api|access|secret|private|judge|auth)?key$", re.I)
# Settings of a tokenizer, whose values are words like <|im_end|>.
_TEXT_TOKEN = re.compile(r"(?:^|[_-])(?:pad|eos|bos|unk|sep|cls|mask|start|end|stop|image|video|audio)[_-]token$", re.I)
_PAIR = re.compile(r"""(["']?([\w-]+)["']?\s*[:=]\s*)("[^"]*"|'[^']*'|[^\s,}"']+)""")  # token=X, or 'token': 'X'
# The name of an environment variable. Many letters and digits without a _ are a key.
_VARIABLE = re.compile(r"(?=.{1,40}$)(?:_?[A-Z][A-Z0-9]{0,11}(?:_[A-Z0-9]+)*|[a-z_]+)")


def redact(text: str) -> str:
    """`text` without what looks like a key, and without user and password of a URL."""
    return _KEYS.sub(HIDDEN, text)


def redact_settings(value: Any, name: str = "") -> Any:
    """Settings, nested ones included, without keys and without every value whose `name` says that it is secret."""
    if isinstance(value, Mapping):
        return {key: redact_settings(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_settings(inner, name) for inner in value]
    if not isinstance(value, str) or not value:
        return value
    return HIDDEN if _is_secret(name, value) else redact(value)


def redact_command(arguments: Sequence[str]) -> list[str]:
    """The same for a command line: `--hub_token X`, `--hub_token=X` and JSON with a token in it."""
    shown, name = [], ""
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            shown.append(f"--{name}={_redact_argument(value, name)}" if equals else argument)
            name = "" if equals else name
        else:
            shown.append(_redact_argument(argument, name))
    return shown


def _redact_argument(value: str, name: str) -> str:
    if value.startswith(("{", "[")):
        with contextlib.suppress(ValueError):
            return json.dumps(redact_settings(json.loads(value), name))
    if _is_secret(name, value):
        return HIDDEN
    return redact(_PAIR.sub(lambda found: found[1] + HIDDEN if _is_secret(found[2], found[3]) else found[0], value))


def looks_like_variable(value: str) -> bool:
    """Whether `value` looks like the name of an environment variable, and so may be shown."""
    return _VARIABLE.fullmatch(value) is not None


def _is_secret(name: str, value: str) -> bool:
    if _KEY_NAME.search(name):
        return value not in os.environ and not looks_like_variable(value)
    return bool(_SECRET_NAME.search(name)) and not _TEXT_TOKEN.search(name)
