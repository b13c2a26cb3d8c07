"""What is set of LFPT5."""

from __future__ import annotations

from pydantic import Field

from cl_runner.config.schema import Section


class Settings(Section):
    """Settings of LFPT5."""

    length: int = Field(300, ge=1, description="Vectors of the prompt (published).")
    lr: float = Field(0.3, gt=0, description="Learning rate, in place of training.lr (ours; 0.5 with Adafactor).")
    lambda_lm: float = Field(0.25, gt=0, description="Weight of the language-model loss (published, classification).")
    lambda_kl: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="Weight λ of the KL, 1 − λ being that of the rest, at every task (published, classification).",
    )
    pseudo: int = Field(2, ge=0, description="Pseudo samples of each label of each past task (published).")
    draws: int = Field(8, ge=1, description="Examples the model writes for each one that is wanted (ours).")
    pseudo_tokens: int = Field(128, ge=4, description="Longest example in tokens that the model writes (ours).")
    top_k: int = Field(64, ge=1, description="Tokens among which each one is drawn (published).")
    repetition_penalty: float = Field(2.5, ge=1, description="While examples are drawn (published).")
