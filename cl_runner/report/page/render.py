"""A page from its template, as one file that stands alone; every text in it is escaped."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from cl_runner.report.figures.style import Drawn

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def render(template: str, **values: Any) -> str:
    """A template of ``templates/`` filled. A name that it wants and ``values`` lacks raises, and is never empty."""
    return _environment().get_template(template).render(**values)


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
