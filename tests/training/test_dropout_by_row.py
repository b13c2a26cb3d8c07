"""Any number of processes and any micro-batch train with the same dropout: the same numbers but for rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.engine.process import Place
from tests.breadth import paired
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.stages import Kind, distance

# Where a dropout may be: in PEFT's layers and the base (all), before past pairs, in a method's own terms.
FORMS: list[tuple[str, Kind, dict[str, Any]]] = [
    ("olora", "t5", {}),
    ("olora", "llama", {"adapter__dropout_past": True}),
    ("sdlora", "t5", {}),
    ("gainlora", "llama", {"method__branch": "olora"}),
    ("shared-basis", "llama", {}),
    ("colora", "t5", {}),
    ("progprompt", "llama", {}),
    ("seqft", "t5", {}),
]


def learned(place: Place, method: str, kind: Kind, micro: int, settings: dict[str, Any]) -> dict[str, Tensor]:
    """What two stages of two epochs leave, dropout 0.2 everywhere; the second one's parameters."""
    sizes = {"training__global_batch": 6, "training__micro_batch": micro, "training__epochs": 2}
    room, config = order_room(place, method, ("a", "b"), kind, dropout=0.2, adapter__dropout=0.2, **sizes, **settings)
    room.base.model.set_attn_implementation("eager")
    return [learn(room, config, index) for index in range(2)][-1].parameters


QUICK = [FORMS[1], FORMS[6], FORMS[7]]  # pairs and past ones, a prompt, all weights


@pytest.mark.parametrize(("method", "kind", "settings"), paired(FORMS, QUICK), ids=[f"{m}-{k}" for m, k, _ in FORMS])
def test_any_micro_batch_and_any_number_of_processes(method: str, kind: Kind, settings: dict[str, Any]) -> None:
    [whole] = on_ranks(1, learned, method, kind, 6, settings)
    [parts] = on_ranks(1, learned, method, kind, 2, settings)
    both = on_ranks(2, learned, method, kind, 3, settings)
    assert distance(parts, whole) < 1e-3
    assert distance(both[0], whole) < 1e-3
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    [by_micro] = on_ranks(1, learned, method, kind, 2, {**settings, "training__dropout_by": "micro"})
    assert distance(by_micro, whole) > 1e-2
