"""What a run will do: its stages, their rows and their batch arithmetic. Known, and refused, before torch is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_runner.adapters.kind import Kind
from cl_runner.config.schema import RunConfig
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.protocol import Method, StagePlan
from cl_runner.metrics.scores import require
from cl_runner.runs import checkpoints
from cl_runner.runs.folder import RunDir
from cl_runner.tasks.extra import ExtraSet, load_extra
from cl_runner.tasks.task import Task
from cl_runner.terminal.progress import ShownStage
from cl_runner.training.compatibility import check_method, check_quantized, fitting_kind, stage_config, unused_settings
from cl_runner.training.data import Data
from cl_runner.training.options import make_options
from cl_runner.training.sampling import BatchPlan
from cl_runner.training.starting import refuse_starting, starting

LARGE = 1024  # a rank from which on what trains may not fit into memory, which the layers' shapes tell


@dataclass
class Plan:
    """What a run will do, known before anything is loaded on a device."""

    config: RunConfig
    order: str
    method: Method
    kind: Kind
    stages: tuple[StagePlan, ...]
    data: Data
    extra: tuple[ExtraSet, ...] = ()  # that are scored beside the tasks (``eval.extra``)
    starts: str = ""  # what becomes of the adapter that the run starts from (``model.adapter``), once it was read
    grows: str = ""  # how much the method will carry, where that is known beforehand
    only: Sequence[str] | None = None  # the tasks that it will be evaluated on; None where it trains
    computes: str | None = None  # what the run computes in on a CPU under ``precision: auto``; None: to be decided

    @classmethod
    def make(cls, config: RunConfig, order: str, tasks: Sequence[Task], only: Sequence[str] | None = None) -> Plan:
        """Check all that can be refused without the model. Raises UserError.

        only: the tasks whose test rows alone are needed, of a plan that will only be evaluated: what cannot be trained
        here, or would be refused by now, still answers.
        """
        method = make_method(config)
        kind = fitting_kind(config, method)
        check_quantized(config, method, kind)
        if only is None:
            refuse_starting(config, method, kind)
        stages = tuple(method.plan([task.name for task in tasks]))
        if only is None:
            cls._check_training(config, method, stages)
        for task in tasks:
            if only is None or task.name in only:
                require(task.metric, task.labels)
        data = Data.load(tasks, config, stages, only)
        extra = tuple(load_extra(each) for each in config.eval.extra)
        computes = "fp32" if config.model.quantize else None  # what is measured are plain layers
        return cls(config, order, method, kind, stages, data, extra, only=only, computes=computes)

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
                from cl_runner.engine.zero import read_deepspeed_json

                read_deepspeed_json(of_stage.training)

    def check_shapes(self) -> None:
        """Refuse what only the layers' names and shapes tell, by the model's config. Raises UserError.

        No weights are loaded.
        """
        stages = [(config, make_method(config)) for config in self._configs()]
        options = [option for option in make_options() if option.by_shape]
        adapter = self.config.adapter
        named = "update" in self.kind.offers and bool(adapter.target_modules or adapter.patterns)
        by_shape = [method.by_shape or any(option.wanted(of, method) for option in options) for of, method in stages]
        large = self.method.has_rank and max([adapter.largest, *adapter.rank_pattern.values()]) >= LARGE
        given = _folder(self.config.model.adapter)
        if not (given or named or large or self.kind.by_shape or any(by_shape)):
            return
        from cl_runner.models.base import outline

        model = outline(self.config.model)
        if model is not None:
            shapes = self.kind.shapes(model)
            layers = self.kind.layers(model)
            self.method.trained = self.kind.trained_count(layers)
            check_method(self.config, self.stages, shapes, self.method.trained, list(layers))
            self.grows = self.method.grows(self.config, shapes)
            if given is not None:
                self._check_given(given, model)

    def _check_given(self, folder: Path, model: Any) -> None:
        """Refuse an adapter to start from that is none of this base's, or of other layers than the run's."""
        from cl_runner.adapters import patterns
        from cl_runner.adapters.given import Given
        from cl_runner.adapters.targets import is_linear, shape_of

        linear = {name: shape_of(module) for name, module in model.named_modules() if is_linear(module)}
        layers, adapter = self.kind.layers(model), self.config.adapter
        ranks = dict.fromkeys(layers, adapter.largest) | patterns.ranks(adapter, list(layers))
        self.starts = starting(Given(folder, layers, linear), self.method, self.kind, self.config, ranks).said

    def notes(self) -> list[str]:
        """Lines on how files were read, and on what is left out or will be missed.

        Settings that no stage can follow or is too short for; rows of other labels; labels without rows; scores.
        """
        data, unused = self.data, unused_settings(self.config, self.stages)
        left = [*data.without_gold(), *data.left_out(), *data.scored_unknown()]
        extra = [f"eval.extra {each.name}: {note}" for each in self.extra for note in each.notes]
        rows = [*data.read_as(), *extra, *left, *data.in_train(), *data.unseen(), *data.constant()]
        return [*unused, *self._of_options(), *self._no_past(), *self._none_removed(), *rows]

    def _none_removed(self) -> list[str]:
        """A line where models are to be removed, and there are none."""
        if self.config.output.keep_stages == "all" or self.method.full:
            return []
        return [f"output.keep_stages has no effect: {self.method.name} trains an adapter, and these stay"]

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

    def _of_options(self) -> list[str]:
        """Lines of options on what has no effect."""
        steps = [batch.steps for batch in self.batches(1)]
        stages = [(of, make_method(of), count) for of, count in zip(self._configs(), steps, strict=True)]
        found = []
        for option in make_options():
            if having := [stage for stage in stages if option.wanted(*stage[:2])]:
                found += option.notes(having)
        return found

    def _configs(self) -> list[RunConfig]:
        """The settings of each stage."""
        return [stage_config(self.config, index, stage) for index, stage in enumerate(self.stages)]

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

    def facts(self, run: RunDir, index: int, ranks: int) -> dict[str, Any]:
        """What has to be the same for a stage (from 0) to go on in its middle (``runs.checkpoints``)."""
        batch = self.batches(ranks)[index]
        sizes = {key: getattr(batch, key) for key in ("global_batch", "micro_batch", "accumulation")}
        return checkpoints.facts(run, self.config, index, ranks, sizes)

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
            **({"extra": {each.name: each.about() for each in self.extra}} if self.extra else {}),
            "micro_batches": [batch.micro_batch for batch in batches],
            **({"penalty_times": times} if set(times) != {1} else {}),
            **({"revision": self.method.revision} if self.method.revision != 1 else {}),
        }

    def seen(self, index: int) -> list[str]:
        """Tasks trained up to and with a stage, each once."""
        return list(dict.fromkeys(task for plan in self.stages[: index + 1] for task in plan.tasks))

    def tested(self, index: int) -> list[str]:
        """Tasks that are scored after a stage."""
        return list(self.data.tasks) if self.config.eval.future else self.seen(index)

    def shown(self) -> list[ShownStage]:
        """The steps of each stage, and the test rows that the model is asked after it."""
        found, extra = [], sum(len(each.rows) for each in self.extra)
        for index, (name, batch) in enumerate(zip(self.names, self.batches(1), strict=True)):
            asked = set(self.tested(index)) - self.settled(index).keys()
            found.append(ShownStage(name, batch.steps, sum(len(self.data.test[task]) for task in asked) + extra))
        return found

    def settled(self, index: int) -> dict[str, int]:
        """Of the tasks that are scored after a stage, those that are not asked again (``Method.settled``).

        Each with the stage whose answers are theirs, from 0; -1 is the untouched base. Not where that one's settings
        would read the prompts in another way, whose rounding differs.
        """
        wanted, seen, configs = self.method.settled, self.seen(index), self._configs()
        found = {}
        for task in self.tested(index) if wanted != "none" else ():
            last = self.last(task, index)
            same = reading(configs[max(last, 0)]) == reading(configs[index])
            if last != index and same and (task in seen or wanted == "all"):
                found[task] = last
        return found

    def last(self, task: str, index: int) -> int:
        """The last stage up to ``index`` that trains a task, from 0; -1 where none does."""
        return max((i for i, plan in enumerate(self.stages[: index + 1]) if task in plan.tasks), default=-1)


def _folder(name: str | None) -> Path | None:
    """The adapter's folder, where there is one; that there has to be is said where it is hashed."""
    return Path(name) if name is not None and os.path.isdir(name) else None  # noqa: PTH112 - Path's takes no long name


def reading(config: RunConfig) -> tuple[Any, ...]:
    """What of a stage's settings decides whether prompts' beginnings are computed once (``training/sharing.py``)."""
    training = config.training
    return (training.share_prefix, training.activation_checkpointing, training.dropout_by)
