"""What a tracker is, and what it is told.

A tracker lives in a process of its own, beside the run (``processes.py``): it may be slow, hang or raise, and the run
is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Tracked:
    """The run that is tracked.

    id: of this run alone; a new run of the same name has another. about: order, method, model, seed, synthetic.
    settings: dotted key → value. resumed: an earlier process began the run; ``steps`` were kept of what it trained.
    """

    name: str
    id: str
    folder: Path
    about: Mapping[str, Any]
    settings: Mapping[str, Any]
    resumed: bool
    steps: int


@dataclass(frozen=True)
class Entry:
    """Numbers of one moment. step: counted over all stages. time: seconds since 1970. values: name → number.

    Names: ``train/loss`` and whatever else a row of ``log.jsonl`` has; ``probe/TASK``; once a stage is committed
    ``score/TASK`` (percent), ``average_accuracy`` and ``forgetting``.
    """

    step: int
    stage: str
    time: float
    values: Mapping[str, float]


class Tracker:
    """Base of all trackers: made once, then ``start``, ``log`` again and again, ``end``. Any of them may raise."""

    name: ClassVar[str]
    title: ClassVar[str]
    package: ClassVar[str]  # the module that must be importable
    extra: ClassVar[str] = ""  # of cl-runner, which installs it

    def start(self, run: Tracked) -> bool:
        """Begin, or go on with what an earlier process of this run has sent.

        Returns whether it goes on: then it is told only what comes after ``run.steps``, else all from the first step.
        """
        raise NotImplementedError

    def where(self) -> str:
        """Where to look at it: an address or a folder, said once on the screen; empty for nothing."""
        return ""

    def log(self, entries: Sequence[Entry]) -> None:
        """What is new, in its order."""
        raise NotImplementedError

    def end(self, state: str) -> None:
        """The run has ended: ``done``, ``stopped`` or ``failed``. Returns when everything is where it belongs."""
        raise NotImplementedError
