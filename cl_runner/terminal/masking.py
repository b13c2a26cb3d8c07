"""Secrets of the environment, and what looks like one: never on a screen, in a log or in a run's folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

MASK = "***"
SHORTEST = 8  # characters: a shorter value is no secret, and would be found everywhere
_NAMES = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|_KEY$|_PAT$|_AUTH$", re.I
)
# Tokens of known form: Hugging Face, GitHub, GitLab, OpenAI and others, AWS, Google, Slack, Weights & Biases, a JWT.
_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}"
    r"|A(?:KIA|SIA)[0-9A-Z]{16}|AIza[\w-]{30,}|xox[abprs]-[\w-]{10,}|wandb_v\d+_\w{20,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
)
# user:password@ of an address, or a token alone; the git of ssh://git@host is none. As a path it has one slash.
_IN_URL = re.compile(r"(?:(?<=://)|(?<=:/))(?:[^\s/@'\":]*:[^\s/@'\"]+|[^\s/@'\":]{20,})(?=@)")
# --set tracker.api_key=…, token: …: by the word before it.
_SAID = re.compile(
    r"(?i)\b([\w.-]*(?:password|passwd|secret|api[_-]?key|access[_-]?key|auth[_-]?token|hf_token))(\s*[=:]\s*)(\S+)"
)


def masked(text: str) -> str:
    """``text`` without secrets: values of variables whose names say so, tokens of known form, passwords in addresses,
    and what stands behind such a word."""
    for value in _values():
        text = text.replace(value, MASK)
    for form in (_FORMS, _IN_URL):
        text = form.sub(MASK, text)
    return _SAID.sub(rf"\1\2{MASK}", text)


def holds_secret(texts: Iterable[str]) -> bool:
    """Whether one of them does: a value of the environment, a token of known form, a password in an address."""
    values = list(_values())
    return any(any(value in text for value in values) or _FORMS.search(text) or _IN_URL.search(text) for text in texts)


def _values() -> Iterator[str]:
    """The secrets of the environment, the longest first: one may be part of another."""
    found = {value for name, value in os.environ.items() if len(value) >= SHORTEST and _NAMES.search(name)}
    # A path to a file of secrets is none, nor is a number of tokens.
    secrets = (value for value in found if not value.startswith(("/", "~")) and not value.isdigit())
    yield from sorted(secrets, key=len, reverse=True)
