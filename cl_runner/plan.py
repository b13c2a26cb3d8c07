"""What a run will do: its stages, their rows and their batch arithmetic. Known, and refused, before torch is loaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cl_runner.config import DataConfig, RunConfig, TrainingConfig
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.base import Method, Reorthogonalise, StagePlan
from cl_runner.metrics.text import no_variance, require
from cl_runner.tasks.rows import Rows, check_forms, load_rows
from cl_runner.tasks.task import Split, Task


def derived_seed(*parts: object) -> int:
    """A seed from everything that decides it, and from nothing carried along."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic of a stage.

    ``micro_batch`` is what a device really takes at once: the setting, or less where the ranks share a small global
    batch. Micro-batch j of a step holds its rows j·micro … and goes to rank j mod ranks.
    """

    rows: int
    global_batch: int
    micro_batch: int
    ranks: int
    accumulation: int
    epochs: int
    length_window: int

    @classmethod
    def make(cls, rows: int, training: TrainingConfig, ranks: int) -> BatchPlan:
        """The plan for so many rows on so many ranks."""
        micro = min(training.micro_batch, math.ceil(training.global_batch / ranks))
        accumulation = math.ceil(training.global_batch / (micro * ranks))
        return cls(rows, training.global_batch, micro, ranks, accumulation, training.epochs, training.length_window)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last may be short."""
        return math.ceil(self.rows / self.global_batch)

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.steps_per_epoch * self.epochs

    def step_rows(self, seed: int, index: int, lengths: Sequence[int], mixed: bool = False) -> Iterator[list[int]]:
        """The rows of every step: each epoch a new order, from seed, stage, epoch and lengths alone.

        A step's rows are of about equal length: the rows of ``length_window`` steps drawn at random are dealt to these
        by length, and the epoch's steps come in random order. The last step of an epoch may be short; its rows are
        drawn like those of a plain shuffle. ``mixed`` (rows of several tasks, whose lengths tell them apart): every
        step's rows are drawn so, and only sorted.

        Args:
            seed: the run's.
            index: of the stage, from 0.
            lengths: tokens of each row.
            mixed: whether the rows are of several tasks.
        """
        import torch

        size = self.global_batch
        whole = self.rows // size  # full steps of an epoch
        window = 1 if mixed else self.length_window
        for epoch in range(self.epochs):
            generator = torch.Generator().manual_seed(derived_seed(seed, index, "rows", epoch))
            rows = torch.randperm(self.rows, generator=generator).tolist()
            if self.length_window > 1:
                ends = [*range(0, whole * size, window * size), whole * size, self.rows]
                windows = [rows[start:end] for start, end in pairwise(ends)]
                rows = [row for found in windows for row in sorted(found, key=lengths.__getitem__)]
            order = list(range(whole))
            if window > 1:  # a window's steps come shortest first
                order = torch.randperm(whole, generator=generator).tolist()
            for step in order + [whole] * (whole * size < self.rows):
                yield rows[step * size : (step + 1) * size]

    def micro_batches(self, rows: Sequence[int], rank: int) -> Iterator[tuple[int, list[int]]]:
        """(global number, rows) of this rank's micro-batches of a step; rows may be empty, the count never varies."""
        for slot in range(self.accumulation):
            number = slot * self.ranks + rank
            yield number, list(rows[number * self.micro_batch : (number + 1) * self.micro_batch])


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
        """What a run says of its data: rows, source and fingerprint of every split."""
        return {
            name: {
                split: {
                    "rows": len(rows),
                    "source": rows.source,
                    "synthetic": rows.synthetic,
                    "dropped": rows.dropped,
                    "fingerprint": rows.fingerprint,
                }
                for split, rows in (("train", self.train[name]), ("test", self.test[name]))
            }
            for name in self.tasks
        }

    def definitions(self) -> dict[str, str]:
        """A hash of what each task asks, and of its metric; where its rows are from is not in it."""
        return {
            name: hashlib.sha256(json.dumps(task.asked, sort_keys=True).encode()).hexdigest()
            for name, task in self.tasks.items()
        }

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


