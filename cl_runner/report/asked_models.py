"""What the models of a run answered ``analyze``: gradients of its tasks, whose part answers whom, base drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import Tensor

from cl_runner.metrics.drift import Known
from cl_runner.metrics.routes import Routes
from cl_runner.metrics.updates.gradients import TaskGradients
from cl_runner.report.tables import number
from cl_runner.report.update_numbers import plain, plain_values, short, table, update_name


@dataclass(frozen=True)
class GradientsSection:
    """rows: of each task, at most. found: at the base, and after the last stage."""

    rows: int
    found: Sequence[TaskGradients]
    pattern: str | None = None
    key: ClassVar[str] = "gradients"

    def to_json(self) -> dict[str, Any]:
        """Norms and cosine matrices over tasks, of all layers together and of each."""
        first = self.found[0]
        return {
            **({"pattern": self.pattern} if self.pattern is not None else {}),
            "rows": self.rows,
            "tasks": list(first.tasks),
            "layers": len(first.inner),
            "at": [
                {
                    "stage": each.stage,
                    "norm": plain_values(each.norm),
                    "cosine": [plain_values(row) for row in each.cosine],
                    "by_layer": {
                        layer: {"cosine": [plain_values(row) for row in each.cosine_of(layer)]} for layer in each.inner
                    },
                }
                for each in self.found
            ],
        }

    def columns(self) -> Mapping[str, Mapping[str, Tensor]]:
        """None: they are of pairs of tasks."""
        return {}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        before, after = self.found
        tasks, cells = before.tasks, []
        for i in range(len(tasks)):
            row = [(before.cosine if i > j else after.cosine)[i, j].item() for j in range(len(tasks))]
            cells.append(["·" if i == j else number(value, 2) for j, value in enumerate(row)])
        yield Text(
            f"\ncosine of the tasks' mean gradients, of {self.rows} rows each: at the base (below), after "
            f"{after.stage} (above)"
        )
        width, names = 6, 1 + max(len(update_name(i, task)) for i, task in enumerate(tasks))
        across = max((options.max_width - names) // width, 1)
        for start in range(0, len(tasks), across):
            part = range(start, min(start + across, len(tasks)))
            shown = table("", *(str(j + 1) for j in part))
            for i, task in enumerate(tasks):
                shown.add_row(update_name(i, task), *(cells[i][j] for j in part))
            yield shown


@dataclass(frozen=True)
class RoutesSection:
    """rows: of each task, at most. found: after each stage whose model is there."""

    rows: int
    found: Sequence[Routes]
    key: ClassVar[str] = "routes"

    def to_json(self) -> dict[str, Any]:
        """Of each task what every part counts for, the mean over rows."""
        return {
            "rows": self.rows,
            "at": [
                {
                    "stage": each.stage,
                    "parts": list(each.parts),
                    "weights": {task: [plain(value) for value in of] for task, of in each.weights.items()},
                }
                for each in self.found
            ],
        }

    def columns(self) -> Mapping[str, Mapping[str, Tensor]]:
        """None: they are of no layer."""
        return {}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.found:
            return
        last = self.found[-1]
        yield Text(
            f"\nwhat each stage's part (across) counts for with each task's rows, the mean of {self.rows}: after "
            f"{last.stage}"
        )
        width, names = 6, 1 + max(len(update_name(t, task)) for t, task in enumerate(last.weights))
        across = max((options.max_width - names) // width, 1)
        for start in range(0, len(last.parts), across):
            part = range(start, min(start + across, len(last.parts)))
            shown = table("", *(str(t + 1) for t in part))
            for t, (task, weights) in enumerate(last.weights.items()):
                shown.add_row(update_name(t, task), *(number(weights[i], 2) for i in part))
            yield shown


@dataclass(frozen=True)
class DriftSection:
    """file: of the text, if one was given. rows: unseen task → its test rows. synthetic: those of made-up rows."""

    file: str | None
    rows: Mapping[str, int]
    synthetic: Sequence[str]
    found: Sequence[Known]
    key: ClassVar[str] = "drift"

    def to_json(self) -> dict[str, Any]:
        """Loss in nats a token; accuracy in percent."""
        tasks = {name: {"rows": count, "synthetic": name in self.synthetic} for name, count in self.rows.items()}
        return {
            **({"text": self.file} if self.file is not None else {}),
            "tasks": tasks,
            "at": [
                {
                    "stage": each.stage,
                    "loss": None if each.loss is None else plain(each.loss),
                    "accuracy": {task: plain(score) for task, score in each.accuracy.items()},
                    "mean_accuracy": None if each.mean_accuracy is None else plain(each.mean_accuracy),
                }
                for each in self.found
            ],
        }

    def columns(self) -> Mapping[str, Mapping[str, Tensor]]:
        """None: it is of no layer."""
        return {}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        of = [f"loss on {self.file} (nats a token)"] if self.file else []
        mark = f" (synthetic: {', '.join(self.synthetic)})" if self.synthetic else ""
        of += [f"choices on {', '.join(self.rows)}{mark}, percent"] if self.rows else []
        yield Text(f"\nbase drift: {'; '.join(of)}")
        several = ["mean"] if len(self.rows) > 1 else []
        shown = table("after", *(["loss"] if self.file else []), *several, *self.rows)
        for t, each in enumerate(self.found):
            cells = [] if each.loss is None else [short(each.loss)]
            if several and each.mean_accuracy is not None:
                cells.append(number(each.mean_accuracy, 1))
            cells += [number(score, 1) for score in each.accuracy.values()]
            shown.add_row(each.stage if not t else update_name(t - 1, each.stage), *cells)
        yield shown
