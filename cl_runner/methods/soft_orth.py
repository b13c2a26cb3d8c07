"""soft-orth: SeqLoRA whose rows of A are given norm 1 every few steps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cl_runner.methods.base import PairSettings, Reorthogonalise
from cl_runner.methods.seqlora import SeqLoRA


class Soft(Reorthogonalise):
    """As everywhere, but soft unless told."""

    how: Literal["hard", "soft"] = Field(default="soft", description="hard: QR; soft: rows of norm 1.")


class SoftOrth(SeqLoRA):
    """A name for ``seqlora`` with ``method.reorthogonalise={how: soft}``. The rows do not become orthogonal."""

    class Config(PairSettings):
        """Settings of soft-orth."""

        reorthogonalise: Soft = Field(
            default_factory=Soft, description="{how, every, on, rescale, moments}: how, and every how many steps."
        )

    name = "soft-orth"
    title = "soft-orth: one LoRA for all tasks, the rows of its A given norm 1 every few steps"
    equation = "W_t = W0 + s·B A;  every k steps A = D Â, A ← Â (rows of norm 1);  rescale: B ← B D, which keeps B A"
    paper = "2310.14152 (baseline of O-LoRA), re-orthogonalised"


METHOD = SoftOrth
