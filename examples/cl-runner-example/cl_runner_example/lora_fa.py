"""LoRA-FA: a pair whose A stays as it was drawn (arXiv 2308.03303)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from cl_runner.adapters.kind import Kind
from cl_runner.adapters.kinds.lora import Lora

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class LoraFA(Lora):
    """``h = W x + s·B A x``, and B alone trains: a method that wants an A that trains is refused by name."""

    class Config(Kind.Config):
        """Settings of lora-fa, beside those that all kinds know but for these: A is drawn here."""

        unused: ClassVar = frozenset({"init", "corda", "init_rows"})
        orthonormal: bool = Field(False, description="Whether the rows of A are orthonormal.")

    name = "lora-fa"
    title = "a low-rank pair whose A is frozen"
    paper = "2308.03303"
    offers = Lora.offers - {"A"}
    trains = ("B",)

    def fresh(self, m: int, n: int, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        import torch

        A = torch.randn(rank, n, generator=generator) / rank**0.5
        return torch.linalg.qr(A.mT)[0].mT.contiguous() if self.config.orthonormal else A, torch.zeros(m, rank)
