"""What is set of shared-basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from cl_runner.adapters.kind import pair_parameters, rank_at
from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.shared.limits import refuse_too_large, size


class Settings(Section):
    """Settings of shared-basis; all coefficients are ours."""

    form: Literal["sum", "block"] = Field(
        "sum", description="sum: (α U + B_t) A_t; block: α U A_t,1 + B_t A_t,2, twice the rows of A."
    )
    shared_lr: float = Field(
        0.1, ge=0, description="Learning rate of U after the first task, as a share of training.lr; 0: frozen."
    )
    mixing: Literal["learned", "fixed", "similarity"] = Field(
        "learned",
        description="learned: α trains; fixed: α = 1; similarity: α = 1, and other tasks' updates count by "
        "β_ij = Sim(i, j) / Σ_k Sim(i, k), not 1.",
    )
    every: int = Field(10, ge=1, description="similarity: steps between two looks at how near the new task is.")
    sparse: float = Field(
        0.0, ge=0, description="λ of the mean |entry| of S and of C: A_t is S_t C, C shared like U. 0: A_t itself."
    )
    dictionary: int | None = Field(None, ge=1, description="sparse: rows of C; null: four times the rank.")
    support: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of entries of α U A_t that count: those where every past |ΔW_i| is among its largest.",
    )
    pca: int = Field(0, ge=0, description="U by the principal components of the B of the first so many tasks.")
    non_negative: bool = Field(False, description="A, B, U (and S, C) are kept at 0 or above.")
    max_gb: float = Field(
        16.0, gt=0, description="support: most that masks and updates as whole matrices may take, 10⁹ bytes."
    )

    @property
    def mixes(self) -> bool:
        """Whether every task's update stays apart, weighed by similarity."""
        return self.mixing == "similarity"

    @property
    def blocks(self) -> int:
        """How many times the rank a task's pair has rows."""
        return 2 if self.form == "block" else 1

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None) -> None:
        """Raises UserError where they do not fit together, or the layers (m, n)."""
        if self.mixes and self.support is not None:
            raise UserError("method.support: under method.mixing=similarity updates stay pairs, which have no mask")
        if self.sparse and self.form == "block":
            raise UserError("method.sparse: needs method.form=sum")
        for shape in sorted(shapes or (), key=min):
            r, small = rank_at(config.adapter, shape), min(shape)
            if r > small:
                raise UserError(
                    f"adapter.r: {r} is more than the {small} rows or columns of a target layer; set it lower"
                )
        if self.support is not None and shapes is not None:
            gigabytes = 2 * sum(m * n for m, n in shapes) * 4e-9  # the mask, and ΔW in the graph of a step
            of = f"method.support: masks and updates of {len(shapes)} layers"
            refuse_too_large(of, gigabytes, self.max_gb, "name fewer adapter.target_modules")

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]], stages: int) -> str:
        """A line on what is carried over so many stages, where that grows."""
        if self.support is not None:
            least = size(4 * sum(m * n for m, n in shapes))
            return f"carries {least}: the least share that past updates have in each entry of {len(shapes)} layers"
        if not self.mixes:
            return ""
        pair = 4 * self.blocks * pair_parameters(config.adapter, shapes)
        return f"carries {size(pair)} a task, {size(stages * pair)} in all: pairs of {len(shapes)} layers"

    def bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        """Of the method's files after so many stages, ``trained`` parameters each."""
        large = 0 if self.support is None else sum(m * n for m, n in shapes)
        # All pairs in the state, and again in the folder of each task.
        pairs = stages * (1 + stages) * self.blocks if self.mixes else 0
        return 4 * (trained * (1 + pairs) + large)
