"""What a method says of the size of its files, to see whether there is room for a run, against what it carries."""

from __future__ import annotations

from typing import Any

import pytest

from cl_runner.engine.process import Place
from tests.breadth import narrowed
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import opposed

# What stands after a space tells variants apart.
CASES: dict[str, dict[str, Any]] = {
    "ewc": {}, "ogd": {"vectors": 3}, "treelora": {}, "doc": {"components": 1}, "gorp": {"k": 2}, "sdlora": {},
    "shared-basis": {"mixing": "similarity"},
    "shared-basis support": {"support": 0.5}, "coso": {"sketch": 4},
    "inflora": {}, "clora": {"k": 4, "subspace": "data"}, "colora": {"routing": "soft", "rounds": 2},
    "slao": {}, "merge": {}, "merge ties": {"how": "ties"}, "slao fisher": {"fisher_beta": 0.5, "fisher_samples": 4},
    "gainlora": {"centred": True}, "sapt": {"pseudo": 2},
}  # fmt: skip
PLAIN = ("seqlora", "olora", "clora")


def _sizes(place: Place, name: str, own: dict[str, Any]) -> tuple[int, int]:
    settings = {f"method__{key}": value for key, value in own.items()}
    room, config = order_room(place, name.split()[0], blocks=2, training__epochs=1, **settings)
    shapes = room.adapters.shapes()
    for index in range(2):
        learn(room, config, index, opposed(index))
    told = room.method.state_bytes(shapes, config.adapter.largest * sum(map(sum, shapes)), 2)
    return told, sum(tensor.nbytes for tensor in room.method.state().tensors.values())


# By entry of the weight, rows that are kept, directions, pairs, masks, subspaces, what merges.
QUICK = ["ewc", "ogd", "sdlora", "shared-basis support", "coso", "inflora", "colora", "slao fisher", "merge ties"]


@pytest.mark.parametrize("name", narrowed(CASES, QUICK))
def test_what_grows_is_told_about_right(name: str) -> None:
    ((told, carried),) = on_ranks(1, _sizes, name, CASES[name])
    # How many directions a task takes is for its rows to say; under similarity the tasks' folders are told, too.
    most = {"inflora": 10.0, "shared-basis": 3.0}.get(name, 2.5)
    assert carried > 0 and 0.85 * carried < told < most * carried, (told, carried)


@pytest.mark.parametrize("name", PLAIN)
def test_what_carries_adapters_alone_says_so(name: str) -> None:
    assert on_ranks(1, _sizes, name, {"k": 4} if name == "clora" else {}) == [(0, 0)]
