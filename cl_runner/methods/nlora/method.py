"""N-LoRA: a new, sparse update for each task, so that updates do not collide (arXiv 2410.10179)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from cl_runner.adapters.kind import Need
from cl_runner.config.schema import RunConfig
from cl_runner.errors import UserError
from cl_runner.methods.nlora.settings import Settings
from cl_runner.methods.protocol import Method
from cl_runner.methods.shared.limits import refuse_borrowing
from cl_runner.methods.shared.penalties import layers_of, mean_size
from cl_runner.methods.shared.tensors import added

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters.pairs import FactorGroup
    from cl_runner.methods.protocol import Stage

# What is penalised of a group of pairs, summed over its layers.
SIZES: dict[str, Callable[[FactorGroup], Tensor]] = {
    "product": mean_size,
    "reference": lambda group: (group.A @ group.B).abs().sum(),
    "factors": lambda group: (group.A.abs().mean((1, 2)) + group.B.abs().mean((1, 2))).sum(),
}


class NLoRA(Method):
    """``+ λ ‖B_t A_t‖₁`` in the paper's form, per entry; the official code's ``‖A_t B_t‖₁`` as ``of: reference``."""

    class Config(Settings):
        """Settings of N-LoRA."""

    name = "nlora"
    title = "N-LoRA: sparse new pairs that do not collide with past ones"
    equation = "loss + λ ‖B_t A_t‖₁ (per entry);  reference: λ ‖A_t B_t‖₁ (r × r)"
    paper = "2410.10179 (Is Parameter Collision Hindering Continual Learning in LLMs?)"
    carried = "past updates, folded into the weight"
    growth = "constant in a step"
    by_shape = True
    any_rank = True
    forms = "paper (default): ‖B A‖₁, the mean over entries; reference: ‖A B‖₁ (r × r), where m = n"

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("A",), ("B",), ("product",))

    @property
    def form(self) -> str:
        return "paper" if self.config.what == "product" else str(self.config.what)

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        refuse_borrowing(config, "nlora penalises the size of B A as that of the update")
        oblong = [shape for shape in shapes or () if shape[0] != shape[1]]
        if self.config.what == "reference" and oblong:
            raise UserError(
                f"method.{'reference' if self.config.reference else 'of'}: nlora's reference form A·B exists only for "
                f"square layers, and one is {oblong[0][0]} × {oblong[0][1]}; use the paper's (method.reference=false, "
                "method.of=product), or other adapter.target_modules"
            )

    def reads_past(self) -> Mapping[str, str]:
        return {}

    def penalty(self, stage: Stage) -> Tensor | None:
        if not self.config.weight:
            return None
        groups = stage.factors()
        total: Tensor = self.config.weight * added([SIZES[self.config.what](group) for group in groups])
        return total if self.config.what == "reference" else total / layers_of(groups)
