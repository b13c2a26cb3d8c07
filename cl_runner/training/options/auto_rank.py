"""The rank of a stage's pair by the spectrum of its task's gradient (``adapter.r: auto``)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from cl_runner.config.schema import RunConfig
from cl_runner.errors import UserError
from cl_runner.methods.protocol import Method, Source, State
from cl_runner.training.options.protocol import Option, Shapes

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.training.stage import StageRun

ROWS = 256  # drawn from the stage's own to take the gradient of


class AutoRank(Option):
    """Each stage's pair begins with the rank that its task needs: for methods that begin a pair at every stage."""

    name = "auto-rank"
    title = "the rank of each stage's pair by the spectrum of its task's gradient"
    setting = "adapter.r=auto"
    paper = "0909.4061 (Finding structure with randomness)"

    def __init__(self) -> None:
        self.rank: int | None = None

    def takes(self, method: type[Method]) -> bool:
        return method.any_rank

    def wanted(self, config: RunConfig, method: Method) -> bool:
        return config.adapter.r == "auto" and method.any_rank and not method.full

    def check(self, config: RunConfig, method: Method, shapes: Shapes | None = None) -> None:
        if config.adapter.r == "auto" and method.kind(config) == config.adapter.kind and not method.any_rank:
            raise UserError(f"adapter.r=auto: {method.name} needs the same rank at every stage; set a number")

    def begin(self, stage: StageRun, own: Source) -> None:
        self.rank = choose_rank(stage, own)

    def about(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def said(self) -> str:
        return f"rank {self.rank}, by the spectrum of the gradient"

    def step_state(self) -> State:
        return State(json={"rank": self.rank})

    def load_step_state(self, stage: StageRun, state: State) -> None:
        self.rank = state.json["rank"]
        stage.adapters.begin(stage.plan.name, stage.rng("adapter"), rank=self.rank)


def choose_rank(stage: StageRun, own: Source) -> int:
    """Begin the stage's pair anew with the rank that its task needs; returns it. *Collective*.

    The rank is the smallest r with Σ_layers Σ_{i≤r} σ_i² ≥ energy · Σ_layers ‖G‖_F², at most ``max_r``, where G (m, n)
    is the gradient of the mean token loss with respect to a layer's weight and σ its singular values.
    """
    import torch

    adapter, adapters = stage.config.adapter, stage.adapters
    shapes = adapters.shapes()
    rows = torch.randperm(len(own.examples), generator=stage.rng("rank"))[:ROWS].sort().values.tolist()
    some = Source([own.examples[i] for i in rows], [own.tasks[i] for i in rows])
    squares, rest = spectrum(stage, some, min(2 * adapter.max_r, min(n for _, n in shapes)))
    rank = smallest_rank(squares, rest, adapter.energy, min(adapter.max_r, *map(min, shapes)))
    adapters.begin(stage.plan.name, stage.rng("adapter"), rank=rank)
    return rank


def spectrum(stage: StageRun, source: Source, k: int) -> tuple[Tensor, float]:
    """The k leading squared singular values of G, added up over layers, and all the energy that is beside them.

    G itself is never made. Of a pair that adds nothing the gradients are products of it: s G Aᵀ by B where B is zero,
    s Bᵀ G by A where A is. So k random rows of A find columns Q that hold most of G, and B = Q then gives Qᵀ G (Halko,
    Martinsson and Tropp, arXiv 0909.4061); what Q misses is measured along as many other random rows. Where every layer
    has n = k the first look has all of G.
    """
    import torch

    adapters = stage.adapters
    adapters.begin(stage.plan.name, stage.rng("probe"), rank=k)
    names = {role: stage.named(role) for role in "AB"}
    stage.write({names["A"][target]: rows for target, rows in _orthonormal(stage).items()})
    _, by_B = _gradients(stage, source)
    if all(n == k for _, n in adapters.shapes()):
        return _squares(by_B.values(), k), 0.0
    found = {target: torch.linalg.qr(g)[0] for target, g in by_B.items()}  # Q (m, k), or (m, m) where m < k

    adapters.begin(stage.plan.name, stage.rng("probe again"), rank=k)
    other = _orthonormal(stage)
    # Q beside zeros, zeros above the other rows: still nothing is added.
    adapters.begin(stage.plan.name, stage.rng("probe again"), rank=2 * k)
    for target, Q in found.items():
        B = Q.new_zeros(len(Q), 2 * k)
        B[:, : Q.shape[1]] = Q
        A = torch.cat([torch.zeros_like(other[target]), other[target]])
        stage.write({names["A"][target]: A, names["B"][target]: B.float()})
    by_A, by_B = _gradients(stage, source)
    rest = 0.0
    for target, Q in found.items():
        seen, n = by_B[target][:, k:], other[target].shape[1]
        rest += n / k * float((seen - Q @ (Q.mT @ seen)).square().sum())
    return _squares((g[:k] for g in by_A.values()), k), rest


def _orthonormal(stage: StageRun) -> dict[str, Tensor]:
    """Target → its A (k, n) as it was drawn, with orthonormal rows instead."""
    import torch

    parameters = stage.parameters()
    drawn = {target: parameters[name].detach() for target, name in stage.named("A").items()}
    return {target: torch.linalg.qr(A.mT)[0].mT.contiguous() for target, A in drawn.items()}


def _gradients(stage: StageRun, source: Source) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Target → gradient by its A, and by its B, fp64."""
    [found] = stage.gradient(partial(stage.room.method.loss, stage), stage.batches(source.by_length()))
    by_A, by_B = ({target: found[name].double() for target, name in stage.named(role).items()} for role in "AB")
    return by_A, by_B


def _squares(matrices: Iterable[Tensor], k: int) -> Tensor:
    """Squared singular values (k) of matrices of at most k, added up, on the CPU."""
    import torch

    total = torch.zeros(k, dtype=torch.float64)
    for matrix in matrices:
        found = torch.linalg.svdvals(matrix).square().cpu()
        total[: len(found)] += found
    return total


def smallest_rank(squares: Tensor, rest: float, energy: float, most: int) -> int:
    """How many of the leading squares (k), largest first, hold ``energy`` of their sum and the rest: 1 to ``most``."""
    total = squares.sum() + rest
    reached = squares.cumsum(0) >= energy * total * (1 - 1e-12)  # 1.0 is the last that adds anything, not rounding
    if not bool(reached.any()):
        return most
    return min(int(reached.int().argmax()) + 1, most) if total > 0 else 1
