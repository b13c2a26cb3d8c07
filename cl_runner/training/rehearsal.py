"""A run in small, to know what it will take: all its stages in memory, of each both ends, and few steps.

Real rows go through the real loop. Of the first stage and of the last one some steps are taken, spread over the lengths
of all its steps, the longest among them, and some batches of test rows are answered. Stages between them take no step:
what they leave behind is as large as it will be. A method that passes over rows at an end of a stage is let see the
first of them, and the rest is owed. Nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cl_runner.config.schema import RunConfig
from cl_runner.methods.protocol import overrides
from cl_runner.models.batch import Example
from cl_runner.models.token_cache import lengths
from cl_runner.training.accounting import Counts
from cl_runner.training.compatibility import stage_config
from cl_runner.training.evaluation import TestSet, evaluate
from cl_runner.training.forecast import Rehearsed
from cl_runner.training.loop import train_stage
from cl_runner.training.plan import Plan
from cl_runner.training.prepare import Tokens, let_go
from cl_runner.training.rehearsed import ROWS, RehearsedStage, batches_of, spread, work_of_step
from cl_runner.training.sampling import BatchPlan
from cl_runner.training.stage import Room, commit_update

STEPS, SECONDS = 16, 10.0  # of a stage that is measured: at most so many, until that is over, but two in any case
WARM = 2  # steps before them, that do not count; one where it takes half of the time


@dataclass
class Rehearsal:
    """What was measured of each stage, and what each has to do.

    asked: of each stage, task → how often its test rows are answered. batches: task → the work of its batches of test
    rows. base: tasks that the untouched base answers (``eval.future``). optimizer: bytes at most. fitted: what was
    halved (``training.auto_batch``).
    """

    stages: list[Rehearsed]
    asked: list[dict[str, float]]
    batches: dict[str, list[float]]
    base: list[str]
    counts: list[Counts]
    optimizer: int
    fitted: dict[str, Any]


def rehearse(
    plan: Plan, room: Room, tokens: Tokens, done: int, processes: int = 1, say: Callable[[str], None] = lambda _: None
) -> Rehearsal:
    """Go through the stages of a plan on one process; those before ``done`` are not measured.

    processes: of the run; this one does what the first of them would.

    Raises:
        OutOfMemory: a step or a batch of answers does not fit.
        TrainingError: as training does.
    """
    first = done if done < len(plan.stages) else 0
    measured = {first, len(plan.stages) - 1}
    found = Rehearsal([], [], {}, [], [], 0, {})
    for index, name in enumerate(plan.names):
        if index in measured:
            say(f"measuring stage {index + 1} of {len(plan.names)} {name}")
        config = of_processes(stage_config(plan.config, index, plan.stages[index]), processes)
        room.method.configure(type(room.method).Config.model_validate(config.method.own()))
        stage = RehearsedStage(room, config, index)
        try:
            found.stages.append(_Measuring(plan, room, tokens, stage, found).stage(index in measured))
            if index in measured:
                tasks = plan.stages[index].tasks if index == first else list(tokens.test)
                asked = [task for task in tasks if task in plan.tested(index)]
                found.stages[-1].answers = _answers(stage, {task: tokens.test[task] for task in asked})
            found.fitted.update(stage.fit.about())
        finally:
            stage.close()
        let_go(room, plan, index)
        times = 2.0 if room.method.fold_loses else 1.0
        settled = plan.settled(index)
        found.asked.append({task: times for task in plan.tested(index) if task not in settled})
    if first < len(plan.stages) - 1 and not stays_outside(room):
        for task, timed in found.stages[first].answers.items():
            found.stages[-1].answers.setdefault(task, []).extend(timed)
        found.stages[first].answers = {}
    last = RehearsedStage(room, plan.config, len(plan.stages) - 1)
    last.close()
    found.batches = {task: [work for work, _ in batches_of(last, test)] for task, test in tokens.test.items()}
    found.base = list(tokens.test) if plan.config.eval.future and not done else []
    return found


def stays_outside(room: Room) -> bool:
    """Whether what stages leave stands beside the weights, so that answers may take longer with each of them."""
    return bool(room.adapters.kept) or room.base.sizes is not None or overrides(room.method, "condition")


def of_processes(config: RunConfig, processes: int) -> RunConfig:
    """The settings of a stage under which one process does what the first of several would."""
    if processes == 1:
        return config
    share = -(-config.training.global_batch // processes)
    return config.model_copy(update={"training": config.training.model_copy(update={"global_batch": share})})


class _Measuring:
    """One stage, through the loop, with the clock at each step."""

    def __init__(self, plan: Plan, room: Room, tokens: Tokens, stage: RehearsedStage, found: Rehearsal) -> None:
        self.plan, self.room, self.tokens, self.stage_run, self.found = plan, room, tokens, stage, found
        self.steps: list[float] = []  # the work of those that are taken
        self.ends: list[float] = []  # of the clock, before the first step and after each
        self.owed: list[float] = []  # by then
        self.work: list[float] = []

    def stage(self, measured: bool) -> Rehearsed:
        """Build it, train it, fold it."""
        stage, room = self.stage_run, self.room
        began = time.perf_counter()
        if stage.plan.start == "base":
            room.to_base()
        room.method.build(stage)
        trained = train_stage(
            stage,
            self.tokens.source(stage.plan),
            log=lambda _: None,
            tick=lambda *_: self._tick(),
            choose=partial(self._choose, WARM + STEPS if measured else 0),
            between=lambda _: self._enough(),
        )
        room.adapters.train(False)
        room.adapters.update_norm()
        commit_update(room.method, stage)
        took = time.perf_counter() - began
        self.found.counts.append(trained.counts)
        seconds = [
            after - before + owed - owed_before
            for before, after, owed_before, owed in zip(
                self.ends, self.ends[1:], self.owed, self.owed[1:], strict=False
            )
        ]
        in_steps = self.ends[-1] - self.ends[0]
        hooks = max(0.0, trained.seconds - in_steps)
        warm = min(WARM if sum(seconds[:1]) < SECONDS / 2 else 1, max(len(seconds) - 1, 0))
        return Rehearsed(
            stage.plan.name,
            work=self.work,
            timed=list(zip(self.steps, seconds, strict=False))[warm:],
            hooks=hooks + stage.owed - self.owed[-1],
            rest=max(0.0, took - in_steps - hooks) + self.owed[0],
        )

    def _tick(self) -> None:
        self.ends.append(time.perf_counter())
        self.owed.append(self.stage_run.owed)

    def _enough(self) -> bool:
        assert self.stage_run.engine is not None
        self.found.optimizer = max(self.found.optimizer, self.stage_run.engine.optimizer_bytes())
        return len(self.ends) > 3 and self.ends[-1] - self.ends[1] > SECONDS

    def _choose(
        self, most: int, batch: BatchPlan, steps: list[list[int]], examples: Sequence[Example], tasks: Sequence[str]
    ) -> list[list[int]]:
        """Some of the steps, spread over their lengths: one of the middle, the longest, then halves of halves."""
        inputs, labels = (one.tolist() for one in lengths(examples))
        self.work = [work_of_step(self.stage_run, batch, rows, inputs, labels, tasks) for rows in steps]
        by_work = np.argsort(self.work, kind="stable").tolist()
        chosen = [by_work[at] for at in spread(len(by_work))[:most]]
        self.steps = [self.work[step] for step in chosen]
        return [steps[step] for step in chosen]


def _answers(stage: RehearsedStage, tests: Mapping[str, TestSet]) -> dict[str, list[tuple[float, float]]]:
    """Task → its largest batch of test rows and one of the middle, each with its seconds, as far as there is time.

    Half of the answers are taken for right, and the others for as long as the task's longest label.
    """
    config = stage.config
    found: dict[str, list[tuple[float, float]]] = {}
    began = time.perf_counter()
    try:
        for number, (name, test) in enumerate(tests.items()):
            if number > 1 and time.perf_counter() - began > SECONDS:
                break
            longest = max(1, int(lengths(test.examples)[1].max()))
            most = min(config.eval.max_new_tokens, longest)
            stage.config = config.model_copy(update={"eval": config.eval.model_copy(update={"max_new_tokens": most})})
            batches = sorted(batches_of(stage, test))
            chosen = [batches[at] for at in spread(len(batches))[:ROWS]]
            if not found:
                evaluate(stage, {name: test.take(chosen[-1][1])})  # once for nothing
            found[name] = []
            for work, rows in chosen:
                started = time.perf_counter()
                evaluate(stage, {name: test.take(rows)})
                found[name].append((work, time.perf_counter() - started))
    finally:
        stage.config = config
    return found
