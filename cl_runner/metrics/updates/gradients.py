"""How the tasks' mean gradients lie to each other: what one step on one task would do to the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class TaskGradients:
    """Of T tasks, at the model after ``stage``, or at the base.

    inner: layer → ``⟨G_i, G_j⟩`` (T, T) fp64 of the gradients of the tasks' losses with respect to its weight.
    """

    stage: str
    tasks: tuple[str, ...]
    inner: Mapping[str, Tensor]

    @property
    def norm(self) -> Tensor:
        """``‖G_t‖`` over all layers (T)."""
        return self._together.diagonal().clamp(min=0).sqrt()

    @property
    def cosine(self) -> Tensor:
        """Of the gradients of all layers as one long vector each (T, T); nan of one that is zero."""
        return _cosine(self._together)

    def cosine_of(self, layer: str) -> Tensor:
        """Of one layer's (T, T)."""
        return _cosine(self.inner[layer])

    @property
    def _together(self) -> Tensor:
        first, *others = self.inner.values()
        return sum(others, first)


def _cosine(inner: Tensor) -> Tensor:
    norms = inner.diagonal().clamp(min=0).sqrt()
    return inner / (norms[:, None] * norms)
