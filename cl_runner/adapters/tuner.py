"""A kind that is another tuner of PEFT's than LoRA: what has to be said of it, once. Nothing here imports torch.

``tuned.py`` does with it what every kind has to do: begin, train, fold or keep, and lie on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from cl_runner.adapters.kind import NAME, Fold, Kind, Opening, Shapes
from cl_runner.config.schema import AdapterConfig
from cl_runner.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cl_runner.adapters.base import Adapters
    from cl_runner.adapters.folding import Accumulator


def rate(ratio: float, published: str) -> Any:
    """The setting ``lr_ratio`` of a kind; ``published``: where its default is from."""
    return Field(default=ratio, gt=0, description=f"Learning rate over training.lr, which is LoRA's ({published}).")


class Tuner(Kind):
    """``W x`` becomes what PEFT's layer of the kind makes of it; ΔW is what it adds to W.

    ``roles``: PEFT's name of a parameter in a layer → what it is there; those that train.
    """

    class Config(AdapterConfig):
        """Settings of every such kind."""

        unused: ClassVar = frozenset(
            {"energy", "max_r", "dropout_past", "rslora", "init", "corda", "init_rows", "lr_ratio_B"}
            | {"rank_pattern", "alpha_pattern"}
        )
        r: int = Field(default=8, description="Rank.")
        lr_ratio: float = rate(1.0, "no other is published")

        @field_validator("r", mode="before")
        @classmethod
        def _rank(cls, value: Any) -> Any:
            if type(value) is not int or value < 1:
                raise ValueError("must be a whole number, 1 or more")
            return value

    by_shape = True
    offers = frozenset({"update"})
    folds: ClassVar[tuple[Fold, ...]] = ("dense", "keep", "replace")

    roles: ClassVar[Mapping[str, str]]
    shared: ClassVar[Mapping[str, str]] = {}  # the same, of parameters that belong to no layer alone
    takes_conv1d: ClassVar[bool] = False  # whether its layer stands in for GPT-2's Conv1D
    reads_weight: ClassVar[bool] = False  # whether its forward reads the weight itself, not only what it makes of x
    frozen: ClassVar[Sequence[str]] = ()  # buffers that belong to a stage's set, by PEFT's name in a layer
    on_disk: ClassVar[Literal["exact", "answers", "lora"]] = "exact"
    # A set by itself: PEFT's own folder, which gives back what trains to the bit; or only answers as it does; or, of a
    # kind that PEFT has not, a LoRA folder of the factors that it makes.

    def peft_config(self, **common: Any) -> Any:
        """PEFT's config; ``common`` is what every kind says: targets, task type."""
        raise NotImplementedError

    def first(self, role: str, like: Tensor, generator: torch.Generator | None, weight: Callable[[], Tensor]) -> Tensor:
        """The value of a parameter as a stage begins, drawn on the CPU where anything is drawn.

        ``weight``: W (m, n) fp32 of its layer, past updates in it.
        """
        raise NotImplementedError

    def prepare(self, layer: Any, past: Accumulator) -> None:
        """Before its parameters: what a stage begins with beside them, such as ``frozen`` buffers."""

    def inject(self, model: nn.Module, config: Any) -> Any:
        """PEFT's model of it."""
        from peft import get_peft_model

        return get_peft_model(model, config)

    def default_targets(self, model: nn.Module) -> list[str]:
        """The layers it adapts unless others are named."""
        from cl_runner.adapters.targets import default_targets

        return default_targets(model)

    def targets(self, model: nn.Module) -> list[str]:
        """The layers it adapts, by the endings of their names. Raises UserError."""
        from cl_runner.adapters.target_sets import chosen_targets

        return chosen_targets(model, self.config.target_modules, self.default_targets)

    def update(self, layer: Any, weight: Callable[[], Tensor]) -> Tensor:
        """ΔW (m, n) of PEFT's layer, fp32, in the graph of its parameters; ``weight`` is W (m, n) fp32."""
        factors = self.factors(layer)
        if factors is not None:
            return (self.scale * factors[1]) @ factors[0]
        delta: Tensor = layer.get_delta_weight(NAME)
        return delta

    def factors(self, layer: Any) -> tuple[Tensor, Tensor] | None:
        """A (r, n) and B (m, r) in the graph, of kinds that have them: as ΔW = s·B A, or that what it is made of."""
        return None

    @property
    def scale(self) -> float:
        """s: alpha / r, of kinds that have it."""
        return 1.0 if "alpha" in self.config.unused else float(self.config.alpha / self.config.r)

    def scale_at(self, layer: Any) -> float:
        """s of the factors in one of PEFT's layers."""
        return self.scale

    def learning_rates(self) -> Mapping[str, float]:
        """Role → its learning rate over the other roles', where that is not 1."""
        return {}

    def check(self, layers: Shapes) -> None:
        """Refuse layers that cannot be adapted with these settings. Raises UserError."""

    def check_model(self, model: nn.Module, targets: Sequence[str]) -> None:
        """Refuse a model's layers for more than their shapes. Raises UserError."""
        from cl_runner.adapters.targets import refuse_conv1d

        if not self.takes_conv1d:
            refuse_conv1d(model, targets, self.name)

    def layers(self, model: nn.Module) -> Shapes:
        from cl_runner.adapters.targets import target_shapes

        targets = self.targets(model)
        found = target_shapes(model, targets)
        self.check_model(model, targets)
        self.check(found)
        return found

    def open(self, opening: Opening) -> Adapters:
        from cl_runner.adapters.tuned import Tuned

        return Tuned(opening, self)


class InLora(Tuner):
    """A kind that stands in PEFT's LoRA layers, where A and B are, or has other things in their places."""

    takes_conv1d = True

    def peft_config(self, **common: Any) -> Any:
        from peft import LoraConfig

        own = self.config
        return LoraConfig(r=own.r, lora_alpha=own.alpha, lora_dropout=own.dropout, **common)

    def factors(self, layer: Any) -> tuple[Tensor, Tensor]:
        return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight


def divides(size: int, widths: Iterable[int], setting: str) -> None:
    """Refuse widths of layers that are no multiple of ``size``. Raises UserError naming what would do.

    setting: what the size is called, for the error.
    """
    found = sorted(set(widths))
    if any(width % size for width in found):
        common = math.gcd(*found)
        fitting = [divisor for divisor in range(2, min(common, 1024) + 1) if common % divisor == 0]
        near = sorted(sorted(fitting, key=lambda divisor: abs(math.log(divisor / size)))[:3])
        raise UserError(
            f"{setting}: {size} does not divide the layers' widths ({', '.join(map(str, found))}); "
            f"{', '.join(map(str, near)) or 'no number'} would"
        )


def kaiming_uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """As PEFT begins most factors: uniform within 1 / √(fan in)."""
    import torch

    return torch.nn.init.kaiming_uniform_(torch.empty(like.shape), a=5**0.5, generator=generator)
