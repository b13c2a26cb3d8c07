"""FourierFT: a few coefficients of the update's spectrum."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from cl_runner.adapters.kind import Shapes
from cl_runner.adapters.tuner import Tuner, rate
from cl_runner.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class FourierFT(Tuner):
    """The same random places of the spectrum in all layers and stages. It begins at zero, where PEFT draws."""

    class Config(Tuner.Config):
        """Settings of fourierft."""

        unused: ClassVar = Tuner.Config.unused | {"r", "alpha", "dropout"}
        lr_ratio: float = rate(10.0, "published with scaling 300: 3e-2, LoRA 3e-3")
        frequencies: int = Field(default=1000, ge=1, description="Coefficients of each layer.")
        scaling: float = Field(default=300.0, gt=0, description="The update is scaled by this.")
        projection_seed: int = Field(default=777, ge=0, description="Seed of their places, the same at every stage.")

    name = "fourierft"
    title = "a few coefficients of the update's spectrum"
    equation = "ΔW = s·Re IDFT₂(F), F zero but at some random places"
    paper = "2405.03003"
    roles: ClassVar = {"fourierft_spectrum": "spectrum"}
    trains = ("spectrum",)
    quantized = True

    def peft_config(self, **common: Any) -> Any:
        from peft import FourierFTConfig

        own = self.config
        return FourierFTConfig(
            n_frequency=own.frequencies, scaling=own.scaling, random_loc_seed=own.projection_seed, init_weights=True,
            **common,
        )  # fmt: skip

    def first(self, role: str, like: Tensor, generator: torch.Generator | None, weight: Callable[[], Tensor]) -> Tensor:
        import torch

        return torch.zeros(like.shape)

    def trained_count(self, layers: Shapes) -> int:
        return int(self.config.frequencies) * len(layers)

    def check(self, layers: Shapes) -> None:
        least = min(m * n for m, n in layers.values())
        if self.config.frequencies > least:
            raise UserError(f"adapter.frequencies: {self.config.frequencies}, and a layer has {least} entries in all")
