"""The part of ``cl-runner analyze`` that loads a run's model and asks it: gradients of tasks, routes, base drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cl_runner.commands.given import own_settings, several
from cl_runner.errors import UserError
from cl_runner.imports import light_imports
from cl_runner.runs.folder import RunDir
from cl_runner.tasks import benchmark
from cl_runner.tasks.order import load_order, order_names
from cl_runner.tasks.task import Task

if TYPE_CHECKING:
    from cl_runner.commands.analyze import Asked
    from cl_runner.report.updates import Section
    from cl_runner.training.base_drift import Bar


def ask(
    run: RunDir,
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, int]],
    asked: Asked,
    bar: Bar,
) -> tuple[list[Section], list[str]]:
    """What was asked for, and lines on what could not be told. Raises UserError.

    names: of the committed stages. shapes: layer → (m, n), of those whose gradients are taken. bar: begins one.
    """
    resolved = own_settings(
        run, model=asked.model, data_dir=asked.data_dir, sets=["eval.mode=choose"], trust=asked.trust
    )
    if asked.data_dir:
        resolved.config.data.source = "folder"
    others = _unseen(asked.unseen, run.about()["tasks"])
    with light_imports():
        from cl_runner.engine.process import here
        from cl_runner.report.asked_models import DriftSection, GradientsSection, RoutesSection
        from cl_runner.training import look
        from cl_runner.training.base_drift import read_texts

    place = here()
    sections: list[Section] = []
    gone: list[str] = []
    texts = read_texts(asked.text) if asked.text else []
    if asked.gradients or asked.routes:
        own = own_settings(run, model=asked.model, data_dir=asked.data_dir, trust=asked.trust)
    if asked.gradients:
        found = look.gradients(own, run, names, asked.gradients, shapes, place, bar)
        sections.append(GradientsSection(asked.gradients, found, asked.layers))
    if asked.routes:
        ways, gone = look.routes(own, run, names, asked.routes, place, bar)
        sections.append(RoutesSection(asked.routes, ways))
    if texts or others:
        data = look.unseen(others, resolved, run) if others else None
        left, more = look.drift(resolved, run, names, texts, data, place, bar)
        gone += more
        rows = {name: len(each) for name, each in data.test.items()} if data else {}
        made_up = [name for name in rows if data and data.test[name].synthetic]
        sections.append(DriftSection(str(asked.text) if asked.text else None, rows, made_up, left))
    return sections, gone


def _unseen(given: Sequence[str], learned: Sequence[str]) -> list[Task]:
    """Tasks by name, and those of orders that the run does not learn. Raises UserError."""
    found: dict[str, Task] = {}
    orders = order_names()
    for name in several("--unseen", given):
        if name in orders or name.endswith((".yaml", ".yml")):
            others = [task for task in load_order(name).tasks if task.name not in learned]
            if not others:
                raise UserError(f"--unseen: the run learns all tasks of the order {name}")
        else:
            if name in learned:
                raise UserError(f"--unseen: {name} is a task of this run")
            others = [benchmark.get(name)]
        for task in others:
            if not task.choices:
                raise UserError(f"--unseen: {task.name} has no labels to choose among")
            found[task.name] = task
    return list(found.values())
