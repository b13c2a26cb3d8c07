"""(IA)³: what layers give, or take in, is scaled feature by feature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from cl_runner.adapters.kind import NAME, Shapes
from cl_runner.adapters.tuner import Tuner, rate
from cl_runner.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# The second layer of a feed-forward block, whose input is scaled, in the names that families have for it.
FEEDFORWARD = ("wo", "down_proj", "fc2", "fc_out", "dense_4h_to_h", "w2")
KEYS_AND_VALUES = ("k", "v", "k_proj", "v_proj")


class IA3(Tuner):
    """Keys, values and the inner features of feed-forward blocks; where a family fuses them, what PEFT takes."""

    class Config(Tuner.Config):
        """Settings of ia3."""

        unused: ClassVar = Tuner.Config.unused | {"r", "alpha", "dropout"}
        lr_ratio: float = rate(8.0, "PEFT's examples for mt0-large: 8e-3, LoRA 1e-3")

    name = "ia3"
    title = "keys, values and inner features scaled by vectors"
    equation = (
        "ΔW = (l − 1) ∘ W: l (m, 1) on what a layer gives, or (1, n) on the input of a feed-forward block's second"
    )
    paper = "2205.05638"
    roles: ClassVar = {"ia3_l": "scale"}
    trains = ("scale",)
    quantized = True

    def peft_config(self, **common: Any) -> Any:
        from peft import IA3Config

        inner = [target for target in common["target_modules"] if _inner(target)]
        return IA3Config(feedforward_modules=inner, **common)

    def default_targets(self, model: nn.Module) -> list[str]:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as known

        from cl_runner.adapters.target_sets import FAMILIES

        family = getattr(getattr(model, "config", None), "model_type", "")
        if family in FAMILIES and (apart := [name for name in FAMILIES[family].attention if name in KEYS_AND_VALUES]):
            return [*apart, *(name for name in FAMILIES[family].mlp if name in FEEDFORWARD)]
        if family not in known:
            raise UserError(
                f"adapter.target_modules: cannot tell keys, values and feed-forward blocks of a {family or 'model'}; "
                "name the layers"
            )
        return list(known[family])

    def first(self, role: str, like: Tensor, generator: torch.Generator | None, weight: Callable[[], Tensor]) -> Tensor:
        import torch

        return torch.ones(like.shape)

    def update(self, layer: Any, weight: Callable[[], Tensor]) -> Tensor:
        delta: Tensor = weight() * (layer.ia3_l[NAME] - 1)
        return delta

    def trained_count(self, layers: Shapes) -> int:
        return sum(n if _inner(target) else m for target, (m, n) in layers.items())

    def check_model(self, model: nn.Module, targets: Sequence[str]) -> None:
        from cl_runner.adapters.targets import is_target

        super().check_model(model, targets)
        for name, module in model.named_modules():
            if is_target(name, targets) and not _inner(name) and getattr(module, "bias", None) is not None:
                raise UserError(
                    f"adapter.kind: ia3 scales what a layer gives, the bias too, which no update of a weight can be; "
                    f"this model's {name} has one: name layers without"
                )


def _inner(target: str) -> bool:
    return target.rsplit(".", 1)[-1] in FEEDFORWARD
