"""``cl-runner analyze``: what the stages of a run, or adapters from anywhere, have changed of the weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count as count_from
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_runner.atomic import read_json, write_json
from cl_runner.commands.given import own_settings
from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError
from cl_runner.imports import light_imports
from cl_runner.runs import catalog
from cl_runner.runs.folder import RunDir, readable, stage_names
from cl_runner.terminal.console import print_json, rich_print, say
from cl_runner.terminal.progress import Screen, ShownStage

if TYPE_CHECKING:
    from cl_runner.adapters.lora_folder import LoraFolder
    from cl_runner.adapters.merged_folder import MergedFolder
    from cl_runner.adapters.task_pairs import TaskPair
    from cl_runner.metrics.updates.analysis import Changes
    from cl_runner.models.base_weights import BaseWeights
    from cl_runner.report.updates import Section, UpdatesReport
    from cl_runner.runs.stage_updates import StageChanges

# What is computed after a run: as many entries of ΔW as a core goes through in so much of the run's time, or seconds.
SHARE, LITTLE, PACE = 0.02, 2.0, 3e7  # the last in a second: benchmarks/analysis.py, of T5-large's shape
TOP_K, EPSILON = 10, 0.5  # of intruder dimensions, as published
COSTLY = ("intruders", "gradients", "routes", "drift")  # of it what is computed only when it is asked for


@dataclass(frozen=True)
class Asked:
    """What of the metrics that need more than the adapters is asked for.

    model: the base, by name or folder; of a run it is known. intruders: whether they are counted, which takes long,
    among the ``top_k`` first singular vectors, by |cos| under ``epsilon``. gradients: so many train rows of each of a
    run's tasks; routes: so many test rows. text: a file. unseen: tasks, or orders, by name. data_dir: where the rows of
    both are. trust: the code that a base brings may be run.
    """

    layers: str | None = None
    model: str | None = None
    intruders: bool = False
    top_k: int | None = None
    epsilon: float | None = None
    gradients: int | None = None
    routes: int | None = None
    text: Path | None = None
    unseen: Sequence[str] = ()
    data_dir: str | None = None
    trust: bool = False

    @property
    def of_models(self) -> list[str]:
        """The flags given that ask the models of a run."""
        given = {
            "--gradients": self.gradients,
            "--routes": self.routes,
            "--text": self.text,
            "--unseen": self.unseen,
        }
        return [flag for flag, value in given.items() if value]


def analyze(wanted: Sequence[str], asked: Asked, *, root: Path, form: str) -> None:
    """``cl-runner analyze``: one run, or folders of adapters."""
    if not asked.intruders and (asked.top_k is not None or asked.epsilon is not None):
        raise UserError("--top-k and --epsilon are of intruder dimensions; say --intruders too")
    paths = [Path(word) for word in wanted]
    if len(paths) > 1:
        for path in paths:
            if RunDir(path).exists() or RunDir(root / path).exists():
                raise UserError(f"{path} is a run; analyze takes one run, or folders of adapters")
    with Screen() as screen:
        if len(paths) > 1 or (wanted and os.path.isdir(wanted[0]) and not RunDir(paths[0]).exists()):  # noqa: PTH112 - Path's takes no long name
            report = _of_folders(paths, asked, screen)
        else:
            run = catalog.find(root, wanted[0] if wanted else None)
            report = _of_run(run, asked, screen)
            if not wanted:
                screen.line(f"the newest run: {run.path}")
            _keep(run, report.to_json(), screen)
    if form == "json":
        print_json(report.to_json())
    elif form == "csv":
        for line in (*report.notes, *report.skipped):
            say(line)
        print(report.csv(), end="")
    else:
        rich_print(report)


def analyze_after(run: RunDir, seconds: float) -> None:
    """What the adapters alone say, kept beside a run that has ended, where that is little of the ``seconds`` it took.

    Raises UserError where a stage cannot be read.
    """
    names = _finished(run)
    with Screen(enabled=False) as screen:
        changes, skipped = _changes(run, names, _no_base)
        layers = {layer: shape for each in changes for layer, shape in each.shapes.items()}
        entries = len(changes) * sum(m * n for m, n in layers.values())
        if changes and entries <= PACE * max(LITTLE, SHARE * seconds):
            report = _report(changes, _of(run, names), run.name, Asked(), None, _notes(run, changes), skipped, screen)
            _keep(run, report.to_json(), screen)


def _no_base() -> BaseWeights:
    raise UserError("needs the base, which is not read again after a run: cl-runner analyze")


def _finished(run: RunDir) -> list[str]:
    """The run's finished stages. Raises UserError if there is none."""
    with readable(run):
        planned = stage_names(run.about())
        names = planned[: run.committed(planned)]
    if not names:
        raise UserError(f"the run {run.path} has no finished stage yet")
    return names


