"""hard-orth: SeqLoRA whose A is made orthonormal every few steps."""

from __future__ import annotations

from pydantic import Field

from cl_runner.methods.base import PairSettings, Reorthogonalise
from cl_runner.methods.seqlora import SeqLoRA


class HardOrth(SeqLoRA):
    """A name for ``seqlora`` with ``method.reorthogonalise={how: hard}``."""

    class Config(PairSettings):
        """Settings of hard-orth."""

        reorthogonalise: Reorthogonalise = Field(
            default_factory=Reorthogonalise,
            description="{how, every, on, rescale, moments}: how, and every how many steps.",
        )

    name = "hard-orth"
    title = "hard-orth: one LoRA for all tasks, its A made orthonormal every few steps"
    equation = "W_t = W0 + s·B A;  every k steps A = R Q, A ← Q (Q Qᵀ = I);  rescale: B ← B R, which keeps B A"
    paper = "2310.14152 (baseline of O-LoRA), re-orthogonalised"


METHOD = HardOrth
