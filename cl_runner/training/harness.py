"""``cl-runner eval --lm-eval``: a committed stage, or the base, scored by tasks of lm-evaluation-harness.

Its results stand as it writes them, in the run's folder: ``lm-eval/02-amazon/results_….json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cl_runner.atomic import write_text
from cl_runner.engine import zero as engine
from cl_runner.engine.process import Place
from cl_runner.errors import UserError, did_you_mean, first_line
from cl_runner.offline import cache_alone
from cl_runner.runs.folder import RunDir, readable, stage_names
from cl_runner.settings import Resolved
from cl_runner.tasks.quiet_libraries import quiet
from cl_runner.terminal.progress import Screen, ShownStage
from cl_runner.training.as_committed import BASE, as_committed
from cl_runner.training.ask_again import same_run
from cl_runner.training.checkpoint import refuse_removed
from cl_runner.training.evaluation import answering
from cl_runner.training.plan import Plan
from cl_runner.training.stage import StageRun

FOLDER = "lm-eval"  # in the run's


@dataclass(frozen=True)
class Harnessed:
    """What the harness found; results: task → its metrics, under the harness's own names (``acc,none``)."""

    stage: int  # from 1; 0 is the untouched base
    name: str
    file: Path
    results: Mapping[str, Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        results = {task: dict(metrics) for task, metrics in self.results.items()}
        return {"stage": self.stage, "name": self.name, "file": str(self.file), "results": results}

    def lines(self) -> list[str]:
        """A line a metric."""
        said = [f"stage {self.stage} ({self.name}) by lm-evaluation-harness:"]
        for task, metrics in self.results.items():
            for key, value in metrics.items():
                metric, _, how = key.partition(",")
                if isinstance(value, float | int) and how and not metric.endswith("_stderr"):
                    error = metrics.get(f"{metric}_stderr,{how}")
                    spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                    by = "" if how == "none" else f" ({how})"
                    said.append(f"  {task} {metric}{by}: {value:.4f}{spread}")
        return [*said, f"written: {self.file}"]


def score(
    resolved: Resolved,
    rundir: RunDir,
    index: int,
    tasks: Sequence[str],
    limit: int | None,
    include: Path | None,
    place: Place,
    screen: Screen,
) -> Harnessed:
    """Score stage ``index`` (from 0; ``BASE``: the untouched base) by tasks of the harness, and write its results.

    limit: only the first so many rows of each task. include: a folder of task files beside the harness's own.

    Raises:
        UserError: there is no such task, or one of its rows cannot be asked; the stage is damaged.
    """
    if place.ranks > 1:
        raise UserError("--lm-eval runs in one process; leave the launcher out")
    assert resolved.order is not None
    config = resolved.config.model_copy(deep=True)
    config.eval.extra = []
    with readable(rundir):
        names = stage_names(rundir.about())
        if index != BASE:
            refuse_removed(rundir.stage_dir(index, names[index]))
        plan = Plan.make(config, resolved.order.name, resolved.order.tasks, only=[])
    manager = _tasks(tasks, include)
    name = names[index] if index != BASE else "base"
    engine.start(place)
    try:
        with ExitStack() as stack:
            with cache_alone():  # what a run's folder names is not fetched; the data of a task that is named here are
                same_run(plan, rundir, [])
                stage, _ = stack.enter_context(as_committed(plan, rundir, index, place))
            screen.begin([ShownStage("", 0, 0)])
            show = stack.enter_context(answering(stage))
            results = _evaluate(stage, show, index, manager, tasks, limit, rundir, screen)
    finally:
        engine.stop()
    folder = rundir.path / FOLDER / rundir.stage_dir(index, name).name
    file = folder / f"results_{datetime.now().isoformat().replace(':', '-')}.json"
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, results.pop("text"))
    return Harnessed(index + 1, name, file, results["results"])


def _tasks(tasks: Sequence[str], include: Path | None) -> Any:
    """The harness's register of tasks. Raises UserError where one of these is not in it."""
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise UserError(f"--include-path {include}: no such folder")
    with _its_faults("its tasks cannot be read"):
        if include is not None:  # its own are many thousands, and take ten seconds to find
            manager = TaskManager(include_path=str(include), include_defaults=False)
            if all(manager.match_tasks([name]) for name in tasks):
                return manager
        manager = TaskManager(include_path=None if include is None else str(include))
    for name in tasks:
        if not manager.match_tasks([name]):
            known = manager.all_tasks
            hint = did_you_mean(name, known) or f"; it has {len(known)}, lm-eval ls tasks lists them"
            raise UserError(f"--lm-eval {name}: lm-evaluation-harness has no such task{hint}")
    return manager


def _evaluate(
    stage: StageRun,
    show: Any,
    index: int,
    manager: Any,
    tasks: Sequence[str],
    limit: int | None,
    rundir: RunDir,
    screen: Screen,
) -> dict[str, Any]:
    from lm_eval import evaluator
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import handle_non_serializable

    from cl_runner.training.harness_model import HarnessModel

    model = HarnessModel(stage, screen.evaluating)
    if index != BASE:
        show(model.known)
    # It would ask git for the commit of the folder we are in, which is no code of this run's, and git would complain.
    evaluator.get_git_commit_hash = lambda: None
    tracker = EvaluationTracker()
    about = {"model": f"{rundir.name}/{index + 1}", "base": stage.room.base.name_or_path}
    with _its_faults("a task cannot be asked"), quiet():
        found = evaluator.simple_evaluate(
            model, about, list(manager.match_tasks(list(tasks))), limit=limit, task_manager=manager, log_samples=False,
            evaluation_tracker=tracker, batch_size=1,
        )  # fmt: skip
    tracker.general_config_tracker.log_end_time()
    found = {**found, **asdict(tracker.general_config_tracker)}
    return {"results": found["results"], "text": json.dumps(found, indent=2, default=handle_non_serializable)}


@contextmanager
def _its_faults(what: str) -> Iterator[None]:
    """What goes wrong in the harness, its tasks and their data, as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of datasets, jinja2, yaml and of tasks' own code: each has errors of its own
        said = first_line(error) or type(error).__name__
        raise UserError(f"--lm-eval: {what}: {said}") from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
