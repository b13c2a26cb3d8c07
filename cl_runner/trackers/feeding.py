"""A tracker fed from a run's folder: rows of its log as they come, scores of each stage once it is committed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cl_runner.metrics.accuracy import Matrix, average_accuracy, forgetting
from cl_runner.report.extra import Extra
from cl_runner.runs.extra_scores import read_extra
from cl_runner.runs.folder import RunDir, stage_names
from cl_runner.runs.follow import Log, is_number
from cl_runner.runs.results import read_matrix
from cl_runner.runs.resume_guard import as_written
from cl_runner.settings import dotted, settings_of
from cl_runner.trackers.protocol import Entry, Tracked, Tracker

ABOUT = ("order", "method", "model", "seed", "synthetic")
PLACE = ("stage", "step", "steps", "time")  # of a row: where and when, no measurement


class Reader:
    """What a run logs and scores, as entries with steps counted over all stages."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.names = stage_names(run.about())
        self._log = Log(run.path / "log.jsonl")
        self._stage, self._before = 0, 0  # the stage that is read, and the steps of those before it
        self._step, self._time = 0, time.time()  # of its last row

    def read(self) -> Iterator[tuple[int, int, Entry]]:
        """What is new, each with its stage (from 0) and step of it, scores after the last one."""
        committed = self.run.committed(self.names)  # first: all rows of these stages are in the log by now
        for row in self._log.read()[1]:
            if row["stage"] not in self.names[self._stage :]:
                continue  # another process has begun the log anew
            yield from self._close(self.names.index(row["stage"]))
            self._step, self._time = row["step"], float(row.get("time") or time.time())
            yield self._stage, self._step, self._entry(numbers(row))
        yield from self._close(committed)

    def _close(self, until: int) -> Iterator[tuple[int, int, Entry]]:
        """The scores of the stages before that one, which begins."""
        while self._stage < until:
            known = {**scores(read_matrix(self.run), self._stage), **extra_scores(read_extra(self.run), self._stage)}
            yield self._stage, self._step + 1, self._entry(known)
            self._before += self._step
            self._stage, self._step = self._stage + 1, 0

    def _entry(self, values: Mapping[str, float]) -> Entry:
        return Entry(self._before + self._step, self.names[self._stage], self._time, values)


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The measurements of a row of ``log.jsonl``: ``train/loss``, …, or ``probe/TASK``."""
    if isinstance(row.get("probe"), dict):
        return {f"probe/{task}": float(value) for task, value in row["probe"].items() if is_number(value)}
    return {f"train/{key}": float(row[key]) for key in row if key not in PLACE and is_number(row[key])}


def scores(matrix: Matrix, stage: int) -> dict[str, float]:
    """What is known after a stage (from 0): its scores, average accuracy and forgetting, as far as they are defined."""
    then = matrix.until(stage + 1)
    found = {f"score/{task}": then.at(stage, task) for task in then.tasks}
    found |= {"average_accuracy": average_accuracy(then), "forgetting": forgetting(then)}
    return {name: value for name, value in found.items() if value is not None}


def extra_scores(extra: Extra, stage: int) -> dict[str, float]:
    """What extra sets scored after a stage (from 0): ``extra/mmlu``."""
    return {f"extra/{name}": score for name in extra.about if (score := extra.at(stage, name)) is not None}


def feed(
    run: RunDir,
    tracker: Tracker,
    kept: int,
    ended: Callable[[], bool],
    say: Callable[[str], None],
    step: int = 0,
) -> None:
    """Tell a tracker all of a run until it has ended.

    kept: stages that were committed when this process of the run began; step: that of the next one which it goes on
    from. ended: waits a while, and says whether the run
    has ended. say: takes a line for the user. Whatever the tracker raises is raised.
    """
    reader = Reader(run)
    earlier: list[Entry] = []
    new: list[Entry] = []
    for stage, within, entry in reader.read():
        (earlier if stage < kept or (stage == kept and within <= step) else new).append(entry)
    goes_on = tracker.start(tracked(run, earlier[-1].step if earlier else 0))
    if where := tracker.where():
        say(where)
    if not goes_on:
        new = [*earlier, *new]
    over = False
    while True:
        if new:
            tracker.log(new)
        if over:
            break
        over = ended()
        new = [entry for _, _, entry in reader.read()]
    # A run that was killed said nothing: it is running still, by its own word.
    state = run.status().get("state")
    tracker.end(state if state in ("done", "failed") else "stopped")


def tracked(run: RunDir, steps: int) -> Tracked:
    """What a tracker is told of a run, of which so many steps were kept."""
    about, environment = run.about(), run.environment()
    digest = hashlib.sha256(f"{run.name} {environment['started']}".encode()).hexdigest()[:8]
    return Tracked(
        name=run.name,
        id=f"{run.name[:100]}-{digest}",
        folder=run.path.absolute(),
        about={key: about[key] for key in ABOUT},
        settings={dotted(key): value for key, value in settings_of(as_written(run))},
        resumed=bool(environment["later"]),
        steps=steps,
    )
