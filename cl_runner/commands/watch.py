"""``cl-runner watch``: a run as it goes on, by its folder alone."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from cl_runner.report.watch import Picture
from cl_runner.runs import catalog
from cl_runner.runs.folder import readable
from cl_runner.runs.watching import Watched
from cl_runner.terminal.console import AsText, print_json, rich_console, rich_print


def watch(wanted: str | None, *, root: Path, every: float, once: bool, as_json: bool) -> None:
    """``cl-runner watch``. On a terminal it goes on until the run has ended."""
    watched = Watched(catalog.find(root, wanted))
    with readable(watched.run):
        if as_json:
            print_json(watched.look().to_json())
        elif once or not sys.stdout.isatty():
            rich_print(Picture(watched.look()))
        else:
            _follow(watched, every)


def _follow(watched: Watched, every: float) -> None:
    from rich.live import Live

    console = rich_console()
    seen = watched.look()
    with Live(
        AsText(Picture(seen)), console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    ) as live:
        console.show_cursor(True)  # even if we are killed
        while True:
            live.update(AsText(Picture(seen)), refresh=True)
            if seen.over:
                return
            time.sleep(every)
            seen = watched.look()
