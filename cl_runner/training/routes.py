"""What the parts of a method's stages count for with the rows of each task, the method asked as where it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from cl_runner.models.batch import Example, token_batches
from cl_runner.training.stage import StageRun


@torch.no_grad()
def mean_weights(
    stage: StageRun, rows: Mapping[str, Sequence[Example]], tick: Callable[[int], None]
) -> dict[str, list[float]]:
    """Task → the mean over its rows, in fp64, of ``Method.routes`` at a stage that is opened to be evaluated."""
    found, done = {}, 0
    for task, examples in rows.items():
        total = torch.zeros(1, dtype=torch.float64)
        for numbers in token_batches([len(example.source) for example in examples], 4096):
            part = [examples[number] for number in numbers]
            weights = stage.room.method.routes(stage, stage.padded(part, [1.0] * len(part)).to(stage.device))
            assert weights is not None, "whoever asks has seen that the method has them"
            total = total + weights.double().sum(0).cpu()
            tick(done := done + len(part))
        found[task] = (total / len(examples)).tolist()
    return found
