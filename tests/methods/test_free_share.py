"""What a method whose updates are no folded pairs says that it leaves to later stages, against what it left."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.engine.process import Place
from cl_runner.training.stage import StageRun
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import opposed


def _after_two(place: Place, name: str, own: dict[str, Any]) -> tuple[float | None, dict[str, Tensor], list[Any]]:
    """What is said after two of three stages, what is carried then, and the layers' (m, n)."""
    settings = {f"method__{key}": value for key, value in own.items()}
    room, config = order_room(place, name, training__epochs=1, **settings)
    for index in range(2):
        stage = learn(room, config, index, opposed(index) if name != "colora" else None).stage
    return room.method.free_share(stage), dict(room.method.state().tensors), room.adapters.shapes()


def free(rows: list[Tensor]) -> float:
    """Share of directions that no row has a part in, by singular values."""
    values = torch.linalg.svdvals(torch.cat(rows).double())
    return 1 - int((values > 1e-5 * values.max()).sum()) / rows[0].shape[1]


@pytest.mark.parametrize("side", ["output", "input"])
def test_coso_leaves_what_is_not_in_m(side: str) -> None:
    ((said, carried, _),) = on_ranks(1, _after_two, "coso", {"sketch": 4, "side": side})
    assert said == pytest.approx(statistics.fmean(free([M.mT]) for M in carried.values()))
    assert 0 < said < 1


def _no_step(place: Place) -> tuple[float, float]:
    """Of a stage without a step, and of one that had some but for a layer that is left out of M."""
    room, config = order_room(place, "coso", training__epochs=0)
    stage = learn(room, config, 0, opposed(0)).stage
    before = room.method.free_share(stage)
    target, layer = next(iter(room.adapters.past.items()))
    room.method.past = {target: torch.eye(layer.base.shape[0])[:, :8]}
    return before, room.method.free_share(stage)


def test_coso_leaves_everything_where_it_took_no_step() -> None:
    ((none, one),) = on_ranks(1, _no_step)
    layers = len(tiny_shapes())
    assert none == 1 and one == pytest.approx(1 - 8 / tiny_shapes()[0][0] / layers)


def tiny_shapes() -> list[tuple[int, int]]:
    """(m, n) of the target layers."""
    room, _ = order_room(Place(), "inclora")
    return room.adapters.shapes()


@pytest.mark.parametrize("threshold", [0.5, 0.999999])
def test_inflora_leaves_the_inputs_that_are_not_in_m(threshold: float) -> None:
    """Of all layers alike, though those that share an input are remembered once."""
    ((said, carried, shapes, free_ones, groups),) = on_ranks(1, _inflora, threshold)
    shares = {}
    for key, basis in carried.items():
        name = key.removeprefix("memory.")
        rank = int((torch.linalg.svdvals(basis.double()) > 0.5).sum())
        n = basis.shape[0]
        shares[name] = rank / n if name in free_ones else (n - rank) / n
    of_layers = [shares[group[0]] for group in groups for _ in group]
    assert len(of_layers) == len(shapes) and len({len(group) for group in groups}) > 1
    assert said == pytest.approx(statistics.fmean(of_layers))
    assert said != pytest.approx(statistics.fmean(shares.values()))
    assert 0 < said < 1 and bool(free_ones) == (threshold > 0.9)


def _inflora(place: Place, threshold: float) -> Any:
    room, config = order_room(place, "inflora", blocks=2, training__epochs=1, method__threshold=threshold)
    for index in range(2):
        stage = learn(room, config, index, opposed(index)).stage
    state = room.method.state()
    groups = StageRun(room, config, 1).input_groups()
    return room.method.free_share(stage), dict(state.tensors), room.adapters.shapes(), state.json["free"], groups


def test_osft_leaves_what_it_does_not_hold() -> None:
    """A quarter held at first, three at last: half at the second stage of three, or one direction less."""
    ((said, _, shapes),) = on_ranks(1, _after_two, "osft", {"preserve_first": 0.25, "preserve_last": 0.75})
    assert said == pytest.approx(statistics.fmean(1 - (min(shape) // 2) / min(shape) for shape in shapes))


def test_sdlora_leaves_what_no_direction_reads() -> None:
    ((said, carried, shapes),) = on_ranks(1, _after_two, "sdlora", {})
    targets = [key.removesuffix(".A") for key in carried if key.endswith(".A")]
    assert len(targets) == len(shapes)
    # Of B A, so that a direction counts once however many rows of A lie in it.
    products = [[carried[f"{t}.B"] @ carried[f"{t}.A"]] for t in targets]
    assert said == pytest.approx(statistics.fmean(free(each) for each in products))
    assert 0 < said < 1


def test_colora_leaves_what_no_pair_of_a_round_reads() -> None:
    own = {"rounds": [["a", "b"], ["c"]]}
    ((said, carried, shapes),) = on_ranks(1, _after_two, "colora", own)
    names = {key.rpartition(".")[0].partition(".")[2] for key in carried if key.endswith("shared_A")}
    assert len(names) == len(shapes)
    of_layers = [
        free(
            [
                part.reshape(-1, part.shape[-1])
                for key, part in carried.items()
                if key.endswith((f".{n}.A", f".{n}.shared_A"))
            ]
        )
        for n in names
    ]
    assert said == pytest.approx(statistics.fmean(of_layers))


def _said(place: Place, name: str, own: dict[str, Any]) -> float | None:
    return _after_two(place, name, own)[0]


@pytest.mark.parametrize(("name", "own"), [("inclora", {}), ("colora", {"fold": "mean", "rounds": 2})])
def test_what_is_folded_as_pairs_is_left_to_the_folders(name: str, own: dict[str, Any]) -> None:
    assert on_ranks(1, _said, name, own) == [None]
