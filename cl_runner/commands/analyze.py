"""``cl-runner analyze``: what the stages of a run, or adapters from anywhere, have changed of the weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import count as count_from
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_runner import methods
from cl_runner.atomic import write_json
from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError
from cl_runner.imports import light_imports
from cl_runner.runs import catalog
from cl_runner.runs.folder import RunDir, kept_order, readable, stage_names
from cl_runner.settings import resolve
from cl_runner.terminal.console import print_json, rich_print
from cl_runner.terminal.progress import Screen

if TYPE_CHECKING:
    from cl_runner.report.updates import UpdatesReport

FILE = "analysis.json"  # in a run's folder


def analyze(wanted: Sequence[str], *, root: Path, layers: str | None, form: str) -> None:
    """``cl-runner analyze``: one run, or folders of adapters."""
    paths = [Path(word) for word in wanted]
    if len(paths) > 1:
        for path in paths:
            if RunDir(path).exists() or RunDir(root / path).exists():
                raise UserError(f"{path} is a run; analyze takes one run, or folders of adapters")
    with Screen() as screen:
        if len(paths) > 1 or (paths and paths[0].is_dir() and not RunDir(paths[0]).exists()):
            report = _of_folders(paths, layers, screen)
        else:
            run = catalog.find(root, wanted[0] if wanted else None)
            report = _of_run(run, layers, screen)
            if not wanted:
                screen.line(f"the newest run: {run.path}")
            _keep(run, report.to_json(), screen)
    if form == "json":
        print_json(report.to_json())
    elif form == "csv":
        for line in (*report.notes, *report.skipped):
            print(line, file=sys.stderr)
        print(report.csv(), end="")
    else:
        rich_print(report)


def _of_run(run: RunDir, layers: str | None, screen: Screen) -> UpdatesReport:
    with readable(run):
        about = run.about()
        planned = stage_names(about)
        names = planned[: run.committed(planned)]
    if not names:
        raise UserError(f"the run {run.path} has no finished stage yet")
    with light_imports():
        from cl_runner.runs.stage_updates import stage_changes

    changes, skipped = stage_changes(run, names, lambda: _base(run))
    if len(names) < len(planned):
        skipped.append(f"{len(planned) - len(names)} of {len(planned)} stages, not trained yet")
    on = [each.name for each in changes if each.differs]
    notes = [f"{', '.join(on)}: trained on; ΔW is what changed, and A has the rows of before and after"] if on else []
    return _report(changes, {"run": str(run.path)}, run.name, layers, notes, skipped, screen)


def _of_folders(paths: Sequence[Path], layers: str | None, screen: Screen) -> UpdatesReport:
    with light_imports():
        from cl_runner.adapters.lora_folder import LoraFolder

    def opened(path: Path, name: str) -> LoraFolder | str:
        try:
            return LoraFolder(path, name)
        except UserError as error:
            return str(error)

    each_way = [opened(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    found = [each for each in each_way if not isinstance(each, str)]
    skipped = [each for each in each_way if isinstance(each, str)]
    notes = [f"{each.name}: {note}" for each in found for note in each.notes]
    bases: dict[str, list[str]] = {}
    for each in found:
        bases.setdefault(each.base or "none", []).append(each.name)
    if len(bases) > 1:
        of = "; ".join(f"{base} ({', '.join(names)})" for base, names in bases.items())
        notes.append(f"they name different bases, so that what overlaps may say nothing: {of}")
    title = f"{len(found)} adapter{'s' * (len(found) > 1)}"
    return _report(found, {"adapters": [str(each.path) for each in found]}, title, layers, notes, skipped, screen)


def _report(
    changes: Sequence[Any],
    of: dict[str, Any],
    title: str,
    layers: str | None,
    notes: list[str],
    skipped: list[str],
    screen: Screen,
) -> UpdatesReport:
    from cl_runner.metrics.updates.analysis import analyse, in_common
    from cl_runner.report.updates import UpdatesReport

    if not changes:
        raise UserError(f"nothing to analyse: {'; '.join(skipped)}")
    names, others = in_common(changes, layers)
    screen.parts("layers", 0, len(names))
    found = analyse(changes, names, lambda done: screen.parts("layers", done, len(names)))
    of = {**of, **({"pattern": layers} if layers is not None else {})}
    return UpdatesReport(of, title, found, notes, [*others, *skipped])


def _names(paths: Sequence[Path]) -> list[str]:
    """Each by as many of its last parts as tell all apart; where one is given twice, by its place too."""
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        return [f"{each[-1]} #{place}" for place, each in enumerate(parts, 1)]
    count = next(count for count in count_from(1) if len({each[-count:] for each in parts}) == len(parts))
    return ["/".join(each[-count:]) for each in parts]


def _base(run: RunDir) -> ModelConfig:
    """The run's base model. Raises UserError where it is another one by now."""
    from cl_runner.models.locate import locate, model_identity

    resolved = resolve(
        config_file=run.config_file,
        method_schema=methods.method_schema,
        stage_names=methods.stage_names,
        kept_order=kept_order,
    )
    model = resolved.config.model
    if run.about()["identity"]["model"] != model_identity(locate(model), model.quantize):
        raise UserError(f"the base model {model.name} is not the one of the run")
    return model


def _keep(run: RunDir, values: dict[str, Any], screen: Screen) -> None:
    """Beside the run's other results; where nothing may be written there, that is said."""
    try:
        write_json(run.path / FILE, values)
    except OSError as error:
        screen.line(f"{run.path / FILE} is not written: {error.strerror or error}")
