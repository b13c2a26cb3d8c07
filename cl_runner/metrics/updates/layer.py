"""All metrics of one layer: what each stage has changed of it, and how these changes overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

import torch
from torch import Tensor

from cl_runner.metrics.updates.angles import matrices
from cl_runner.metrics.updates.entries import (
    collision_rate,
    entries,
    expected_collision_rate,
    generalised_sparsity_rate,
    hoyer,
)
from cl_runner.metrics.updates.overlap import inner, orthogonal_overlap, weight_overlap
from cl_runner.metrics.updates.spectrum import effective_rank, nuclear_norm, spectrum
from cl_runner.metrics.updates.update import Update

SINGULAR = 256  # singular values that are kept of a layer


@dataclass(frozen=True, eq=False)
class Metrics:
    """Of T updates, by K thresholds; all fp64 on the CPU, nan where undefined.

    by_stage: name → (T). between: name → (T, T), symmetric. density (K, T), acr and expected_acr (K).
    """

    by_stage: dict[str, Tensor]
    between: dict[str, Tensor]
    density: Tensor
    acr: Tensor
    expected_acr: Tensor
    awom: float


@dataclass(frozen=True, eq=False)
class LayerMetrics(Metrics):
    """Those of a layer (m, n). singular: σ of each stage, of a matrix the largest."""

    shape: tuple[int, int]
    singular: list[list[float]]


@torch.no_grad()
def layer_metrics(updates: Sequence[Update]) -> LayerMetrics:
    """Of at least one update, all of one shape and on one device."""
    spectra = [spectrum(update) for update in updates]
    found = entries(updates)
    inners = _pairs(updates, inner)
    norms = inners.diagonal().clamp(min=0).sqrt()
    overlaps = _pairs(updates, orthogonal_overlap)
    sizes = list(zip(found.l1.tolist(), norms.tolist(), strict=True))
    by_stage = {
        "update_norm": norms,
        "nuclear_norm": _row([nuclear_norm(each.values) for each in spectra]),
        "effective_rank": _row([effective_rank(each.values) for each in spectra]),
        "gsr": _row([generalised_sparsity_rate(*size, found.count) for size in sizes]),
        "hoyer": _row([hoyer(*size, found.count) for size in sizes]),
        "free_share": _row(free_shares(updates)),
        "orthogonal_overlap": overlaps.tril(-1).sum(1) + 0 * overlaps.diagonal(),  # nan of a matrix, the first one too
    }
    last = [weight_overlap(updates[-1], before) for before in updates[:-1]]
    return LayerMetrics(
        by_stage,
        {
            "orthogonal_overlap": overlaps,
            "inner": inners,
            **matrices([each.reads for each in spectra], "input"),
            **matrices([each.writes for each in spectra], "output"),
        },
        found.density.cpu(),
        collision_rate(found).cpu(),
        expected_collision_rate(found).cpu(),
        math.fsum(last) if last else math.nan,
        updates[0].shape,
        [each.values[:SINGULAR].tolist() for each in spectra],
    )


def free_shares(updates: Sequence[Update]) -> list[float]:
    """After each update the share of input directions that no A so far reads; nan from one without factors on.

    As ``free_share`` has it, from one QR of all rows: NumPy's own threads get in the way of ours.
    """
    factors = [each.A for each in takewhile(lambda update: update.A is not None, updates) if each.A is not None]
    if not factors:
        return [math.nan] * len(updates)
    together = torch.cat(factors).double()
    in_basis = torch.linalg.qr(together.mT, mode="r").R
    shares = []
    for count in accumulate(len(A) for A in factors):
        singular = torch.linalg.svdvals(in_basis[:, :count])
        read = (singular > torch.finfo(torch.float32).eps * singular.max()).sum() if count else 0
        shares.append(1 - int(read) / together.shape[1])
    return shares + [math.nan] * (len(updates) - len(shares))


def _pairs(updates: Sequence[Update], of: Callable[[Update, Update], float]) -> Tensor:
    """(T, T) of what is the same both ways round."""
    found = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for i, one in enumerate(updates):
        for j, other in enumerate(updates[: i + 1]):
            found[i, j] = found[j, i] = of(one, other)
    return found


def _row(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
