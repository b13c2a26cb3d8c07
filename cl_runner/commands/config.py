"""``cl-runner config``: the settings of a run, and their schema."""

from __future__ import annotations

from cl_runner.commands.request import Request
from cl_runner.config.schema import Section
from cl_runner.errors import UserError
from cl_runner.registry import METHODS
from cl_runner.settings import schema, show
from cl_runner.terminal.console import print_json, say


def config_show(request: Request, *, as_json: bool) -> None:
    """``cl-runner config show``."""
    resolved = request.resolve()
    for note in resolved.notes:
        say(note)
    if as_json:
        print_json({"config": resolved.config.model_dump(mode="json"), "origin": resolved.origin})
    else:
        print(show(resolved), end="")


def show_schema() -> None:
    """``cl-runner config schema``: of every method that can be imported."""
    found = {name: _schema_of(name) for name in METHODS}
    print_json(schema({name: kind for name, kind in found.items() if kind is not None}))


def _schema_of(name: str) -> type[Section] | None:
    try:
        return METHODS.get(name).Config
    except UserError as error:
        say(f"left out: {error}")
        return None
