"""How a task's own term begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_runner.methods.shared_basis.terms import SharedBasis

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.methods.shared_basis.past import Past
    from cl_runner.methods.shared_basis.settings import Settings
    from cl_runner.methods.shared_basis.terms import Mixture


def fresh_term(
    stage: Stage, settings: Settings, past: Past, target: str, dice: torch.Generator, beside: Mixture | None
) -> SharedBasis:
    """It begins at ΔW = 0, with A = 0 where U is not, else with U or B = 0. ``beside``: finished tasks' updates."""
    import torch

    r = stage.rank_of(target)
    m, n = stage.targets()[target]
    first = stage.index == 0 and not settings.pca  # U itself learns, in the place of a B
    U, C = past.shared.get(f"U.{target}"), past.shared.get(f"C.{target}")
    if first:
        U = torch.zeros(m, r)
    rows = settings.dictionary or 4 * r
    if settings.sparse and C is None:
        C = _drawn(rows, n, dice, settings.non_negative)
    A = _drawn(r, rows if settings.sparse else n, dice, settings.non_negative)
    later = U is not None and not first
    if later:
        A = torch.cat([torch.zeros_like(A), A]) if settings.form == "block" else torch.zeros_like(A)
    return SharedBasis(
        A,
        m,
        stage.scale_of(target),
        basis=U,
        dictionary=C,
        shared_trains=not past.shared or settings.shared_lr > 0,
        own=not first,
        mixing=settings.mixing == "learned" and later,
        mask=past.mask(target, settings.support) if later else None,
        past=beside,
        p=stage.config.adapter.dropout,
    )


def _drawn(rows: int, columns: int, dice: torch.Generator, non_negative: bool) -> Tensor:
    """Kaiming-uniform, as PEFT's A."""
    import torch

    made = torch.empty(rows, columns)
    torch.nn.init.kaiming_uniform_(made, a=5**0.5, generator=dice)
    return made.abs() if non_negative else made
