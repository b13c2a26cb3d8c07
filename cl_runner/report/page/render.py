"""A page from its template, as one file that stands alone; every text in it is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_runner.atomic import write_text
from cl_runner.errors import UserError
from cl_runner.report.figures.style import Drawn

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def render(template: str, **values: Any) -> str:
    """A template of ``templates/`` filled. A name that it wants and ``values`` lacks raises, and is never empty."""
    return _environment().get_template(template).render(**values)


def save(file: Path, page: str, figures: Iterable[Drawn] = (), folder: Path | None = None) -> None:
    """Write a page, and its figures into a folder if one is given. Raises UserError where that cannot be."""
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for each in figures:
                each.save(folder)
        except OSError as error:
            raise UserError(f"cannot write figures into {folder}: {error.strerror or error}") from None
    try:
        write_text(file, page)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from None


def _figure(drawn: Drawn) -> Markup:
    from markupsafe import Markup

    return Markup(drawn.svg())  # made here, and its texts escaped by matplotlib


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader("cl_runner.report.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["figure"] = _figure
    return found
