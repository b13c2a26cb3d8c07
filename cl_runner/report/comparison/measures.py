"""What is measured of a run in a comparison, and its mean and spread over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from cl_runner.metrics import accuracy
from cl_runner.report.tables import RunSummary, number

# Key → its column, and digits behind the point.
MEASURES = {
    "average_accuracy": ("AA", 1),
    "forgetting": ("forgetting", 1),
    "backward_transfer": ("BWT", 1),
    "train_seconds": ("train s", 0),
    "state_megabytes": ("state MB", 2),
}
# In Markdown and JSON, where there is room: right after learning, the mean ‖ΔW_t‖, what is left of the input space,
# the mean over extra sets (``eval.extra``) now, and base minus now.
MORE = {
    "learning_accuracy": ("learned", 1),
    "update_norm": ("‖ΔW‖", 2),
    "free_subspace": ("free %", 1),
    "peak_megabytes": ("peak MB", 0),
    "trained_parameters": ("trained", 0),
    "general_ability": ("extra %", 1),
    "general_forgetting": ("extra lost", 1),
}
ALL = {**MEASURES, **MORE}
# What AA is held against, each with its own Pareto front.
COSTS = ("train_seconds", "state_megabytes", "peak_megabytes")


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (over ``n − 1``; ``None`` for one value) of ``n`` values."""

    mean: float
    std: float | None
    n: int

    def text(self, digits: int = 1) -> str:
        """``"78.4 ± 0.6"``, or the mean alone for one value."""
        mean = number(self.mean, digits)
        return mean if self.std is None else f"{mean} ± {self.std:.{digits}f}"


def spread(values: Sequence[float | None]) -> Spread | None:
    """The spread of ``values``; ``None`` if there is none, or one of them is undefined."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return Spread(math.fsum(known) / len(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def shown(value: Spread | None, key: str) -> str:
    """A measure in a table; ``-`` where there is none."""
    return "-" if value is None else value.text(ALL[key][1])


def measured(run: RunSummary) -> dict[str, float | None]:
    """All measures of a run, by their keys. Of what is undefined there is no mean that may stand beside another's."""
    seconds = (run.seconds or {}).get("train")
    found = {**accuracy.summary(run.matrix.over_all()), **run.learned}
    found |= {"train_seconds": seconds, "state_megabytes": run.megabytes, "trained_parameters": run.trained}
    found |= {"general_ability": run.extra.mean, "general_forgetting": run.extra.forgetting}
    return {key: found.get(key) for key in ALL}
