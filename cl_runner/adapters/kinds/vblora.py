"""VB-LoRA: factors put together from a bank of short vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from cl_runner.adapters.kind import NAME, Shapes
from cl_runner.adapters.tuner import Tuner, divides, rate

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class VBLoRA(Tuner):
    """A new bank at each stage. The folder has the k best of each piece and only answers; the logits are carried."""

    class Config(Tuner.Config):
        """Settings of vblora."""

        unused: ClassVar = Tuner.Config.unused | {"alpha"}
        r: int = Field(default=4, description="Rank of the pair that the pieces make.")
        vectors: int = Field(default=256, ge=2, description="Vectors in the bank, h.")
        vector_length: int = Field(default=256, ge=1, description="Length of a vector, b; divides the layers' widths.")
        topk: int = Field(default=2, ge=1, description="Vectors that a piece is a mixture of, k.")
        bank_bound: float = Field(default=0.02, gt=0, description="The bank is drawn within this of 0.")
        logits_std: float = Field(default=0.1, gt=0, description="Standard deviation of the first logits.")
        lr_ratio: float = rate(2.5, "published: 1e-3 for the bank, LoRA 4e-4")
        lr_ratio_logits: float = Field(
            default=10.0, gt=0, description="Learning rate of the logits over the bank's (published: 1e-2 and 1e-3)."
        )

        @field_validator("topk")
        @classmethod
        def _of_the_bank(cls, topk: int, others: ValidationInfo) -> int:
            if topk > others.data.get("vectors", topk):
                raise ValueError(f"is more than the {others.data['vectors']} vectors there are")
            return topk

    name = "vblora"
    title = "factors whose pieces are mixtures of a shared bank's vectors"
    equation = "ΔW = B A, each piece of length b the softmax mixture of its k best of h vectors"
    paper = "2405.15179"
    offers = frozenset({"A", "B", "product", "factors", "update"})
    folds = ("factors", "dense", "keep", "replace")
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

    def inject(self, model: nn.Module, config: Any) -> Any:
        wrapped = super().inject(model, config)
        for layer in wrapped.modules():
            if "vblora_logits_A" in getattr(layer, "_modules", ()):
                # One bank in one place of the tree: torch.func would put back what it swaps once for each.
                layer.__dict__["vblora_vector_bank"] = layer._modules.pop("vblora_vector_bank")
        return wrapped

    def first(self, role: str, like: Tensor, generator: torch.Generator | None, weight: Callable[[], Tensor]) -> Tensor:
        import torch

        drawn = torch.empty(like.shape)
        if role == "bank":
            return drawn.uniform_(-self.config.bank_bound, self.config.bank_bound, generator=generator)
        return drawn.normal_(0, self.config.logits_std, generator=generator)

    def factors(self, layer: Any) -> tuple[Tensor, Tensor]:
        A, B = layer._get_lora_matrices(NAME)
        return A, B

    def learning_rates(self) -> Mapping[str, float]:
        return dict.fromkeys(("logits", "logits_B"), self.config.lr_ratio_logits)

    def trained_count(self, layers: Shapes) -> int:
        return int(self.config.vectors * (self.config.vector_length + self._pieces(layers)))

    def stored_count(self, layers: Shapes) -> float:
        """The bank, and of each piece k − 1 weights and k numbers of vectors, of a byte each up to 256 vectors.

        Of more the paper's tables count whole ones; PEFT's folder has two bytes for each from 256 vectors on.
        """
        h, k = self.config.vectors, self.config.topk
        number = 0.25 if h <= 256 else 1.0
        return float(h * self.config.vector_length + self._pieces(layers) * (k * number + k - 1))

    def _pieces(self, layers: Shapes) -> int:
        return sum(int(self.config.r) * (m + n) // self.config.vector_length for m, n in layers.values())

    def check(self, layers: Shapes) -> None:
        divides(
            self.config.vector_length, [side for shape in layers.values() for side in shape], "adapter.vector_length"
        )
