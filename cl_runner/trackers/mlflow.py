"""MLflow, at the place that its own environment variables say (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import islice
from typing import ClassVar

from cl_runner.trackers.protocol import Entry, Tracked, Tracker

TAG = "cl_runner.id"
STATES = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
PARAMS, METRICS = 100, 1000  # most that one request takes
LONGEST = 500  # characters of a parameter's value that every store takes


class MLflow(Tracker):
    """A run that goes on is found by its tag."""

    name: ClassVar[str] = "mlflow"
    title: ClassVar[str] = "MLflow (MLFLOW_TRACKING_URI says where)"
    package: ClassVar[str] = "mlflow"
    extra: ClassVar[str] = "mlflow"

    def start(self, run: Tracked) -> bool:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient()
        called = os.environ.get("MLFLOW_EXPERIMENT_NAME", "cl-runner")
        experiment = self.client.get_experiment_by_name(called)
        self.experiment = self.client.create_experiment(called) if experiment is None else experiment.experiment_id
        found = self.client.search_runs([self.experiment], f"tags.`{TAG}` = '{run.id}'", max_results=1)
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return True
        tags = {TAG: run.id, "run folder": str(run.folder)}
        self.id = self.client.create_run(self.experiment, tags=tags, run_name=run.name).info.run_id
        params = (Param(_name(key), str(value)[:LONGEST]) for key, value in run.settings.items())
        while some := list(islice(params, PARAMS)):
            self.client.log_batch(self.id, params=some)
        return False

    def where(self) -> str:
        return f"experiment {self.experiment}, run {self.id} at {self.client.tracking_uri}"

    def log(self, entries: Sequence[Entry]) -> None:
        from mlflow.entities import Metric

        metrics = (
            Metric(_name(name), value, round(1000 * entry.time), entry.step)
            for entry in entries
            for name, value in entry.values.items()
        )
        while some := list(islice(metrics, METRICS)):
            self.client.log_batch(self.id, metrics=some)
        if entries:
            self.client.set_tag(self.id, "stage", entries[-1].stage)

    def end(self, state: str) -> None:
        self.client.set_terminated(self.id, STATES[state])


def _name(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w./ -]", "_", name)
