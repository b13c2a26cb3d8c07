"""How much longer training made the columns of a weight, and how far it turned them (DoRA, arXiv 2402.09353)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_runner.metrics.updates.update import Update


def magnitude_and_direction(weight: Tensor, total: Update) -> tuple[float, float]:
    """ΔM and ΔD of W0 (m, n) and ``W = W0 + ΔW``: over the n columns the mean of ``| ‖w‖ − ‖w0‖ |``, and of
    ``1 − cos(w, w0)``, where neither is zero; nan where all are.

    From the columns' inner products alone, so that of factors no m × n product is made, and that what is small beside
    the weight is not lost: the differences themselves would be rounded as the weight is.
    """
    W, B = weight.double(), total.B.double()
    own = W.square().sum(0)  # ‖w0‖², w0 · d and ‖d‖² of each column d of ΔW, (n)
    if total.A is None:
        across, moved = (W * B).sum(0), B.square().sum(0)
    else:
        A = total.A.double()
        across = ((B.mT @ W) * A).sum(0)
        moved = ((B.mT @ B @ A) * A).sum(0)
    after = (own + 2 * across + moved).clamp(min=0)
    lengths = own.sqrt() + after.sqrt()
    magnitude = torch.where(lengths > 0, (2 * across + moved).abs() / lengths, 0.0).mean()
    there = (own > 0) & (after > 0)
    squares = (own * after)[there]
    cosine = (own + across)[there] / squares.sqrt()
    sine = (own * moved - across.square())[there].clamp(min=0) / squares  # squared
    # Where the angle is small 1 − cos is what rounding left of it.
    turned = torch.where(cosine > 0, sine / (1 + cosine), 1 - cosine)
    return float(magnitude), float(turned.mean()) if len(turned) else math.nan


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's, over all places where both are defined; nan of fewer than two, or where one is constant."""
    there = one.isfinite() & other.isfinite()
    one, other = one[there] - one[there].mean(), other[there] - other[there].mean()
    sizes = float(one.norm() * other.norm())
    return float(one @ other) / sizes if sizes else math.nan
