"""The merges against naive ones of pairs that were trained by hand; what is carried of them; where TIES cuts."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.merge.past import Past
from cl_runner.methods.merge.trimming import least_kept
from tests.breadth import narrowed, wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import STEPS, THREE, Values, by_hand, off, opposed, values, vector
from tests.stages import Kind

RULES = ["average", "ties", "dare", "magmax"]


def sums(room: Any) -> dict[str, Tensor]:
    return {target: past.sum for target, past in room.adapters.past.items()}


def updates(room: Any, tuned: Values) -> Tensor:
    """s·B A of every layer, all entries in one row, fp64."""
    found = []
    for target in room.adapters.past:
        A, B = tuned[f"{target}.lora_A"].double(), tuned[f"{target}.lora_B"].double()
        found.append((room.adapters.scale_of(target) * B @ A).flatten())
    return torch.cat(found)


def naive(how: str, each: list[list[float]], keep: float) -> list[float]:
    """Entry by entry, in plain Python."""
    count = len(each[0])
    if how == "ties":
        for update in each:
            kept = set(sorted(range(count), key=lambda i: -abs(update[i]))[: round(keep * count)])
            update[:] = [value if i in kept else 0.0 for i, value in enumerate(update)]
    found = []
    for entries in zip(*each, strict=True):
        if how == "average":
            found.append(sum(entries) / len(entries))
        elif how == "magmax":
            found.append(max(entries, key=abs))
        else:
            agreeing = [e for e in entries if e * sum(entries) > 0]
            found.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return found


def _merged(place: Place, how: str, kind: Kind) -> None:
    room, config = order_room(place, "merge", kind=kind, **THREE, method__how=how, method__weight=0.7, method__keep=0.3)
    assert {plan.start for plan in room.order} == {"base"}
    starts: list[Values] = []
    begin = room.method.begin_task

    def spy(stage: Any) -> None:
        begin(stage)
        starts.append(values(room))
        assert all(past.sum is None for past in room.adapters.past.values())  # from the base, whatever was merged

    room.method.begin_task = spy
    tuned: list[Values] = []
    for index in range(3):
        learn(room, config, index, opposed(index))
        if how == "magmax" and index:
            assert off(vector(starts[index]), vector(tuned[-1])) < 2e-3
        tuned.append(by_hand(kind, starts[index], opposed(index).examples, STEPS))
        each = [updates(room, of) for of in tuned]
        ours = torch.cat([total.flatten() for total in sums(room).values()])
        if index == 0:
            assert off(ours, each[0]) < 2e-3 and [pair.stage for pair in room.adapters.folded] == ["a"]
            continue
        wanted = 0.7 * torch.tensor(naive(how, [update.tolist() for update in each], 0.3), dtype=torch.float64)
        # What lies where a rule turns may fall to its other side by rounding.
        assert off(ours, wanted) < (2e-3 if how == "average" else 3e-2)
        assert off(ours, 0.7 * each[-1]) > 0.1
        assert room.adapters.folded == [] and room.adapters.live is None and room.adapters.dense == ["abc"[index]]


@pytest.mark.parametrize(
    ("how", "kind"),
    [("average", "llama"), ("ties", "t5"), pytest.param("ties", "llama", marks=wide), ("magmax", "t5")],
)
def test_merges_of_pairs_trained_by_hand(how: str, kind: Kind) -> None:
    on_ranks(1, _merged, how, kind)


def _exactly(place: Place, how: str) -> None:
    """Of the very pairs that were learned, so that nothing lies on another side."""
    room, config = order_room(place, "merge", **THREE, method__how=how)
    for index in range(3):
        learn(room, config, index, opposed(index))
    each = [
        torch.cat([(s * B @ A).flatten() for A, B, s in (past.pairs[task] for past in room.method.past.values())])
        for task in range(3)
    ]
    wanted = torch.tensor(naive(how, [update.double().tolist() for update in each], 0.2), dtype=torch.float64)
    ours = torch.cat([total.flatten() for total in sums(room).values()])
    assert off(ours, wanted) < 1e-6
    if how == "ties":
        assert 0.2 < float((ours != 0).double().mean()) < 0.6


@pytest.mark.parametrize("how", ["average", "ties", "magmax"])
def test_every_entry_of_a_merge(how: str) -> None:
    on_ranks(1, _exactly, how)


def _dropped(place: Place) -> None:
    found: dict[Any, list[Tensor]] = {}
    for key in ((0.5, 42), (0.5, 43), (0.0, 42), "average"):
        drop, seed = key if isinstance(key, tuple) else (0.9, 42)
        own = {"method__how": "dare", "method__drop": drop} if key != "average" else {}
        room, config = order_room(place, "merge", **THREE, **own, seed=seed)
        found[key] = []
        for index in range(3):
            learn(room, config, index, opposed(index))
            found[key].append(torch.cat([total.flatten() for total in sums(room).values()]))
        pair = [past.pairs[2] for past in room.method.past.values()]
        if key == (0.5, 42):
            last = torch.cat([(s * B @ A).flatten() for A, B, s in pair])
    # A task's entries are dropped once: what the third one adds to the sum is its own entries, or nothing.
    added = 3 * found[0.5, 42][2] - 2 * found[0.5, 42][1]
    stays = added.abs() > 1e-6
    assert 0.47 < float(stays.double().mean()) < 0.53
    torch.testing.assert_close(added[stays], 2 * last[stays], atol=1e-5, rtol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(found[0.0, 42], found["average"], strict=True))
    assert off(found[0.5, 43][2], found[0.5, 42][2]) > 0.1


def test_dare_drops_by_lot_and_makes_up_for_it() -> None:
    on_ranks(1, _dropped)


def _smaller(place: Place, how: str) -> None:
    """Ranks 6 beside 32 × 32: three pairs are larger than their matrix."""
    found = []
    for never in (False, True):
        room, config = order_room(place, "merge", tasks="abcdef", method__how=how, adapter__r=6, training__epochs=1)
        with mock.patch.object(Past, "due", False) if never else nullcontext():
            for index in range(6):
                learn(room, config, index)
        found.append(sums(room))
        kept = {(past.total is not None, past.summed, len(past.pairs)) for past in room.method.past.values()}
        assert kept == ({(False, 0, 6)} if never or how == "ties" else {(True, 5, 1)})
        held = sum(tensor.nbytes for tensor in room.method.state().tensors.values())
        shapes = room.adapters.shapes()
        assert held == room.method.state_bytes(shapes, 6 * sum(map(sum, shapes)), 6) or never
    assert all(torch.equal(a, b) for a, b in zip(*(each.values() for each in found), strict=True))


@pytest.mark.parametrize("how", narrowed(RULES, ["average", "magmax"]))
def test_what_is_carried_is_the_smaller_and_gives_the_same_bits(how: str) -> None:
    on_ranks(1, _smaller, how)


@pytest.mark.parametrize("share", [1e-9, 0.01, 0.2, 0.5, 1.0])
def test_where_a_share_of_the_largest_begins(share: float) -> None:
    dice = torch.Generator().manual_seed(0)
    matrices = [torch.randn(7, 5, generator=dice) * scale for scale in (1e-3, 1.0, 3e4)]
    matrices += [torch.zeros(3, 3), torch.full((4, 4), -0.25)]
    entries = torch.cat([matrix.abs().flatten() for matrix in matrices]).sort(descending=True).values
    wanted = entries[max(1, round(share * len(entries))) - 1]
    assert least_kept(lambda: iter(matrices), share) == float(wanted)


def _alone(place: Place) -> None:
    """An order of one task: the update as it was learned, which is inclora's, to the bit."""
    room, config = order_room(place, "merge", tasks="a", method__how="ties", method__weight=0.5)
    other, _ = order_room(place, "inclora", tasks="a")
    for one in (room, other):
        learn(one, config, 0)
    assert all(torch.equal(a, b) for a, b in zip(sums(room).values(), sums(other).values(), strict=True))


