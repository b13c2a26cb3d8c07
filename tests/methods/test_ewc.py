"""EWC's Fisher information against a loop over examples, its one quadratic against the sum over tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.engine.process import Place
from cl_runner.methods.shared.rows import drawn
from cl_runner.training.stage import StageRun
from tests.breadth import wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import STEPS, THREE, Values, by_hand, gradient, off, opposed, put, values, vector
from tests.stages import Kind, naive_loss

Term = tuple[float, Tensor, Tensor]  # weight, F, θ*
LAMBDA = 30.0


def fisher_by_loop(room: Any, kind: Kind, at: Values, examples: Any) -> Tensor:
    """Mean over examples of the squared gradient of −log p(label), each example alone, in fp64."""
    put(room, at)
    squares = [
        gradient(room, naive_loss(room.adapters.model, kind, [example]) * len(example.target)).square()
        for example in examples
    ]
    return torch.stack(squares).mean(0)


def sum_of_tasks(terms: list[Term], at: Tensor) -> Tensor:
    return LAMBDA / 2 * sum(w * (F * (at - best) ** 2).sum() for w, F, best in terms)  # type: ignore[return-value]


def terms_of(learned: list[tuple[Tensor, Tensor]], online: float | None) -> list[Term]:
    if online is None:
        return [(1.0, F, best) for F, best in learned]
    last = learned[-1][1]
    return [(online ** (len(learned) - 1 - k), F, last) for k, (F, _) in enumerate(learned)]


def _penalty(place: Place, kind: Kind, online: float | None) -> None:
    room, config = order_room(place, "ewc", kind=kind, **THREE, method__lambda1=LAMBDA, method__online=online)
    probe, _ = order_room(place, "seqlora", kind=kind)
    learned: list[tuple[Tensor, Tensor]] = []
    for index in range(3):
        stage = StageRun(room, config, index)
        room.method.build(stage)
        assert (room.method.penalty(stage) is None) == (index == 0)
        stage.close()
        start = values(room)
        outcome = learn(room, config, index, opposed(index))

        # The same steps by hand, with the sum over tasks.
        past = terms_of(learned, online) if learned else []
        extra = lambda model, p: sum_of_tasks(past, vector(p).double()).float() if past else torch.zeros(())  # noqa: B023, E731
        wanted = by_hand(kind, start, opposed(index).examples, STEPS, extra)
        assert off(vector(values(room)), vector(wanted)) < 2e-3
        if past:
            plain = by_hand(kind, start, opposed(index).examples, STEPS)
            assert off(vector(values(room)), vector(plain)) > 2e-2
            assert outcome.rows[0]["penalty"] == pytest.approx(float(sum_of_tasks(past, vector(start).double())), 1e-3)

        end = values(room)
        learned.append((fisher_by_loop(probe, kind, end, opposed(index).examples), vector(end).double()))
        assert {name: t.shape for name, t in room.method.state().tensors.items()} == {
            "fisher": learned[0][0].shape, "centre": learned[0][0].shape,
        }  # fmt: skip
        sizes = [w * F for w, F, _ in terms_of(learned, online)]
        assert off(room.method.fisher, torch.stack(sizes).sum(0)) < 1e-3

    # Anywhere, value and gradient are those of the definition, with the constant.
    for seed in range(2):
        dice = torch.Generator().manual_seed(seed)
        put(room, {n: v + 0.1 * torch.randn(v.shape, generator=dice) for n, v in values(room).items()})
        stage = StageRun(room, config, 2)
        found = room.method.penalty(stage)
        at = vector(values(room)).double().requires_grad_()
        definition = sum_of_tasks(terms_of(learned, online), at)
        assert found.dtype == torch.float32 and float(found.detach()) == pytest.approx(float(definition.detach()), 1e-4)
        assert off(gradient(room, found), torch.autograd.grad(definition, at)[0]) < 1e-4
        stage.close()
    assert (room.method.least > 0) == (online is None)


@pytest.mark.parametrize(("kind", "online"), [pytest.param("t5", None, marks=wide), ("t5", 0.9), ("llama", None)])
def test_penalty_and_steps_are_those_of_the_definition(kind: Kind, online: float | None) -> None:
    on_ranks(1, _penalty, kind, online)


def _samples(place: Place) -> None:
    room, config = order_room(place, "ewc", **THREE, method__fisher_samples=4)
    probe, _ = order_room(place, "seqlora")
    learn(room, config, 0, opposed(0))
    own = opposed(0)
    stage = StageRun(room, config, 0)
    chosen = drawn(own, 4, stage.rng("fisher"))
    stage.close()
    assert len(chosen.examples) == 4 and all(e in own.examples for e in chosen.examples)
    assert off(room.method.fisher, fisher_by_loop(probe, "t5", values(room), chosen.examples)) < 1e-3
    assert off(room.method.fisher, fisher_by_loop(probe, "t5", values(room), own.examples)) > 1e-2


def test_the_fisher_of_a_sample() -> None:
    on_ranks(1, _samples)
