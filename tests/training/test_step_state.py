"""A stage entered in its middle: all built anew, what was held put back from files, the rest is the same to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from cl_runner.engine.process import Place
from cl_runner.methods import METHODS
from cl_runner.methods.lfpt5 import method as lfpt5
from cl_runner.methods.protocol import State
from cl_runner.models.batch import Example
from cl_runner.training.loop import train_stage
from cl_runner.training.stage import StageRun
from cl_runner.training.step_files import SHARED, read, write_own, write_shared
from cl_runner.training.step_state import StepState
from tests.breadth import ONE_OF_EACH_SORT, narrowed, paired, wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room, rows_of
from tests.methods.small import OWN
from tests.stages import END

HOLDS = {"lwf", "lfpt5", "shared-basis", "colora", "coso", "treelora", "doc", "gorp", "gainlora", "sure", "rkif"}
STEPS = 4  # two epochs of two steps
# Else after 2 of 4: inside of an epoch's search; behind a cycle, before the end of another.
AT: dict[str, tuple[int, dict[str, Any]]] = {"treelora": (3, {}), "rkif": (4, {"training__epochs": 4})}
SLOW = {"options__slow_copy": {"beta": 0.7}}
AFTER = {
    "shared-basis": 2,
    **dict.fromkeys(("seqft", "seqlora", "inclora", "pertask", "nlora", "pego", "slora", "l2p"), 0),
}


class Left(Exception):
    """The stage is left."""


def begun(place: Place, method: str, stages: int, **settings: Any) -> StageRun:
    """The stage after so many, built in a room of its own."""
    own = {f"method__{key}": value for key, value in OWN.get(method, {}).items()}
    dropped = {"dropout": 0.2, "adapter__dropout": 0.2, "training__epochs": 2}
    room, config = order_room(place, method, **{**dropped, **own, **settings})
    last = min(stages, len(room.order) - 1)
    for index in range(last):
        learn(room, config, index)
    stage = StageRun(room, config, last)
    if stage.plan.start == "base":
        room.adapters.restore([], room.adapters.kept, None)
    room.method.build(stage)
    return stage


def trained(
    stage: StageRun, state: StepState | None = None, at: int = 0, leave: bool = False
) -> tuple[list[StepState], list[dict[str, Any]]]:
    """The stage trained, from ``state`` on: what it holds after ``at`` steps and at its last, and its log."""
    rows: list[dict[str, Any]] = []
    taken: list[StepState] = []

    def between(take: Callable[[], StepState]) -> None:
        if stage.step in (at, stage.steps):
            taken.append(take())
        if leave and stage.step == at:
            raise Left

    try:
        own = rows_of(stage.plan)
        done = train_stage(stage, own, log=rows.append, tick=lambda *_: None, state=state, between=between)
        assert done.steps == stage.steps
    except Left:
        pass
    finally:
        stage.close()
    unlike = ("examples_per_second", "memory_mb")
    return taken, [{key: value for key, value in row.items() if key not in unlike} for row in rows]


def differing(a: State, b: State) -> list[str]:
    if list(a.tensors) != list(b.tensors):
        return ["names"]
    found = [name for name, value in a.tensors.items() if not torch.equal(value, b.tensors[name])]
    times = ("seconds", "since_seconds", "hook_seconds")
    return found + [key for key, value in a.json.items() if key not in times and value != b.json[key]]


def through_files(state: StepState, rank: int) -> StepState:
    """As a checkpoint has it; nothing may change on the way, nor lie otherwise."""
    with TemporaryDirectory() as name:
        write_shared(Path(name), state)
        write_own(Path(name), state, rank)
        found = read(Path(name), state.step, rank)
    assert list(found.parts) != [] and found.parts.keys() == state.parts.keys()
    for part, held in state.parts.items():
        assert held.json == found.parts[part].json
        assert list(held.tensors) == list(found.parts[part].tensors)
        for one, other in zip(held.tensors.values(), found.parts[part].tensors.values(), strict=True):
            assert one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
    return found


def _entered(place: Place, method: str, at: int, drop: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What differs between a stage in one go and one entered after ``at`` steps, without what ``drop`` held."""
    straight, again = (begun(place, method, AFTER.get(method, 1), **settings) for _ in range(2))
    [state, wanted], wanted_rows = trained(straight, at=at)
    before = {name: State(dict(part.tensors), part.json) for name, part in state.parts.items()}
    if drop:
        tensors = state.parts[drop].tensors
        for name in tensors:  # of Adam's the moments, not what trains
            if tensors[name].is_floating_point() and not name.startswith("parameter."):
                tensors[name] = torch.zeros_like(tensors[name])
    [held], rows = trained(again, through_files(state, place.rank))
    ends = [stage.room.method.state() for stage in (straight, again)]
    values = [State({n: p.detach() for n, p in s.adapters.parameters().items()}) for s in (straight, again)]
    return {
        "parts": {name: bad for name, part in wanted.parts.items() if (bad := differing(part, held.parts[name]))},
        "log": rows != [row for row in wanted_rows if row["step"] > at],
        "values": differing(*values),
        "carried": differing(*ends),
        "held": [name for name, part in before.items() if part.tensors],
    }


