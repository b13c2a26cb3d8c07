"""JumpLoRA: a new, sparse update for each task, by a gate whose threshold learns (arXiv 2604.16171)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cl_runner.adapters.kind import Fold, Need
from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.protocol import Method, State
from cl_runner.methods.shared.limits import refuse_too_large
from cl_runner.methods.shared.tensors import added

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.engine.optim import ParameterGroup
    from cl_runner.methods.jumplora.gate import Gated
    from cl_runner.methods.protocol import Stage


class JumpLoRA(Method):
    """A fifth of the stage trains without gate; then θ is set so that as many entries are kept as A and B have numbers,
    and the gate is blended in until, after four fifths, only what it keeps answers.

    Beside it stands ELLA's penalty, of the gated update; ``lambda1=0`` is the gate alone. As the published code it has
    no dropout unless ``adapter.dropout`` is given: then the input is dropped, as a LoRA's. Published with
    ELLA's settings.
    """

    class Config(Section):
        """Settings of JumpLoRA."""

        elsewhere: ClassVar[Mapping[str, Any]] = {"adapter.dropout": 0.0}  # as published

        lambda1: float = Field(
            3e4, ge=0, description="Weight λ of ELLA's penalty, on the sum over entries, mean over layers (published)."
        )
        start: float = Field(0.2, ge=0, le=1, description="Share of the stage's steps without gate (published).")
        end: float = Field(0.8, ge=0, le=1, description="Share after which the gate alone counts (published).")
        threshold: Literal["global", "block"] = Field(
            "global", description="One θ for all layers, or one for each block of the model."
        )
        z: float = Field(-4.7, description="log θ before it is set (published).")
        width: float = Field(
            1e-3, gt=0, description="ε: θ's gradient is that of entries within half of it (published)."
        )
        max_gb: float = Field(16.0, gt=0, description="Most that the updates of all layers may take, 10⁹ bytes.")

    name = "jumplora"
    title = "JumpLoRA: new pairs whose small entries are gated away"
    equation = (
        "ΔW_t = s (p J(B A) + (1 − p) B A),  J(D) = D·1[|D| > θ], θ = e^z learns, p: 0 → 1 within the stage;  "
        "loss + λ/L Σ_layers ‖ΔW_t ∘ Σ_{i<t} ΔW_i‖_F²"
    )
    paper = "2604.16171 (JumpLoRA)"
    trains = "a LoRA pair, and z"
    carried = "past updates, folded into the weight"
    growth = "constant in a step"
    since_second = ("lambda1",)
    past_as = "other"
    dense = True
    by_shape = True

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("terms",),)

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.z: dict[str, list[str]] = {}  # name of a z → the targets that it is of
        self.p = 0.0
        self.placed = False  # whether θ has been set in this stage
        self._said = ""

    @property
    def answers_later(self) -> str:
        return "gates its update in within a stage"

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        start, end = self.config.start, self.config.end
        if start >= end:
            raise UserError(f"method.start: {start:g} is not before method.end {end:g}; set a smaller one")
        if shapes is not None:  # B A, its mask and ΔW
            gigabytes = 3 * sum(m * n for m, n in shapes) * 4e-9
            of = f"adapter.target_modules: gated updates of {len(shapes)} layers"
            refuse_too_large(of, gigabytes, self.config.max_gb, "name fewer layers")

    def build(self, stage: Stage) -> None:
        if stage.evaluating:
            return
        import torch
        from torch import nn

        from cl_runner.adapters.pairs import fresh_pair
        from cl_runner.methods.jumplora.gate import Gated

        self.z = {}
        for target in stage.targets():
            self.z.setdefault(_block(target) if self.config.threshold == "block" else "z", []).append(target)
        z = {name: nn.Parameter(torch.full((1,), float(self.config.z))) for name in self.z}
        of = {target: z[name] for name, targets in self.z.items() for target in targets}
        dice, p = stage.rng("adapter"), stage.config.adapter.dropout
        terms = {}
        for target, (m, n) in stage.targets().items():
            A, B = fresh_pair(m, n, stage.rank_of(target), dice)
            terms[target] = Gated(A, B, stage.scale_of(target), of[target], self.config.width, p)
        stage.begin_terms(terms, z)

    def begin_task(self, stage: Stage) -> None:
        self.placed = False
        self._blend(stage, 0.0)

    def parameter_groups(self, stage: Stage) -> list[ParameterGroup]:
        """Weight decay of z would open or close the gate by itself."""
        all_of = stage.parameters()
        z = {name: all_of.pop(name) for name in self.z}
        return [*stage.ordinary_groups(all_of), *(replace(g, weight_decay=0.0) for g in stage.ordinary_groups(z))]

    def penalty(self, stage: Stage) -> Tensor | None:
        from torch.utils.checkpoint import checkpoint

        def overlap(term: Gated, past: Tensor) -> Tensor:
            return (term.update() * past).square().sum()

        terms = stage.terms()
        beside = {target: past for target in terms if (past := stage.past_update(target)) is not None}
        if not self.config.lambda1 or not beside:
            return None
        # One layer's matrices at a time: they are made again for the gradient.
        sums = [checkpoint(overlap, terms[target], past, use_reentrant=False) for target, past in beside.items()]
        total: Tensor = self.config.lambda1 / len(terms) * added(sums)
        return total

    def after_step(self, stage: Stage) -> None:
        step, steps = stage.progress.step, stage.progress.steps
        start = max(round(self.config.start * steps), 1)
        end = max(round(self.config.end * steps), start + 1)
        if step >= start and not self.placed:
            self.placed = True
            self._place(stage)
        self._blend(stage, min(max((step - start) / (end - start), 0.0), 1.0))

    def _place(self, stage: Stage) -> None:
        """Set each θ so that as many entries lie over it as there are numbers in the pairs that it is of."""
        from cl_runner.methods.jumplora.gate import as_many_over

        terms, now = stage.terms(), stage.parameters()
        for name, targets in self.z.items():
            count = sum(terms[target].A.numel() + terms[target].B.numel() for target in targets)
            theta = as_many_over((terms[target].product() for target in targets), count)
            stage.write({name: now[name].detach().new_full((1,), math.log(theta))})

    def _blend(self, stage: Stage, p: float) -> None:
        self.p = p
        for term in stage.terms().values():
            term.p.fill_(p)

    def logged(self, stage: Stage) -> dict[str, Any]:
        now = stage.parameters()
        return {"gate": self.p, "threshold": sum(float(now[name].detach().exp()) for name in self.z) / len(self.z)}

    def end_task(self, stage: Stage) -> None:
        self._blend(stage, 1.0)
        kept = sum(int((update != 0).sum()) for update in stage.live_update().values())
        share = 100 * kept / sum(m * n for m, n in stage.targets().values())
        self._said = f"the gate keeps {share:.3g} % of the update's entries" if kept else NOTHING

    def said(self, stage: Stage) -> str:
        return self._said

    def fold(self, stage: Stage) -> Fold:
        return "dense"

    def step_state(self) -> State:
        return State({}, {"p": self.p, "placed": self.placed})

    def load_step_state(self, stage: Stage, state: State) -> None:
        self.placed = state.json["placed"]
        self._blend(stage, state.json["p"])


NOTHING = "warning: the gate keeps no entry of the update: nothing was learned; lower method.z, or method.width"


def _block(target: str) -> str:
    """The name of the z of a target's block: its path up to the first number."""
    found = re.match(r"(.*?\.\d+)(\.|$)", target)
    return "z_" + (found[1] if found else target).replace(".", "_")