def _changes(
    run: RunDir, names: Sequence[str], base: Callable[[], BaseWeights]
) -> tuple[list[StageChanges], list[str]]:
    """What each stage has changed, and lines on what is left out."""
    with light_imports():
        from cl_runner.runs.stage_updates import stage_changes

    changes, skipped = stage_changes(run, names, base)
    planned = len(run.about()["stages"])
    if len(names) < planned:
        skipped.append(f"{planned - len(names)} of {planned} stages, not trained yet")
    return changes, skipped


def _notes(run: RunDir, changes: Sequence[StageChanges]) -> list[str]:
    from cl_runner.runs.answering import why_no_folder

    notes = []
    if on := [each.name for each in changes if each.differs]:
        notes.append(f"{', '.join(on)}: trained on; ΔW is what changed, and A has the rows of before and after")
    if why := why_no_folder(run):
        notes.append(f"the method {why}: ΔW is how that adapter changed, and its angles say nothing of the pairs'")
    return notes


def _of(run: RunDir, names: Sequence[str]) -> dict[str, Any]:
    """What is analysed: each stage by the hash of its last file, which has those of all others."""
    return {"run": str(run.path), "stages": run.digests(names)}


def _of_run(run: RunDir, asked: Asked, screen: Screen) -> UpdatesReport:
    names = _finished(run)

    @cache
    def base() -> BaseWeights:
        with light_imports():
            from cl_runner.models.base_weights import BaseWeights  # which brings transformers

        return BaseWeights(_model(run, asked.model, asked.trust))

    if asked.model is not None:
        base()  # to say first what is wrong with it
    changes, skipped = _changes(run, names, base)
    report = _report(changes, _of(run, names), run.name, asked, base, _notes(run, changes), skipped, screen)
    if not asked.of_models:
        return report
    from cl_runner.commands.analyze_models import ask

    shapes = {layer: metrics.shape for layer, metrics in report.found.layers.items()}
    more, gone = ask(run, names, shapes, asked, partial(bar, screen))
    return replace(report, sections=[*report.sections, *more], skipped=[*report.skipped, *gone])


