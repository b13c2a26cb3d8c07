"""VB-LoRA: factors put together from a bank of short vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from cl_runner.adapters.kind import NAME
from cl_runner.adapters.tuner import Shapes, Tuner, divides
from cl_runner.config.schema import AdapterConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class VBLoRA(Tuner):
    """A new bank at each stage. The folder has the k best of each piece and only answers; the logits are carried."""

    class Config(AdapterConfig):
        """Settings of vblora."""

        r: int = Field(default=4, ge=1, description="Rank of the pair that the pieces make.")
        vectors: int = Field(default=256, ge=2, description="Vectors in the bank, h.")
        vector_length: int = Field(default=256, ge=1, description="Length of a vector, b; divides the layers' widths.")
        topk: int = Field(default=2, ge=1, description="Vectors that a piece is a mixture of, k.")
        bank_bound: float = Field(default=0.02, gt=0, description="The bank is drawn within this of 0.")
        logits_std: float = Field(default=0.1, gt=0, description="Standard deviation of the first logits.")
        lr_ratio_logits: float = Field(
            default=10.0, gt=0, description="Learning rate of the logits over training.lr (published: 1e-2 and 1e-3)."
        )

        @model_validator(mode="after")
        def _of_them(self) -> VBLoRA.Config:
            if self.topk > self.vectors:
                raise ValueError(f"topk is {self.topk}, and there are {self.vectors} vectors")
            return self

    name = "vblora"
    title = "factors whose pieces are mixtures of a shared bank's vectors"
    equation = "ΔW = B A, each piece of length b the softmax mixture of its k best of h vectors"
    paper = "2405.15179"
    offers = frozenset({"A", "B", "factors", "update"})
    folds = ("factors", "dense", "keep", "replace")
    ignores = Tuner.ignores | {"alpha"}
    roles: ClassVar = {"vblora_logits_A": "logits", "vblora_logits_B": "logits_B"}
    shared: ClassVar = {"vblora_vector_bank": "bank"}
    trains = ("logits", "logits_B", "bank")
    quantized = True
    takes_conv1d = True
    on_disk = "answers"

    def peft_config(self, **common: Any) -> Any:
        from peft import VBLoRAConfig

        own = self.config
        return VBLoRAConfig(
            r=own.r, num_vectors=own.vectors, vector_length=own.vector_length, topk=own.topk,
            vblora_dropout=own.dropout, save_only_topk_weights=True, **common,
        )  # fmt: skip

    def first(self, role: str, like: Tensor, generator: torch.Generator | None, weight: Callable[[], Tensor]) -> Tensor:
        import torch

        drawn = torch.empty(like.shape)
        if role == "bank":
            return drawn.uniform_(-self.config.bank_bound, self.config.bank_bound, generator=generator)
        return drawn.normal_(0, self.config.logits_std, generator=generator)

    def update(self, layer: Any, weight: Callable[[], Tensor]) -> Tensor:
        A, B = self.factors(layer)
        return B @ A

    def factors(self, layer: Any) -> tuple[Tensor, Tensor]:
        A, B = layer._get_lora_matrices(NAME)
        return A, B

    def learning_rates(self) -> Mapping[str, float]:
        return dict.fromkeys(("logits", "logits_B"), self.config.lr_ratio_logits)

    def trained_count(self, layers: Shapes) -> int:
        return int(self.config.vectors * (self.config.vector_length + self._pieces(layers)))

    def stored_count(self, layers: Shapes) -> float:
        """The bank, and of each piece k numbers of vectors and k − 1 weights; PEFT's smallest whole numbers."""
        h, k = self.config.vectors, self.config.topk
        number = 0.25 if h < 2**8 else 0.5 if h < 2**15 else 1.0
        return float(h * self.config.vector_length + self._pieces(layers) * (k * number + k - 1))

    def _pieces(self, layers: Shapes) -> int:
        return sum(int(self.config.r) * (m + n) // self.config.vector_length for m, n in layers.values())

    def check(self, layers: Shapes) -> None:
        divides(
            self.config.vector_length, [side for shape in layers.values() for side in shape], "adapter.vector_length"
        )
