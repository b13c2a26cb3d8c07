"""``cl-runner forgotten``: the rows that a run had learned and got wrong since; or those of two runs."""

from __future__ import annotations

from pathlib import Path

from cl_runner.errors import UserError
from cl_runner.report.forgotten import DifferenceTable, ForgottenTable, skipped_lines
from cl_runner.runs import catalog
from cl_runner.runs.folder import RunDir
from cl_runner.runs.forgotten import read_difference, read_forgotten
from cl_runner.runs.results import summary_of
from cl_runner.terminal.console import print_json, rich_print, say


def forgotten(
    wanted: str | None, *, root: Path, task: str | None, stage: int | None, against: str | None, as_json: bool
) -> None:
    """``cl-runner forgotten``. Raises UserError."""
    if against == "":
        raise UserError("--against: the name of the other run is empty")
    run = catalog.find(root, wanted)
    other = None if against is None else catalog.find(root, against)
    if wanted is None:
        say(f"the newest run: {run.path}")
    if other is not None:
        _difference(run, other, task, stage, as_json)
        return
    found, summary = read_forgotten(run, stage=stage, task=task), summary_of(run)
    if as_json:
        about = {"synthetic": summary.synthetic, "chosen": summary.chosen}
        print_json({"run": str(run.path), **about, **found.to_json()})
        return
    lines = [*found.notes, *skipped_lines(found.skipped, found.to_come)]
    rich_print(ForgottenTable(summary, found.stages, found.tasks, lines))


def _difference(run: RunDir, other: RunDir, task: str | None, stage: int | None, as_json: bool) -> None:
    found = read_difference(run, other, stage=stage, task=task)
    summaries = summary_of(run), summary_of(other)
    if as_json:
        marks = ("synthetic", "chosen")
        about = {mark: [getattr(summary, mark) for summary in summaries] for mark in marks}
        print_json({"run": str(run.path), "against": str(other.path), **about, **found.to_json()})
        return
    lines = [*found.notes, *skipped_lines(found.skipped)]
    rich_print(DifferenceTable(summaries, (found.run.stages, found.other.stages), found.tasks, lines))
