"""SD-LoRA: directions stay, their magnitudes learn on (arXiv 2501.13198)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cl_runner.adapters.kind import Fold, Need, rank_at
from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.protocol import Method, State
from cl_runner.methods.sdlora.past import Past, learned
from cl_runner.methods.sdlora.settings import Settings
from cl_runner.methods.shared.limits import refuse_too_large, size
from cl_runner.methods.shared.tensors import under
from cl_runner.metrics.free_subspace import free_share

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage

START = 0.8  # every α of the reference form, at the beginning of every task


class SDLoRA(Method):
    """The new direction is not normalised while it trains (it is 0/0 at the start); at its end α_t takes up its norm.

    α is per layer and carried on; α_t begins at s = alpha / r, where a LoRA would. The reference form has one α a task
    for all layers, all of them at 0.8 again at every task, and ‖A‖‖B‖ for the norm.
    """

    class Config(Settings):
        """Settings of SD-LoRA."""

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

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("terms",),)

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.past: dict[str, Past] = {}

    @property
    def form(self) -> str:
        return "reference" if self.config.reference else "paper"

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        if self.config.reference and self.config.reuse:
            raise UserError(
                "method.reuse: which directions a layer has is its own then, and the reference form has one α for all "
                "layers; set method.reference=false"
            )
        if self.config.rank_decay and config.adapter.patterns:
            raise UserError(
                f"method.rank_decay: gives all layers one rank, adapter.{config.adapter.patterns[0]} not; leave one out"
            )
        if self.config.reference and config.adapter.alpha_pattern:
            raise UserError("adapter.alpha_pattern: sdlora's reference form has one α for all layers; leave it out")
        if shapes is not None:
            of = f"adapter.r: directions of {len(shapes)} layers over {self.stages} tasks"
            gigabytes = sum(self._bytes(config, shapes)) / 1e9
            refuse_too_large(of, gigabytes, self.config.max_gb, "set a smaller rank")

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        each = self._bytes(config, shapes)
        return f"carries {size(each[0])} a task, {size(sum(each))} in all: directions of {len(shapes)} layers"

    def _bytes(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> list[int]:
        """Of each task's direction."""
        each = [(rank_at(config.adapter, shape), sum(shape)) for shape in shapes]
        return [4 * sum(self._rank(rank, index) * sides for rank, sides in each) for index in range(self.stages)]

    def _rank(self, first: int, index: int) -> int:
        """The rank at a stage, of a layer that begins with the rank ``first``."""
        ranks = [first, *self.config.rank_decay]
        return int(ranks[min(index // self.config.decay_every, len(ranks) - 1)])

    def build(self, stage: Stage) -> None:
        import torch
        from torch import nn

        from cl_runner.adapters.pairs import fresh_pair
        from cl_runner.methods.sdlora.directions import Directions

        if stage.evaluating:
            self._keep(stage)
            return
        dice, adapter = stage.rng("adapter"), stage.config.adapter
        count = len(next(iter(self.past.values())).alpha) if self.past else 0
        shared = nn.Parameter(torch.full((count + 1,), START))
        terms = {}
        for target, (m, n) in stage.targets().items():
            past = self.past.get(target) or Past(torch.zeros(0, n), torch.zeros(m, 0), [], torch.zeros(0))
            first = stage.rank_of(target)
            rank = self._rank(first, stage.index)
            scale = stage.scale_of(target) if rank == first else adapter.alpha / rank
            own = nn.Parameter(torch.cat([past.alpha.cpu(), torch.tensor([scale])]))
            alpha = shared if self.config.reference else own
            pair = fresh_pair(m, n, rank, dice)
            terms[target] = Directions(past.A, past.B, past.ranks, alpha, pair, adapter.dropout)
        stage.begin_terms(terms, {"alpha": shared} if self.config.reference else None)

    def fold(self, stage: Stage) -> Fold:
        for target, term in stage.terms().items():
            ranks = self.past[target].ranks if target in self.past else []
            self.past[target] = learned(term, ranks, self.config)
        self._keep(stage)
        return "keep"

    def _keep(self, stage: Stage) -> None:
        """What the stage has learned, as it answers and as a later process will build it again."""
        from cl_runner.methods.sdlora.directions import Directions

        stage.begin_terms({t: Directions(past.A, past.B, past.ranks, past.alpha) for t, past in self.past.items()})

    def free_share(self, stage: Stage) -> float:
        return statistics.fmean(free_share([past.A.cpu().numpy()]) for past in self.past.values())

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return 4 * trained * stages

    def state(self) -> State:
        tensors: dict[str, Tensor] = {}
        for target, past in self.past.items():
            tensors |= under(target, {"A": past.A, "B": past.B, "alpha": past.alpha})
        return State(tensors, {"ranks": {target: past.ranks for target, past in self.past.items()}})

    def load_state(self, state: State) -> None:
        held = state.tensors
        self.past = {
            target: Past(held[f"{target}.A"], held[f"{target}.B"], ranks, held[f"{target}.alpha"])
            for target, ranks in state.json["ranks"].items()
        }
