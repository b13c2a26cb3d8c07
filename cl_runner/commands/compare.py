"""``cl-runner compare``: runs beside each other, over methods, orders and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cl_runner.errors import UserError
from cl_runner.report.comparison.compared import compare as compared
from cl_runner.report.comparison.found import Comparison
from cl_runner.report.comparison.latex import latex
from cl_runner.report.comparison.markdown import markdown
from cl_runner.report.comparison.terminal import ComparisonView
from cl_runner.runs import catalog
from cl_runner.runs.comparing import entries, kept
from cl_runner.terminal.console import print_json, rich_print


def compare(wanted: Sequence[str], *, root: Path, against: str, form: str) -> None:
    """``cl-runner compare``. Raises UserError."""
    found = _found(wanted, root, against, updates=form in ("json", "csv", "markdown"))
    if form == "json":
        print_json(found.to_json())
    elif form == "csv":
        print(found.csv(), end="")
    elif form == "markdown":
        print(markdown(found))
    elif form == "latex":
        print(latex(found), end="")
    else:
        rich_print(ComparisonView(found))


def write_page(wanted: Sequence[str], *, root: Path, against: str, file: Path | None, figures_in: Path | None) -> None:
    """``cl-runner compare --html FILE``: one page, and its figures as files into a folder, if one is given.

    Raises:
        UserError: as ``compare``, or nothing can be written there.
    """
    from cl_runner.report.page.comparison_page import comparison_page, drawn, figures
    from cl_runner.report.page.render import save

    if file is None:
        raise UserError("--figures: the figures are those of the page; say --html FILE too")
    if file.name.startswith("-"):
        raise UserError(f"--html {file}: say which file to write the page to")
    found = _found(wanted, root, against, updates=False)
    held, untold = kept(found, [run for run, _ in catalog.find_several(root, wanted)])
    pictures = figures(found)
    save(file, comparison_page(found, held, pictures, untold), drawn(pictures), figures_in)
    print(f"page to open: {file}")


def _found(wanted: Sequence[str], root: Path, against: str, updates: bool) -> Comparison:
    """What there is to say. updates: what the runs learned too, where there is room for it. Raises UserError."""
    if not wanted:
        raise UserError(
            f"say which runs: names, patterns ('order1-*') or a folder that holds them (cl-runner compare {root})"
        )
    found, broken = entries(catalog.find_several(root, wanted), updates=updates)
    return compared(found, against, broken)
