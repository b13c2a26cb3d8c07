"""First stages that two runs have in common, and a run that begins with those another one has trained.

A stage is decided by what it starts from, its rows, and the settings that touch it. Of two runs that have all of these
the same the stage is the same to the bit, whatever they do afterwards: other coefficients of a penalty on past updates
(``Method.since_second``), other tasks, other settings of a later task. Of a method that trains each task alone
(``Method.alone``) a stage is decided by its own task, whatever the order: ``training/adopted.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

from cl_runner.atomic import read_json
from cl_runner.config.schema import RunConfig
from cl_runner.errors import UserError
from cl_runner.methods import METHODS
from cl_runner.methods.protocol import StagePlan
from cl_runner.runs import catalog
from cl_runner.runs.drift import drift
from cl_runner.runs.folder import RunDir, readable
from cl_runner.runs.resume_guard import deciding
from cl_runner.runs.shapes import read_metrics
from cl_runner.settings.layers import SETTABLE
from cl_runner.training.compatibility import stage_config
from cl_runner.training.taken_over import TakenOver

_BY_STAGE = ("stages", "micro_batches", "penalty_times")  # of a run's identity: a value a stage
_BY_TASK = ("definitions", "scoring", "data")


def decided(config: RunConfig, identity: Mapping[str, Any]) -> list[str]:
    """Of each stage of a run a digest of all that decides its bits, on one machine and by the same code.

    Two runs have as many first stages in common as these begin alike.

    Args:
        config: the run's settings, the method's own ones filled in.
        identity: as ``run.json`` has it. What a CPU was measured to compute in is not looked at: who takes stages over
            computes in the same.
    """
    method = METHODS.get(config.method.name)
    whole = {**_of_all(identity), "order": identity["stages"] if method.by_order else None}
    stages = [StagePlan(name, tuple(tasks)) for name, *tasks in identity["stages"]]
    digests, before = [], ""
    for index, plan in enumerate(stages):
        # An adapter that the run starts from is a past to the first stage.
        first = index == 0 and config.model.adapter is None
        # With eval.future all tasks are scored after every stage.
        seen = [task for stage in stages[: index + 1] for task in stage.tasks]
        tasks = list(identity["definitions"]) if config.eval.future else seen
        about = _about_stage(config, identity, index, plan, tasks, method.since_second if first else ())
        before = _digest({"before": before, "whole": whole, **about})
        digests.append(before)
    return digests


def decided_alone(config: RunConfig, identity: Mapping[str, Any]) -> list[str]:
    """Of each stage a digest of what decides what it learns and answers of its own task, where nothing else does.

    None of a method whose stages go on from each other, and where a probe looks at the tasks before. Arguments: as of
    ``decided``.
    """
    if not METHODS.get(config.method.name).alone or config.eval.probe_every is not None:
        return []
    stages = [StagePlan(name, tuple(tasks)) for name, *tasks in identity["stages"]]
    return [
        _digest({"alone": True, "whole": _of_all(identity), **_about_stage(config, identity, i, plan, plan.tasks, ())})
        for i, plan in enumerate(stages)
    ]


def _of_all(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's identity what is of all its stages."""
    return {key: value for key, value in identity.items() if key not in (*_BY_STAGE, *_BY_TASK, "computes")}


def _about_stage(
    config: RunConfig,
    identity: Mapping[str, Any],
    index: int,
    plan: StagePlan,
    tasks: Sequence[str],
    unread: Sequence[str],
) -> dict[str, Any]:
    """What decides a stage beside what it starts from.

    Args:
        tasks: those that have a part in it, or are scored after it.
        unread: the method's own settings that have none.
    """
    # Of a run's settings the whole ones too: a method may look at them beside the stage's own.
    configs = {"run": config, "stage": stage_config(config, index, plan)}
    left_out = {f"method.{key}" for key in unread}
    settings = {
        f"{where} {key}": list(value.items()) if isinstance(value, dict) else value  # whose order counts
        for where, of in configs.items()
        for key, value in deciding(of).items()
        if key.partition(".")[0] not in SETTABLE and key not in left_out
    }
    return {
        "settings": settings,
        "tasks": {task: [_compared(identity[key].get(task)) for key in _BY_TASK] for task in tasks},
        # Of a stage of several tasks, or a task that is only scored, no stage's config has what is set for it.
        "settings of tasks": {task: config.tasks[task] for task in tasks if task in config.tasks},
        "deepspeed": [_text(of.training.deepspeed) for of in configs.values()],
        **{key: identity[key][index] for key in _BY_STAGE if key in identity},
    }


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many first stages two runs have in common, by their digests."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


class Reused(TakenOver):
    """First stages of a run that has them in common with a new one."""

    key: ClassVar[str] = "reuses"

    @classmethod
    def find(cls, root: Path, config: RunConfig, identity: Mapping[str, Any]) -> Reused | None:
        """The run under ``root`` that has committed most of the first stages of a run with these settings.

        ``others`` of it have as many or fewer: where its machine or code is another, one of them may do.
        """
        wanted, found = decided(config, identity), []
        for run in catalog.all_runs(root):
            # A run that cannot be read has nothing to give, which is no fault of this one.
            with suppress(UserError), readable(run):
                stages = run.about()["stages"]
                count = common(wanted, [stage.get("decided") for stage in stages])
                names = [str(stage["name"]) for stage in stages[:count]]
                names = names[: run.committed(names)]
                if names and fits(run, list(enumerate(names)), config):
                    found.append(cls(run, tuple(names)))
        if not found:
            return None
        best, *others = sorted(found, key=lambda one: -len(one.stages))  # of equal ones the newest
        return replace(best, others=tuple(others))

    def otherwise(self, now: Mapping[str, Any]) -> list[str]:
        try:
            self.verify()
        except UserError as error:
            return [str(error)]
        return trained_otherwise(self.run, now)


def fits(run: RunDir, stages: Sequence[tuple[int, str]], config: RunConfig) -> bool:
    """Whether nothing was removed of a run's stages (from 0), and nothing came of settings that are free to differ.

    Such are a step left out, smaller batches of rows or answers, a probe.
    """
    for index, name in stages:
        folder = run.stage_dir(index, name)
        metrics = read_metrics(folder)
        trained = metrics["training"]
        if (
            read_json(folder / "DONE").get("removed")
            or trained.get("skipped_steps")
            or trained.get("micro_batches")
            or trained.get("eval_batch_tokens")
            or bool(metrics.get("probe")) != bool(config.eval.probe_every)
        ):
            return False
    return True


def trained_otherwise(run: RunDir, now: Mapping[str, Any]) -> list[str]:
    """In what its code, versions or machine were others than ``environment`` says of now, a line each."""
    before = run.environment()
    if any(of.get("code", now["code"]) != now["code"] for of in [before, *before.get("later", [])]):
        return ["its stages were trained by other code of cl-runner"]
    return list(drift(before, now, "its stages"))


def _text(file: str | None) -> str | None:
    """What stands in a file of settings; None without, or where it is gone."""
    with suppress(OSError):
        return Path(file).read_text("utf-8", "replace") if file else None
    return None


def _compared(value: Any) -> Any:
    """Of a task's data what is compared: the fingerprint of each split."""
    if not isinstance(value, Mapping):
        return value
    return {key: part.get("fingerprint", part) if isinstance(part, Mapping) else part for key, part in value.items()}
