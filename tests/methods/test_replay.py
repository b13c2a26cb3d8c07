"""The memory: which examples, as what they are kept, and when they are seen; replay's steps against the union's."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from cl_runner.engine.process import Place
from cl_runner.methods.protocol import Source, State
from cl_runner.methods.shared.memory import Memory, choose
from cl_runner.models.batch import Example
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room, rows_of
from tests.methods.steps import LR, by_hand, off, values, vector
from tests.stages import some_rows


def lot(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_reservoir_holds_every_row_as_likely_as_any_other() -> None:
    labels = [(i,) for i in range(10)]
    draws = [choose(labels, 3, "reservoir", lot(seed)) for seed in range(2000)]
    assert all(len(set(rows)) == 3 and rows == sorted(rows) for rows in draws)
    counts = Counter(row for rows in draws for row in rows)
    assert all(530 < counts[i] < 670 for i in range(10))  # 600 expected, sd 20
    assert choose(labels, 3, "reservoir", lot(5)) == draws[5] and len(set(map(tuple, draws))) > 100
    assert choose(labels, 99, "reservoir", lot(0)) == list(range(10)) and choose([], 3, "class", lot(0)) == []


def test_by_class_labels_are_as_many_as_there_are_rows_for() -> None:
    labels = [(1,)] * 50 + [(2, 3)] * 4 + [(4,)] * 20
    for seed in range(20):
        chosen = Counter(labels[row] for row in choose(labels, 20, "class", lot(seed)))
        assert chosen == {(1,): 8, (2, 3): 4, (4,): 8}
        few = Counter(labels[row] for row in choose(labels, 7, "class", lot(seed)))
        assert sorted(few.values()) == [2, 2, 3]
    one = {labels[choose(labels, 1, "class", lot(seed))[0]] for seed in range(200)}
    assert one == set(labels)  # what is left over is not always the first label's
    assert len({tuple(choose(labels, 6, "class", lot(seed))) for seed in range(20)}) > 15


def test_the_memory_comes_back_as_it_was_and_holds_no_text() -> None:
    memory = Memory()
    memory.keep(some_rows(9, seed=1, task="a"), 4, "reservoir", lot(0))
    both = [some_rows(3, seed=2, task="b"), some_rows(5, seed=3, task="c")]
    mixed = Source([e for s in both for e in s.examples], [t for s in both for t in s.tasks])
    mixed.examples = [*mixed.examples, Example([5], [6], weight=0.0)]  # a filler is no example
    mixed.tasks = [*mixed.tasks, "b"]
    memory.keep(mixed, 4, "reservoir", lot(1))
    assert {task: len(rows) for task, rows in memory.tasks.items()} == {"a": 4, "b": 3, "c": 4}
    state = memory.state()
    assert {name: t.dtype for name, t in state.tensors.items()} == {
        "memory.source": torch.int32, "memory.source_ends": torch.int64,
        "memory.target": torch.int32, "memory.target_ends": torch.int64,
    }  # fmt: skip
    assert state.json == {"memory": [["a", 4], ["b", 3], ["c", 4]]}
    again = Memory.load(state)
    assert again == memory and list(again.tasks) == ["a", "b", "c"]
    assert again.source(["b"]).examples == both[0].examples
    assert Memory().state() == State() and Memory.load(State()) == Memory()


def mixes(room: Any, config: Any) -> list[list[Source]]:
    """What each stage trains on."""
    seen: list[list[Source]] = []
    method: Any = room.method
    ask = method.training_data
    method.training_data = lambda stage, own: seen.append(ask(stage, own)) or seen[-1]
    for index in range(3):
        learn(room, config, index)
    return seen


def _seen(place: Place) -> None:
    room, config = order_room(place, "replay", method__memory_per_task=4)
    own = {task: rows_of(plan).examples for task, plan in zip("abc", room.order, strict=True)}
    found = mixes(room, config)
    for index, sources in enumerate(found):
        assert list(sources[0].examples) == own["abc"[index]]
        past = Counter(task for source in sources[1:] for task in source.tasks)
        assert past == dict.fromkeys("abc"[:index], 4)
        for source in sources[1:]:
            pairs = list(zip(source.examples, source.tasks, strict=True))
            assert all(example in own[task] for example, task in pairs)
            assert len({str(pair) for pair in pairs}) == len(pairs) and source.weight == 1.0
    assert found[1][1].examples == found[2][1].examples[:4]  # what is remembered stays

    # A ratio: so many, as many of each task, again where there are too few.
    room, config = order_room(place, "replay", method__memory_per_task=2, method__replay_ratio=1.0)
    found = mixes(room, config)
    assert len(found[0]) == 1
    assert [Counter(sources[1].tasks) for sources in found[1:]] == [{"a": 6}, {"a": 3, "b": 3}]
    for sources in found[1:]:
        for task in set(sources[1].tasks):
            of_task = [str(e) for e, t in zip(sources[1].examples, sources[1].tasks, strict=True) if t == task]
            times = Counter(of_task).values()
            assert len(times) == 2 and max(times) - min(times) <= 1


def test_a_stage_sees_its_own_rows_and_those_remembered_of_past_ones() -> None:
    on_ranks(1, _seen)


def _union(place: Place) -> None:
    room, config = order_room(
        place, "replay", training__global_batch=12, training__micro_batch=4, training__epochs=3, training__lr=LR
    )  # fmt: skip
    learn(room, config, 0)
    start = values(room)
    union = [*rows_of(room.order[0]).examples, *rows_of(room.order[1]).examples]
    learn(room, config, 1)
    assert off(vector(values(room)), vector(by_hand("t5", start, union, 3))) < 1e-3
    assert off(vector(values(room)), vector(by_hand("t5", start, union[6:], 3))) > 1e-2


def test_replay_of_everything_is_training_on_the_union() -> None:
    on_ranks(1, _union)


@pytest.mark.parametrize("how", ["reservoir", "class"])
def test_what_a_stage_keeps_depends_on_seed_and_stage_alone(how: str) -> None:
    def kept(seed: int, index: int) -> Memory:
        from cl_runner.training.stage import StageRun

        room, config = order_room(Place(), "replay", seed=seed, method__memory_per_task=3, method__how=how)
        stage = StageRun(room, config, index)
        stage.own = some_rows(30, task="a")
        room.method.end_task(stage)
        stage.close()
        return room.method.memory

    assert kept(1, 0) == kept(1, 0) and kept(1, 0) != kept(2, 0) and kept(1, 0) != kept(1, 1)
