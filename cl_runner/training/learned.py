"""What a stage has learned, in figures: of its training here, or as the run that it is taken over from has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cl_runner.training.accounting import Counts
from cl_runner.training.adopted import Adopted
from cl_runner.training.health import Health
from cl_runner.training.probe import Probe
from cl_runner.training.stage import StageRun
from cl_runner.training.step_log import Trained


@dataclass(frozen=True)
class Learned:
    """For ``metrics.json``.

    training: its section. counts: of what trained. seconds: of parts that are over; of another run's stage, of all.
    probe: its section. answers: of tasks that need not be asked. taken_from: whose stage it is, where it is not this
    run's own.
    """

    training: Mapping[str, Any]
    counts: Counts
    seconds: Mapping[str, float]
    probe: Mapping[str, Any] = field(default_factory=dict)
    answers: Mapping[str, list[str]] = field(default_factory=dict)
    taken_from: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def here(cls, stage: StageRun, trained: Trained, health: Health, probe: Probe | None) -> Learned:
        """What training has reported."""
        seconds = {"train": round(trained.seconds, 3), "method": round(trained.hook_seconds, 3)}
        if probe:
            seconds["probe"] = round(probe.seconds, 3)
        training = {
            "steps": trained.steps,
            "examples": trained.examples,
            "loss": trained.loss,
            "penalty": trained.penalty,
            "penalty_gradient_ratio": health.ratio,
            "update_norm": health.update,
            "free_share": None,  # known once the update is folded
            "rank": None,  # unless it was chosen
            **trained.about,
            "skipped_steps": trained.skipped,
            "global_batch": trained.plan.global_batch,
            "micro_batch": trained.plan.micro_batch,
            "accumulation": trained.plan.accumulation,
            "ranks": trained.plan.ranks,
        }
        return cls(training, trained.counts, seconds, probe.about() if probe else {})

    @classmethod
    def there(cls, stage: StageRun, adopted: Adopted) -> Learned:
        """What the other run says of the stage, whose parameter set answers here."""
        metrics, answers = adopted.metrics, {stage.plan.name: adopted.answers}
        return cls(metrics["training"], Counts.of(stage), metrics["seconds"], answers=answers, taken_from=adopted.about)
