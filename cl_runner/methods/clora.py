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
    alike, and of what W0 makes of them; the first task, which has no past, then has no penalty.
    """

    class Config(PairSettings):
        """Settings of CLoRA."""

        lambda1: float = Field(1.0, ge=0, description="Weight λ of the penalty (published; a sum over layers).")
        k: int = Field(128, ge=1, description="Columns of P_in and P_out (published: 128 to 2048, layers of 4096).")
        subspace: Literal["random", "data"] = Field(
            "random", description="P: random (published), or leading directions of past inputs and outputs (ours)."
        )
        max_gb: float = Field(8.0, gt=0, description="data: most that second moments and P may take, 10⁹ bytes.")

    name = "clora"
    title = "CLoRA: one LoRA, whose null space keeps a chosen subspace"
    equation = (
        "loss + λ/2 Σ_layers (‖A P_in‖_F² + ‖Bᵀ P_out‖_F²),  P_in (n × k), P_out (m × k) orthonormal: random, or top "
        "eigenvectors of Σ x xᵀ and of W0 Σ x xᵀ W0ᵀ over past tasks"
    )
    paper = "2410.16801 (CLoRA: controlled low-rank adaptation of large language models)"
    carried = "A, B; P from the seed, or (subspace=data) past inputs' second moments"
    growth = "constant: k (m + n) numbers a layer in memory, none on disk; data: n² for each input that layers share"
    by_shape = True

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.inputs: dict[str, list[str]] = {}  # first of the targets that share an input → all of them
        self.moments: dict[str, Tensor] = {}  # the same → sum over past tasks of the mean of x xᵀ (n, n)
        self._made: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        least = min((min(shape) for shape in shapes or ()), default=self.config.k)
        if self.config.k > least:
            raise UserError(
                f"method.k: {self.config.k} orthonormal columns do not fit into a layer's {least} dimensions; set k to "
                f"{least - 1} or less"
            )
        if self.config.subspace == "data" and shapes is not None:
            gigabytes = sum(n * n + self.config.k * (m + n) for m, n in shapes) * 4e-9
            of = f"method.subspace: moments and P of {len(shapes)} layers"
            refuse_too_large(of, gigabytes, self.config.max_gb, "name fewer adapter.target_modules")

    def build(self, stage: Stage) -> None:
        super().build(stage)
        self._made = {key: both for key, both in self._made.items() if key[0] == "random"}

    def penalty(self, stage: Stage) -> Tensor | None:
        from_data = self.config.subspace == "data"
        if not self.config.lambda1 or (from_data and not self.moments):
            return None
        terms: list[Tensor] = []
        for group in stage.factors():
            key = (self.config.subspace, self.config.k, *group.targets)
            if key not in self._made:
                make = self._of_data if from_data else self._random
                self._made[key] = make(stage, group)
            P_in, P_out = self._made[key]
            terms += [(group.A @ P_in).square().sum(), (group.B.mT @ P_out).square().sum()]
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

    def _of_data(self, stage: Stage, group: FactorGroup) -> tuple[Tensor, Tensor]:
        """The same from past inputs. *Collective*."""
        import torch

        first = {target: name for name, members in self.inputs.items() for target in members}
        moments = [self.moments[first[target]].to(stage.device) for target in group.targets]
        weights = [stage.base_weight(target).detach().float() for target in group.targets]
        with torch.no_grad():
            P_in = leading(torch.stack(moments), self.config.k)
            P_out = leading(torch.stack([W @ C @ W.mT for W, C in zip(weights, moments, strict=True)]), self.config.k)
            return stage.broadcast(P_in), stage.broadcast(P_out)  # another rank may turn directions of equal energy

    def end_task(self, stage: Stage) -> None:
        super().end_task(stage)
        if self.config.subspace == "data":
            for targets, moment in input_moments(stage).items():
                self.inputs[targets[0]] = list(targets)
                past = self.moments.get(targets[0])
                self.moments[targets[0]] = moment.cpu() if past is None else past + moment.cpu()

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return 4 * sum(n * n for _, n in shapes) if self.config.subspace == "data" else 0

    def state(self) -> State:
        return State({f"moment.{name}": moment for name, moment in self.moments.items()}, {"inputs": self.inputs})

    def load_state(self, state: State) -> None:
        self.inputs = state.json.get("inputs", {})
        self.moments = {name: state.tensors[f"moment.{name}"] for name in self.inputs}


def leading(moments: Tensor, k: int) -> Tensor:
    """(L, d, k) orthonormal eigenvectors of symmetric (L, d, d), largest first; zero where there is no energy left.

    None left: less than 1e-6 of the largest. Such directions would lie anywhere.
    """
    import torch

    energy, vectors = torch.linalg.eigh(moments)
    found: Tensor = vectors[..., -k:] * (energy[..., -k:] > 1e-6 * energy[..., -1:])[:, None, :]
    return found.flip(-1).contiguous()


def orthonormal_columns(d: int, k: int, purpose: str) -> Tensor:
    """(d, k) fp32 on the CPU, k ≤ d orthonormal columns of uniform distribution, decided by ``purpose`` alone."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(purpose.encode()))
    columns, upper = torch.linalg.qr(torch.randn(d, k, generator=generator))
    P: Tensor = columns * torch.where(upper.diagonal() < 0, -1.0, 1.0)  # uniform only with the signs fixed
    return P


METHOD = CLoRA
