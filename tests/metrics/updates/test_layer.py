"""Metrics of one layer against naive computations on whole matrices, to a relative 1e-5."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cl_runner.metrics.free_subspace import free_share
from cl_runner.metrics.updates import entries as by_entry
from cl_runner.metrics.updates import spectrum as by_spectrum
from cl_runner.metrics.updates.entries import THRESHOLDS
from cl_runner.metrics.updates.layer import LayerMetrics, free_shares, layer_metrics
from cl_runner.metrics.updates.overlap import inner, orthogonal_overlap, weight_overlap
from cl_runner.metrics.updates.spectrum import effective_rank, nuclear_norm, spectrum
from cl_runner.metrics.updates.update import Update
from tests.metrics.updates import naive
from tests.metrics.updates.naive import matrix, pair, whole

MOST = 4  # leading directions of a matrix
CASES: dict[str, Sequence[Update]] = {
    "pairs": [pair(4, seed) for seed in range(4)],
    "ranks and scales that differ": [pair(2, 0), pair(7, 1, scale=3.0), pair(1, 2, scale=1e-4), pair(5, 3)],
    "more rows than a side": [pair(30, 0), pair(3, 1)],
    "matrices": [matrix(seed) for seed in range(3)],
    "tall matrices": [matrix(seed, 40, 6) for seed in range(3)],
    "both": [pair(3, 0), matrix(1), pair(2, 2), matrix(3)],
    "one": [pair(3, 0)],
}


@pytest.fixture(params=CASES, ids=str)
def updates(request: pytest.FixtureRequest) -> Sequence[Update]:
    return CASES[request.param]


@pytest.fixture
def found(updates: Sequence[Update], monkeypatch: pytest.MonkeyPatch) -> LayerMetrics:
    monkeypatch.setattr(by_spectrum, "LEADING", MOST)
    monkeypatch.setitem(by_entry.BLOCK, "cpu", 5 * len(updates) * updates[0].shape[1])  # five rows, the last block less
    return layer_metrics(updates)


def same(values: Tensor, wanted: Sequence[float]) -> None:
    assert values.tolist() == pytest.approx(wanted, rel=1e-5, nan_ok=True)


def test_what_each_update_is(updates: Sequence[Update], found: LayerMetrics) -> None:
    each = [whole(update) for update in updates]
    norms = [float(np.sqrt((D**2).sum())) for D in each]
    sums = [float(np.abs(D).sum()) for D in each]
    count = each[0].size
    same(found.by_stage["update_norm"], norms)
    same(found.by_stage["nuclear_norm"], [np.linalg.norm(D, "nuc") for D in each])
    same(found.by_stage["effective_rank"], [naive.effective_rank(D) for D in each])
    same(found.by_stage["gsr"], [math.sqrt(count) * l1 / l2 for l1, l2 in zip(sums, norms, strict=True)])
    hoyer = [(math.sqrt(count) - l1 / l2) / (math.sqrt(count) - 1) for l1, l2 in zip(sums, norms, strict=True)]
    same(found.by_stage["hoyer"], hoyer)
    assert found.shape == each[0].shape
    for values, D in zip(found.singular, each, strict=True):
        np.testing.assert_allclose(values, np.linalg.svd(D, compute_uv=False)[: len(values)], rtol=1e-5, atol=1e-6)


def test_what_is_left_to_learn_in(updates: Sequence[Update], found: LayerMetrics) -> None:
    wanted: list[float] = []
    rows = np.zeros((0, updates[0].shape[1]))
    for update in updates:
        if update.A is None:
            break
        rows = np.concatenate([rows, update.A.numpy()])
        wanted.append(1 - np.linalg.matrix_rank(rows) / rows.shape[1])
    same(found.by_stage["free_share"], wanted + [math.nan] * (len(updates) - len(wanted)))


def test_rows_that_others_read_already_take_nothing() -> None:
    """And what is left is what reports say of a run's pairs (``free_share``)."""
    first = pair(3, 0)
    assert first.A is not None
    again = Update(first.B, torch.randn(3, 3, generator=torch.Generator().manual_seed(1)) @ first.A)
    close = Update(first.B, first.A + 1e-5 * pair(3, 2).A)
    updates = [first, again, first.less(first), close, pair(30, 3)]
    shares = free_shares(updates)
    assert shares == pytest.approx([1 - k / 23 for k in (3, 3, 3, 6, 23)])
    assert shares == [free_share([each.A.numpy() for each in updates[:k]]) for k in range(1, 6)]


def test_entries(updates: Sequence[Update], found: LayerMetrics) -> None:
    for k, threshold in enumerate(THRESHOLDS):
        if len(updates) > 1:
            rate, expected, shares = naive.collisions(updates, threshold)
            assert found.acr[k].item() == pytest.approx(rate, rel=1e-5)
            assert found.expected_acr[k].item() == pytest.approx(expected, rel=1e-5)
            same(found.density[k], shares)
        else:
            assert math.isnan(found.acr[k]) and math.isnan(found.expected_acr[k])
    assert 0 < found.density[0].max() < 1, "something counts as zero"


