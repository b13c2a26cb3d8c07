"""What is set of SD-LoRA."""

from __future__ import annotations

from pydantic import Field, field_validator

from cl_runner.config.schema import Section


class Settings(Section):
    """Settings of SD-LoRA."""

    reference: bool = Field(
        False, description="The official code's form: one α a task for all layers, all at 0.8 anew; ‖A‖·‖B‖."
    )
    rank_decay: list[int] = Field(
        default_factory=list, description="Ranks after each decay_every stages (SD-LoRA-RR; published [8, 6])."
    )
    decay_every: int = Field(4, ge=1, description="Stages between two ranks of rank_decay.")
    reuse: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="τ: a new direction that old ones make up to this share of its norm goes into their α "
        "(SD-LoRA-KD); 0: never.",
    )
    max_gb: float = Field(16.0, gt=0, description="Most that the directions of all tasks may take, 10⁹ bytes.")

    @field_validator("rank_decay")
    @classmethod
    def _ranks(cls, ranks: list[int]) -> list[int]:
        if any(rank < 1 for rank in ranks):
            raise ValueError("a rank is 1 or more")
        return ranks
