"""CLoRA, Controlled LoRA: the update's null space keeps a fixed random subspace (arXiv 2410.16801)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.config import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.base import PairSettings
from cl_runner.methods.seqlora import SeqLoRA

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.base import Stage


class CLoRA(SeqLoRA):
    """Of inputs in span P_in the update makes nothing, and nothing of what it makes lies in span P_out.

    P is the same at every stage. It is not stored: its numbers are drawn again from the seed and the layer's name, the
    same everywhere, and made orthonormal on the CPU in fp32, the same to the bit with the same library and threads
    (elsewhere to rounding).
    """

    class Config(PairSettings):
        """Settings of CLoRA."""

        lambda1: float = Field(1.0, ge=0, description="Weight λ of the penalty (published; a sum over layers).")
        k: int = Field(128, ge=1, description="Columns of P_in and P_out (published: 128 to 2048, layers of 4096).")

    name = "clora"
    title = "CLoRA: one LoRA, whose null space keeps a fixed random subspace"
    equation = "loss + λ/2 Σ_layers (‖A P_in‖_F² + ‖Bᵀ P_out‖_F²),  P_in (n × k), P_out (m × k) random, orthonormal"
    paper = "2410.16801 (CLoRA: controlled low-rank adaptation of large language models)"
    carried = "A, B; P from the seed"
    growth = "constant: k (m + n) numbers a layer in memory, none on disk"
    by_shape = True

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self._made: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        least = min((min(shape) for shape in shapes or ()), default=self.config.k)
        if self.config.k > least:
            raise UserError(
                f"method.k: {self.config.k} orthonormal columns do not fit into a layer's {least} dimensions; set k to "
                f"{least - 1} or less"
            )

    def penalty(self, stage: Stage) -> Tensor | None:
        if not self.config.lambda1:
            return None
        terms: list[Tensor] = []
        for group in stage.factors():
            P_in, P_out = self._subspaces(stage, group.targets, group.A.shape[2], group.B.shape[1])
            terms += [(group.A @ P_in).square().sum(), (group.B.mT @ P_out).square().sum()]
        total: Tensor = self.config.lambda1 / 2 * sum(terms[1:], terms[0])
        return total

    def _subspaces(self, stage: Stage, targets: Sequence[str], n: int, m: int) -> tuple[Tensor, Tensor]:
        """P_in (L, n, k) and P_out (L, m, k) of layers of one shape, fp32, made once in a process."""
        import torch

        key = (*targets, stage.config.seed, self.config.k)
        if key not in self._made:
            both = (
                torch.stack([orthonormal_columns(d, self.config.k, f"{stage.config.seed}/{t}/{side}") for t in targets])
                for side, d in (("in", n), ("out", m))
            )
            P_in, P_out = (P.to(stage.device) for P in both)
            self._made[key] = P_in, P_out
        return self._made[key]


def orthonormal_columns(d: int, k: int, purpose: str) -> Tensor:
    """(d, k) fp32 on the CPU, k ≤ d orthonormal columns of uniform distribution, decided by ``purpose`` alone."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(purpose.encode()))
    columns, upper = torch.linalg.qr(torch.randn(d, k, generator=generator))
    P: Tensor = columns * torch.where(upper.diagonal() < 0, -1.0, 1.0)  # uniform only with the signs fixed
    return P


METHOD = CLoRA
