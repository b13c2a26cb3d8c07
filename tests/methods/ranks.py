"""Two ranks and one: a method on five rows in micro-batches of one, and what it learned held beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from cl_runner.engine.process import Place
from tests.distributed import on_ranks
from tests.methods.orders import learn
from tests.methods.steps import off, opposed, vector
from tests.stages import Kind, Outcome

# Of two ranks with three rows each, one takes a row that does not count.
FEW: dict[str, Any] = {"training__micro_batch": 1, "training__epochs": 2}


def each_learned(
    names: Iterable[str],
    opened: Callable[[str, Kind], tuple[Any, Any]],
    what: Callable[[Any, Outcome], Tensor] = lambda room, outcome: vector(outcome.parameters),
) -> dict[str, Tensor]:
    """Name → ``what`` two stages have come to, by turns on a LLaMA and a T5."""
    found = {}
    for number, name in enumerate(names):
        room, config = opened(name, "t5" if number % 2 else "llama")
        outcome = [learn(room, config, index, opposed(index, rows=5)) for index in range(2)][-1]
        found[name] = what(room, outcome)
    return found


def two_do_what_one_does(body: Callable[[Place], dict[str, Tensor]]) -> None:
    """The two the same to the bit, and as one alone but for rounding."""
    (alone,) = on_ranks(1, body)
    first, second = on_ranks(2, body)
    for name, found in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert off(first[name], found) < 1e-3, name