def test_one_task_is_not_merged() -> None:
    on_ranks(1, _alone)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"adapter": {"init": "pissa"}},
            "adapter.init=pissa: the pair begins with a part of the weight, and merge takes s·B A for a task's update; "
            "leave it out",
        ),
        (
            {"adapter": {"r": "auto"}, "method": {"how": "magmax"}},
            "adapter.r=auto: under method.how=magmax one pair trains on, of one rank; set a number",
        ),
        ({"tasks": {"a": {"method.how": "ties"}}}, "method.how: the same for all tasks; set it once"),
        (
            {"method": {"max_gb": 5e-6}},
            "adapter.target_modules: merged matrices of 2 layers take 0.00563 MB, over method.max_gb 5e-06; name fewer "
            "layers, or set a larger max_gb",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_start(config: dict[str, Any], said: str) -> None:
    made = RunConfig.model_validate({**config, "method": {"name": "merge", **config.get("method", {})}})
    with pytest.raises(UserError) as refused:
        make_method(made).check(made, [(32, 32), (16, 24)])
    assert str(refused.value) == said


@pytest.mark.parametrize(
    "own",
    [{"how": "mean"}, {"weight": 0}, {"keep": 0}, {"keep": 1.1}, {"drop": 1.0}, {"drop": -0.1}, {"max_gb": 0}],
)
def test_settings_have_bounds(own: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(own))):
        make_method(RunConfig.model_validate({"method": {"name": "merge", **own}}))
