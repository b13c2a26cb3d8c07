"""All methods on one continued LoRA: resumed to the bit, the same on two ranks, in bf16, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.protocol import State
from tests.breadth import narrowed, wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.restarted import DROPPED, restarted
from tests.methods.steps import THREE, Values, off, opposed, values, vector
from tests.stages import Kind

OWN: dict[str, dict[str, Any]] = {
    "replay": {"method__memory_per_task": 3, "method__how": "class", "method__replay_ratio": 0.5},
    "ewc": {"method__lambda1": 30.0, "method__fisher_samples": 4},
    "ewc online": {"method__lambda1": 30.0, "method__online": 0.5},
    "lwf": {"method__lambda1": 5.0},
    "agem": {"method__memory_per_task": 4, "method__memory_batch": 3},
    "gem": {"method__memory_per_task": 4, "method__memory_batch": 3},
    "ogd": {"method__vectors": 4},
    "migu": {},
    "sure": {"method__memory_size": 7, "method__memory_batch": 4, "method__score": "after"},
    "rkif": {"method__inner_steps": 2, "method__outer_steps": 2, "method__memory_share": 0.5},
}


def opened(place: Place, name: str, **settings: Any) -> tuple[Any, Any]:
    return order_room(place, name.split()[0], **{**THREE, **OWN[name], **settings})


def same(a: State, b: State) -> bool:
    return (
        a.json == b.json
        and list(a.tensors) == list(b.tensors)
        and all(map(_same, a.tensors.values(), b.tensors.values()))
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _resumed(place: Place, folder: str, name: str) -> None:
    for straight, room, _ in restarted(lambda: opened(place, name, **DROPPED), folder):
        assert torch.equal(vector(values(room)), vector(values(straight)))
        assert same(room.method.state(), straight.method.state())
    assert bool(straight.method.state().tensors) == (name not in ("lwf", "migu"))


# With and without weights of its own, rows that are kept, directions, a teacher, masks.
@pytest.mark.parametrize("name", narrowed(OWN, ["ewc online", "replay", "ogd", "lwf", "migu"]))
def test_restarted_at_every_stage_it_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    on_ranks(1, _resumed, str(tmp_path), name)


def _ranks(place: Place) -> dict[str, tuple[Values, dict[str, Tensor]]]:
    """Five rows in micro-batches of one: of two ranks with three each, one takes a row that does not count."""
    found = {}
    for number, name in enumerate(OWN):
        kind: Kind = "t5" if number % 2 else "llama"
        room, config = opened(place, name, kind=kind, training__micro_batch=1, training__epochs=2)
        for index in range(3 if name == "gem" else 2):
            learn(room, config, index, opposed(index, rows=5))
        found[name] = (values(room), room.method.state().tensors)
    return found


@wide
def test_two_ranks_do_what_one_does() -> None:
    (alone,) = on_ranks(1, _ranks)
    first, second = on_ranks(2, _ranks)
    for name, (parameters, carried) in alone.items():
        assert torch.equal(vector(first[name][0]), vector(second[name][0])), name
        assert all(map(_same, first[name][1].values(), second[name][1].values())), name
        assert off(vector(first[name][0]), vector(parameters)) < 1e-3, name
        assert list(first[name][1]) == list(carried)
        for key, value in carried.items():
            assert off(first[name][1][key], value) < 1e-2, (name, key)
    ends = [vector(parameters) for parameters, _ in alone.values()]
    assert all(off(a, b) > 1e-2 for i, a in enumerate(ends) for b in ends[:i] if len(a) == len(b))  # they differ


def _bf16(place: Place) -> None:
    for name in OWN:
        room, config = opened(place, name, bf16=True, training__epochs=2)
        for index in range(2):
            outcome = learn(room, config, index, opposed(index))
        assert outcome.losses[-1] < outcome.losses[0], name
        assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in outcome.parameters.values())
        kept = [t for t in room.method.state().tensors.values() if t.is_floating_point()]
        assert all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in kept)


def test_in_bf16_what_trains_and_what_is_carried_is_fp32() -> None:
    on_ranks(1, _bf16)


NO_MEMORY = "method.memory_per_task: {} needs a memory; set 1 or more, or use seqlora"
NO_TEMPERATURE = "method.temperature: lwf divides the logits by it; set more than 0 (2 is published)"


@pytest.mark.parametrize(
    ("name", "own", "said"),
    [
        *((name, {"memory_per_task": 0}, NO_MEMORY.format(name)) for name in ("replay", "agem", "gem")),
        ("lwf", {"temperature": 0}, NO_TEMPERATURE),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(name: str, own: dict[str, Any], said: str) -> None:
    config = RunConfig.model_validate({"method": {"name": name, **own}})
    with pytest.raises(UserError) as refused:
        make_method(config).check(config)
    assert str(refused.value) == said


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("replay", {"memory_per_task": -1}), ("replay", {"replay_ratio": 0}), ("replay", {"how": "best"}),
        ("ewc", {"online": 1.5}), ("ewc", {"fisher_samples": 0}), ("ewc", {"lambda1": -1}),
        ("lwf", {"temperature": -1}), ("agem", {"memory_batch": 0}), ("gem", {"memory_strength": -0.5}),
        ("ogd", {"vectors": 0}), ("ogd", {"variant": "one"}), ("ogd", {"max_gb": 0}), ("migu", {"quantile": 1.0}),
    ],
)  # fmt: skip
def test_settings_have_bounds(name: str, own: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(own))):
        make_method(RunConfig.model_validate({"method": {"name": name, **own}}))
