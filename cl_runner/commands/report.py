"""``cl-runner report``: one run, or several side by side."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl_runner.errors import UserError
from cl_runner.report import tables
from cl_runner.report.compare import compare
from cl_runner.report.tables import RunSummary
from cl_runner.runs import catalog
from cl_runner.runs.folder import RunDir
from cl_runner.runs.forgotten import forgotten_counts
from cl_runner.runs.results import summary_of
from cl_runner.terminal.console import print_json, rich_print


def report(wanted: Sequence[str], *, root: Path, form: str) -> None:
    """``cl-runner report``: one run, or several side by side."""
    if len(wanted) > 1:
        updates = form in ("markdown", "json")  # more columns than a terminal has room for, and more to read
        _compare([summary_of(catalog.find(root, name), updates=updates) for name in wanted], form)
        return
    rundir = catalog.find(root, wanted[0] if wanted else None)
    summary = summary_of(rundir)
    if not wanted:
        print(f"the newest run: {rundir.path}", file=sys.stderr)
    if form == "json":
        print_json(_json(rundir, summary))
    elif form == "csv":
        print(tables.title(summary), file=sys.stderr)
        print(tables.csv(summary), end="")
    elif form == "markdown":
        print(tables.markdown(summary))
    else:
        rich_print(tables.table(summary))


def _compare(summaries: Sequence[RunSummary], form: str) -> None:
    found = compare(summaries)
    if form == "json":
        print_json(found.to_json())
    elif form == "csv":
        raise UserError("--csv is the matrix of one run; several are compared as a table, --markdown or --json")
    elif form == "markdown":
        print(found.markdown())
    else:
        rich_print(found)


def _json(run: RunDir, summary: RunSummary) -> dict[str, Any]:
    """One run for machines, with how many rows it has forgotten."""
    return {**tables.report_json(summary), "forgotten": forgotten_counts(run)}


def print_result(folder: RunDir, as_json: bool) -> None:
    """The table, the folder, the next command; or one JSON object."""
    summary = summary_of(folder)
    if as_json:
        print_json({"run": str(folder.path), **_json(folder, summary)})
        return
    rich_print(tables.table(summary))
    print(f"\nrun folder: {folder.path}")
    print(f"again at any time: cl-runner report {shlex.quote(str(folder.path))}")