def unused_settings(config: RunConfig, plans: Sequence[StagePlan]) -> list[str]:
    """A line for each setting of a task that no stage can follow."""
    found = []
    for task, changes in config.tasks.items():
        if any(plan.tasks == (task,) for plan in plans):
            continue
        keys = [key for key in changes if not key.startswith("data.")]
        found += [f"tasks.{task}.{key} is not used: {task} trains together with others" for key in keys]
    return found


def stage_config(config: RunConfig, index: int, plan: StagePlan) -> RunConfig:
    """The config of a stage: what is set for its task (where it trains one) and for its position."""
    return config.at(index + 1, plan.tasks[0] if len(plan.tasks) == 1 else None)


def check_method(
    config: RunConfig, stages: Sequence[StagePlan], shapes: Sequence[tuple[int, int]] | None = None
) -> None:
    """Let the method, as each stage sets it, refuse what cannot work. Raises UserError."""
    order = list(dict.fromkeys(task for plan in stages for task in plan.tasks))
    for index, plan in enumerate(stages):
        of_stage = stage_config(config, index, plan)
        method = make_method(of_stage)
        method.plan(order)
        if of_stage.adapter.r == "auto" and not (method.any_rank or method.prompts or method.full):
            raise UserError(f"adapter.r=auto: {method.name} needs the same rank at every stage; set a number")
        if of_stage.adapter.dropout_past and method.past_as == "other":
            raise UserError(
                f"adapter.dropout_past: {method.name} does not keep what earlier stages learned as folded pairs; set "
                "it to false"
            )
        if method.reorthogonalise is not None:
            check_reorthogonalise(of_stage, method.reorthogonalise, method.full, shapes)
        method.check(of_stage, shapes)


def check_reorthogonalise(
    config: RunConfig, settings: Reorthogonalise, full: bool, shapes: Sequence[tuple[int, int]] | None
) -> None:
    """Refuse what cannot be made orthonormal. Raises UserError."""
    if full:
        raise UserError("method.reorthogonalise: there are no factors under full fine-tuning; leave it out")
    r = config.adapter.largest
    sides = [n if factor == "A" else m for m, n in shapes or () for factor in "AB" if settings.on in (factor, "both")]
    least = min(sides, default=r)
    if settings.how == "hard" and r > least:
        raise UserError(
            f"method.reorthogonalise: of {r} rows in {least} dimensions not all can be orthonormal; set adapter.r to "
            f"{least} or less, or how: soft"
        )


