"""Small things that many methods do with tensors: a sum of terms, names under a prefix, rank 0's basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cl_runner.maths.vectors import flat

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage


def added(terms: Sequence[Tensor]) -> Tensor:
    """Their sum, from the first to the last; there has to be one."""
    return sum(terms[1:], terms[0])


def under(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by longer names, for a state that holds others too."""
    return {f"{prefix}.{name}": value for name, value in values.items()}


def within(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``under``: what stands under a prefix, by its own names."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def copies(stage: Stage) -> dict[str, Tensor]:
    """All that trains as it is now, by name, apart from what it becomes."""
    return {name: parameter.detach().clone() for name, parameter in stage.parameters().items()}


def trained(stage: Stage) -> Tensor:
    """All that trains as one fp32 vector (n), part of its graph."""
    parameters = stage.parameters()
    return flat(parameters, parameters)


def of_rank_0(stage: Stage, basis: Tensor) -> Tensor:
    """Rank 0's basis (d, k) on every rank, whose own may have another k. *Collective*.

    Another library on another rank may turn directions of equal energy, and find one more or fewer of them.
    """
    columns = int(stage.broadcast(basis.new_tensor(basis.shape[1])))
    return stage.broadcast(basis if stage.rank == 0 else basis.new_empty(len(basis), columns))
