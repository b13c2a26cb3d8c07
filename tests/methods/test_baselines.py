"""seqlora, inclora, pertask, mtl, and olora's frozen past: a few real steps against the same steps by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_runner.adapters.pairs import Pair
from cl_runner.engine.process import Place
from cl_runner.methods.protocol import Method
from cl_runner.training.evaluation import evaluate
from cl_runner.training.stage import StageRun
from tests.distributed import on_ranks
from tests.methods.orders import ByHand, learn, order_room, rows_of
from tests.stages import naive_loss

EPOCHS = {"training__epochs": 3}


def same_bits(a: Pair, b: Pair) -> bool:
    return all(torch.equal(a.A[t], b.A[t]) and torch.equal(a.B[t], b.B[t]) for t in a.A)


def _seqlora(place: Place) -> None:
    room, config = order_room(place, "seqlora", **EPOCHS)
    hand, one_optimizer = ByHand(room), ByHand(room)
    hand.begin(room, config, 0)
    one_optimizer.take(room.adapters.pair())
    room.adapters.show(None)
    carried: Any = None
    for index, task in enumerate("ab"):
        learn(room, config, index)
        hand.train(config, index, rows_of(room.order[index]))
        carried = one_optimizer.train(config, index, rows_of(room.order[index]), optimizer=carried)
        assert room.adapters.live == task and list(room.adapters.kept) == [task]
        assert room.adapters.folded == [] and all(past.sum is None for past in room.adapters.past.values())
        pair = room.adapters.kept[task]
        assert (pair.stage, pair.rank, pair.scale) == (task, 2, 2.0)
        assert hand.off(pair) < 1e-3
        assert (one_optimizer.off(pair) > 1e-2) == (index > 0)  # moments carried on would show


def test_seqlora_trains_one_pair_on_with_a_new_optimizer() -> None:
    on_ranks(1, _seqlora)


def _inclora(place: Place) -> None:
    room, config = order_room(place, "inclora", **EPOCHS)
    hand = ByHand(room)
    at_the_end: list[Pair] = []
    for index in range(3):
        hand.begin(room, config, index)
        first = room.adapters.pair().A
        assert not any(torch.equal(first[t], past.A[t]) for past in at_the_end for t in first)
        learn(room, config, index)
        hand.train(config, index, rows_of(room.order[index]))
        assert [pair.stage for pair in room.adapters.folded] == list("abc")[: index + 1]
        assert all(same_bits(a, b) for a, b in zip(at_the_end, room.adapters.folded, strict=False))
        at_the_end = [Pair(p.stage, p.rank, p.scale, dict(p.A), dict(p.B)) for p in room.adapters.folded]
        assert hand.off(room.adapters.folded[-1]) < 1e-3
        hand.fold()
        for target, past in room.adapters.past.items():
            total = at_the_end[0].update(target)
            for pair in at_the_end[1:]:
                total = total + pair.update(target)
            assert torch.equal(past.sum, total) and torch.equal(past.weight, hand.W0[target] + total)
        assert room.adapters.live is None and room.adapters.kept == {}


def test_inclora_trains_a_new_pair_on_top_of_frozen_ones() -> None:
    on_ranks(1, _inclora)


def _olora(place: Place) -> None:
    room, config = order_room(place, "olora", **EPOCHS, method__lambda1=0.5)
    hand, without = ByHand(room), ByHand(room)
    frozen: list[Pair] = []
    for index in range(2):
        hand.begin(room, config, index)
        without.take(room.adapters.pair())
        learn(room, config, index)

        def penalty(A: dict[str, Tensor], B: dict[str, Tensor]) -> Tensor:
            overlaps = [(old.A[t] @ A[t].T).abs().sum() for old in frozen for t in A]  # noqa: B023
            return 0.5 * sum(overlaps, torch.zeros(()))

        hand.train(config, index, rows_of(room.order[index]), penalty=penalty)
        without.train(config, index, rows_of(room.order[index]))
        own = room.adapters.folded[-1]
        assert hand.off(own) < 1e-2  # |·| has kinks: one flipped sign is a step of Adam's
        assert (without.off(own) > 0.1) == (index > 0)
        assert all(same_bits(a, b) for a, b in zip(frozen, room.adapters.folded, strict=False))
        frozen = list(room.adapters.folded)
        hand.take(own)
        without.take(own)
        hand.fold()
        without.fold()


def test_olora_trains_against_its_penalty_and_leaves_past_pairs_alone() -> None:
    """The penalty arrives once a step, whole, though a step has two micro-batches; nothing at the first stage."""
    on_ranks(1, _olora)


def _pertask(place: Place) -> None:
    room, config = order_room(place, "pertask", **EPOCHS)
    assert {plan.start for plan in room.order} == {"base"}
    hands = []
    for index, task in enumerate("abc"):
        hand = ByHand(room)
        hand.begin(room, config, index)
        learn(room, config, index)
        hand.train(config, task, rows_of(room.order[index]))
        hands.append(hand)
        assert list(room.adapters.kept) == list("abc")[: index + 1] and room.adapters.live == task
        assert room.adapters.folded == [] and all(past.sum is None for past in room.adapters.past.values())
        # From the untouched base, whatever was learned before.
        assert all(torch.equal(past.weight, hand.W0[t]) for t, past in room.adapters.past.items())
        for other, pair in zip(hands, room.adapters.kept.values(), strict=True):
            assert other.off(pair) < 1e-3
    _answers_with_its_own_pair(room, config, hands)


def _answers_with_its_own_pair(room: Any, config: Any, hands: list[ByHand]) -> None:
    from cl_runner.tasks.task import Row, Task
    from cl_runner.training.evaluation import TestSet

    tests = {}
    for name in "cab":
        examples = rows_of(room.order["abc".index(name)]).examples
        rows = [Row(str(i), "text", "label") for i in range(len(examples))]
        tests[name] = TestSet(Task(name=name, kind="TC", labels=["label"], instruction="?"), rows, examples)
    stage = StageRun(room, config, 2)
    scored = evaluate(stage, tests)
    stage.close()
    assert [one.task for one in scored] == list("cab")
    said: dict[str, list[str]] = {one.task: [row["output"] for row in one.predictions] for one in scored}
    by_hand = {name: [_greedy(hands["abc".index(name)], e.source) for e in tests[name].examples] for name in "cab"}
    assert said == by_hand
    others = {name: [_greedy(hands[2], e.source) for e in tests[name].examples] for name in "ab"}
    assert all(others[name] != by_hand[name] for name in "ab")  # another pair would have answered something else
    assert room.adapters.live == "c" and same_bits(room.adapters.pair(), room.adapters.kept["c"])


def _greedy(hand: ByHand, source: list[int]) -> str:
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < 4:
            made = hand(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[0, *answer]]))
            best = int(made.logits[0, -1].argmax())
            if best == 1:
                break
            answer.append(best)
    return " ".join(map(str, answer))


def test_pertask_begins_at_the_base_and_answers_each_task_with_its_own_pair() -> None:
    on_ranks(1, _pertask)


def _mtl(place: Place) -> None:
    room, config = order_room(place, "mtl", **EPOCHS)
    assert [(plan.name, plan.tasks) for plan in room.order] == [("mtl", ("a", "b", "c"))]
    hand = ByHand(room)
    hand.begin(room, config, 0)
    own = rows_of(room.order[0])
    assert len(own.examples) == 18 and own.tasks == [*"aaaaaabbbbbbcccccc"]
    learn(room, config, 0)
    hand.train(config, 0, own)
    (pair,) = room.adapters.folded
    assert pair.stage == "mtl" and hand.off(pair) < 1e-3
    alone = ByHand(room)
    alone.begin(room, config, 0)
    alone.train(config, 0, rows_of(order_room(place, "inclora")[0].order[0]))
    assert alone.off(pair) > 0.1


def test_mtl_trains_one_pair_on_the_union() -> None:
    on_ranks(1, _mtl)


def test_what_each_baseline_says_of_itself() -> None:
    from cl_runner.methods import METHODS, method_class

    for name in METHODS:
        method: type[Method] = method_class(name)
        assert method.name == name
        assert all((method.title, method.equation, method.paper, method.carried, method.growth))
        assert (method.task_id == "yes") == (name in ("pertask", "progprompt"))


def _losses(place: Place) -> None:
    """That the steps by hand learn at all: a test of the tests."""
    room, config = order_room(place, "inclora", **EPOCHS)
    hand = ByHand(room)
    hand.begin(room, config, 0)
    own = rows_of(room.order[0])
    before = float(naive_loss(hand, "t5", own.examples).detach())
    hand.train(config, 0, own)
    assert float(naive_loss(hand, "t5", own.examples).detach()) < before


def test_the_steps_by_hand_learn() -> None:
    on_ranks(1, _losses)
