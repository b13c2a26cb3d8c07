"""A-GEM's and GEM's gradients: their constraints hold and they are the nearest ones, by scipy's solver in fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from cl_runner.engine.process import Place
from cl_runner.methods.agem import project
from cl_runner.methods.gem import dual
from cl_runner.methods.shared.memory import drawn_at_step
from cl_runner.training.stage import StageRun
from tests.breadth import wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import STEPS, THREE, mean_loss_gradient, off, opposed, stepped, vector, watch
from tests.stages import Kind, some_rows


def nearest(G: Tensor, g: Tensor, margin: float) -> Tensor:
    """g + Gᵀv with v ≥ margin and the least norm: with u = v − margin, a least-squares problem with u ≥ 0."""
    G, g = G.double(), g.double()
    if bool((G @ g >= 0).all()):
        return g
    shifted = g + margin * G.sum(0)
    u, _ = nnls(G.T.numpy(), -shifted.numpy())
    return shifted + torch.from_numpy(u) @ G


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_dual_against_scipy(margin: float) -> None:
    changed = 0
    for seed in range(60):
        dice = torch.Generator().manual_seed(seed)
        tasks = 1 + seed % 7
        G = torch.randn(tasks, 12, generator=dice, dtype=torch.float64) * 10.0 ** (seed % 5 - 3)
        g = torch.randn(12, generator=dice, dtype=torch.float64) - (seed % 3) * G.mean(0) / G.std()
        if seed % 4 == 0:
            G = torch.cat([G, 2 * G[:1]])  # the same direction twice
        v = dual(G @ G.T, G @ g, margin)
        found, wanted = g + v @ G, nearest(G, g, margin)
        assert off(found, wanted) < 1e-4, seed
        assert not v.any() or bool((v >= margin).all())
        assert bool((G @ found >= -1e-4 * G.norm(dim=1) * g.norm()).all())
        changed += bool(v.any())
    assert 30 < changed < 60


def test_the_projection_of_agem_is_the_one_of_gem_with_one_constraint() -> None:
    for seed in range(10):
        dice = torch.Generator().manual_seed(seed)
        g, m = torch.randn(2, 30, generator=dice)
        found = project(g, m)
        assert off(found, nearest(m[None], g, 0.0)) < 1e-6
        assert float(found @ m) >= -1e-5 * float(g.norm() * m.norm())
        assert torch.equal(found, g) == bool(g @ m >= 0)
    assert torch.equal(project(g, torch.zeros(30)), g)


def _edits(place: Place, name: str, kind: Kind, margin: float) -> None:
    own: dict[str, Any] = {"method__memory_strength": margin} if name == "gem" else {}
    room, config = order_room(place, name, kind=kind, **THREE, **own)
    steps = watch(room)
    for index in range(3):
        learn(room, config, index, opposed(index))
    assert len(steps) == 3 * STEPS
    changed = 0
    for number, step in enumerate(steps):
        stage, g = number // STEPS, vector(step.given)
        past = [opposed(i).examples for i in range(stage)]
        mean = mean_loss_gradient(room, kind, step.before, opposed(stage).examples)
        assert off(g, mean) < 1e-3  # three micro-batches are one
        if name == "agem":
            past = [[e for examples in past for e in examples]] if past else []
        G = torch.stack([mean_loss_gradient(room, kind, step.before, rows) for rows in past]) if past else None
        wanted = g.double() if G is None else nearest(G, g, margin)
        edited = vector(step.edited)
        assert off(edited, wanted) < 2e-3
        if G is not None:
            assert bool((G @ edited.double() >= -1e-3 * G.norm(dim=1) * g.double().norm()).all())
            changed += off(edited, g) > 1e-2
    assert changed >= 3
    for at in range(0, len(steps), STEPS):  # each stage with an optimizer of its own, which sees what was edited
        for step, wanted in zip(steps[at : at + STEPS], stepped(steps[at : at + STEPS]), strict=True):
            assert off(vector(step.after), vector(wanted)) < 1e-4


@pytest.mark.parametrize(
    ("name", "kind", "margin"),
    [
        pytest.param("agem", "t5", 0.0, marks=wide),
        ("agem", "llama", 0.0),
        pytest.param("gem", "t5", 0.0, marks=wide),
        ("gem", "llama", 0.0),
        ("gem", "t5", 0.5),
    ],
)
def test_edited_gradients_at_accumulation_3(name: str, kind: Kind, margin: float) -> None:
    on_ranks(1, _edits, name, kind, margin)


def test_a_step_draws_its_own_rows_of_the_memory() -> None:
    room, config = order_room(Place(), "agem")
    stage, source = StageRun(room, config, 1), some_rows(20)

    def rows(step: int) -> list[int]:
        stage.step = step
        chosen = drawn_at_step(source, 5, stage)
        return [list(source.examples).index(e) for e in chosen.examples]

    assert rows(3) == rows(3) and rows(3) != rows(4) and len(rows(3)) == 5
    assert np.unique([row for step in range(40) for row in rows(step)]).size == 20
    assert drawn_at_step(source, 99, stage).examples == list(source.examples)
    stage.close()
