"""``cl-runner eval``: a committed stage asked again, beside what was committed. Writes nothing into the run.

To score the kept answers again by another metric, no model is asked: ``runs/rescoring.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cl_runner.engine import zero as engine
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.metrics.choices import section
from cl_runner.models.identity import differing_model, model_identity
from cl_runner.models.locate import locate
from cl_runner.runs.extra_scores import answers
from cl_runner.runs.folder import RunDir, readable, stage_names
from cl_runner.runs.predictions import predictions
from cl_runner.runs.results import chosen
from cl_runner.runs.resume_guard import other_extra, other_rules
from cl_runner.runs.shapes import read_metrics
from cl_runner.settings import Resolved
from cl_runner.terminal.progress import Screen, ShownStage
from cl_runner.training.as_committed import as_committed
from cl_runner.training.checkpoint import refuse_removed
from cl_runner.training.evaluation import Scored, evaluate
from cl_runner.training.extra_sets import ExtraScored, score_extra
from cl_runner.training.moved_runs import run_of, with_files
from cl_runner.training.plan import Plan

_CHOSEN = {
    (False, False): "",
    (True, True): ", choose",
    (True, False): ", choose (committed: free answers)",
    (False, True): ", free answers (committed: choose)",
}


@dataclass(frozen=True)
class AskedAgain:
    """Scores now and as committed (percent), and the ids of the rows whose answer differs (None: not committed).

    ``chosen``: whether answers were chosen among the labels, now and then. ``rules``: of the tasks that today's rule of
    what is right differs for, that of then and today's. ``undefined``: why there is no score now.
    """

    stage: int
    name: str
    synthetic: tuple[str, ...]  # the tasks whose rows are
    chosen: tuple[bool, bool]
    now: dict[str, float | None]
    committed: dict[str, float | None]
    differing: dict[str, list[str] | None]
    rules: dict[str, tuple[str, str]]
    undefined: dict[str, str]
    extra: tuple[ExtraAgain, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "stage": self.stage,
            "name": self.name,
            "synthetic": bool(self.synthetic),
            "chosen": {"now": self.chosen[0], "committed": self.chosen[1]},
            "scores": self.now,
            "committed": self.committed,
            "differing_rows": self.differing,
            "rules": {task: {"committed": then, "now": now} for task, (then, now) in self.rules.items()},
            "undefined": self.undefined,
            "extra": {each.name: each.to_json() for each in self.extra},
        }

    def lines(self) -> list[str]:
        """The same for people."""
        of = "" if len(self.synthetic) == len(self.now) else f": {', '.join(self.synthetic)}"
        mark = f", synthetic{of}" if self.synthetic else ""
        lines = [f"stage {self.stage} ({self.name}), percent{mark}{_CHOSEN[self.chosen]}:"]
        for task, score in self.now.items():
            ids = self.differing[task]
            why = f" ({self.undefined[task]})" if task in self.undefined else ""
            line = f"  {task}: {_percent(score)}{why}"
            if ids is None:
                line += " (not scored when the stage was committed)"
            elif ids:
                rows = ", ".join(ids[:10]) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")
                line += f", committed {_percent(self.committed.get(task))}; other answers: {rows}"
            elif task in self.rules:
                line += f", committed {_percent(self.committed.get(task))}; the same answers"
            else:
                line += ", as committed"
            if task in self.rules:
                line += "; committed by the rule '{}', now by '{}'".format(*self.rules[task])
            lines.append(line)
        return [*lines, *(f"  extra set {each.name}: {each.text}" for each in self.extra)]


@dataclass(frozen=True)
class ExtraAgain:
    """An extra set scored again, rows of them. The rest is None where it was not scored when the stage was committed.

    differing: ids of the rows with another answer. off: how far log-likelihoods are off at most: 0 on the same device
    with as many threads, else what rounding makes of it.
    """

    name: str
    rows: int
    now: float
    committed: float | None = None
    differing: list[str] | None = None
    off: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {"score": self.now, "committed": self.committed, "differing_rows": self.differing, "off": self.off}

    @property
    def text(self) -> str:
        """The same for people."""
        if self.differing is None:
            return f"{_percent(self.now)} (not scored when the stage was committed)"
        by = f" (log-likelihoods off by {self.off:.1g} at most)" if self.off else ""
        if not self.differing:
            return f"{_percent(self.now)}, as committed{by}"
        rows = ", ".join(self.differing[:10]) + (f" and {len(self.differing) - 10} more" * (len(self.differing) > 10))
        return f"{_percent(self.now)}, committed {_percent(self.committed)}; other answers: {rows}{by}"


def ask_again(
    resolved: Resolved, rundir: RunDir, index: int, tasks: Sequence[str] | None, place: Place, screen: Screen
) -> AskedAgain:
    """Ask stage ``index`` (from 0) for ``tasks`` and score it, by default for those it was scored on.

    Raises:
        UserError: the data are not those of the run, or the stage is damaged.
    """
    assert resolved.order is not None
    config, order = resolved.config, resolved.order
    with readable(rundir):
        folder = rundir.stage_dir(index, stage_names(rundir.about())[index])
        refuse_removed(folder)
        committed: dict[str, float | None] = read_metrics(folder)["scores"]
        kept = answers(folder)
        outputs = {(row["task"], row["id"]): row["output"] for rows in predictions(folder).values() for row in rows}
        wanted = list(tasks or committed)
        if run_of(order):
            order = with_files(order, rundir, config, ("test",), wanted)
        plan = Plan.make(config, order.name, order.tasks, only=wanted)
        same_run(plan, rundir, wanted)
    engine.start(place)
    try:
        scored, extra = _score(plan, rundir, index, wanted, place, screen)
    finally:
        engine.stop()
    now_by = other_rules(rundir.about()["identity"], plan.data.scoring())
    differing = {
        one.task: [row["id"] for row in one.predictions if outputs.get((one.task, row["id"])) != row["output"]]
        if one.task in committed
        else None
        for one in scored
    }
    return AskedAgain(
        index + 1,
        plan.names[index],
        tuple(one.task for one in scored if plan.data.test[one.task].synthetic),
        (plan.config.eval.mode == "choose", chosen(rundir.about())),
        {one.task: one.score for one in scored},
        committed,
        differing,
        {task: rules for task, rules in now_by.items() if task in committed},
        {one.task: one.undefined for one in scored if one.undefined},
        tuple(_extra_again(one, kept.get(one.name)) for one in extra),
    )


def _extra_again(now: ExtraScored, then: list[dict[str, Any]] | None) -> ExtraAgain:
    """then: the rows as they were committed."""
    if then is None:
        return ExtraAgain(now.name, len(now.answers), now.score)
    other = [row["id"] for row, before in zip(now.answers, then, strict=True) if before["output"] != row["output"]]
    logs = [[log for row in rows for log in row["log_likelihoods"]] for rows in (now.answers, then)]
    off = max(abs(a - b) for a, b in zip(*logs, strict=True))
    committed = section(now.section["by"], now.section["shots"], then)["score"]
    return ExtraAgain(now.name, len(now.answers), now.score, committed, other, off)


def same_run(plan: Plan, rundir: RunDir, tasks: Sequence[str]) -> None:
    """Refuse another run than this one, or other test rows of these tasks. Raises UserError."""
    before = rundir.about()["identity"]
    if before["stages"] != [[stage.name, *stage.tasks] for stage in plan.stages]:
        stages = ", ".join(stage[0] for stage in before["stages"])
        raise UserError(f"the order {plan.order} has changed: the run {rundir.path} has the stages {stages}")
    model = plan.config.model
    if other := differing_model(before["model"], model_identity(locate(model), model.quantize)):
        raise UserError(f"the base model {model.name} is not the one of the run {rundir.path} ({', '.join(other)})")
    now = plan.data.definitions()
    for task in tasks:
        if before["definitions"][task] != now[task]:
            raise UserError(f"the run {rundir.path} asked {task} otherwise (instruction, labels or metric)")
        if before["data"][task]["test"]["fingerprint"] != plan.data.test[task].fingerprint:
            raise UserError(f"the test data of {task} are not those of the run {rundir.path}")
    asked = {extra.name: extra.about() for extra in plan.extra}  # which may be more, or others
    both = before.get("extra", {}).keys() & asked.keys()
    if problem := other_extra({"extra": {n: before["extra"][n] for n in both}}, {n: asked[n] for n in both}):
        raise UserError(
            f"the run {rundir.path} {problem}; --set eval.extra={{name: …, file: …}} says where its rows are"
        )


def _score(
    plan: Plan, rundir: RunDir, index: int, tasks: Sequence[str], place: Place, screen: Screen
) -> tuple[list[Scored], list[ExtraScored]]:
    with as_committed(plan, rundir, index, place) as (stage, tokens):
        for line in tokens.notes:
            screen.line(line)
        tests = {task: tokens.test[task] for task in tasks}
        rows = sum(len(test.rows) for test in tests.values()) + sum(len(each.rows) for each in plan.extra)
        screen.begin([ShownStage("", 0, rows)])
        return evaluate(stage, tests, screen.evaluating), score_extra(stage, tokens.extra, screen.evaluating)


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{score:.4f}"
