"""LwF: nothing at the first step, and its divergence token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cl_runner.engine.process import Place
from cl_runner.methods.shared.distillation import divergence
from cl_runner.models.forward import token_loss
from cl_runner.training.stage import StageRun
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import STEPS, THREE, by_hand, label_logits, off, opposed, put, values, vector
from tests.stages import Kind

LAMBDA, TAU = 20.0, 3.0
OWN = {"method__lambda1": LAMBDA, "method__temperature": TAU}


def test_the_divergence_is_the_definition() -> None:
    dice = torch.Generator().manual_seed(0)
    before, now = torch.randn(2, 3, 4, 7, generator=dice, dtype=torch.float64) * 4
    found = divergence(before, now, TAU)
    for b in range(3):
        for t in range(4):
            p, q = torch.softmax(before[b, t] / TAU, 0), torch.softmax(now[b, t] / TAU, 0)
            assert float(found[b, t]) == pytest.approx(float(sum(p[v] * (p[v] / q[v]).log() for v in range(7))), 1e-4)
    assert not divergence(before, before, TAU).any()


def kept(model: Any, kind: Kind, old: list[Tensor], examples: Any) -> Tensor:
    """λ · mean over the label tokens of KL(old ‖ new), one example at a time."""
    total = sum(
        functional.kl_div(
            torch.log_softmax(label_logits(model, kind, example) / TAU, -1), torch.softmax(before / TAU, -1),
            reduction="sum",
        )
        for example, before in zip(examples, old, strict=True)
    )  # fmt: skip
    return LAMBDA * total / sum(len(example.target) for example in examples)  # type: ignore[return-value]


def _lwf(place: Place, kind: Kind) -> None:
    room, config = order_room(place, "lwf", kind=kind, **THREE, **OWN)
    probe, _ = order_room(place, "seqlora", kind=kind)
    method: Any = room.method
    first: list[tuple[Tensor, Tensor]] = []
    ask = method.loss

    def spy(stage: Any, batch: Any) -> Tensor:
        whole = ask(stage, batch)
        if stage.step == 0:
            with torch.no_grad():
                task = (token_loss(stage.forward(batch), batch.labels) * batch.token_weights).sum()
            first.append((whole.detach(), task))
        return whole

    method.loss = spy
    for index in range(3):
        start, examples = None if index == 0 else values(room), opposed(index).examples
        learn(room, config, index, opposed(index))
        assert not method.old and not method.state().tensors  # the next stage begins with what this one left
        if start is None:
            continue
        put(probe, start)
        with torch.no_grad():
            old = [label_logits(probe.adapters.model, kind, example) for example in examples]
        wanted = by_hand(kind, start, examples, STEPS, lambda model, _: kept(model, kind, old, examples))  # noqa: B023
        assert off(vector(values(room)), vector(wanted)) < 2e-3
        assert off(vector(values(room)), vector(by_hand(kind, start, examples, STEPS))) > 2e-2
    assert len(first) == 9
    assert all(torch.equal(whole, task) for whole, task in first)  # zero at each stage's first step


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_steps_against_the_definition_at_accumulation_3(kind: Kind) -> None:
    on_ranks(1, _lwf, kind)


def test_the_old_model_answers_with_dropout_off() -> None:
    room, config = order_room(Place(), "lwf", dropout=0.3, adapter__dropout=0.3, **OWN)
    method: Any = room.method
    stage = StageRun(room, config, 1)
    method.build(stage)
    put(room, {n: torch.randn(v.shape, generator=torch.Generator().manual_seed(1)) for n, v in values(room).items()})
    room.adapters.model.eval()
    method.begin_task(stage)
    own = opposed(1)
    batch = stage.make_batch(own.examples, own.tasks, [1 / 16] * 6)
    with torch.no_grad():
        before = stage.forward(batch)
        room.adapters.model.train()
        torch.manual_seed(3)
        whole = method.loss(stage, batch)
        torch.manual_seed(3)
        now = stage.forward(batch)
    assert room.adapters.model.training and not torch.equal(now, before)
    each = token_loss(now, batch.labels) + LAMBDA * divergence(before, now, TAU)
    torch.testing.assert_close(whole, (each * batch.token_weights).sum())
    stage.close()


def test_what_it_distils_from_survives_within_a_stage() -> None:
    room, config = order_room(Place(), "lwf")
    stage = StageRun(room, config, 1)
    room.method.build(stage)
    room.method.begin_task(stage)
    again, _ = order_room(Place(), "lwf")
    again.method.load_state(room.method.state())
    old: Any = room.method.old  # type: ignore[attr-defined]
    assert list(again.method.old) == list(stage.parameters()) == list(old)  # type: ignore[attr-defined]
    assert all(torch.equal(value, old[name]) for name, value in again.method.old.items())  # type: ignore[attr-defined]
    stage.close()
