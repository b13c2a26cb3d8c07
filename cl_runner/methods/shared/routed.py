"""Pairs of all tasks side by side, weighed for each row by what a router makes of its prompt: no one matrix answers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from cl_runner.adapters.kind import Fold, Need, pair_parameters
from cl_runner.config.schema import RunConfig, Section
from cl_runner.methods.protocol import Method, State
from cl_runner.methods.shared.limits import refuse_by_task, refuse_too_large, size
from cl_runner.methods.shared.tensors import under, within
from cl_runner.metrics.free_subspace import free_share

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch


class Routed(Method):
    """A new pair a task, which trains beside all past ones, and a router whose weights go with each row.

    ``router`` is what of it past tasks left, by name; what trains stands among the stage's parameters as that of no
    layer. ``shares`` are the weights that each task's own rows had at its end, the mean over them: by the mean of these
    over tasks, pairs are weighed in the stage's folder, which answers no row as the router does.
    """

    factors = "A (r × n) and B (m × r) of each task's pair; ΔW = alpha/r · B A, weighed row by row"
    frozen = "the base, and the pairs of past tasks"
    past_as = "other"
    by_shape = True
    of_all_tasks: ClassVar[tuple[str, ...]] = ("hidden",)  # settings of the method that no task may change

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("terms",),)

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}  # target → A (R, n), B (m, R) with s in it
        self.ranks: dict[str, list[int]] = {}  # target → of each past pair
        self.router: dict[str, Tensor] = {}
        self.shares: dict[str, list[float]] = {}  # task → what each pair counted for
        self._new: tuple[int, list[Any]] | None = None  # of a step's rows: the new pair's weights, and how many

    # The router: what a method says.

    def fresh_router(self, stage: Stage) -> dict[str, Tensor]:
        """Where the parameters of a new task's router begin, by name."""
        raise NotImplementedError

    def weights(self, stage: Stage, batch: Batch) -> Tensor:
        """What each pair counts for (b, T), in the graph of what trains, whose own pair is the last."""
        raise NotImplementedError

    def take_up_router(self, stage: Stage) -> None:
        """What has trained of the router is a past task's, in ``router``."""
        raise NotImplementedError

    def router_entries(self, width: int, stages: int) -> int:
        """How many numbers ``router`` has after so many stages; ``width`` is that of the embeddings."""
        raise NotImplementedError

    # Pairs.

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        refuse_by_task(config, *self.of_all_tasks)
        if shapes is not None:
            of = f"adapter.r: pairs of {len(shapes)} layers over {self.stages} tasks"
            gigabytes = self.stages * 4 * pair_parameters(config.adapter, shapes) / 1e9
            refuse_too_large(of, gigabytes, self.config.max_gb, "set a smaller rank")

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        each = 4 * pair_parameters(config.adapter, shapes)
        return f"carries {size(each)} a task, {size(self.stages * each)} in all: pairs of {len(shapes)} layers"

    @property
    def no_folder(self) -> str:
        return "weighs its pairs row by row, and `adapter/` has them by their mean weights"

    def reads_past(self) -> Mapping[str, str]:
        return {}

    def build(self, stage: Stage) -> None:
        import torch
        from torch import nn

        from cl_runner.adapters.pairs import fresh_pair
        from cl_runner.methods.shared.routed_pairs import RoutedPairs

        self.router = {name: value.to(stage.device) for name, value in self.router.items()}
        self._new = None
        if stage.evaluating:
            self._keep(stage)
            return
        dice, share, dropout = stage.rng("adapter"), self._share(), stage.config.adapter.dropout
        terms = {}
        for target, (m, n) in stage.targets().items():
            A, B = self.pairs.get(target) or (torch.zeros(0, n), torch.zeros(m, 0))
            pair = *fresh_pair(m, n, stage.rank_of(target), dice), stage.scale_of(target)
            terms[target] = RoutedPairs(A, B, self.ranks.get(target, []), share, pair, dropout)
        stage.begin_terms(terms, {name: nn.Parameter(value) for name, value in self.fresh_router(stage).items()})

    def condition(self, stage: Stage, batch: Batch, task: str | None) -> dict[str, Tensor] | None:
        if not stage.terms():
            return None  # the untouched base is asked
        from cl_runner.methods.shared.routed_pairs import WEIGHTS

        found = self.weights(stage, batch)
        if batch.places is not None:  # of a step: what the new pair counts for
            real = batch.counts[:, 0]
            self._note(stage, (found.detach()[:, -1] * real).sum(), real.sum())
        return {WEIGHTS: found}

    def routes(self, stage: Stage, batch: Batch) -> Tensor | None:
        return self.weights(stage, batch)

    def _note(self, stage: Stage, *parts: Tensor) -> None:
        step = stage.progress.step
        before = self._new[1] if self._new and self._new[0] == step else [0.0, 0.0]
        self._new = step, [total + part for total, part in zip(before, parts, strict=True)]

    def take_back(self, stage: Stage) -> None:
        self._new = None

    def logged(self, stage: Stage) -> dict[str, Any]:
        assert self._new is not None, "a step has been"
        total, count = (float(stage.sum(part.float())) for part in self._new[1])
        return {"new_weight": total / count}

    def end_task(self, stage: Stage) -> None:
        self.shares[stage.plan.name] = self._mean_weights(stage)

    def _mean_weights(self, stage: Stage) -> list[float]:
        """Over the stage's own rows. *Collective*."""
        from cl_runner.methods.shared.routed_pairs import WEIGHTS

        found: list[float] = mean_over_rows(stage, lambda batch: batch.condition[WEIGHTS]).tolist()
        return found

    def _share(self) -> Tensor:
        """What each past pair counts for where no row is asked (T)."""
        import torch

        rows = [torch.tensor(own + [0.0] * (len(self.shares) - len(own))) for own in self.shares.values()]
        return torch.stack(rows).mean(0) if rows else torch.zeros(0)

    def fold(self, stage: Stage) -> Fold:
        for target, term in stage.terms().items():
            self.pairs[target] = term.learned()
            self.ranks[target] = [*self.ranks.get(target, []), len(term.A)]
        self.take_up_router(stage)
        self._keep(stage)
        return "keep"

    def _keep(self, stage: Stage) -> None:
        """What the stage has learned, as it answers and as a later process will build it again."""
        from cl_runner.methods.shared.routed_pairs import RoutedPairs

        share = self._share()
        stage.begin_terms(
            {target: RoutedPairs(A, B, self.ranks[target], share) for target, (A, B) in self.pairs.items()}
        )

    def free_share(self, stage: Stage) -> float | None:
        return statistics.fmean(free_share([A.cpu().numpy()]) for A, _ in self.pairs.values())

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return 4 * (trained * stages + self.router_entries(min(n for _, n in shapes), stages))

    def state(self) -> State:
        tensors = under("router", self.router)
        for target, (A, B) in self.pairs.items():
            tensors |= under(target, {"A": A, "B": B})
        return State(tensors, {"ranks": self.ranks, "router": list(self.router), "weights": self.shares})

    def load_state(self, state: State) -> None:
        held = state.tensors
        self.ranks, self.shares = dict(state.json["ranks"]), dict(state.json["weights"])
        self.pairs = {target: (held[f"{target}.A"], held[f"{target}.B"]) for target in self.ranks}
        of_router = within("router", held)
        self.router = {name: of_router[name] for name in state.json["router"]}


def mean_over_rows(stage: Stage, of: Callable[[Batch], Tensor]) -> Tensor:
    """The mean over the stage's own rows, (k) fp32, of what ``of`` makes of each (b, k). *Collective*."""
    import torch

    parts = []
    with torch.no_grad():
        for batch in stage.batches():
            real = batch.counts[:, 0].double()  # not those that only fill a rank's share
            parts.append(torch.cat([(of(batch).double() * real[:, None]).sum(0), real.sum()[None]]))
    total = stage.sum(torch.stack(parts).sum(0))
    return (total[:-1] / total[-1]).float()
