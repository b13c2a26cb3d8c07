"""SD-LoRA: directions stay, their magnitudes learn on (arXiv 2501.13198)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from cl_runner.config import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.base import Fold, Method, StagePlan, State
from cl_runner.methods.limits import refuse_too_large, size
from cl_runner.metrics.subspace import free_share

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters.directions import Directions
    from cl_runner.methods.base import Stage

START = 0.8  # every α of the reference form, at the beginning of every task


@dataclass
class Past:
    """The directions of one target: A (R, n), normalised B (m, R), their ranks, and α (k) as the last stage left it."""

    A: Tensor
    B: Tensor
    ranks: list[int]
    alpha: Tensor

    def each(self) -> list[tuple[Tensor, Tensor]]:
        """A_i (r_i, n) and B_i (m, r_i) of every direction."""
        import torch

        return list(zip(torch.split(self.A, self.ranks), torch.split(self.B, self.ranks, dim=1), strict=True))


class SDLoRA(Method):
    """The new direction is not normalised while it trains (it is 0/0 at the start); at its end α_t takes up its norm.

    α is per layer and carried on; α_t begins at s = alpha / r, where a LoRA would. The reference form has one α a task
    for all layers, all of them at 0.8 again at every task, and ‖A‖‖B‖ for the norm.
    """

    class Config(Section):
        """Settings of SD-LoRA."""

        reference: bool = Field(
            False, description="The official code's form: one α a task for all layers, all at 0.8 anew; ‖A‖·‖B‖."
        )
        rank_decay: list[int] = Field(
            default_factory=list, description="Ranks after each decay_every stages (SD-LoRA-RR; published [8, 6])."
        )
        decay_every: int = Field(4, ge=1, description="Stages between two ranks of rank_decay.")
        reuse: float = Field(
            0.0,
            ge=0,
            lt=1,
            description="τ: a new direction that old ones make up to this share of its norm goes into their α "
            "(SD-LoRA-KD); 0: never.",
        )
        max_gb: float = Field(16.0, gt=0, description="Most that the directions of all tasks may take, 10⁹ bytes.")

        @field_validator("rank_decay")
        @classmethod
        def _ranks(cls, ranks: list[int]) -> list[int]:
            if any(rank < 1 for rank in ranks):
                raise ValueError("a rank is 1 or more")
            return ranks

    name = "sdlora"
    title = "SD-LoRA: directions stay, their magnitudes learn on"
    equation = (
        "ΔW = α_t B_t A_t + Σ_{i<t} α_i (B_i A_i) / ‖B_i A_i‖_F;  A_t, B_t and all α train  "
        "(reference: / (‖A_i‖_F ‖B_i‖_F), one α a task)"
    )
    paper = "2501.13198 (SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning)"
    carried = "all A_i, B_i and α, in the forward"
    growth = "one pair and its α a task for each target, in every forward and in each stage's files (reuse: fewer)"
    trains = "a LoRA pair, and the magnitudes of all past ones"
    past_as = "other"
    by_shape = True

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.past: dict[str, Past] = {}
        self._tasks = 1

    def plan(self, order: Sequence[str]) -> list[StagePlan]:
        self._tasks = len(order)
        return super().plan(order)

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        if self.config.reference and self.config.reuse:
            raise UserError(
                "method.reuse: which directions a layer has is its own then, and the reference form has one α for all "
                "layers; set method.reference=false"
            )
        if shapes is not None:
            of = f"adapter.r: directions of {len(shapes)} layers over {self._tasks} tasks"
            gigabytes = sum(self._bytes(config, shapes)) / 1e9
            refuse_too_large(of, gigabytes, self.config.max_gb, "set a smaller rank")

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        each = self._bytes(config, shapes)
        return f"carries {size(each[0])} a task, {size(sum(each))} in all: directions of {len(shapes)} layers"

    def _bytes(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> list[int]:
        """Of each task's direction."""
        sides = sum(m + n for m, n in shapes)
        return [4 * self._rank(config, index) * sides for index in range(self._tasks)]

    def _rank(self, config: RunConfig, index: int) -> int:
        ranks = [config.adapter.largest, *self.config.rank_decay]
        return int(ranks[min(index // self.config.decay_every, len(ranks) - 1)])

    def build(self, stage: Stage) -> None:
        import torch
        from torch import nn

        from cl_runner.adapters.directions import Directions

        if stage.evaluating:
            self._keep(stage)
            return
        rank, dice = self._rank(stage.config, stage.index), stage.rng("adapter")
        adapter, layers = stage.config.adapter, stage.adapters.past
        count = len(next(iter(self.past.values())).alpha) if self.past else 0
        shared = nn.Parameter(torch.full((count + 1,), START))
        terms = {}
        for target, layer in layers.items():
            m, n = layer.base.shape
            past = self.past.get(target) or Past(torch.zeros(0, n), torch.zeros(m, 0), [], torch.zeros(0))
            A = nn.init.kaiming_uniform_(torch.empty(rank, n), a=5**0.5, generator=dice)
            own = nn.Parameter(torch.cat([past.alpha.cpu(), torch.tensor([adapter.alpha / rank])]))
            alpha = shared if self.config.reference else own
            pair = A, torch.zeros(m, rank)
            terms[target] = Directions(past.A, past.B, past.ranks, alpha, pair, adapter.dropout)
        stage.adapters.begin_terms(stage.plan.name, terms, {"alpha": shared} if self.config.reference else None)

    def fold(self, stage: Stage) -> Fold:
        from cl_runner.adapters.directions import Directions

        assert stage.adapters.terms is not None
        for target, term in stage.adapters.terms.of.items():
            assert isinstance(term, Directions)
            self.past[target] = self._learned(target, term)
        self._keep(stage)
        return "keep"

    def _learned(self, target: str, term: Directions) -> Past:
        """The directions of a target with the new one among them, its norm taken up by its α."""
        import torch

        from cl_runner.maths.directions import fitted, norm

        assert term.A is not None and term.B is not None
        A, B, alpha = term.A.detach(), term.B.detach(), term.alpha.detach()
        # Past directions as the layer has them, which is where A and B are; those of the state may be on the CPU.
        old = Past(term.past_A, term.past_B, self.past[target].ranks if target in self.past else [], alpha[:-1])
        length = (A.double().norm() * B.double().norm() if self.config.reference else norm((A, B))).float()
        if old.ranks and self.config.reuse:
            c, left = fitted(old.each(), (A, B))
            if left < self.config.reuse:
                return replace(old, alpha=old.alpha + alpha[-1] * c.float())
        new = B / length if length else B  # nothing was learned: a direction of zeros
        return Past(
            torch.cat([old.A, A]),
            torch.cat([old.B, new], dim=1),
            [*old.ranks, len(A)],
            torch.cat([old.alpha, alpha[-1:] * length]),
        )

    def _keep(self, stage: Stage) -> None:
        """What the stage has learned, as it answers and as a later process will build it again."""
        from torch import nn

        from cl_runner.adapters.directions import Directions

        terms = {
            target: Directions(past.A, past.B, past.ranks, nn.Parameter(past.alpha))
            for target, past in self.past.items()
        }
        stage.adapters.begin_terms(stage.plan.name, terms)
        stage.adapters.train(False)

    def free_share(self, stage: Stage) -> float:
        return statistics.fmean(free_share([past.A.cpu().numpy()]) for past in self.past.values())

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return 4 * trained * stages

    def state(self) -> State:
        parts = {target: {"A": past.A, "B": past.B, "alpha": past.alpha} for target, past in self.past.items()}
        tensors = {f"{target}.{name}": part for target, each in parts.items() for name, part in each.items()}
        return State(tensors, {"ranks": {target: past.ranks for target, past in self.past.items()}})

    def load_state(self, state: State) -> None:
        held = state.tensors
        self.past = {
            target: Past(held[f"{target}.A"], held[f"{target}.B"], ranks, held[f"{target}.alpha"])
            for target, ranks in state.json["ranks"].items()
        }


METHOD = SDLoRA
