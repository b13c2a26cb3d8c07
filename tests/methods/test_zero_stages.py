"""ZeRO 0, 1 and 2 learn the same: with a penalty, edited gradients, steps of a method's own, all weights, moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.engine.process import Place
from cl_runner.methods import METHODS
from tests.breadth import narrowed
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.small import OWN
from tests.methods.steps import off, opposed, vector

# A penalty, edits of whole gradients and of a live term's, whole steps, all weights.
SORTS = ("olora", "gem", "osft", "coso", "seqft")


def learned(place: Place, method: str, zero: int) -> Tensor:
    own = {f"method__{key}": value for key, value in OWN.get(method, {}).items()}
    settings: dict[str, Any] = {"training__micro_batch": 1, "training__epochs": 2, "training__clip": 0.5, **own}
    room, config = order_room(place, method, training__zero=zero, **settings)
    stages = range(min(2, len(room.order)))
    return vector([learn(room, config, index, opposed(index, rows=5)) for index in stages][-1].parameters)


@pytest.mark.parametrize("ranks", narrowed([1, 2], [2]))
@pytest.mark.parametrize("method", narrowed(METHODS, SORTS))
def test_all_learn_the_same(method: str, ranks: int) -> None:
    wanted = on_ranks(ranks, learned, method, 2)
    assert wanted[0].abs().sum() > 0
    for zero in (0, 1):
        found = on_ranks(ranks, learned, method, zero)
        assert all(torch.equal(one, found[0]) for one in found), "the ranks"
        assert off(found[0], wanted[0]) < 1e-4, zero
