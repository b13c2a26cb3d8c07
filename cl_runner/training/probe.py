"""The probe inside a stage (``eval.probe_every``): a few test rows of each task seen, asked between two steps.

It draws forgetting while it happens. The rows are those of the test split, decided by seed and task alone: the same in
every stage, and with more of them the first ones stay. They are answered and scored as evaluation does, by what would
answer were the stage over now. Nothing that the training reads is changed: no generator, no mode, no parameter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cl_runner.errors import LimitReached
from cl_runner.models.forward import evaluating
from cl_runner.runs.folder import RunDir
from cl_runner.training.checkpoint import answers_to
from cl_runner.training.evaluation import Scored, TestSet, evaluate, score_task
from cl_runner.training.options import answering
from cl_runner.training.plan import Plan
from cl_runner.training.sampling import derived_seed
from cl_runner.training.stage import StageRun
from cl_runner.training.step_log import Meter

ROUNDED = 1e-9  # points that a difference of two shares may be off: 3 rows of 30 are 10 points, and no more


def rows_of_probe(seed: int, task: str, total: int, count: int) -> list[int]:
    """Which of a task's ``total`` test rows are asked, in ascending order: ``count``, or all where there are fewer."""
    dice = torch.Generator().manual_seed(derived_seed(seed, "probe", task))
    return sorted(torch.randperm(total, generator=dice)[:count].tolist())


