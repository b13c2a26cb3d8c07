"""What is set of SAPT."""

from __future__ import annotations

from pydantic import Field

from cl_runner.config.schema import Section


class Settings(Section):
    """Settings of SAPT."""

    kappa: float = Field(
        0.1, ge=0, description="Weight κ of the KL (published for the long orders on T5; LLaMA: 2; SuperNI: 0.5, 1)."
    )
    hidden: int = Field(100, ge=1, description="Width between W1 and W2 (published).")
    router_lr: float = Field(
        1.0, gt=0, description="Learning rate of keys and query net, times training.lr (1: the same, published)."
    )
    pseudo: int = Field(
        64, ge=0, description="Pseudo inputs that the model writes of each task (ours); 0: no KL, and none is learned."
    )
    lambda_lm: float = Field(
        0.25,
        gt=0,
        description="Weight of the loss that learns to write them (ours, LFPT5's; SAPT trains another LoRA).",
    )
    pseudo_tokens: int = Field(128, ge=4, description="Longest input in tokens that the model writes (ours).")
    top_k: int = Field(64, ge=1, description="Tokens among which each one is drawn (ours, LFPT5's).")
    repetition_penalty: float = Field(1.0, ge=1, description="While inputs are drawn; 1: none (ours).")
    max_gb: float = Field(16.0, gt=0, description="Most that the pairs of all tasks may take, 10⁹ bytes.")

    @property
    def writes(self) -> bool:
        """Whether pseudo inputs have any use."""
        return bool(self.pseudo and self.kappa)
