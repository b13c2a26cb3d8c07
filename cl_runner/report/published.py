"""Published results (``configs/published_results.yaml``) and the rule for printing one beside a run's own.

Only the same order, model and method, in the same form, is comparable: anything looser reads as a comparison that
nobody made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import yaml

from cl_runner.config.lookup import shipped

FILE = "published_results.yaml"


@dataclass(frozen=True)
class Published:
    """One published result. Scores in percent: ``final`` after the last stage, ``diagonal`` after each task's own.

    average: AA; weighted_average: mean over test rows; backward_transfer: BWT, points. ``form``: ``"reference"``,
    ``"paper"`` or ``""`` (only one).
    seconds: of the authors' run, by part. source: where it is from, in words.
    """

    method: str
    label: str
    order: str
    model: str
    source: str
    form: str = ""
    average: float | None = None
    weighted_average: float | None = None
    backward_transfer: float | None = None
    final: dict[str, float] = field(default_factory=dict)
    diagonal: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``: plain JSON types; timings only under ``seconds``."""
        return {
            "label": self.label,
            "source": self.source,
            "average_accuracy": self.average,
            "weighted_average_accuracy": self.weighted_average,
            "backward_transfer": self.backward_transfer,
            "final": dict(self.final),
            "learned": dict(self.diagonal),
            "seconds": dict(self.seconds) or None,
        }


@lru_cache(maxsize=1)
def results() -> tuple[Published, ...]:
    """All published results."""
    data = yaml.safe_load((shipped("configs") / FILE).read_text(encoding="utf-8"))
    sources = {name: f"{s['title']} ({s['paper']}, {s['repository']})" for name, s in data["sources"].items()}
    return tuple(Published(**{**entry, "source": sources[entry["source"]]}) for entry in data["results"])


def model_key(model: str) -> str:
    """The name results are listed under: the last part of a hub id or folder (``google-t5/t5-large``)."""
    return model.rstrip("/").rsplit("/", 1)[-1].lower()


def lookup(order: str, model: str, method: str, form: str = "") -> Published | None:
    """The published result for this order, model and method; ``None`` if there is none to compare with.

    form: the method's, where it has more than one (``"reference"``, ``"paper"``); left empty, it is not compared.
    """
    for entry in results():
        same = (entry.order, entry.model, entry.method) == (order, model_key(model), method)
        if same and (not form or not entry.form or form == entry.form):
            return entry
    return None
