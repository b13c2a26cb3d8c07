"""OA-Adapter: an adapter for each task that chooses its dimensions, off those of past ones (arXiv 2505.22358)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from cl_runner.adapters.kind import Need, rank_at
from cl_runner.config.schema import RunConfig, Section
from cl_runner.methods.protocol import Method, State
from cl_runner.methods.shared.limits import size
from cl_runner.methods.shared.tensors import added

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage


class OAAdapter(Method):
    """What a task may write is pushed off what past tasks write with the dimensions that they have kept on.

    Assumptions, as there is no public code: tasks' adapters stand side by side behind the untouched layer, not one
    behind the other; g begins uniform in (0, 1), so that a share of τ of the dimensions begins off; the penalty is a
    mean over layers and over pairs of dimensions. Published with r 16, one epoch and batch 32.
    """

    class Config(Section):
        """Settings of OA-Adapter."""

        elsewhere: ClassVar[Mapping[str, Any]] = {"adapter.target_modules": ["outputs"]}  # as published

        lambda1: float = Field(
            100.0, ge=0, description="Weight λ, on the mean over layers and pairs of dimensions (ours, not published)."
        )
        tau: float = Field(0.1, ge=0, lt=1, description="Where the threshold τ begins; it trains (ours).")

    name = "oa"
    title = "OA-Adapter: adapters with a learned number of dimensions, off those of past ones"
    equation = (
        "y = u + Σ_{i≤t} W2_i diag(γ_i) W1_i u,  u = W0 x,  γ = sign(g) max(|g| − τ, 0);  "
        "loss + λ Σ_{s<t} Σ_{jk} ⟨W2_t[:, k], γ_j W2_s[:, j]⟩²  (mean over jk and layers)"
    )
    paper = "2505.22358 (OA-Adapter)"
    trains = "W1 (r × m), W2 (m × r), g (r) and τ behind each target layer"
    factors = "A = W1 W0 (r × n), B = W2 diag(γ) (m × r) on disk; no scale, adapter.alpha is not used"
    carried = "past updates, folded into the weight; W2 diag(γ) of past tasks"
    growth = "up to r columns a task for each target, in the penalty"
    since_second = ("lambda1",)
    past_as = "other"
    by_shape = True

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("terms",),)

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.past: dict[str, list[Tensor]] = {}  # target → of each task W2 diag(γ) (m, r), with zeros where off
        self._said = ""

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        each = 4 * sum(m * rank_at(config.adapter, (m, n)) for m, n in shapes)
        return f"carries {size(each)} a task, {size(each * self.stages)} in all: outputs of {len(shapes)} layers"

    def reads_past(self) -> Mapping[str, str]:
        return {}

    def build(self, stage: Stage) -> None:
        if stage.evaluating:
            return
        import torch

        from cl_runner.adapters.pairs import fresh_pair
        from cl_runner.methods.oa.bottleneck import Bottleneck

        dice, p = stage.rng("adapter"), stage.config.adapter.dropout
        terms = {}
        for target, (m, _) in stage.targets().items():
            r = stage.rank_of(target)
            W1, W2 = fresh_pair(m, m, r, dice)  # as a pair that reads and writes outputs
            g = torch.rand(r, generator=dice)
            terms[target] = Bottleneck(stage.base_weight(target), W1, W2, g, self.config.tau, p)
        stage.begin_terms(terms)
        self.past = {target: [B.to(stage.device) for B in each] for target, each in self.past.items()}

    def penalty(self, stage: Stage) -> Tensor | None:
        if not self.past or not self.config.lambda1:
            return None
        terms = stage.terms()
        means = [(terms[target].W2.mT @ B).square().mean() for target, each in self.past.items() for B in each]
        total: Tensor = self.config.lambda1 / len(terms) * added(means)
        return total

    def logged(self, stage: Stage) -> dict[str, Any]:
        return {"active": sum(int(term.gamma().count_nonzero()) for term in stage.terms().values())}

    def end_task(self, stage: Stage) -> None:
        terms = stage.terms()
        for target, term in terms.items():
            self.past.setdefault(target, []).append(term.outputs().detach().clone())
        on, all_of = sum(int(t.gamma().count_nonzero()) for t in terms.values()), sum(len(t.g) for t in terms.values())
        self._said = f"{on} of {all_of} dimensions are on" if on else OFF

    def said(self, stage: Stage) -> str:
        return self._said

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return 4 * trained * stages // 2

    def state(self) -> State:
        tensors = {f"{i}.{target}": B for target, each in self.past.items() for i, B in enumerate(each)}
        return State(tensors, {"targets": list(self.past)})

    def load_state(self, state: State) -> None:
        tasks = len(state.tensors) // max(len(state.json["targets"]), 1)
        self.past = {target: [state.tensors[f"{i}.{target}"] for i in range(tasks)] for target in state.json["targets"]}


OFF = "warning: every dimension is off: nothing was learned; set a smaller method.tau"
