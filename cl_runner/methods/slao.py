"""SLAO: one pair into which every task's pair is merged, B by averaging and A by taking the new one (2512.23017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.adapters.kind import Need, rank_at
from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.protocol import State
from cl_runner.methods.shared.fisher import fisher
from cl_runner.methods.shared.limits import refuse_by_task
from cl_runner.methods.shared.rows import drawn
from cl_runner.methods.shared.sequential import Sequential
from cl_runner.methods.shared.tensors import copies, under, within

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage

DEFICIENT = 1e-6  # of the largest |R_ii|


class SLAO(Sequential):
    """Two pairs: the merged one answers, the last task's own is where the next one begins, its R dropped.

    So B A jumps where a task begins. The Fisher of ``fisher_beta`` is of the tuned pair, the sum over past tasks, and
    its mean is taken per layer. There is no official code; the paper's alpha is unknown (others take 16 or 32);
    published with r 8, learning rate 1e-4, batch 8, one epoch.
    """

    class Config(Section):
        """Settings of SLAO."""

        fisher_beta: float = Field(
            0.0,
            ge=0,
            description="β: B changes less where past tasks' Fisher is large; 0: not at all (published), 0.5 as the "
            "public repository that has it.",
        )
        fisher_samples: int = Field(
            256, ge=1, description="Rows of a task that its Fisher is estimated from, by lot, where fisher_beta > 0."
        )

    name = "slao"
    title = "SLAO: one LoRA for all tasks, merged into after each"
    equation = (
        "begins with A = Qᵀ of A_{t−1}ᵀ = Q R, B = B_{t−1};  answers with A_m = A_t, B_m ← B_m + (B_t − B_m)/√t  "
        "(fisher_beta: each entry's share over 1 + β F/mean F)"
    )
    paper = "2512.23017 (Merge before Forget: A Single LoRA Continual Learning via Continual Merging)"
    carried = "A_m, B_m; A_t, B_t (fisher_beta: Σ F of B)"
    growth = "constant: two pairs"
    by_shape = True
    remade = "merges a task into the past once it is learned"

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("pair",), ("A",), ("B",), ("product",))

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.A: dict[str, Tensor] = {}  # target → A (r, n) as the last task has left it, on the CPU
        self.B: dict[str, Tensor] = {}
        self.fisher: dict[str, Tensor] = {}  # target → Σ F of B (m, r) over past tasks
        self.deficient: list[str] = []  # targets whose A had no full rank as the stage began

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        refuse_by_task(config, "fisher_beta")  # Σ F is of all past tasks, or of none
        if config.adapter.borrows or config.adapter.init == "loftq":
            raise UserError(
                f"adapter.init={config.adapter.init}: the pair begins with a part of the weight, and slao begins each "
                "task with another A; leave it out"
            )
        for shape in shapes or ():
            if (r := rank_at(config.adapter, shape)) > min(shape):
                raise UserError(
                    f"adapter.r: slao begins with {r} orthonormal rows, and a layer is {shape[0]} × {shape[1]}; set "
                    f"{min(shape)} or less"
                )

    def begin_task(self, stage: Stage) -> None:
        from cl_runner.maths.subspace import orthonormal_rows

        names, values = {role: stage.named(role) for role in "AB"}, {}
        self.deficient = []
        for target, A in self.A.items():
            rows, R = orthonormal_rows(A.to(stage.device))
            sizes = R.diagonal().abs()
            if sizes.min() < DEFICIENT * sizes.max():
                self.deficient.append(target)
            values[names["A"][target]] = stage.broadcast(rows)
            values[names["B"][target]] = self.B[target].to(stage.device)
        stage.write(values)

    def end_task(self, stage: Stage) -> None:
        parameters = copies(stage)
        names, merged = stage.named("B"), stage.start
        new = self._fisher(stage) if self.config.fisher_beta else {}
        if merged is not None:
            shares = {target: self._share(stage, target) for target in names}
            old = {target: merged.B[target].to(stage.device) for target in names}
            stage.write({name: old[t] + shares[t] * (parameters[name] - old[t]) for t, name in names.items()})
        self.A, self.B = ({t: parameters[n].cpu() for t, n in stage.named(role).items()} for role in "AB")
        for target, F in new.items():
            self.fisher[target] = F + self.fisher[target] if target in self.fisher else F

    def _share(self, stage: Stage, target: str) -> Tensor | float:
        """How much of what is new each entry of B takes."""
        share: float = (stage.index + 1) ** -0.5
        F = self.fisher.get(target)
        if not self.config.fisher_beta or F is None:
            return share
        matters = (F / F.mean().clamp(min=1e-38)).to(stage.device)  # 0 where no entry does
        lessened: Tensor = share / (1 + self.config.fisher_beta * matters)
        return lessened

    def _fisher(self, stage: Stage) -> dict[str, Tensor]:
        """Of B of each target (m, r), on the CPU. *Collective*."""
        from cl_runner.maths.vectors import unflat

        rows = drawn(stage.own_rows(), self.config.fisher_samples, stage.rng("fisher"))
        found = unflat(fisher(stage, rows), stage.parameters())
        return {target: found[name].cpu() for target, name in stage.named("B").items()}

    def said(self, stage: Stage) -> str:
        if not self.deficient:
            return ""
        one, more = self.deficient[0], len(self.deficient) - 1
        return (
            f"warning: A of {one}{f' and {more} others' if more else ''} had no full rank after the task before; the "
            "rest of its orthonormal rows were arbitrary; set a smaller adapter.r"
        )

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        share = sum(m for m, _ in shapes) / sum(map(sum, shapes)) if self.config.fisher_beta else 0.0
        return int(4 * trained * (1 + share))

    def state(self) -> State:
        return State(under("A", self.A) | under("B", self.B) | under("fisher", self.fisher))

    def load_state(self, state: State) -> None:
        self.A, self.B, self.fisher = (within(part, state.tensors) for part in ("A", "B", "fisher"))
