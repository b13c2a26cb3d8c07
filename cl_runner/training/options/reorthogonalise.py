"""Re-orthogonalisation of a LoRA factor every few steps (``method.reorthogonalise``): one place for every method.

A factor is read as rows F (r, d): A, or Bᵀ. It is split, F = R Q, and Q takes its place. Hard: Q has orthonormal rows
of the same span (QR; R lower triangular, its diagonal positive). Soft: Q has rows of norm 1, R is the diagonal of the
norms; the rows do not become orthogonal. With ``rescale`` the other factor O (r, d') becomes Rᵀ O: ΔW stays as it was.

While the layer's gradient by ΔW stays what it was, those by the new factors are Rᵀ g_F (without ``rescale`` g_F itself,
as O is as before) and R⁻¹ g_O: so Adam's first moments go over, where they are mapped. The second go over by the
squares of the same numbers: for soft that is exactly what Adam would have, for hard what it would expect of independent
entries. (Set to zero, they would make the next step 1/√(1 − β₂) ≈ 30 times too long, as Adam's count of steps goes on.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cl_runner.adapters.kind import rank_at
from cl_runner.config.schema import RunConfig
from cl_runner.errors import UserError
from cl_runner.methods.protocol import Method, Reorthogonalise
from cl_runner.training.options.protocol import Option, Shapes

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.models.batch import Batch
    from cl_runner.training.stage import StageRun

FLAT = 1e-6  # of the largest scale of a factor: under it a row adds no direction of its own


class Reorthogonalisation(Option):
    """Of every method that trains a LoRA pair and promises nothing of its factors."""

    name = "reorthogonalise"
    title = "a factor is put back to orthonormal rows, or rows of norm 1, every few steps"
    setting = "method.reorthogonalise"
    by_shape = True

    def takes(self, method: type[Method]) -> bool:
        return "reorthogonalise" in method.Config.model_fields

    def wanted(self, config: RunConfig, method: Method) -> bool:
        return method.reorthogonalise is not None

    def check(self, config: RunConfig, method: Method, shapes: Shapes | None = None) -> None:
        settings = method.reorthogonalise
        if settings is None:
            return
        if method.full:
            raise UserError("method.reorthogonalise: there are no factors under full fine-tuning; leave it out")
        if config.adapter.borrows and not settings.rescale:
            raise UserError(
                f"method.reorthogonalise: with adapter.init={config.adapter.init} the pair holds a part of the weight, "
                "which a factor that is turned alone would change; set rescale: true, or leave one out"
            )
        for shape in sorted(shapes or (), key=lambda shape: _dimensions(shape, settings.on)):
            r, least = rank_at(config.adapter, shape), _dimensions(shape, settings.on)
            if settings.how == "hard" and r > least:
                raise UserError(
                    f"method.reorthogonalise: of {r} rows in {least} dimensions not all can be orthonormal; set "
                    f"adapter.r to {least} or less, or how: soft"
                )

    def notes(self, stages: Sequence[tuple[RunConfig, Method, int]]) -> list[str]:
        """Where a factor is to be put back every so many steps, and no stage has as many."""
        asked = [(method.reorthogonalise.every, steps) for _, method, steps in stages if method.reorthogonalise]
        if any(every <= steps for every, steps in asked):
            return []
        return [
            f"method.reorthogonalise: every {min(every for every, _ in asked)} steps, and the longest stage has "
            f"{max(steps for _, steps in asked)}: it never happens; set every lower"
        ]

    def after_step(self, stage: StageRun, batch: Batch) -> dict[str, Any] | None:
        settings = stage.room.method.reorthogonalise
        assert settings is not None, "not wanted"
        if stage.step % settings.every:
            return None
        before, after = reorthogonalise(stage, settings, batch)
        return {"reorthogonalised": settings.how, "loss_before": before, "loss_after": after}


def _dimensions(shape: tuple[int, int], on: str) -> int:
    """Of the rows that are to be orthonormal: of A, of Bᵀ, or the fewer of both."""
    m, n = shape
    return {"A": n, "B": m, "both": min(m, n)}[on]


def split(F: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """``F = R Q`` of F (L, r, d), as the module says: R (L, r, r), Q (L, r, d).

    Left as it is (R = I) where F has no full rank, as B at the start: its Q would be arbitrary.
    """
    import torch

    from cl_runner.maths.subspace import orthonormal_rows

    if how == "hard":
        Q, R = orthonormal_rows(F)
    else:
        norms = F.norm(dim=2)
        Q, R = F / norms.clamp(min=1e-30)[..., None], torch.diag_embed(norms)
    scales = R.diagonal(dim1=1, dim2=2)
    full = (scales.amin(1) > FLAT * scales.amax(1))[:, None, None]
    return torch.where(full, Q, F), torch.where(full, R, torch.eye(F.shape[1], dtype=F.dtype, device=F.device))


def reorthogonalise(stage: StageRun, settings: Reorthogonalise, batch: Batch) -> tuple[float, float]:
    """Do it to every target layer; the same on every rank. *Collective*.

    Returns the mean loss per label token of all ranks' ``batch`` (the step's last micro-batches), dropout off, before
    and after.
    """
    import torch

    with torch.no_grad():
        before = _loss(stage, batch)
        for factor in ("A", "B") if settings.on == "both" else (settings.on,):
            _turn(stage, settings, factor)
        return before, _loss(stage, batch)


def _turn(stage: StageRun, settings: Reorthogonalise, factor: str) -> None:
    """One factor of every target layer, and what goes with it."""
    import torch

    opposite = "B" if factor == "A" else "A"
    for group in stage.factors():
        A, B = group.A.detach(), group.B.detach().mT
        F, other = (A, B) if factor == "A" else (B, A)
        Q, R = (stage.broadcast(part) for part in split(F, settings.how))
        _put(stage, group.targets, factor, Q)
        if settings.rescale:
            _put(stage, group.targets, opposite, R.mT @ other)
        if settings.maps_moments:
            if settings.rescale:
                _map_moments(stage, group.targets, factor, R.mT)
            _map_moments(stage, group.targets, opposite, torch.linalg.inv(R))


def _put(stage: StageRun, targets: tuple[str, ...], factor: str, rows: Tensor) -> None:
    """Write rows (L, r, d) as A, or as Bᵀ."""
    values = rows if factor == "A" else rows.mT
    names = stage.named(factor)
    stage.write({names[target]: value for target, value in zip(targets, values, strict=True)})


def _map_moments(stage: StageRun, targets: tuple[str, ...], factor: str, by: Tensor) -> None:
    """Adam's moments of a factor, read as rows (r, d), times ``by`` (L, r, r), and its entries' squares."""
    names = stage.named(factor)
    for target, matrix in zip(targets, by, strict=True):
        name = names[target]
        moments = stage.moments(name)
        if moments is None:
            continue
        first, second = moments["exp_avg"], moments["exp_avg_sq"]
        if factor == "A":
            new = {"exp_avg": matrix @ first, "exp_avg_sq": matrix.square() @ second}
        else:
            new = {"exp_avg": first @ matrix.mT, "exp_avg_sq": second @ matrix.square().mT}
        stage.set_moments(name, new)


def _loss(stage: StageRun, batch: Batch) -> float:
    import torch

    from cl_runner.models.forward import token_loss

    with stage.without_dropout():
        losses = token_loss(stage.forward(batch), batch.labels)
    counts = batch.token_weights != 0
    total, tokens = stage.sum(torch.stack([(losses * counts).sum(), counts.sum().to(losses.dtype)])).tolist()
    return float(total / max(tokens, 1))
