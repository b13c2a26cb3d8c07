"""OSFT: only the low end of each weight's spectrum learns, the high end is held (arXiv 2504.07097)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.adapters.kind import Fold, Need
from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.protocol import Method
from cl_runner.methods.shared.limits import refuse_too_large
from cl_runner.methods.shared.rates import at_rate

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.engine.optim import ParameterGroup
    from cl_runner.methods.protocol import Stage


class OSFT(Method):
    """Adam's elementwise steps leave the subspace that a projected gradient lies in, so U and V are projected again.

    ΔW then has no part in the upper singular vectors, on either side: ``U_hᵀ ΔW = 0`` and ``ΔW V_hᵀ = 0``.
    """

    class Config(Section):
        """Settings of OSFT."""

        preserve_first: float = Field(
            0.3, ge=0, lt=1, description="Share of each weight's rank that is held at the first stage (PEFT's example)."
        )
        preserve_last: float = Field(
            0.7, ge=0, lt=1, description="The same at the last stage; in between it grows evenly (PEFT's example)."
        )
        lr: float = Field(5e-5, gt=0, description="Learning rate, in place of training.lr (published for T5-large).")
        max_gb: float = Field(
            64.0, gt=0, description="Most that the SVDs of all target layers and their training may take, 10⁹ bytes."
        )

    name = "osft"
    title = "OSFT: the low end of each weight's spectrum learns, the high end is held"
    equation = (
        "W = U_h S_h V_h + U S V, SVD anew at each stage; U, S, V train;  "
        "U ← (I − U_h U_hᵀ) U,  V ← V (I − V_hᵀ V_h) after each step, their gradients alike before it"
    )
    paper = "2504.07097 (Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning)"
    carried = "past updates, folded into the weight"
    growth = "constant; the held rank grows from preserve_first to preserve_last over the stages"
    trains = "U, S, V of every target layer (no LoRA: of adapter.*, target_modules alone is used)"
    factors = "none: U (m × k), S (k), V (k × n); on disk A = I, B = ΔW"
    frozen = "the base, past updates, and U_h, S_h, V_h, the high end of their sum"
    past_as = "other"
    dense = True
    by_shape = True
    by_order = True

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("terms",),)

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        if self.config.preserve_last < self.config.preserve_first:
            raise UserError(
                f"method.preserve_last: {self.config.preserve_last:g} is less than method.preserve_first "
                f"{self.config.preserve_first:g}; what is held must not shrink"
            )
        if shapes is not None:
            # What trains has a gradient, the engine's master copy and Adam's two moments beside it; ΔW stands beside
            # the sum that it began with.
            copies = 1 + 4 * (1 - self.config.preserve_first)
            gigabytes = sum(copies * min(m, n) * (m + n) + 2 * m * n for m, n in shapes) * 4e-9
            of = f"adapter.target_modules: SVDs of {len(shapes)} layers, and what their training needs"
            refuse_too_large(of, gigabytes, self.config.max_gb, "name fewer layers")

    def build(self, stage: Stage) -> None:
        if stage.evaluating:
            return
        import torch

        from cl_runner.methods.osft.spectral import Spectral

        terms = {}
        for target in stage.targets():
            # Of the unrounded sum; one rank's, in case another's arithmetic chose other signs.
            found = torch.linalg.svd(stage.whole_weight(target).contiguous(), full_matrices=False)
            U, S, V = (stage.broadcast(part) for part in found)
            terms[target] = Spectral(U, S, V, high=self._held(stage, len(S)))
        stage.begin_terms(terms)

    def _held(self, stage: Stage, rank: int) -> int:
        """Singular directions, of ``rank``, that this stage holds."""
        first, last = self.config.preserve_first, self.config.preserve_last
        share = first + (last - first) * stage.index / max(len(stage.order) - 1, 1)
        return min(int(share * rank + 1e-9), rank - 1)

    def free_share(self, stage: Stage) -> float:
        ranks = map(min, stage.targets().values())
        return statistics.fmean(1 - self._held(stage, rank) / rank for rank in ranks)

    def parameter_groups(self, stage: Stage) -> list[ParameterGroup]:
        return at_rate(stage, self.config.lr)

    def edit_gradients(self, stage: Stage, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
        return dict(self._outside(stage, gradients))

    def after_step(self, stage: Stage) -> None:
        stage.write(dict(self._outside(stage, {name: p.detach() for name, p in stage.parameters().items()})))

    def _outside(self, stage: Stage, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What belongs to U and V, without its part in the upper singular vectors."""
        from cl_runner.maths.subspace import without

        U, V = stage.named("U"), stage.named("V")
        for target, term in stage.terms().items():
            yield U[target], without(values[U[target]], term.high_U)
            yield V[target], without(values[V[target]].mT, term.high_V.mT).mT

    def fold(self, stage: Stage) -> Fold:
        return "dense"
