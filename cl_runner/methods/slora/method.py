"""SLoRA: a new pair for each task, cut to the directions that the weight shares with it (ACL 2026, long 247)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.adapters.kind import Need
from cl_runner.config.schema import RunConfig, Section
from cl_runner.methods.protocol import Method, PairSettings, State
from cl_runner.methods.shared.limits import refuse_borrowing

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage


class SLoRA(Method):
    """Once a task is learned each layer keeps the top c singular directions of its update.

    Of c the paper takes the one of largest overlap ‖U_cᵀ U0_r‖_F, U0_r the top r left singular vectors of W0: taken
    exactly that grows with c, so that nothing would be cut. Assumption: the overlap's square over c, its mean over the
    directions that are kept. c is one of 0.1 r, 0.2 r … r, rounded; of equal ones the largest. Published with r 64,
    alpha 128, learning rate 2e-4, on TRACE.
    """

    class Config(PairSettings):
        """Settings of SLoRA."""

        keep: float | None = Field(
            None, gt=0, le=1, description="Share of the rank that every layer keeps (1: inclora); null: by the overlap."
        )

    name = "slora"
    title = "SLoRA: new pairs, cut to the directions that the weight shares with them"
    equation = (
        "W_t = W_{t−1} + s·U_c S_c V_cᵀ of B_t A_t = U S Vᵀ, once learned;  c of largest ‖U_cᵀ U0_r‖_F²/c, U0_r the "
        "top left singular vectors of W0"
    )
    paper = "ACL 2026, long 247 (SLoRA; the rule for c is an assumption)"
    carried = "past updates, folded into the weight"
    growth = "constant in a step; the saved factors grow by one pair a task"
    any_rank = True
    remade = "cuts an update once it is learned"

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("pair",), ("product",))

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.leading: dict[str, Tensor] = {}  # target → U0_r (m, r), on the CPU; made of W0, and so not carried
        self.kept: dict[str, int] = {}  # target → c of the last task

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        refuse_borrowing(config, "slora cuts B A, which is no update then")

    def reads_past(self) -> Mapping[str, str]:
        return {}

    def end_task(self, stage: Stage) -> None:
        from cl_runner.methods.slora.cutting import chosen, cut, spectrum

        parameters, names = stage.all_parameters(), {role: stage.named(role) for role in "AB"}
        values: dict[str, Tensor] = {}
        self.kept = {}
        for target in stage.targets():
            A, B = (parameters[names[role][target]].detach() for role in "AB")
            found, rank = spectrum(A, B), len(A)
            if self.config.keep is not None:
                c = max(1, round(self.config.keep * rank))
            elif len(found[1]):
                c = chosen(found[0], self._leading(stage, target, rank), rank)
            else:  # nothing was learned
                c = rank
            # Rank 0's: another library may turn directions of equal size.
            self.kept[target] = int(stage.broadcast(A.new_tensor(c)))
            less_A, less_B = map(stage.broadcast, cut(A, B, found, c))
            if self.kept[target] < rank:
                values |= {names["A"][target]: less_A, names["B"][target]: less_B}
        stage.write(values)

    def _leading(self, stage: Stage, target: str, rank: int) -> Tensor:
        from cl_runner.methods.slora.cutting import leading_outputs

        known = self.leading.get(target)
        if known is None or known.shape[1] < rank:
            known = self.leading[target] = leading_outputs(stage.base_weight(target), rank).cpu()
        return known[:, :rank]

    def said(self, stage: Stage) -> str:
        ranks = {target: stage.rank_of(target) for target in self.kept}
        if not self.kept or self.kept == ranks:
            return ""
        each, mean = self.kept.values(), statistics.fmean(self.kept.values())
        return f"updates cut to rank {mean:.1f} (mean over layers; {min(each)} to {max(each)})"

    def state(self) -> State:
        return State(json={"kept": dict(self.kept)})

    def load_state(self, state: State) -> None:
        self.kept = dict(state.json.get("kept", {}))
