"""Second moments of what the target layers read: where in its inputs a task lives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Source, Stage


def input_moments(stage: Stage) -> dict[tuple[str, ...], Tensor]:
    """Targets that share an input → the mean of x xᵀ (n, n) over the tokens of the stage's own rows. *Collective*.

    As ``input_sums`` has them.
    """
    return {targets: total.div_(count) for targets, total, count in input_sums(stage)}


def input_sums(stage: Stage, source: Source | None = None) -> Iterator[tuple[tuple[str, ...], Tensor, int]]:
    """Targets that share an input, Σ x xᵀ (n, n) over the tokens of a source, and how many these are. *Collective*.

    source: default, the stage's own rows. fp64, the same on every rank; the model as it is, dropout off. Products of
    fp32 are exact there, and their sum keeps directions a ten-millionth of another in length; added up in fp32 it would
    lose those of a thousandth.
    """
    import torch

    groups = {targets[0]: targets for targets in stage.input_groups()}
    moments: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}

    def see(target: str, rows: Tensor, counts: Tensor | None) -> None:
        if target not in groups:
            return
        assert counts is not None, "no rows of this batch"
        x = rows.double().mul_(counts[..., None].double().sqrt()).flatten(0, 1)  # one that is of n rows counts n times
        if target not in moments:
            moments[target] = x.new_zeros(x.shape[1], x.shape[1])
            tokens[target] = counts.new_zeros(())
        with torch.autocast(rows.device.type, enabled=False):
            moments[target].addmm_(x.mT, x)  # in place: nothing else of this size
        tokens[target] += counts.sum()

    with torch.no_grad(), stage.observe("inputs", see):
        for batch in stage.batches((source or stage.own_rows()).by_length()):
            stage.forward(batch)
    # One by one out of the dictionary, so that none is held beside its sum.
    for name in sorted(moments):
        yield groups[name], stage.sum(moments.pop(name)), int(stage.sum(tokens[name]))