class Probe:
    """The probe of one stage, on every rank.

    Args:
        samples: the rows of each task seen, those of the stage itself too.
        learned: of each old task (that this stage does not train) its score on them as it was learned, percent; None
            where that is not known. The limits hold for these.
        settled: of some tasks the answers to them, which nothing changes.
        tell: takes step and scores, percent by task, of every look. warn: takes a line. tick: as ``evaluate`` has it.
    """

    def __init__(
        self,
        stage: StageRun,
        samples: Mapping[str, TestSet],
        learned: Mapping[str, float | None],
        settled: Mapping[str, Sequence[str]],
        *,
        tell: Callable[[int, Mapping[str, float | None]], None] = lambda *_: None,
        warn: Callable[[str], None] = lambda _: None,
        tick: Callable[[str, int, int], None] = lambda *_: None,
    ) -> None:
        self.stage, self.samples, self.learned, self.settled = stage, samples, learned, settled
        self.tell, self.warn, self.tick = tell, warn, tick
        self.seconds = 0.0
        self._found: dict[str, dict[str, Any]] = {}  # by task, as ``about`` has it

    def due(self, step: int) -> bool:
        """Whether it looks after so many steps: before the first too, but in stage 1, and after the last."""
        if not step:
            return self.stage.index > 0
        every = self.stage.config.eval.probe_every
        return step == self.stage.steps or (every is not None and step % every == 0)

    def look(self, meter: Meter) -> None:
        """Ask, log, and hold against the limits, if it is due. *Collective*.

        Raises:
            LimitReached: an old task is lower than ``eval.probe_stop`` lets it be.
        """
        step = self.stage.step
        if not self.due(step):
            return
        self._synchronised()  # what the training has asked for is its own time
        started = time.perf_counter()
        scores = {one.task: one.score for one in self._asked()}
        for task, score in scores.items():
            self._note(task, score, step)
        spent = time.perf_counter() - started
        self.seconds += spent
        meter.leave_out(spent)
        meter.note({"probe": scores, "probe_rows": {task: len(self.samples[task].rows) for task in scores}})
        self.tell(step, scores)
        self._hold_against_limits(scores)

    def about(self) -> dict[str, dict[str, Any]]:
        """Of each task for ``metrics.json``: rows, score as it was learned, first, lowest and last one; percent.

        ``lowest_at``: the step of the lowest; ``warned_at``: that of the warning.
        """
        return self._found

    def state(self) -> dict[str, Any]:
        """What it has seen, between two steps, as JSON has it."""
        return {"seconds": self.seconds, "found": {task: dict(found) for task, found in self._found.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state``."""
        self.seconds = state["seconds"]
        self._found = {task: dict(found) for task, found in state["found"].items()}

    def _asked(self) -> list[Scored]:
        """The scores now."""
        stage = self.stage
        gpus = [stage.device] if stage.device.type == "cuda" else []
        with torch.random.fork_rng(gpus), torch.no_grad(), evaluating(stage.adapters.model), self._as_if_over():
            return evaluate(stage, self.samples, self.tick, self.settled)

    @contextmanager
    def _as_if_over(self) -> Iterator[None]:
        """Inside, the values that an option has answer after a stage are in the place of those that train."""
        values, adapters = answering(self.stage) or {}, self.stage.adapters
        own = adapters.parameters()
        before = {name: own[name].detach().clone() for name in values}
        adapters.put(values)
        try:
            yield
        finally:
            adapters.put(before)

    def _note(self, task: str, score: float | None, step: int) -> None:
        if task not in self._found:
            about: dict[str, Any] = {"rows": len(self.samples[task].rows)}
            if task in self.learned:
                about["learned"] = self.learned[task]
            self._found[task] = {**about, "first": score, "lowest": score, "lowest_at": step}
        found = self._found[task]
        if score is not None and (found["lowest"] is None or score < found["lowest"]):
            found.update(lowest=score, lowest_at=step)
        found["last"] = score

    def _hold_against_limits(self, scores: Mapping[str, float | None]) -> None:
        warn, stop = (getattr(self.stage.config.eval, key) for key in ("probe_warn", "probe_stop"))
        falls = {
            task: learned - score
            for task, learned in self.learned.items()
            if learned is not None and (score := scores.get(task)) is not None
        }
        if warn is not None:
            under = {task: fall for task, fall in falls.items() if fall > warn + ROUNDED}
            if new := {task: fall for task, fall in under.items() if "warned_at" not in self._found[task]}:
                self.warn(f"warning: {self._fallen(new)} (eval.probe_warn is {warn:g})")
            for task in new:
                self._found[task]["warned_at"] = self.stage.step
        if stop is not None and (under := {task: fall for task, fall in falls.items() if fall > stop + ROUNDED}):
            raise LimitReached(f"{self._fallen(under)} (eval.probe_stop is {stop:g})", "eval.probe_stop=null")

    def _fallen(self, falls: Mapping[str, float]) -> str:
        each = [f"{task} by {fall:.2f} points to {self._found[task]['last']:.2f} %" for task, fall in falls.items()]
        where = f"at step {self.stage.step} of {self.stage.steps}"
        return f"{where} probes have fallen since their tasks were learned: {', '.join(each)}"

    def _synchronised(self) -> None:
        if self.stage.device.type == "cuda":
            torch.cuda.synchronize(self.stage.device)


def samples(
    plan: Plan, rundir: RunDir, stage: StageRun, tests: Mapping[str, TestSet]
) -> tuple[dict[str, TestSet], dict[str, float | None], dict[str, list[str]], list[str]]:
    """For ``Probe`` at a stage: ``samples``, ``learned`` and ``settled``; and the tasks that it cannot ask.

    What a task's score was as it was learned is read from the answers that its last stage committed, and so are answers
    that nothing changes (``Method.settled``). A task that another parameter set answers is not asked: to show that one
    is no matter of a look.

    Raises:
        UserError: committed answers are not those of the task's rows.
    """
    method, index, count = stage.room.method, stage.index, stage.config.eval.probe_rows
    taken: dict[str, TestSet] = {}
    learned: dict[str, float | None] = {}
    settled: dict[str, list[str]] = {}
    missing = []
    for task in plan.seen(index):
        test, last = tests[task], plan.last(task, index)
        rows = rows_of_probe(plan.config.seed, task, len(test.rows), count)
        sample, answers = test.take(rows), None
        if last != index:
            folder = rundir.stage_dir(last, plan.names[last])
            then = answers_to(folder, task, [row.id for row in test.rows])
            answers = [then[row] for row in rows] if then else None
        if answers and method.settled != "none":
            settled[task] = answers
        elif method.answering(task if method.knows_task else None) not in (None, stage.plan.name):
            missing.append(task)
            continue
        taken[task] = sample
        if last != index:
            learned[task] = score_task(sample, answers).score if answers else None
    return taken, learned, settled, missing
