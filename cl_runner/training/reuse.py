"""First stages that two runs have in common, and a run that begins with those another one has trained.

A stage is decided by what it starts from, its rows, and the settings that touch it. Of two runs that have all of these
the same the stage is the same to the bit, whatever they do afterwards: other coefficients of a penalty on past updates
(``Method.since_second``), other tasks, other settings of a later task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
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
from cl_runner.runs.resume_guard import is_free, recorded
from cl_runner.settings import dotted, settings_of
from cl_runner.training.compatibility import stage_config
from cl_runner.training.taken_over import TakenOver

_BY_STAGE = ("stages", "micro_batches", "penalty_times")  # of a run's identity: a value a stage
_BY_TASK = ("definitions", "scoring", "data")


@dataclass(frozen=True)
class Decided:
    """What decides a run's numbers: its settings, and its identity as ``run.json`` has it."""

    config: RunConfig
    identity: Mapping[str, Any]

    @classmethod
    def by(cls, run: RunDir) -> Decided:
        """Of a run in its folder. Raises UserError where its files are broken, or its method is not here."""
        with readable(run):
            return cls(recorded(run), run.about()["identity"])

    @property
    def stages(self) -> list[StagePlan]:
        """The stages: names and tasks."""
        return [StagePlan(name, tuple(tasks)) for name, *tasks in self.identity["stages"]]

    def stage(self, index: int) -> dict[str, Any]:
        """Everything that decides a stage (from 0), but for the state that it starts from."""
        plan, since = self.stages[index], METHODS.get(self.config.method.name).since_second
        unread = {f"method.{key}" for key in since} if index == 0 else set()
        configs = {"run": self.config, "stage": stage_config(self.config, index, plan)}
        settings = {
            (where, dotted(path)): value
            for where, config in configs.items()
            for path, value in settings_of(config)
            if path[0] not in ("tasks", "stages") and not is_free(path) and dotted(path) not in unread
        }
        # With eval.future all tasks are scored after every stage.
        seen = [task for stage in self.stages[: index + 1] for task in stage.tasks]
        of = list(self.identity["definitions"]) if self.config.eval.future else seen
        parts = {key: self.identity[key][index] for key in _BY_STAGE if key in self.identity}
        return {
            "settings": settings,
            "tasks": of,
            **parts,
            **{key: [_fingerprint(self.identity.get(key, {}).get(task)) for task in of] for key in _BY_TASK},
        }

    def whole(self) -> dict[str, Any]:
        """What decides every stage: the base model, plugins, the method's revision; its order where that counts."""
        rest = {key: value for key, value in self.identity.items() if key not in (*_BY_STAGE, *_BY_TASK, "computes")}
        by_order = METHODS.get(self.config.method.name).by_order
        return {**rest, "order": self.identity["stages"] if by_order else None}


def common(one: Decided, other: Decided) -> int:
    """How many first stages of two runs are the same to the bit, on one machine and by the same code."""
    if one.config.method.name != other.config.method.name or one.whole() != other.whole():
        return 0
    found = 0
    for index in range(min(len(one.stages), len(other.stages))):
        if one.stage(index) != other.stage(index):
            break
        found += 1
    return found


class Reused(TakenOver):
    """First stages of a run that has them in common with a new one."""

    key: ClassVar[str] = "reuses"

    @classmethod
    def find(cls, root: Path, config: RunConfig, identity: Mapping[str, Any]) -> Reused | None:
        """The run under ``root`` that has committed most of the first stages of a run with these settings."""
        wanted, best = Decided(config, json.loads(json.dumps(identity))), None
        for run in catalog.all_runs(root):
            # A run that cannot be read has nothing to give, which is no fault of this one.
            with suppress(UserError):
                about = run.about()
                if about["method"] != config.method.name or about["seed"] != config.seed:
                    continue  # run.json is read sooner than settings are
                names = [stage.name for stage in wanted.stages]
                count = min(run.committed(names), common(wanted, Decided.by(run)))
                if count > (len(best.stages) if best else 0) and _is_whole(run, names[:count]):
                    best = cls(run, tuple(names[:count]))
        return best

    def otherwise(self, now: Mapping[str, Any]) -> list[str]:
        try:
            self.verify()
        except UserError as error:
            return [str(error)]
        return list(drift(self.run.environment(), now, "its stages"))


def _is_whole(run: RunDir, names: list[str]) -> bool:
    """Whether nothing was removed of stages (``output.keep_stages``)."""
    return not any(read_json(run.stage_dir(index, name) / "DONE").get("removed") for index, name in enumerate(names))


def _fingerprint(value: Any) -> Any:
    """Of a task's data what is compared: the fingerprint of each split."""
    if isinstance(value, Mapping) and all(
        isinstance(split, Mapping) and "fingerprint" in split for split in value.values()
    ):
        return {split: data["fingerprint"] for split, data in value.items()}
    return value
