"""What is set of CoSO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from cl_runner.config.schema import Section


class Settings(Section):
    """Settings of CoSO; rank, sketch, every and lr as published for DomainNet."""

    rank: int = Field(70, ge=1, description="r: directions of Q (at most as many as the matrix has).")
    sketch: int = Field(160, ge=1, description="Columns of the sketch of a task's gradients.")
    every: int = Field(20, ge=1, description="K: steps between two looks at the gradient, for Q and the sketch.")
    looks: int = Field(
        0, ge=0, description="At least so many looks a stage, where it has the steps (ours); 0: by every alone."
    )
    threshold: float = Field(0.98, gt=0, le=1, description="Share of the sketch's energy that goes into M.")
    decay: float = Field(1.0, ge=0, le=1, description="Weight of the sketch so far beside a new gradient.")
    lr: float = Field(1e-4, gt=0, description="Learning rate, in place of training.lr.")
    temperature: float = Field(
        1.0, gt=0, description="The loss is that of logits / temperature; 1: of the logits (published: 3)."
    )
    side: Literal["output", "input"] = Field(
        "output", description="What M spans: the rows of ΔW (output, as the code) or its columns (input)."
    )
    rotate: bool = Field(False, description="Turn Adam's moments into the new Q (ours).")
    max_gb: float = Field(
        64.0, gt=0, description="Most that ΔW, what its steps need of it, M and sketch may take, 10⁹ bytes."
    )

    def floats(self, shapes: Sequence[tuple[int, int]], tasks: int, within: bool = True) -> int:
        """Numbers in the largest M of so many tasks; and within a stage in Q, sketch and moments, and in ΔW.

        Of ΔW a device holds the parameter, its gradient, the engine's master copy, the step's update, and both added.
        """
        total = 0
        for m, n in shapes:
            d, w = (m, n) if self.side == "output" else (n, m)
            rank, sketch = min(self.rank, d, w), min(self.sketch, d, w)
            total += d * min(tasks * sketch, d)
            total += d * (rank + sketch) + 2 * rank * w + 5 * m * n if within else 0
        return total