SAME = {"parts": {}, "log": False, "values": [], "carried": []}


def entered(ranks: int, method: str, at: int | None = None, drop: str = "", **settings: Any) -> dict[str, Any]:
    where, longer = AT.get(method, (2, {}))
    found = on_ranks(ranks, _entered, method, at or where, drop, {**longer, **settings})
    return {key: next((one[key] for one in found if one[key]), found[0][key]) for key in found[0]}


@pytest.mark.parametrize("method", narrowed(METHODS, ONE_OF_EACH_SORT))
def test_any_method_goes_on_to_the_bit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfpt5, "write", _written)
    found = entered(1, method)
    assert ("method" in found.pop("held")) == (method in HOLDS)
    assert found == SAME


def _written(stage: Any, settings: Any, frame: Any) -> tuple[list[Example], dict[str, int]]:
    """The random model writes nothing that can be read: the same two examples of each past task instead."""
    examples = [Example([5, 6, END], [7, END]), Example([8, 9, 10, END], [11, END])]
    return examples, {"drawn": 2, "well_formed": 2, "used": 2}


@pytest.mark.parametrize(
    "method", narrowed(["colora", "coso", "lwf", "shared-basis", "gainlora", "sapt"], ["coso", "lwf"])
)
def test_on_two_ranks_too(method: str) -> None:
    found = entered(2, method)
    assert {key: found[key] for key in SAME} == SAME


def test_what_prompts_are_counted_from_is_of_the_first_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AFTER, "gainlora", 0)
    found = entered(1, "gainlora", method__centred=True)
    assert {key: found[key] for key in SAME} == SAME
    found = entered(1, "gainlora", drop="method", method__centred=True)
    assert found["carried"]


PAIR = {"method__reorthogonalise": {"every": 1, "rescale": True}, **SLOW}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("olora", {**PAIR, "training__clip": 0.5, "training__schedule": "cosine", "training__warmup": 2}),
    ("seqlora", {**PAIR, "bf16": True, "training__weight_decay": 0.1}),
    ("inclora", {**SLOW, "training__optimizer": "sgd"}),
    ("ewc", {**SLOW, "training__optimizer": "muon"}),
    ("olora", {**SLOW, "adapter__r": "auto", "adapter__max_r": 6, "adapter__energy": 0.6}),
    ("seqft", {**SLOW, "kind": "llama"}),
]
WITH_RANKS = [(*of, ranks) for of in OPTIONS for ranks in (1, 2)]
QUICK = [row for row in WITH_RANKS if row[2] == 1 or row[0] in ("seqlora", "inclora", "seqft")]


@pytest.mark.parametrize(("method", "settings", "ranks"), paired(WITH_RANKS, QUICK))
def test_every_optimizer_and_option(method: str, settings: dict[str, Any], ranks: int) -> None:
    found = entered(ranks, method, **settings)
    assert "option.slow-copy" in found["held"]
    assert {key: found[key] for key in SAME} == SAME


def _left(place: Place, at: int) -> None:
    """Left for good, or once all steps were done; what is taken changes nothing of what goes on."""
    plain, left, entered = (begun(place, "seqlora", 0, **PAIR) for _ in range(3))
    losses: list[dict[str, Any]] = []
    train_stage(plain, rows_of(plain.plan), log=losses.append, tick=lambda *_: None)
    [state, *_], first = trained(left, at=at, leave=True)
    _, rest = trained(entered, state)
    assert state.step == at and left.step == at
    assert [row.get("loss") for row in losses] == [row.get("loss") for row in first + rest]
    values = [stage.adapters.parameters() for stage in (plain, entered)]
    assert all(torch.equal(value, values[1][name]) for name, value in values[0].items())


@pytest.mark.parametrize("at", [1, STEPS])
def test_a_stage_that_was_left(at: int) -> None:
    on_ranks(1, _left, at)


@pytest.mark.parametrize(
    ("method", "part", "settings"),
    [
        ("olora", "engine", {}),
        ("lwf", "method", {}),
        pytest.param("lfpt5", "method", {}, marks=wide),
        pytest.param("colora", "method", {}, marks=wide),
        ("coso", "method", {}),
        pytest.param("gainlora", "method", {}, marks=wide),
        pytest.param("shared-basis", "method", {}, marks=wide),
        pytest.param("sure", "method", {}, marks=wide),
        pytest.param("rkif", "method", {}, marks=wide),
        ("inflora", "frozen", {}),
        ("ewc", "muon", {"training__optimizer": "muon"}),
        ("olora", "option.slow-copy", SLOW),
    ],
)
def test_what_is_left_out_shows(
    method: str, part: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lfpt5, "write", _written)
    found = entered(1, method, drop=part, **settings)
    assert found["parts"] or found["log"] or found["carried"], found


def test_numbers_that_are_none_come_back(tmp_path: Path) -> None:
    """What a method or an option holds of a stage, such as the best loss so far, may be infinite."""
    given = State(json={"best": math.inf, "least": -math.inf, "last": math.nan})
    write_shared(tmp_path, StepState(1, dict.fromkeys(SHARED, State())))
    write_own(tmp_path, StepState(1, {"method": given}), 0)
    assert repr(read(tmp_path, 1, 0).parts["method"].json) == repr(given.json)
