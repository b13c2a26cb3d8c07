"""VeRA: one random pair for all layers, and two vectors a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from cl_runner.adapters.kind import NAME, Shapes
from cl_runner.adapters.tuner import Tuner, rate

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Vera(Tuner):
    """A and B are the same in all layers and stages, drawn from a seed, and not on disk."""

    class Config(Tuner.Config):
        """Settings of vera."""

        unused: ClassVar = Tuner.Config.unused | {"alpha"}
        r: int = Field(default=256, description="Rows of the random A.")
        d_initial: float = Field(default=0.1, gt=0, description="First value of the vector d.")
        projection_seed: int = Field(default=0, ge=0, description="Seed of A and B, the same at every stage.")
        lr_ratio: float = rate(10.0, "published: 4e-3, LoRA 4e-4")

    name = "vera"
    title = "one frozen random pair for all layers, scaled by two vectors a layer"
    equation = "ΔW = diag(b) B diag(d) A, A and B random, frozen and shared"
    paper = "2310.11454"
    offers = frozenset({"product", "factors", "update"})
    folds = ("factors", "dense", "keep", "replace")
    roles: ClassVar = {"vera_lambda_d": "d", "vera_lambda_b": "b"}
    trains = ("d", "b")
    quantized = True
    takes_conv1d = True

    def peft_config(self, **common: Any) -> Any:
        from peft import VeraConfig

        own = self.config
        return VeraConfig(
            r=own.r, vera_dropout=own.dropout, d_initial=own.d_initial, projection_prng_key=own.projection_seed,
            save_projection=False, **common,
        )  # fmt: skip

    def first(self, role: str, like: Tensor, generator: torch.Generator | None, weight: Callable[[], Tensor]) -> Tensor:
        import torch

        return torch.full(like.shape, self.config.d_initial if role == "d" else 0.0)

    def factors(self, layer: Any) -> tuple[Tensor, Tensor]:
        A, B = layer.vera_A[NAME][:, : layer.in_features], layer.vera_B[NAME][: layer.out_features]
        d, b = layer.vera_lambda_d[NAME], layer.vera_lambda_b[NAME]
        return d[:, None] * A.to(d.device), b[:, None] * B.to(b.device)

    def trained_count(self, layers: Shapes) -> int:
        return sum(m + self.config.r for m, _ in layers.values())
