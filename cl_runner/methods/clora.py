"""CLoRA, Controlled LoRA: the update's null space keeps a chosen subspace (arXiv 2410.16801)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cl_runner.config import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.base import PairSettings, State
from cl_runner.methods.limits import refuse_too_large
from cl_runner.methods.moments import input_moments
from cl_runner.methods.seqlora import SeqLoRA

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters import FactorGroup
    from cl_runner.methods.base import Stage


class CLoRA(SeqLoRA):
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

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.inputs: dict[str, list[str]] = {}  # first of the targets that share an input → all of them
        self.moments: dict[str, Tensor] = {}  # the same → sum over past tasks of the mean of x xᵀ (n, n)
        self._made: dict[tuple[object, ...], tuple[Tensor, ...]] = {}

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        k, data = self.config.k, self.config.subspace == "data"
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
        from_data = self.config.subspace == "data"
        if not self.config.lambda1 or (from_data and not self.moments):
            return None
        terms: list[Tensor] = []
        of_inputs: dict[str, Tensor] = {}
        for group in stage.factors():
            key = (self.config.subspace, self.config.k, *group.targets)
            if key not in self._made:
                self._made[key] = self._of_data(stage, group, of_inputs) if from_data else self._random(stage, group)
            P_in, P_out, *start = self._made[key]
            A, B = (group.A - start[0], group.B - start[1]) if start else (group.A, group.B)
            terms += [(A @ P_in).square().sum(), (B.mT @ P_out).square().sum()]
        total: Tensor = self.config.lambda1 / 2 * sum(terms[1:], terms[0])
        return total

    def _random(self, stage: Stage, group: FactorGroup) -> tuple[Tensor, Tensor]:
        """P_in (L, n, k) and P_out (L, m, k) of layers of one shape, fp32."""
        import torch

        seed, k = stage.config.seed, self.config.k
        both = (
            torch.stack([orthonormal_columns(d, k, f"{seed}/{target}/{side}") for target in group.targets])
            for side, d in (("in", group.A.shape[2]), ("out", group.B.shape[1]))
        )
        P_in, P_out = (P.to(stage.device) for P in both)
        return P_in, P_out

    def _of_data(self, stage: Stage, group: FactorGroup, of_inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The same from past inputs, and A (L, r, n) and B (L, m, r) as the stage began. *Collective*.

        ``of_inputs`` takes up, and gives, P_in of each input that layers share.
        """
        import torch

        start = stage.adapters.start
        assert start is not None, "there are past tasks, so the pair trains on"
        first = {target: name for name, members in self.inputs.items() for target in members}
        P_in, P_out = [], []
        with torch.no_grad():  # layer by layer: the matrices of all of them at once would be several times the model
            for target in group.targets:
                C = self.moments[first[target]].to(stage.device)
                if first[target] not in of_inputs:
                    # Rank 0's: another rank may turn directions of equal energy.
                    of_inputs[first[target]] = stage.broadcast(leading(C, self.config.k))
                P_in.append(of_inputs[first[target]])
                W = stage.base_weight(target).float()
                P_out.append(stage.broadcast(leading(W @ C @ W.mT, self.config.k)))
            A, B = ([of[target].to(stage.device) for target in group.targets] for of in (start.A, start.B))
            return torch.stack(P_in), torch.stack(P_out), torch.stack(A), torch.stack(B)

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
        return State({f"moment.{name}": moment for name, moment in self.moments.items()}, {"inputs": self.inputs})

    def load_state(self, state: State) -> None:
        self.inputs = state.json.get("inputs", {})
        self.moments = {name: state.tensors[f"moment.{name}"] for name in self.inputs}


def leading(moments: Tensor, k: int) -> Tensor:
    """(…, d, k) orthonormal eigenvectors of symmetric (…, d, d), largest first; zero where there is no energy left.

    None left: less than 1e-6 of the largest. Such directions would lie anywhere.
    """
    import torch

    energy, vectors = torch.linalg.eigh(moments)
    found: Tensor = vectors[..., -k:] * (energy[..., -k:] > 1e-6 * energy[..., -1:])[..., None, :]
    return found.flip(-1).contiguous()


def orthonormal_columns(d: int, k: int, purpose: str) -> Tensor:
    """(d, k) fp32 on the CPU, k ≤ d orthonormal columns of uniform distribution, decided by ``purpose`` alone."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(purpose.encode()))
    columns, upper = torch.linalg.qr(torch.randn(d, k, generator=generator))
    P: Tensor = columns * torch.where(upper.diagonal() < 0, -1.0, 1.0)  # uniform only with the signs fixed
    return P


METHOD = CLoRA
