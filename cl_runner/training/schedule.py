"""The learning rate over a stage: warm-up, and the way down."""

from __future__ import annotations

import math

from cl_runner.config.schema import TrainingConfig


def learning_rate(training: TrainingConfig, step: int, steps: int) -> float:
    """The rate of step ``step`` (from 0) of ``steps``: linear warm-up, then the schedule down to 0."""
    # Whole steps; 0.07 of 100 is 7 of them, though 0.07 · 100 > 7.
    warmup = math.ceil(training.warmup * steps - 1e-9 if training.warmup < 1 else training.warmup)
    if step < warmup:
        return training.lr * (step + 1) / warmup
    if training.schedule == "constant":
        return training.lr
    share = (step - warmup) / max(steps - warmup, 1)
    if training.schedule == "linear":
        return training.lr * (1.0 - share)
    return training.lr * 0.5 * (1.0 + math.cos(math.pi * share))
