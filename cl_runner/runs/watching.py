"""A run watched by its folder, from any machine that shares it. Reads only, takes no lock, and only what is new."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from cl_runner.report.tables import RunSummary
from cl_runner.report.watch import Seen
from cl_runner.runs.checkpoints import kept_to
from cl_runner.runs.folder import RunDir, readable, stage_names
from cl_runner.runs.follow import Lines, Log, is_number
from cl_runner.runs.listing import state_of
from cl_runner.runs.results import summary_of
from cl_runner.runs.shapes import read_metrics
from cl_runner.terminal.progress import ShownStage, TimeLeft, clean

DRAWN = ("loss", "penalty")
SILENT = 900.0  # seconds without a sign of life after which a run on another machine counts as stopped


class Watched:
    """``look()`` again and again."""

    def __init__(self, run: RunDir, clock: Callable[[], float] = time.monotonic) -> None:
        self.run = run
        self._clock = clock
        with readable(run):
            about = run.about()
            self.stages = stage_names(about)
            # What runs of earlier versions do not say: how much there is to do.
            plans = [ShownStage(one["name"], one.get("steps", 0), one.get("test_rows", 0)) for one in about["stages"]]
            self._plans = plans if all("steps" in one for one in about["stages"]) else None
        self._log, self._said = Log(run.path / "log.jsonl"), Lines(run.log_file)
        self._warnings: list[str] = []
        self._last = ""
        self._summary: RunSummary | None = None
        self._begin()

    def _begin(self) -> None:
        """Nothing of the log is read yet."""
        self._stage = -1  # of the last row
        self._row: Mapping[str, Any] = {}
        self._curves: dict[str, list[float]] = {}
        self._probes: dict[str, list[float]] = {}
        self._steps = (0, 0)  # the last step of the stage, and how many it has
        self._now, self._at = 0.0, self._clock()  # of the last row, by its own time and by our clock
        self._left = TimeLeft(self._plans, 0, lambda: self._now) if self._plans else None

    def look(self) -> Seen:
        """What the folder says now. Raises UserError where it cannot be read."""
        with readable(self.run):
            done = self.run.committed(self.stages)  # first: all rows of these stages are in the log by now
            if self._summary is None or self._summary.stages_done != done:
                self._summary = summary_of(self.run)
            self._read_log()
            self._read_words()
            state = self._state(done)
            stage = min(done, len(self.stages) - 1)
            step, steps = self._steps if self._stage == stage else (0, 0)
            return Seen(
                summary=self._summary,
                stages=self.stages,
                state=state,
                message=str(self.run.status().get("message", "")) if state == "failed" else "",
                stage=stage,
                step=step,
                steps=steps,
                kept=kept_to(self.run, self.stages, done),
                row=self._row,
                curves=self._curves,
                probes=self._probes,
                left=self._seconds_left(done) if state == "running" else None,
                warnings=self._warnings,
                said=self._last,
            )

    def _read_log(self) -> None:
        anew, rows = self._log.read()
        if anew:
            self._begin()
        for row in rows:
            if row["stage"] in self.stages:
                self._take(self.stages.index(row["stage"]), row)
        if rows:
            self._at = self._clock()

    def _take(self, stage: int, row: Mapping[str, Any]) -> None:
        """A row of the log."""
        if isinstance(row.get("probe"), dict):
            for task, value in row["probe"].items():
                if is_number(value):
                    self._probes.setdefault(task, []).append(value)
            return
        before = self._steps[0] if stage == self._stage else 0
        if stage != self._stage:
            self._curves = {name: [] for name in DRAWN}
        self._steps = (row["step"], row.get("steps", 0))
        if "loss" in row:
            self._row = row
            for name in DRAWN:
                if is_number(row.get(name)):
                    self._curves[name].append(row[name])
        self._count(stage, before, row)
        self._stage = stage

    def _count(self, stage: int, before: int, row: Mapping[str, Any]) -> None:
        """What a row says of how long steps take, and of how many there are."""
        left, now = self._left, row.get("time")
        if left is None or not is_number(now):
            return
        left.plans[stage] = replace(left.plans[stage], steps=self._steps[1])
        for ended in range(max(self._stage, 0), stage):
            self._count_evaluation(left, ended)
        self._now = now
        if stage != self._stage:
            left.start(stage, row["step"])
        elif row["step"] > before:  # a step may have rows beside its own
            left.note("step", row["step"] - before)

    def _count_evaluation(self, left: TimeLeft, stage: int) -> None:
        """How long the test rows of a stage took."""
        metrics = self.run.stage_dir(stage, self.stages[stage]) / "metrics.json"
        rows = left.plans[stage].rows
        took = read_metrics(metrics.parent)["seconds"].get("evaluate") if metrics.is_file() else None
        if rows and took is not None:
            left.note("row", 0)
            self._now += took
            left.note("row", rows)

    def _seconds_left(self, done: int) -> float | None:
        """From the last row on, less what has passed since we saw it; the other machine's clock may be another."""
        if self._left is None or self._stage < done - 1:
            return None
        seconds = self._left.left()
        return None if seconds is None else max(seconds - (self._clock() - self._at), 0.0)

    def _read_words(self) -> None:
        anew, lines = self._said.read()
        if anew:
            self._warnings, self._last = [], ""
        for line in filter(None, map(clean, lines)):
            if line.startswith("--- "):  # a process of the run begins
                continue
            self._last = line
            if "warning: " in line and line not in self._warnings:
                self._warnings.append(line)

    def _state(self, done: int) -> str:
        """As lists have it; but a lock that another machine holds may not be seen from here."""
        state, status = state_of(self.run, done, len(self.stages)), self.run.status()
        elsewhere = status.get("state") == "running" and status.get("host") != socket.gethostname()
        return "running" if state == "stopped" and elsewhere and self._silence() < SILENT else state

    def _silence(self) -> float:
        """Seconds since the run wrote anything that we read."""
        wrote = 0.0
        for name in ("log.jsonl", "run.log", "status.json"):
            with suppress(OSError):
                wrote = max(wrote, (self.run.path / name).stat().st_mtime)
        return time.time() - wrote
