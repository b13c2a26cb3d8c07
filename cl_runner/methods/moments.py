"""Second moments of what the target layers read: where in its inputs a task lives."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.base import Stage


def input_moments(stage: Stage) -> dict[tuple[str, ...], Tensor]:
    """Targets that share an input → the mean of x xᵀ (n, n) over the tokens of the stage's own rows. *Collective*.

    fp32, the same on every rank; the model as it is, dropout off.
    """
    import torch

    groups = {targets[0]: targets for targets in stage.input_groups()}
    moments: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    real = torch.ones(())

    def see(target: str, rows: Tensor, mask: Tensor | None) -> None:
        if target not in groups:
            return
        counted = real[:, None].expand(rows.shape[:2]) if mask is None else mask & real[:, None]
        with torch.autocast(rows.device.type, enabled=False):
            x = (rows * counted[..., None]).float().flatten(0, 1)
            moment = x.mT @ x
        moments[target] = moments[target] + moment if target in moments else moment
        counts[target] = counts.get(target, torch.zeros((), device=rows.device)) + counted.sum()

    with torch.no_grad(), stage.observe("inputs", see):
        for batch in stage.batches():
            real = (batch.token_weights != 0).any(1)  # a rank without rows sees one that does not count
            stage.forward(batch)
    # One by one out of the dictionary, so that none is held beside its sum.
    return {groups[name]: stage.sum(moments.pop(name)).div_(stage.sum(counts[name])) for name in sorted(moments)}
