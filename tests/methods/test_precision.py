"""Folding costs no digits: fp32 gradients beside fp64 ones, and those of the form with past pairs in the forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import pytest
import torch

from benchmarks import world
from benchmarks.precision import by_hand, errors, geometric_mean
from cl_runner.adapters.folding import Accumulator
from cl_runner.adapters.pairs import Pair
from cl_runner.config.schema import ModelConfig
from cl_runner.engine import zero as engine
from cl_runner.engine.process import Place
from cl_runner.models.base import load_base
from cl_runner.models.batch import collate


def grown(pair: Pair) -> Pair:
    """Its update about a third of a weight's size: a few times what a stage on this model leaves."""
    return replace(pair, B={target: 15 * B for target, B in pair.B.items()})


@pytest.fixture(scope="module")
def made() -> Iterator[world.World]:
    """tiny-t5 at the third stage of an order, two random pairs behind it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = world.tiny(3)
    one.pairs[:] = [grown(pair) for pair in one.pairs]
    yield one
    one.close()
    engine.stop()
    torch.set_num_threads(threads)


def test_folded_gradients_are_as_near_to_fp64_as_those_with_pairs_in_the_forward(made: world.World) -> None:
    """The mean ratio of their errors, over batches in which every hidden unit is on its side of zero in both."""
    live = grown(world.random_pair(made.room.adapters, "task3", 3))
    rows = world.tiny_rows(made, 48, "yahoo")
    found = [one for one in errors(made, live, [rows[at : at + 2] for at in range(0, 48, 2)]) if one.plain]
    assert len(found) >= 12
    assert all(1e-7 < one.in_the_forward < 1e-2 for one in found)
    assert geometric_mean([one.ratio for one in found]) < 1.5
    # Of this the rounding of the folded weight is a small part.
    assert median(one.folding_alone / one.in_the_forward for one in found) < 0.2


def test_a_fold_that_loses_digits_would_show(made: world.World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With three decimal digits less in the folded weight both figures are far out."""
    add = Accumulator.set

    def coarse(self: Accumulator, total: torch.Tensor | None) -> None:
        add(self, total)
        if total is not None:
            self.weight.data = (self.weight.data.view(torch.int32) & -1024).view(torch.float32)

    monkeypatch.setattr(Accumulator, "set", coarse)
    live = grown(world.random_pair(made.room.adapters, "task3", 3))
    rows = world.tiny_rows(made, 16, "yahoo")
    found = errors(made, live, [rows[at : at + 2] for at in range(0, 16, 2)])
    assert geometric_mean([one.ratio for one in found]) > 5
    assert median(one.folding_alone / one.in_the_forward for one in found) > 5


def test_the_exact_form_is_exact(made: world.World) -> None:
    """Past pairs added to the weight in fp64 give the gradient that they give in the forward."""
    live = grown(world.random_pair(made.room.adapters, "task3", 3))
    base = load_base(ModelConfig(name="tiny-t5"), Place().torch_device)
    plain = {t: base.model.get_submodule(t).weight.detach().double() for t in live.A}
    summed = {t: W + sum(p.scale * p.B[t].double() @ p.A[t].double() for p in made.pairs) for t, W in plain.items()}
    batch = collate(world.tiny_rows(made, 4, "yahoo"), base.layout)
    one, other = (
        by_hand(base.model, weights, past, live, torch.float64).gradient(batch)
        for weights, past in ((plain, made.pairs), (summed, []))
    )
    assert float(one.norm()) > 1e-3 and float((one - other).norm() / one.norm()) < 1e-11
