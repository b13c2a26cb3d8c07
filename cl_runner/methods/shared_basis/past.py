"""What finished tasks leave to later ones: bases, where their updates are large, and the pairs that are mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cl_runner.methods.protocol import State
from cl_runner.methods.shared.tensors import under, within

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.shared_basis.terms import SharedBasis


class Past:
    """All by the names of targets.

    shared: ``U.<target>`` and ``C.<target>``. large: target → min_i |ΔW_i| / ‖ΔW_i‖ over tasks (m, n). pairs: of each
    of ``tasks``, ``A.<target>`` and ``B.<target>``, to mix or for the PCA.
    """

    def __init__(self) -> None:
        self.shared: dict[str, Tensor] = {}
        self.large: dict[str, Tensor] = {}
        self.pairs: list[dict[str, Tensor]] = []
        self.tasks: list[str] = []
        self._known: dict[str, Tensor] = {}  # what ``weights`` found for the tasks there are
        self._spans: list[dict[str, Tensor]] = []  # of ``pairs``, as far as they were asked for

    def take_up(self, target: str, term: SharedBasis, support: bool) -> dict[str, Tensor]:
        """A finished term's U and C, and with ``support`` how large its update is; returns its pair, if it has one."""
        for name, shared in (("U", term.U), ("C", term.C)):
            if shared is not None:
                self.shared[f"{name}.{target}"] = copy(shared)
        if support:
            size = copy(term.own()).abs()
            size /= size.norm().clamp(min=1e-30)
            self.large[target] = size.minimum(self.large.get(target, size))
        if term.mask is not None:
            return {}
        A, B = map(copy, term.pair())
        return {f"A.{target}": A, f"B.{target}": B}

    def keep(self, task: str, pair: dict[str, Tensor]) -> None:
        """One more task's pair."""
        self.pairs.append(pair)
        self.tasks.append(task)
        self._known = {}

    def factors(self, target: str) -> tuple[list[Tensor], list[Tensor]]:
        """A and B of each task at a target."""
        return [pair[f"A.{target}"] for pair in self.pairs], [pair[f"B.{target}"] for pair in self.pairs]

    def mask(self, target: str, support: float | None) -> Tensor | None:
        """Where every past update is among its largest entries: the share ``support`` of them, equal ones or not."""
        import torch

        large = self.large.get(target)
        if support is None or large is None:
            return None
        kept = large.flatten().topk(max(1, round(support * large.numel()))).indices
        mask = torch.zeros(large.numel())
        mask[kept] = 1.0
        return mask.view_as(large)

    def find_basis(self, ranks: Mapping[str, int], non_negative: bool) -> None:
        """U of every target, of its rank, by the principal components of the tasks' B."""
        from cl_runner.methods.shared_basis.mixing import principal

        for target, rank in ranks.items():
            U = principal(self.factors(target)[1], rank)
            self.shared[f"U.{target}"] = U.clamp(min=0) if non_negative else U

    def near(self, rows: Mapping[str, Tensor]) -> Tensor:
        """β (T) of past tasks for one that is being learned, whose ``A.<target>`` (r, n) these are."""
        from cl_runner.methods.shared_basis.mixing import nearness, shares, spans

        return shares(nearness(spans(rows), self.spans()))

    def weights(self, task: str) -> Tensor:
        """How much each task's update counts (T) where ``task`` is answered: 1 for its own, β for the others."""
        import torch

        from cl_runner.methods.shared_basis.mixing import nearness, shares

        if task not in self._known:
            mine = self.tasks.index(task)
            others, of = [i for i in range(len(self.tasks)) if i != mine], self.spans()
            found = torch.ones(len(self.tasks))
            found[others] = shares(nearness(of[mine], [of[i] for i in others]))
            self._known[task] = found
        return self._known[task]

    def spans(self) -> list[dict[str, Tensor]]:
        """Row spaces of each finished task's pair. Pairs do not change: each one's are made once."""
        from cl_runner.methods.shared_basis.mixing import spans

        self._spans += [spans(pair) for pair in self.pairs[len(self._spans) :]]
        return self._spans

    def state(self) -> State:
        """All of it, as a method's state may hold it."""
        tensors = under("shared", self.shared) | under("large", self.large)
        for number, pair in enumerate(self.pairs):
            tensors |= under(str(number), pair)
        return State(dict(sorted(tensors.items())), {"tasks": self.tasks})

    @classmethod
    def of_state(cls, state: State) -> Past:
        """The inverse of ``state``."""
        past = cls()
        past.tasks = list(state.json.get("tasks", []))
        past.shared, past.large = within("shared", state.tensors), within("large", state.tensors)
        past.pairs = [within(str(number), state.tensors) for number in range(len(past.tasks))]
        return past


def copy(tensor: Tensor) -> Tensor:
    """On the CPU, out of the graph."""
    return tensor.detach().to("cpu", copy=True)