def _of_folders(paths: Sequence[Path], asked: Asked, screen: Screen) -> UpdatesReport:
    with light_imports():
        from cl_runner.adapters.lora_folder import LoraFolder, NeedsBase
        from cl_runner.adapters.merged_folder import open_folder

    if asked.of_models:
        raise UserError(f"{asked.of_models[0]}: asks the models of a run; of adapters there are none")
    base: Callable[[], BaseWeights] | None = None
    if asked.model is not None:
        base = _named(asked.model)

    def opened(path: Path, name: str) -> LoraFolder | MergedFolder | str:
        try:
            return open_folder(path, name, lambda: base().network) if base else LoraFolder(path, name)
        except NeedsBase as error:
            return f"{error}; say it with --model"
        except UserError as error:
            return str(error)

    each_way = [opened(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    skipped = [each for each in each_way if isinstance(each, str)]
    found, notes = _of_their_tasks([each for each in each_way if not isinstance(each, str)])
    bases: dict[str, list[str]] = {}
    for each in found:
        bases.setdefault(each.base or "none", []).append(each.name)
    if len(bases) > 1:
        of = "; ".join(f"{base} ({', '.join(names)})" for base, names in bases.items())
        notes.append(f"they name different bases, so that what overlaps may say nothing: {of}")
    what = "update" if len(found) > len(each_way) else "adapter"
    title = f"{len(found)} {what}{'s' * (len(found) > 1)}"
    of_paths = {"adapters": list(dict.fromkeys(str(each.path) for each in found))}
    return _report(found, of_paths, title, asked, base, notes, skipped, screen)


def _of_their_tasks(
    folders: Sequence[LoraFolder | MergedFolder],
) -> tuple[list[LoraFolder | MergedFolder | TaskPair], list[str]]:
    """The same, those that hold the pairs of several tasks taken apart, each pair once; and lines on all of them."""
    from cl_runner.adapters.merged_folder import MergedFolder
    from cl_runner.adapters.task_pairs import TaskPair, apart

    found: list[LoraFolder | MergedFolder | TaskPair] = []
    notes: list[str] = []
    for folder in folders:
        notes += [f"{folder.name}: {note}" for note in folder.notes]
        ranks = () if isinstance(folder, MergedFolder) else folder.tasks
        if isinstance(folder, MergedFolder) or not ranks:
            found.append(folder)
            continue
        new = apart(folder, [each for each in found if isinstance(each, TaskPair)])
        found += new
        of = "by the code of O-LoRA or N-LoRA"
        held = (
            f"the pairs of {len(ranks)} tasks, oldest first"
            if len(ranks) > 1
            else f"{ranks[0]} rows, taken as one task's"
        )
        told = f"; {len(ranks) - len(new)} of them stand above" if len(new) < len(ranks) else ""
        notes.append(f"{folder.name}: {of}: {held}{told}")
    return found, notes


def _report(
    changes: Sequence[Changes],
    of: dict[str, Any],
    title: str,
    asked: Asked,
    base: Callable[[], BaseWeights] | None,
    notes: list[str],
    skipped: list[str],
    screen: Screen,
) -> UpdatesReport:
    from cl_runner.metrics.updates.analysis import analyse, in_common
    from cl_runner.report.updates import UpdatesReport

    if not changes:
        raise UserError(f"nothing to analyse: {'; '.join(skipped)}")
    names, others = in_common(changes, asked.layers)
    sections = _against(changes, names, asked, base, skipped, screen)
    found = analyse(changes, names, bar(screen, "layers", len(names)))
    of = {**of, **({"pattern": asked.layers} if asked.layers is not None else {})}
    return UpdatesReport(of, title, found, sections, notes, [*others, *skipped])


def _against(
    changes: Sequence[Changes],
    layers: Sequence[str],
    asked: Asked,
    base: Callable[[], BaseWeights] | None,
    skipped: list[str],
    screen: Screen,
) -> list[Section]:
    """Metrics against the base. Raises UserError where it cannot be read, and it, or what needs it, was asked for."""
    from cl_runner.metrics.updates.against_base import intruding, moved
    from cl_runner.metrics.updates.intruders import Looked
    from cl_runner.report.against_base import IntrudersSection, MovedSection

    if base is None:
        if asked.intruders:
            raise UserError("--intruders: needs the base of the adapters; say which with --model")
        return []
    names = [each.name for each in changes]
    sections: list[Section] = []
    try:
        found = moved(changes, layers, base(), bar(screen, "magnitude and direction", len(layers)))
        sections.append(MovedSection(names, base().name, found))
    except UserError as error:
        if asked.intruders or asked.model is not None:
            raise
        skipped.append(f"what needs the base (ΔM, ΔD): {error}")
        return []
    if asked.intruders:
        looked = Looked(asked.top_k or TOP_K, EPSILON if asked.epsilon is None else asked.epsilon)
        counts = intruding(changes, layers, base(), looked, bar(screen, "intruder dimensions", len(layers)))
        sections.append(IntrudersSection(names, base().name, counts, asked.layers))
    return sections


def bar(screen: Screen, what: str, total: int) -> Callable[[int], None]:
    """A bar of its own, from nothing done; what is to be told how much is."""
    screen.begin([ShownStage("", 0, total)])
    screen.parts(what, 0, total)
    return lambda done: screen.parts(what, done, total)


def _names(paths: Sequence[Path]) -> list[str]:
    """Each by as many of its last parts as tell all apart; where one is given twice, by its place too."""
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        return [f"{each[-1]} #{place}" for place, each in enumerate(parts, 1)]
    count = next(count for count in count_from(1) if len({each[-count:] for each in parts}) == len(parts))
    return ["/".join(each[-count:]) for each in parts]


def _named(name: str) -> Callable[[], BaseWeights]:
    """A base by name or folder. Raises UserError where it is not on this machine."""
    with light_imports():
        from cl_runner.models.base_weights import BaseWeights

    found = BaseWeights(ModelConfig(name=name))
    return lambda: found


def _model(run: RunDir, name: str | None, trust: bool) -> ModelConfig:
    """The run's base model, which may be at ``name`` now. Raises UserError where it is another one by now."""
    from cl_runner.models.identity import differing_model, model_identity
    from cl_runner.models.locate import locate

    model = own_settings(run, model=name, trust=trust).config.model
    with readable(run):
        then = run.about()["identity"]["model"]
    if other := differing_model(then, model_identity(locate(model), model.quantize)):
        raise UserError(f"the base model {model.name} is not the one of the run ({', '.join(other)})")
    return model


def _keep(run: RunDir, values: dict[str, Any], screen: Screen) -> None:
    """Beside the run's other results, and with what an earlier call found at more cost of the same stages.

    Where nothing may be written there, that is said.
    """
    file = run.analysis_file
    try:
        before = read_json(file) if file.is_file() else {}
    except UserError:
        before = {}  # broken, and about to be written anew
    if before.get("stages") != values["stages"]:
        before = {}
    if "pattern" in values and before and "pattern" not in before:  # all layers stay, beside what was asked for of some
        values = {**before, **{key: values[key] for key in COSTLY if key in values}}
        screen.line(f"{file} keeps what it says of all layers")
    kept = {key: before[key] for key in COSTLY if key in before}
    try:
        write_json(file, {**kept, **values})
    except OSError as error:
        screen.line(f"{file} is not written: {error.strerror or error}")