@dataclass
class Plan:
    """What a run will do, known before anything is loaded on a device."""

    config: RunConfig
    order: str
    method: Method
    stages: tuple[StagePlan, ...]
    data: Data
    grows: str = ""  # how much the method will carry, where that is known beforehand
    only: Sequence[str] | None = None  # the tasks that it will be evaluated on; None where it trains

    @classmethod
    def make(cls, config: RunConfig, order: str, tasks: Sequence[Task], only: Sequence[str] | None = None) -> Plan:
        """Check all that can be refused without the model. Raises UserError.

        only: the tasks whose test rows alone are needed, of a plan that will only be evaluated: what cannot be trained
        here, or would be refused by now, still answers.
        """
        method = make_method(config)
        stages = tuple(method.plan([task.name for task in tasks]))
        if only is None:
            cls._check_training(config, method, stages)
        for task in tasks:
            if only is None or task.name in only:
                require(task.metric, task.labels)
        return cls(config, order, method, stages, Data.load(tasks, config, stages, only), only=only)

    @staticmethod
    def _check_training(config: RunConfig, method: Method, stages: Sequence[StagePlan]) -> None:
        if method.full and config.model.dtype == "bf16":
            raise UserError(
                "model.dtype bf16: full fine-tuning trains the weights in fp32; set model.dtype=auto "
                "(training.precision=bf16 computes in bf16)"
            )
        check_method(config, stages)
        for index, plan in enumerate(stages):
            of_stage = stage_config(config, index, plan)
            if make_method(of_stage).full != method.full:
                raise UserError(
                    f"method.train: stage {index + 1} ({plan.name}) trains otherwise; set it for all stages"
                )
            if of_stage.training.deepspeed is not None:
                from cl_runner.engine import read_deepspeed_json

                read_deepspeed_json(of_stage.training.deepspeed)

    def check_shapes(self) -> None:
        """Refuse what only the layers' shapes tell, by the model's config: no weights are loaded. Raises UserError."""
        methods = [make_method(stage_config(self.config, i, stage)) for i, stage in enumerate(self.stages)]
        if not any(method.by_shape or method.reorthogonalise for method in methods):
            return
        from cl_runner.adapters.lora import target_shapes
        from cl_runner.models.base import outline

        model = outline(self.config.model)
        if model is not None:
            shapes = target_shapes(model, self.config.adapter)
            check_method(self.config, self.stages, shapes)
            self.grows = self.method.grows(self.config, shapes)

    def notes(self) -> list[str]:
        """Lines on how files were read, and on what is left out or will be missed.

        Settings that no stage can follow or is too short for; rows of other labels; labels without rows; scores.
        """
        data, unused = self.data, unused_settings(self.config, self.stages)
        rows = [*data.read_as(), *data.left_out(), *data.scored_unknown(), *data.unseen(), *data.constant()]
        return [*unused, *self._never(), *self._no_past(), *rows]

    def _no_past(self) -> list[str]:
        """A line where past pairs are to read the dropped-out input, and there is no dropout or no past pair."""
        adapter, method = self.config.adapter, self.method
        if not adapter.dropout_past:
            return []
        why = ""
        if method.full or method.past_as == "none":
            why = f"{method.name} has no past pairs"
        elif len(self.stages) == 1:
            why = "there is one stage"
        elif not adapter.dropout:
            why = "adapter.dropout is 0"
        return [f"adapter.dropout_past has no effect: {why}"] if why else []

    def _never(self) -> list[str]:
        """A line where a factor is to be put back every so many steps, and no stage has as many."""
        settings = [make_method(stage_config(self.config, i, of)).reorthogonalise for i, of in enumerate(self.stages)]
        steps = [batch.steps for batch in self.batches(1)]
        asked = [(own.every, done) for own, done in zip(settings, steps, strict=True) if own is not None]
        if not asked or any(every <= done for every, done in asked):
            return []
        return [
            f"method.reorthogonalise: every {min(every for every, _ in asked)} steps, and the longest stage has "
            f"{max(done for _, done in asked)}: it never happens; set every lower"
        ]

    @property
    def names(self) -> list[str]:
        """Names of the stages."""
        return [stage.name for stage in self.stages]

    def batches(self, ranks: int) -> list[BatchPlan]:
        """The batch arithmetic of each stage."""
        found = []
        for index, plan in enumerate(self.stages):
            rows = sum(len(self.data.train[task]) for task in plan.tasks)
            found.append(BatchPlan.make(rows, stage_config(self.config, index, plan).training, ranks))
        return found

    def identity(self, ranks: int) -> dict[str, Any]:
        """What has to be the same for a run to go on, beside the settings: stages, tasks, rows and micro-batches.

        The accumulation too where it is a factor of the penalty, and the method's revision where it is not the first.
        """
        batches = self.batches(ranks)
        at = [stage_config(self.config, index, plan).training.penalty_at for index, plan in enumerate(self.stages)]
        times = [batch.accumulation if one == "micro" else 1 for batch, one in zip(batches, at, strict=True)]
        return {
            "stages": [[stage.name, *stage.tasks] for stage in self.stages],
            "definitions": self.data.definitions(),
            "scoring": self.data.scoring(),
            "data": self.data.about(),
            "micro_batches": [batch.micro_batch for batch in batches],
            **({"penalty_times": times} if set(times) != {1} else {}),
            **({"revision": self.method.revision} if self.method.revision != 1 else {}),
        }

    def seen(self, index: int) -> list[str]:
        """Tasks trained up to and with a stage, each once."""
        return list(dict.fromkeys(task for plan in self.stages[: index + 1] for task in plan.tasks))
