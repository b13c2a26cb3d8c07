"""The rows of an order's tasks, as a run uses them, and what is to be said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cl_runner.config.schema import DataConfig, RunConfig
from cl_runner.methods.protocol import StagePlan
from cl_runner.metrics.scores import no_variance
from cl_runner.tasks.rows import Rows, check_forms, load_rows
from cl_runner.tasks.task import Split, Task


@dataclass
class Data:
    """The rows of an order's tasks, label-checked, each with the data settings of its task."""

    tasks: dict[str, Task]
    settings: dict[str, DataConfig]
    train: dict[str, Rows]
    test: dict[str, Rows]

    @classmethod
    def load(
        cls, tasks: Sequence[Task], config: RunConfig, plans: Sequence[StagePlan], only: Sequence[str] | None = None
    ) -> Data:
        """Read every row that any stage will want; raises UserError for whatever is wrong with one.

        only: the tasks of which the test rows are read, and no other rows; the rest is left empty. A run has answered
        these before: empty texts among them are not refused.
        """
        settings = {task.name: data_settings(config, plans, task.name) for task in tasks}
        if only is not None:
            settings = {name: keeping_empty(data) for name, data in settings.items()}

        def read(task: Task, split: Split) -> Rows:
            wanted = only is None or (split == "test" and task.name in only)
            return load_rows(task, settings[task.name], split) if wanted else Rows([], split, "not read")

        train = {task.name: read(task, "train") for task in tasks}
        test = {task.name: read(task, "test") for task in tasks}
        for name in train:
            check_forms(name, train[name], test[name])
        return cls({task.name: task for task in tasks}, settings, train, test)

    @property
    def synthetic(self) -> bool:
        """Whether any row was made by a grammar."""
        return bool(self.made_up())

    def made_up(self) -> list[str]:
        """The tasks with rows made by a grammar."""
        return [name for name in self.tasks if self.train[name].synthetic or self.test[name].synthetic]

    def left_out(self) -> list[str]:
        """A line on the rows left out because their label is outside the task's set; none where there are none."""
        return self._unknown("left out", scored=False)

    def without_gold(self) -> list[str]:
        """A line on the rows left out because they have no answer; none where there are none."""
        parts = [
            f"{name} {rows.without_gold} {rows.split}"
            for name in self.tasks
            for rows in (self.train[name], self.test[name])
            if rows.without_gold
        ]
        return [f"rows without an answer, left out and never scored: {', '.join(parts)}"] if parts else []

    def in_train(self) -> list[str]:
        """A line on the test rows whose text is in train too; none where there are none, or rows are made up."""
        counts = {name: count for name, count in self.repeated.items() if not self.test[name].synthetic}
        parts = [f"{name} {count} of {len(self.test[name])}" for name, count in counts.items() if count]
        return [f"test rows whose text is in train too: {', '.join(parts)}"] if parts else []

    @cached_property
    def repeated(self) -> dict[str, int]:
        """Task → how many of its test rows have a text that a train row of it has, as it stands."""
        found = {}
        for name in self.tasks:
            texts = {row.text for row in self.train[name].rows}
            found[name] = sum(row.text in texts for row in self.test[name].rows)
        return found

    def scored_unknown(self) -> list[str]:
        """A line on the test rows that are scored by such a label (``data.unknown_test``)."""
        return self._unknown("scored all the same", scored=True)

    def _unknown(self, what: str, *, scored: bool) -> list[str]:
        parts = [
            f"{name} {sum(rows.unknown.values())} {rows.split} "
            f"({', '.join(f'{label}: {n}' for label, n in rows.unknown.items())})"
            for name in self.tasks
            for rows in (self.train[name], self.test[name])
            if rows.unknown and rows.scored == scored
        ]
        return [f"rows {what}, their label being none of the task's: {'; '.join(parts)}"] if parts else []

    def unseen(self) -> list[str]:
        """A line for each split of a task that has no row of some label, as a cut of a sorted file has."""
        found = []
        for name, task in self.tasks.items():
            for rows in (self.train[name], self.test[name]):
                known = {label for row in rows.rows for label in task.given(row.label)}
                missing = [label for label in task.labels or () if label not in known]
                if rows.rows and missing:
                    cut = f" among the {len(rows)} taken" if rows.cut else ""
                    if rows.cut and not self.settings[name].balanced and not set(missing) <= set(rows.absent):
                        cut += "; data.balanced=true takes of each label"
                    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
                    found.append(f"task {name}: no {rows.split} row of {', '.join(missing[:5])}{more}{cut}")
        return found

    def constant(self) -> list[str]:
        """A line for each task whose score will be undefined, whatever is answered."""
        golds = {name: [row.label for row in self.test[name].rows] for name in self.tasks}
        whys = {name: no_variance(task.metric, golds[name]) for name, task in self.tasks.items()}
        return [f"task {name}: {self.tasks[name].metric} will be undefined: {why}" for name, why in whys.items() if why]

    def read_as(self) -> list[str]:
        """Lines on how own files were read, and one on texts that are empty; none where all is plain."""
        splits = [(name, rows) for name in self.tasks for rows in (self.train[name], self.test[name])]
        lines = dict.fromkeys(f"task {name}: {note}" for name, rows in splits for note in rows.notes)
        empty = [f"{name} {rows.empty} {rows.split}" for name, rows in splits if rows.empty]
        return [*lines, *([f"texts that are empty or lack a part, kept: {', '.join(empty)}"] if empty else [])]

    def about(self) -> dict[str, Any]:
        """What a run says of its data: rows, source and fingerprint of every split; those left out; those in both."""
        return {
            name: {
                split: {
                    "rows": len(rows),
                    "source": rows.source,
                    "synthetic": rows.synthetic,
                    "dropped": rows.dropped,
                    "without_gold": rows.without_gold,
                    **({"in_train": self.repeated[name]} if split == "test" else {}),
                    "fingerprint": rows.fingerprint,
                }
                for split, rows in (("train", self.train[name]), ("test", self.test[name]))
            }
            for name in self.tasks
        }

    def definitions(self) -> dict[str, str]:
        """A hash of what each task asks, and of its metric; where its rows are from is not in it."""
        return {name: task.definition for name, task in self.tasks.items()}

    def scoring(self) -> dict[str, str]:
        """The rule by which answers are right, of each task whose score is made of right answers."""
        return {name: task.scoring for name, task in self.tasks.items() if task.scoring}


def data_settings(config: RunConfig, plans: Sequence[StagePlan], task: str) -> DataConfig:
    """The data settings of a task, at the first stage that trains it: rows are a task's own, whoever it trains with."""
    first = next((index for index, plan in enumerate(plans) if task in plan.tasks), -1)
    return config.at(first + 1, task).data


def keeping_empty(data: DataConfig) -> DataConfig:
    """The same settings, under which rows that a run has used are read again, whatever is refused by now."""
    return data.model_copy(update={"empty_texts": "keep"})
