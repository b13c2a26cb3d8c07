"""OLieRA: each task multiplies the weight entry by entry, away from what past ones did (arXiv 2509.06100)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cl_runner.adapters.kind import Fold, Need, pair_parameters
from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.protocol import Method, State
from cl_runner.methods.shared.limits import refuse_by_task, refuse_too_large, size
from cl_runner.methods.shared.rates import at_rate
from cl_runner.methods.shared.tensors import added

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.engine.optim import ParameterGroup
    from cl_runner.methods.protocol import Stage


class OLieRA(Method):
    """The weights that are multiplied, entry by entry, are a group; its exponential is that of each entry.

    Assumptions: exponents of tasks add up, so that with the exact f their multiplications do; J is the group's neutral
    element, all ones, where the paper writes I. With ones ‖J Jᵀ‖ = m n stays whatever is learned, and mainly sums of
    rows are pushed. Published with two epochs and dropout 0.1.
    """

    class Config(Section):
        """Settings of OLieRA."""

        lambda1: float = Field(
            1.0, ge=0, description="Weight λ, on the norm over m n, summed over past tasks, mean over layers (ours)."
        )
        order: Literal[1, 2, "exact"] = Field(
            2, description="f: exp by its Taylor polynomial of order 1 or 2 (published), or itself."
        )
        neutral: Literal["ones", "identity"] = Field(
            "ones", description="J: all ones, or I (as printed), where layers are square."
        )
        lr: float = Field(
            1e-3,
            gt=0,
            description="Peak learning rate (published for 4 tasks; 5e-4 for 15). Weights near 0 move little.",
        )
        max_gb: float = Field(
            16.0, gt=0, description="Most that exponents and updates of all layers may take, 10⁹ bytes."
        )

    name = "oliera"
    title = "OLieRA: multiplicative updates with low-rank exponents, away from past ones"
    equation = (
        "W_t = W0 ∘ f(Σ_{i≤t} D_i),  D_i = s·B_i A_i, f = exp or its Taylor polynomial;  "
        "loss + λ Σ_{j<t} ‖(J + D_t)(J + D_j)ᵀ‖_F / (m n)"
    )
    paper = "2509.06100 (OLieRA)"
    carried = "past updates, folded into the weight; all A_i, B_i"
    growth = "one pair a task, in the penalty and in each stage's files; one fp32 matrix a layer in memory"
    since_second = ("lambda1",)
    past_as = "other"
    dense = True
    by_shape = True

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("terms",),)

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.pairs: list[dict[str, tuple[Tensor, Tensor]]] = []  # of each task: target → A (r, n), s·B (m, r)
        self._stacked: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        refuse_by_task(config, "order")  # what is folded adds up to one f alone
        if shapes is None:
            return
        oblong = [shape for shape in shapes if shape[0] != shape[1]]
        if self.config.neutral == "identity" and oblong:
            raise UserError(
                f"method.neutral: I exists only for square layers, and one is {oblong[0][0]} × {oblong[0][1]}; set "
                "ones, or other adapter.target_modules"
            )
        gigabytes = 3 * sum(m * n for m, n in shapes) * 4e-9  # E, f and ΔW
        of = f"adapter.target_modules: exponents and updates of {len(shapes)} layers"
        refuse_too_large(of, gigabytes, self.config.max_gb, "name fewer layers")

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        each = 4 * pair_parameters(config.adapter, shapes)
        return f"carries {size(each)} a task, {size(each * self.stages)} in all: pairs of {len(shapes)} layers"

    def build(self, stage: Stage) -> None:
        if stage.evaluating:
            return
        from cl_runner.adapters.pairs import fresh_pair
        from cl_runner.methods.oliera.multiplied import Multiplied

        self._stacked = {}
        dice, adapter = stage.rng("adapter"), stage.config.adapter
        terms = {}
        for target, (m, n) in stage.targets().items():
            pair = fresh_pair(m, n, stage.rank_of(target), dice)
            scale, W0 = stage.scale_of(target), stage.base_weight(target)
            E = self._exponents(stage, target)
            terms[target] = Multiplied(W0, E, pair, scale, self.config.order, adapter.dropout)
        stage.begin_terms(terms)

    def parameter_groups(self, stage: Stage) -> list[ParameterGroup]:
        return at_rate(stage, self.config.lr)

    def _exponents(self, stage: Stage, target: str) -> Tensor | None:
        """Σ_{i<t} D_i of a target, (m, n), in stage order."""
        each = [B.to(stage.device) @ A.to(stage.device) for A, B in (pair[target] for pair in self.pairs)]
        return added(each) if each else None

    def penalty(self, stage: Stage) -> Tensor | None:
        if not self.pairs or not self.config.lambda1:
            return None
        import torch

        from cl_runner.methods.oliera.overlap import overlap_of_identity, overlap_of_ones

        overlap = overlap_of_ones if self.config.neutral == "ones" else overlap_of_identity
        terms = stage.terms()
        alike: dict[tuple[int, ...], list[str]] = {}
        for target, term in terms.items():
            alike.setdefault((*term.B.shape, *term.A.shape), []).append(target)
        sums = []
        for targets in alike.values():
            A = torch.stack([terms[target].A for target in targets])
            B = torch.stack([terms[target].scale * terms[target].B for target in targets])
            sums.append(overlap(A, B, *self._past(stage, tuple(targets))).sum() / (B.shape[1] * A.shape[2]))
        total: Tensor = self.config.lambda1 / len(terms) * added(sums)
        return total

    def _past(self, stage: Stage, targets: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Past factors of targets of one shape, (L, T, r, n) and (L, T, m, r); of a smaller rank with zeros."""
        import torch
        from torch.nn.functional import pad

        if targets not in self._stacked:
            r = max(len(pair[target][0]) for pair in self.pairs for target in targets)
            A, B = ([[pair[target][i] for pair in self.pairs] for target in targets] for i in (0, 1))
            self._stacked[targets] = (
                torch.stack([torch.stack([pad(a, (0, 0, 0, r - len(a))) for a in each]) for each in A]).to(
                    stage.device
                ),
                torch.stack([torch.stack([pad(b, (0, r - b.shape[1])) for b in each]) for each in B]).to(stage.device),
            )
        return self._stacked[targets]

    def end_task(self, stage: Stage) -> None:
        self.pairs.append(
            {t: (term.A.detach().clone(), term.scale * term.B.detach()) for t, term in stage.terms().items()}
        )

    def fold(self, stage: Stage) -> Fold:
        return "dense"

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return 4 * trained * stages

    def state(self) -> State:
        each = {f"{i}.{part}.{t}": pair[t][n] for i, pair in enumerate(self.pairs) for t in pair
                for n, part in enumerate("AB")}  # fmt: skip
        return State(each, {"targets": list(self.pairs[0]) if self.pairs else [], "tasks": len(self.pairs)})

    def load_state(self, state: State) -> None:
        held = state.tensors
        self.pairs = [
            {target: (held[f"{i}.A.{target}"], held[f"{i}.B.{target}"]) for target in state.json["targets"]}
            for i in range(state.json["tasks"])
        ]
