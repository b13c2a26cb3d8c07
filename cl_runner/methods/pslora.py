"""PS-LoRA: a new update for each task that keeps the signs of past ones, merged by magnitude (arXiv 2512.08960)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cl_runner.adapters.kind import Fold, Need
from cl_runner.config.schema import RunConfig, Section
from cl_runner.methods.protocol import Method, PairSettings, State
from cl_runner.methods.shared.limits import refuse_borrowing, refuse_by_task, refuse_too_large, size
from cl_runner.methods.shared.penalties import past_updates, scaled
from cl_runner.methods.shared.tensors import added

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters.pairs import FactorGroup
    from cl_runner.methods.protocol import Stage

IDLE = 1e-3  # where a |X| is below this, tanh(aX) is next to nothing and the penalty next to X²


class PSLoRA(Method):
    """Entries of an update cost by their squares, up to twice as much where past ones add up to the other sign.

    Assumptions, as the printed form is ambiguous: X and S are the updates themselves, with s, entry by entry, and the
    penalty is a mean over entries and layers; the merged updates are what later tasks train beside.
    """

    class Config(PairSettings):
        """Settings of PS-LoRA."""

        lambda1: float = Field(3e3, ge=0, description="Weight λ, on the mean over entries and layers (ours).")
        a: float = Field(
            100.0, gt=0, description="a in tanh(aX): entries well over 1/a count by their sign alone (ours)."
        )
        loss: bool = Field(True, description="Whether the penalty is added.")
        merge: bool = Field(True, description="Whether updates are merged by magnitude; false: added up.")
        history: Literal["sum", "merged"] = Field(
            "sum", description="S: the sum of all past updates, or what they were merged into."
        )
        max_gb: float = Field(16.0, gt=0, description="Most that the sums of past updates may take, 10⁹ bytes.")

    name = "pslora"
    title = "PS-LoRA: new pairs that keep the signs of past updates, merged by magnitude"
    equation = (
        "loss + λ mean X² (1 − tanh(aX) tanh(aS)),  X = ΔW_t, S = Σ_{i<t} ΔW_i;  "
        "W_t = W0 + M_t,  M_t = M_{t−1} where |M_{t−1}| ≥ |ΔW_t|, else ΔW_t"
    )
    paper = "2512.08960 (PS-LoRA)"
    carried = "M, in the weight; S (history=sum)"
    growth = "constant: one or two fp32 matrices a layer"
    since_second = ("lambda1",)
    past_as = "matrix"
    dense = True
    by_shape = True
    any_rank = True

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("A",), ("B",), ("product",))

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.sums: dict[str, Tensor] = {}  # target → S (m, n) fp32
        self._said = ""

    @property
    def carries_sum(self) -> bool:
        """Whether S is another matrix than the one in the weight."""
        return bool(self.config.merge and self.config.loss and self.config.history == "sum")

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        refuse_borrowing(config, "pslora penalises B A as the update")
        refuse_by_task(config, "loss", "merge", "history")
        if shapes is not None and self.carries_sum:
            of = f"adapter.target_modules: sums of past updates of {len(shapes)} layers"
            instead = "name fewer layers, or set method.history=merged"
            refuse_too_large(of, self.state_bytes(shapes, 0, 0) / 1e9, self.config.max_gb, instead)

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        carried = self.state_bytes(shapes, 0, 0)
        return f"carries {size(carried)}: sums of past updates of {len(shapes)} layers" if carried else ""

    def reads_past(self) -> Mapping[str, str]:
        return {}

    def begin_task(self, stage: Stage) -> None:
        self.sums = {target: S.to(stage.device) for target, S in self.sums.items()}

    def penalty(self, stage: Stage) -> Tensor | None:
        if not self.config.loss or not self.config.lambda1:
            return None
        groups = stage.factors()
        entries = sum(len(group.targets) * group.B.shape[1] * group.A.shape[2] for group in groups)
        terms = [self._size(stage, group, past) for group in groups if (past := self._history(stage, group))]
        return self.config.lambda1 / entries * added(terms) if terms else None

    def _history(self, stage: Stage, group: FactorGroup) -> Sequence[Tensor]:
        """S of every layer of a group; empty at the first stage."""
        past = past_updates(stage, group.targets)
        return [self.sums[target] for target in group.targets] if past and self.sums else past

    def _size(self, stage: Stage, group: FactorGroup, S: Sequence[Tensor]) -> Tensor:
        """``Σ X² (1 − tanh(aX) tanh(aS))``, summed over the layers of a group."""
        from cl_runner.maths.product import block_of, sum_over_product

        a = self.config.a

        def of(X: Tensor, layers: slice, rows: slice) -> tuple[Tensor, Tensor]:
            now, past = (a * X).tanh(), (a * block_of(S, layers, rows)).tanh()
            weight = 1 - now * past
            slope = X * (2 * weight - a * X * (1 - now.square()) * past)
            return (X.square() * weight).sum(), slope

        return sum_over_product(scaled(stage, group), group.A, of)

    def end_task(self, stage: Stage) -> None:
        update = stage.live_update()
        most = self.config.a * max(float(X.abs().max()) for X in update.values())
        idle = self.config.loss and stage.index and most < IDLE
        said = f"warning: a·|X| is at most {most:.2g}, where signs count for nothing; set a larger method.a"
        self._said = said if idle else ""
        if self.carries_sum:
            # Before the first stage an adapter that the run began from, if it did from one.
            past = self.sums or {target: S for target in update if (S := stage.past_update(target)) is not None}
            self.sums = {target: past[target] + X if target in past else X for target, X in update.items()}

    def said(self, stage: Stage) -> str:
        return self._said

    @property
    def fold_loses(self) -> bool:
        return bool(self.config.merge)

    def fold(self, stage: Stage) -> Fold:
        return "replace" if self.config.merge else "factors"

    def replacement(self, stage: Stage) -> dict[str, Tensor]:
        update = stage.live_update()
        for target, X in update.items():
            past = stage.past_update(target)
            update[target] = X if past is None else X.where(X.abs() > past.abs(), past)
        return update

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return 4 * sum(m * n for m, n in shapes) if self.carries_sum else 0

    def state(self) -> State:
        return State(dict(self.sums))

    def load_state(self, state: State) -> None:
        self.sums = dict(state.tensors)
