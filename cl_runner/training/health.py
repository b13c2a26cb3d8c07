"""The health of a stage: whether its penalty pulls at all, and whether anything was learned.

A penalty may be met by shrinking what was to be learned, and a method that keeps past subspaces free may have none
left. All of these have cost users of the published codes whole runs, and none shows in a falling loss.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Of the largest update of an earlier stage: less than this and the stage has learned next to nothing.
NOTHING = 0.02
# Gradient of the penalty beside the task loss's: less than this and the penalty is not what held the update down.
WEAK = 0.1
# Of the median of a stage's first logged losses (MOST, at least FEWEST): more than this and it explodes. A loss
# that begins next to 0, of a task that is known already, is taken for NOISE: one hard step is no explosion.
EXPLODES, FEWEST, MOST, NOISE = 10.0, 3, 5, 0.1


class PenaltyWatch:
    """Measures, at logged steps, the penalty's own gradient against the task loss's. The same on every rank."""

    def __init__(self) -> None:
        self.ratio: float | None = None  # ‖∇ penalty‖ / ‖∇ task loss‖ at the last step measured
        self.seen = False  # a penalty at all
        self.pulled = False  # one that was not exactly 0
        self._own: dict[str, Tensor] | None = None

    def see(self, penalty: Tensor | None, parameters: Mapping[str, nn.Parameter]) -> None:
        """Before the backward: the gradient of the penalty (a scalar) alone, by autograd, weights untouched."""
        self._own = self.ratio = None
        if penalty is None:
            return
        self.seen = True
        self.pulled |= bool(penalty.detach() != 0)
        if penalty.requires_grad:
            found = torch.autograd.grad(penalty, list(parameters.values()), retain_graph=True, allow_unused=True)
            self._own = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}

    @property
    def waits(self) -> bool:
        """Whether there is a gradient to compare."""
        return self._own is not None

    def compare(self, whole: Mapping[str, Tensor], mean: Callable[[Tensor], Tensor]) -> None:
        """After the backward, before clipping: ``whole`` mean gradients by name, of loss and penalty together.

        mean: over the ranks, of which each may have a share of the penalty of its own (treelora). *Collective*.
        """
        assert self._own is not None, "see() comes before compare()"
        own = {name: mean(g) for name, g in self._own.items()}
        task = [g - own[name].to(g) if name in own else g for name, g in whole.items()]
        below = _norm(task)
        self.ratio = _norm(list(own.values())) / below if below else None
        self._own = None

    def state(self) -> dict[str, Any]:
        """What it has seen, between two steps, as JSON has it."""
        return {"ratio": self.ratio, "seen": self.seen, "pulled": self.pulled}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state``."""
        self.ratio, self.seen, self.pulled = state["ratio"], state["seen"], state["pulled"]

    @property
    def idle(self) -> bool:
        """There is a penalty, and it was exactly 0 at every step looked at."""
        return self.seen and not self.pulled


class Explosion:
    """Whether a stage's loss grows far over what it began with: its own logged steps alone decide. Said once."""

    def __init__(self) -> None:
        self.first: list[float] = []  # the first logged losses
        self.said = False

    def see(self, step: int, loss: float) -> str | None:
        """A logged loss, finite; the warning, where it is the first to be one."""
        if len(self.first) >= FEWEST and not self.said:
            usual = statistics.median(self.first)
            if loss > EXPLODES * max(usual, NOISE):
                self.said = True
                return (
                    f"warning: the loss is {loss:.4g} at step {step}, and was {usual:.4g} at first (median of "
                    f"{len(self.first)} logged steps); try a lower training.lr"
                )
        if len(self.first) < MOST:
            self.first.append(loss)
        return None

    def state(self) -> dict[str, Any]:
        """What it has seen, between two steps, as JSON has it."""
        return {"first": list(self.first), "said": self.said}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state``."""
        self.first, self.said = list(state["first"]), state["said"]


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@dataclass(frozen=True)
class Health:
    """A stage's penalty in figures.

    ``ratio`` is that of the gradients, penalty to task loss, at the last step; ``update`` and ``earlier`` are
    ‖ΔW‖_F over all target layers, of this stage and the largest one before it; None where there is none.
    """

    loss: float | None
    penalty: float | None
    ratio: float | None
    idle: bool
    update: float | None
    earlier: float | None
    first: bool  # the first stage: nothing to be orthogonal to yet
    expected: bool  # the method has a penalty, if not at this stage

    def line(self) -> str | None:
        """What the screen says; None where the method has no penalty."""
        if self.penalty is None and not self.expected:
            return None
        said = ["no penalty yet" if self.penalty is None else f"penalty {self.penalty:.4g}"]
        if self.loss is not None:
            said.append(f"task loss {self.loss:.4g}")
        if self.ratio is not None:
            said.append(f"gradient of the penalty {self.ratio:.2g} × the task loss's")
        if self.update is not None:
            said.append(f"new update ‖ΔW‖ {self.update:.4g}")
        return ", ".join(said)

    def warning(self) -> str | None:
        """One clear line if the penalty did nothing, or if next to nothing was learned."""
        if self.first:
            return None
        if self.idle:
            return "warning: the penalty was exactly 0 at every logged step; it had no effect on this stage"
        if self.update is not None and self.earlier and self.update < NOTHING * self.earlier:
            share = 100 * self.update / self.earlier
            why = "this stage has learned next to nothing"
            if self.penalty is not None and (self.ratio is None or self.ratio >= WEAK):
                why = "the penalty was met by learning nothing; lower its coefficient"
            return f"warning: the new update is {share:.2g} % as large as the largest one before: {why}"
        return None