def test_overlaps(updates: Sequence[Update], found: LayerMetrics) -> None:
    T, each = len(updates), [whole(update) for update in updates]
    for i in range(T):
        for j in range(T):
            norms = np.linalg.norm(each[i]) * np.linalg.norm(each[j])
            inner_ij = found.between["inner"][i, j].item()
            assert inner_ij == pytest.approx(float((each[i] * each[j]).sum()), rel=1e-5, abs=1e-9 * norms)
            A_i, A_j = updates[i].A, updates[j].A
            wanted = math.nan if A_i is None or A_j is None else float((A_i.double() @ A_j.double().T).square().sum())
            assert found.between["orthogonal_overlap"][i, j].item() == pytest.approx(wanted, rel=1e-9, nan_ok=True)
    overlap = found.between["orthogonal_overlap"].tolist()
    sums = [math.nan if update.A is None else sum(overlap[t][:t]) for t, update in enumerate(updates)]
    same(found.by_stage["orthogonal_overlap"], sums)
    wanted = sum(float(((each[-1].T @ each[i]) ** 2).sum()) for i in range(T - 1)) if T > 1 else math.nan
    assert found.awom == pytest.approx(wanted, rel=1e-5, nan_ok=True)


def test_spaces(updates: Sequence[Update], found: LayerMetrics) -> None:
    each = [whole(update) for update in updates]
    ranks = [
        min(math.ceil(naive.effective_rank(D) - 1e-9), MOST) if update.A is None else np.linalg.matrix_rank(D)
        for update, D in zip(updates, each, strict=True)
    ]
    for side, matrices in (("input", each), ("output", [D.T for D in each])):
        for i in range(len(each)):
            for j in range(i):
                wanted = naive.angles(matrices[i], matrices[j], (ranks[i], ranks[j]))
                values = [found.between[f"{side}_{name}"][i, j].item() for name in ("angle_smallest", "angle_mean")]
                assert values == pytest.approx([wanted.min(), wanted.mean()], rel=1e-5, abs=2e-5)
                distance = math.sqrt((np.sin(np.radians(wanted)) ** 2).mean())
                assert found.between[f"{side}_distance"][i, j].item() == pytest.approx(distance, rel=1e-5, abs=1e-6)
                assert found.between[f"{side}_distance"][j, i] == found.between[f"{side}_distance"][i, j]


def test_an_update_that_is_zero_is_undefined_where_it_must_be() -> None:
    nothing = Update(torch.zeros(17, 3), torch.randn(3, 23, generator=torch.Generator().manual_seed(0)))
    for zero in (nothing, Update(torch.zeros(17, 23))):
        found = layer_metrics([pair(4, 1), zero])
        of = {name: values[1].item() for name, values in found.by_stage.items()}
        assert of["update_norm"] == of["nuclear_norm"] == 0
        assert all(math.isnan(of[name]) for name in ("effective_rank", "gsr", "hoyer"))
        assert found.density[:, 1].tolist() == [0, 0, 0] and found.acr.tolist() == [0, 0, 0]
        assert found.awom == 0 and found.between["inner"][0, 1] == 0
        assert math.isnan(found.between["input_angle_mean"][0, 1])


def test_what_changed() -> None:
    """Less what was there before: of pairs side by side only what is new; of others both, one of them taken off."""
    old, new = pair(3, 0), pair(2, 1)
    assert old.A is not None and new.A is not None
    beside = Update(torch.cat([old.B, new.B], 1), torch.cat([old.A, new.A]))
    changed = beside.less(old)
    assert changed.A is not None and torch.equal(changed.A, new.A) and torch.equal(changed.B, new.B)
    moved = Update(torch.cat([old.B * torch.tensor([1.0, 2.0, 1.0]), new.B], 1), beside.A).less(old)
    assert moved.rank == 3  # the second old direction, and the new ones
    torch.testing.assert_close(moved.whole(), new.whole() + old.B[:, 1:2] @ old.A[1:2])
    on = new.less(old)
    assert on.rank == 5
    torch.testing.assert_close(on.whole(), new.whole() - old.whole())
    dense = Update(new.whole()).less(old)
    assert dense.rank is None
    torch.testing.assert_close(dense.whole(), new.whole() - old.whole())
    nothing = old.less(old)
    assert nothing.rank == 0 and nothing.shape == old.shape
    assert layer_metrics([old, nothing]).by_stage["update_norm"][1] == 0


class Largest(TorchDispatchMode):
    """How many entries the largest tensor has that torch makes inside."""

    entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return made


def of_spectra(one: Update, other: Update) -> None:
    for update in (one, other):
        values = spectrum(update).values
        nuclear_norm(values)
        effective_rank(values)


@pytest.mark.parametrize("metric", [orthogonal_overlap, inner, weight_overlap, of_spectra])
def test_no_matrix_is_made_where_factors_will_do(metric: Callable[[Update, Update], Any]) -> None:
    one, other = pair(4, 0, 600, 500), pair(6, 1, 600, 500)
    with Largest() as seen:
        metric(one, other)
    assert 0 < seen.entries <= 6 * 600
    with Largest() as seen:
        one.whole()
    assert seen.entries == 600 * 500, "it would be seen"


def test_entries_are_made_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [pair(4, seed, 600, 500) for seed in range(3)]
    monkeypatch.setitem(by_entry.BLOCK, "cpu", 3 * 20 * 500)
    with Largest() as seen:
        by_entry.entries(updates)
    assert seen.entries == 3 * 20 * 500
