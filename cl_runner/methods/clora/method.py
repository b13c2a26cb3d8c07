"""CLoRA, Controlled LoRA: the update's null space keeps a chosen subspace (arXiv 2410.16801)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cl_runner.adapters.kind import Need
from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.clora.subspaces import as_begun, leading_of, random
from cl_runner.methods.protocol import PairSettings, State
from cl_runner.methods.shared.limits import refuse_borrowing, refuse_too_large
from cl_runner.methods.shared.moments import input_moments
from cl_runner.methods.shared.sequential import Sequential
from cl_runner.methods.shared.tensors import added, under, within

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters.pairs import FactorGroup
    from cl_runner.methods.protocol import Stage


class CLoRA(Sequential):
    """Of inputs in span P_in the update makes nothing, and nothing of what it makes lies in span P_out.

    Random, P is the same at every stage. It is not stored: its numbers are drawn again from the seed and the layer's
    name, the same everywhere, and made orthonormal on the CPU in fp32, the same to the bit with the same library and
    threads (elsewhere to rounding). From data, P spans the leading directions of past tasks' inputs, each task counting
    alike, and of what W0 makes of them; the first task, which has no past, then has no penalty. What past tasks learned
    lies in these directions, in the same pair: so what is penalised there is how A and B change in the stage.
    """

    class Config(PairSettings):
        """Settings of CLoRA."""

        lambda1: float = Field(1.0, ge=0, description="Weight λ of the penalty (published; a sum over layers).")
        k: int = Field(128, ge=1, description="Columns of P_in and P_out (published: 128 to 2048, layers of 4096).")
        subspace: Literal["random", "data"] = Field(
            "random", description="P: random (published), or leading directions of past inputs and outputs (ours)."
        )
        max_gb: float = Field(
            32.0, gt=0, description="Most that P, and second moments (data), of all layers may take, 10⁹ bytes."
        )

    name = "clora"
    title = "CLoRA: one LoRA, whose null space keeps a chosen subspace"
    equation = (
        "loss + λ/2 Σ_layers (‖A P_in‖_F² + ‖Bᵀ P_out‖_F²),  P_in (n × k), P_out (m × k) orthonormal: random, or top "
        "eigenvectors of Σ x xᵀ and of W0 Σ x xᵀ W0ᵀ over past tasks, and A, B less what they were as the stage began"
    )
    paper = "2410.16801 (CLoRA: controlled low-rank adaptation of large language models)"
    carried = "A, B; P from the seed, or (subspace=data) past inputs' second moments"
    growth = "constant: k (m + n) numbers a layer in memory, none on disk; data: n² for each input that layers share"
    by_shape = True

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("A",), ("B",), ("product",))

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.inputs: dict[str, list[str]] = {}  # first of the targets that share an input → all of them
        self.moments: dict[str, Tensor] = {}  # the same → sum over past tasks of the mean of x xᵀ (n, n)
        self._made: dict[tuple[object, ...], tuple[Tensor, ...]] = {}

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        k, data = self.config.k, self.config.subspace == "data"
        if not data:
            refuse_borrowing(config, "clora keeps a subspace out of A and B as they are, not of what they change")
        least = min((min(shape) for shape in shapes or ()), default=k + 1)
        if k >= least:
            raise UserError(
                f"method.k: {k} orthonormal columns leave nothing of a layer's {least} dimensions to learn in; set k "
                f"to {least - 1} or less"
            )
        if data and self.config.reorthogonalise is not None:
            raise UserError(
                "method.reorthogonalise: puts other factors in the place of those that method.subspace=data keeps near "
                "their start; leave it out, or set subspace=random"
            )
        if shapes is not None:
            gigabytes = sum((n * n if data else 0) + k * (m + n) for m, n in shapes) * 4e-9
            of = f"method.{'subspace: moments and' if data else 'k:'} P of {len(shapes)} layers"
            instead = "name fewer adapter.target_modules" if data else "set k smaller"
            refuse_too_large(of, gigabytes, self.config.max_gb, instead)

    def build(self, stage: Stage) -> None:
        super().build(stage)
        self._made = {key: made for key, made in self._made.items() if key[0] == "random"}

    def penalty(self, stage: Stage) -> Tensor | None:
        from_data, k = self.config.subspace == "data", self.config.k
        if not self.config.lambda1 or (from_data and not self.moments):
            return None
        terms: list[Tensor] = []
        of_inputs: dict[str, Tensor] = {}
        for group in stage.factors():
            key = (self.config.subspace, k, *group.targets)
            if key not in self._made:
                self._made[key] = self._of_data(stage, group, of_inputs) if from_data else random(stage, group, k)
            P_in, P_out, *start = self._made[key]
            A, B = (group.A - start[0], group.B - start[1]) if start else (group.A, group.B)
            terms += [(A @ P_in).square().sum(), (B.mT @ P_out).square().sum()]
        total: Tensor = self.config.lambda1 / 2 * added(terms)
        return total

    def _of_data(self, stage: Stage, group: FactorGroup, known: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """P_in, P_out, and A and B as the stage began: there are past tasks, so the pair trains on."""
        first = {target: name for name, members in self.inputs.items() for target in members}
        assert stage.start is not None
        return (
            *leading_of(stage, group, self.config.k, first, self.moments, known),
            *as_begun(stage, group, stage.start),
        )

    def end_task(self, stage: Stage) -> None:
        super().end_task(stage)
        if self.config.subspace == "data":
            for targets, moment in input_moments(stage).items():
                self.inputs[targets[0]] = list(targets)
                past, now = self.moments.get(targets[0]), moment.float().cpu()
                self.moments[targets[0]] = now if past is None else past + now

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return 4 * sum(n * n for _, n in shapes) if self.config.subspace == "data" else 0

    def state(self) -> State:
        return State(under("moment", self.moments), {"inputs": self.inputs})

    def load_state(self, state: State) -> None:
        self.inputs = state.json.get("inputs", {})
        self.moments = within("moment", state.tensors)
