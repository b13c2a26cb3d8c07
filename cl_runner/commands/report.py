"""``cl-runner report``: what one run has learned and forgotten."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl_runner.errors import UserError
from cl_runner.report import tables
from cl_runner.report.tables import RunSummary
from cl_runner.runs import catalog
from cl_runner.runs.folder import RunDir, readable
from cl_runner.runs.forgotten import forgotten_counts
from cl_runner.runs.results import summary_of
from cl_runner.terminal.console import print_json, rich_print, say


def report(wanted: Sequence[str], *, root: Path, form: str, figures_in: Path | None = None) -> None:
    """``cl-runner report``. Raises UserError."""
    if figures_in is not None and form != "html":
        raise UserError("--figures: the figures are those of the page; say --html too")
    if len(wanted) > 1:
        raise UserError(f"report is of one run; cl-runner compare {shlex.join(wanted)} holds several beside each other")
    rundir = catalog.find(root, wanted[0] if wanted else None)
    summary = summary_of(rundir)
    if not wanted:
        say(f"the newest run: {rundir.path}")
    with readable(rundir):
        _print(rundir, summary, form, figures_in)


def _print(rundir: RunDir, summary: RunSummary, form: str, figures_in: Path | None) -> None:
    if form == "json":
        print_json(_json(rundir, summary))
    elif form == "csv":
        say(tables.title(summary))
        print(tables.csv(summary), end="")
    elif form == "markdown":
        print(tables.markdown(summary))
    elif form == "html":
        print(write_page(rundir, figures_in))
    else:
        rich_print(tables.table(summary))


def write_page(run: RunDir, figures_in: Path | None = None) -> Path:
    """Write the run's page, and its figures as files into a folder, if one is given; returns the page's place.

    Raises:
        UserError: a file of the run is broken, or nothing can be written there.
    """
    from cl_runner.report.page.render import save
    from cl_runner.report.page.run_page import figures, run_page
    from cl_runner.runs.page import read_page

    page = read_page(run)
    with readable(run):
        drawn = figures(page)
        html = run_page(page, drawn)
    save(run.page_file, html, drawn, figures_in)
    return run.page_file


def _json(run: RunDir, summary: RunSummary) -> dict[str, Any]:
    """One run for machines, with how many rows it has forgotten."""
    return {**tables.report_json(summary), "forgotten": forgotten_counts(run)}


def print_result(folder: RunDir, as_json: bool, page: Path | None) -> None:
    """The table, the folder, its page if there is one, the next command; or one JSON object."""
    summary = summary_of(folder)
    if as_json:
        print_json({"run": str(folder.path), **_json(folder, summary)})
        return
    rich_print(tables.table(summary))
    print(f"\nrun folder: {folder.path}")
    if page is not None:
        print(f"page to open: {page}")
    print(f"again at any time: cl-runner report {shlex.quote(str(folder.path))}")
