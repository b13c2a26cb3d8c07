"""One line of what was found, and how lines look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

State = Literal["ok", "missing", "wrong"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and where it is not fine: what that costs, and what to do.

    needed: as it is, nothing trains here.
    """

    group: str
    what: str
    state: State
    said: str
    costs: str = ""
    do: str = ""
    needed: bool = False


def ready(findings: Sequence[Finding]) -> bool:
    """Whether a run can train here."""
    return not any(found.needed for found in findings if found.state != "ok")


def summary(findings: Sequence[Finding]) -> str:
    """All of it in one line."""
    if not ready(findings):
        culprits = dict.fromkeys(found.what for found in findings if found.needed and found.state != "ok")
        return f"not ready: nothing trains here as long as this is so: {', '.join(culprits)}"
    counted = {state: [found.what for found in findings if found.state == state] for state in ("wrong", "missing")}
    said = [f"{len(names)} {state} ({', '.join(names)})" for state, names in counted.items() if names]
    return f"ready; {', '.join(said)}" if said else "ready: all clear"


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """``{ready, summary, findings}``."""
    return {
        "ready": ready(findings),
        "summary": summary(findings),
        "findings": [
            {
                "group": found.group, "what": found.what, "state": found.state, "needed": found.needed,
                "said": found.said, "costs": found.costs, "do": found.do,
            }
            for found in findings
        ],
    }  # fmt: skip


def as_text(findings: Sequence[Finding]) -> str:
    """A line each, in groups; under what is not fine, what it costs and what to do."""
    width = max(len(found.what) for found in findings)
    lines = []
    for group, members in groupby(findings, key=lambda found: found.group):
        lines.append(group)
        for found in members:
            lines.append(f"  {found.state:<8}{found.what:<{width}}  {found.said}")
            if found.state != "ok":
                lines.append(f"  {'':<8}{'':<{width}}  {found.costs}; {found.do}")
    return "\n".join([*lines, summary(findings)])
