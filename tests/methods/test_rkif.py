"""Recurrent-KIF: masks against torch's quantile, whole cycles against a plain loop with torch's own AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.methods import make_method
from cl_runner.methods.rkif import Importance, inner_share, leading
from cl_runner.training.stage import StageRun
from tests.breadth import wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import LR, THREE, Values, off, opposed, put, values, vector
from tests.stages import Kind, naive_loss

INNER, OUTER, BETA, TOP = 3, 2, 0.85, 0.2
OWN: dict[str, Any] = {"method__inner_steps": INNER, "method__outer_steps": OUTER, "method__memory_share": 0.5}
# Two cycles, and a step that is left over.
STEPS = 2 * INNER + 1


def random_scores(seed: int) -> Values:
    dice = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "b": (4, 7), "c": (1, 2)}
    return {name: torch.rand(shape, generator=dice) for name, shape in shapes.items()}


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_important_are_entries_over_the_quantile_of_all(share: float) -> None:
    for seed in range(5):
        scores = random_scores(seed)
        threshold = torch.cat([score.flatten() for score in scores.values()]).double().quantile(1 - share)
        for name, found in leading(scores, share).items():
            assert torch.equal(found, scores[name].double() > threshold)
    assert not any(found.any() for found in leading({"a": torch.ones(9)}, share).values())  # none over any other


def test_each_entry_is_shared_out_by_who_needs_it() -> None:
    new, old = random_scores(1), random_scores(2)
    to_new, to_old = leading(new, 0.4), leading(old, 0.4)
    kinds = set()
    for name, m_in in inner_share(new, old, 0.4).items():
        for found, a, b in zip(m_in.flatten(), to_new[name].flatten(), to_old[name].flatten(), strict=True):
            wanted = {(True, True): 0.4, (False, False): 0.5, (True, False): 1.0, (False, True): 0.0}
            m_out = {(True, True): 0.6, (False, False): 0.5, (True, False): 0.0, (False, True): 1.0}
            kind = (bool(a), bool(b))
            kinds.add(kind)
            assert float(found) == pytest.approx(wanted[kind]) and float(1 - found) == pytest.approx(m_out[kind])
    assert len(kinds) == 4


def test_importance_is_a_mean_times_the_mean_distance_from_it() -> None:
    dice = torch.Generator().manual_seed(0)
    steps = [(torch.randn(4, generator=dice), torch.randn(4, generator=dice)) for _ in range(6)]
    importance = Importance()
    mean = spread = torch.zeros(4, dtype=torch.float64)
    for theta, g in steps:
        importance.see({"x": theta}, {"x": g}, BETA)
        now = (theta.double() * g.double()).abs()
        mean = BETA * mean + (1 - BETA) * now
        spread = BETA * spread + (1 - BETA) * (now - mean).abs()
    assert off(importance.scores()["x"], mean * spread) < 1e-6


class ByHand:
    """A stage of cycles: torch's AdamW goes on through inner and outer steps, clipped each."""

    def __init__(self, room: Any, kind: Kind, optimizer: str, clip: float) -> None:
        self.room, self.kind, self.clip = room, kind, clip
        self.parameters = room.adapters.parameters()
        every = list(self.parameters.values())
        make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
        self.optimizer = make(every, lr=LR, weight_decay=0.0)

    def step(self, examples: Any, running: dict[str, Any]) -> None:
        before = vector(values(self.room)).double()
        self.optimizer.zero_grad()
        naive_loss(self.room.adapters.model, self.kind, examples).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.clip)
        gradient = torch.cat([p.grad.flatten() for p in self.parameters.values()]).double()
        now = (before * gradient).abs()
        running["mean"] = BETA * running.get("mean", 0.0) + (1 - BETA) * now
        running["spread"] = BETA * running.get("spread", 0.0) + (1 - BETA) * (now - running["mean"]).abs()
        self.optimizer.step()

    def write(self, flat: Tensor) -> None:
        at = 0
        for parameter in self.parameters.values():
            parameter.data.copy_(flat[at : at + parameter.numel()].view_as(parameter))
            at += parameter.numel()


def top(running: dict[str, Tensor]) -> Tensor:
    scores = running["mean"] * running["spread"]
    return scores > scores.quantile(1 - TOP)


def stage_by_hand(hand: ByHand, own: Any, memory: Any) -> int:
    start = vector(values(hand.room)).double()
    outer: dict[str, Any] = {}
    inner: dict[str, Any] = {}
    merges = 0
    for step in range(1, STEPS + 1):
        hand.step(own, inner)
        if not memory or step % INNER:
            continue
        middle = vector(values(hand.room)).double()
        for _ in range(OUTER):
            hand.step(memory, outer)
        end = vector(values(hand.room)).double()
        new, old = top(inner), top(outer)
        m_in = torch.where(new & old, 0.4, torch.where(new | old, new.double(), torch.full_like(start, 0.5)))
        start = start + m_in * (middle - start) + (1 - m_in) * (end - middle)
        hand.write(start)
        inner = {}
        merges += 1
    return merges


def _cycles(place: Place, kind: Kind, optimizer: str) -> None:
    settings: dict[str, Any] = {**THREE, "training__epochs": STEPS, "training__clip": 0.05}
    settings["training__optimizer"] = optimizer
    room, config = order_room(place, "rkif", kind=kind, **settings, **OWN)
    hand, _ = order_room(place, "seqlora", kind=kind)
    for index in range(3):
        stage = StageRun(room, config, index)
        room.method.build(stage)
        stage.close()
        put(hand, values(room))
        memory = room.method.memory.source().examples
        assert len(memory) == 3 * index
        begun = vector(values(room))
        outcome = learn(room, config, index, opposed(index))
        merges = stage_by_hand(ByHand(hand, kind, optimizer, 0.05), opposed(index).examples, memory)
        assert merges == (2 if index else 0) and room.method.cycles == merges
        assert outcome.trained.steps == STEPS and outcome.trained.skipped == 0
        change = vector(values(hand)).double() - begun.double()
        # An entry whose importance is within rounding of the quantile may count otherwise.
        assert off(vector(values(room)).double() - begun.double(), change) < 2e-3


@pytest.mark.parametrize(
    ("kind", "optimizer", "ranks"),
    [
        ("t5", "adamw", 1),
        pytest.param("t5", "adamw", 2, marks=wide),
        pytest.param("llama", "adamw", 1, marks=wide),
        ("llama", "sgd", 2),
    ],
)
def test_cycles_at_accumulation_3(kind: Kind, optimizer: str, ranks: int) -> None:
    on_ranks(ranks, _cycles, kind, optimizer)


def _first_stage(place: Place) -> None:
    ends = []
    for name, own in (("seqlora", {}), ("rkif", OWN)):
        room, config = order_room(place, name, **THREE, **own, dropout=0.1)
        learn(room, config, 0, opposed(0))
        ends.append(vector(values(room)))
    assert torch.equal(*ends)


def test_the_first_stage_is_seqlora() -> None:
    on_ranks(1, _first_stage)


def _muon(place: Place) -> None:
    """Matrices by Muon: outer steps are by it too."""
    room, config = order_room(place, "rkif", **{**THREE, "training__optimizer": "muon", "training__lr": 0.02}, **OWN)
    moved = []
    end: Any = room.method._outer_steps

    def spy(stage: Any) -> None:
        before = vector(values(room))
        end(stage)
        moved.append(off(vector(values(room)), before))

    room.method._outer_steps = spy
    for index in range(2):
        learn(room, config, index, opposed(index))
    assert len(moved) == 1 and moved[0] > 1e-3


def test_outer_steps_are_by_the_stages_own_rule() -> None:
    on_ranks(1, _muon)


def _not_finite(place: Place) -> None:
    """Gradients of the memory that are none leave no trace: the cycle is that of its inner steps."""
    from cl_runner.methods import rkif

    room, config = order_room(place, "rkif", **THREE, **OWN)
    learn(room, config, 0, opposed(0))
    real = rkif.memory_gradient
    rkif.memory_gradient = lambda *given: {n: g * torch.nan for n, g in real(*given).items()}
    try:
        outcome = learn(room, config, 1, opposed(1))
    finally:
        rkif.memory_gradient = real
    assert outcome.trained.skipped == OUTER
    plain, config = order_room(place, "seqlora", **THREE)
    for index in range(2):
        learn(plain, config, index, opposed(index))
    assert torch.equal(vector(values(room)), vector(values(plain)))


def test_an_outer_step_that_is_not_finite_is_left_out() -> None:
    on_ranks(1, _not_finite)


def _short(place: Place) -> list[str]:
    room, config = order_room(place, "rkif", **THREE, **{**OWN, "method__inner_steps": 9})
    return [line for index in range(2) for line in learn(room, config, index, opposed(index)).trained.said]


def test_a_stage_without_a_whole_cycle_says_so() -> None:
    [said] = on_ranks(1, _short)
    assert said == [
        "warning: no cycle ends in a stage of 4 steps, where nothing is replayed; set method.inner_steps smaller than 9"
    ]


@pytest.mark.parametrize(("share", "rows", "kept"), [(0.02, 50, 1), (0.02, 51, 2), (0.02, 3, 1), (1.0, 4, 4)])
def test_the_memory_is_a_share_of_each_tasks_rows(share: float, rows: int, kept: int) -> None:
    room, config = order_room(Place(), "rkif", method__memory_share=share)
    stage = StageRun(room, config, 0)
    stage.own = opposed(0, rows=rows)
    room.method.end_task(stage)
    stage.close()
    assert len(room.method.memory.source().examples) == kept


@pytest.mark.parametrize(
    "own",
    [
        {"inner_steps": 0}, {"outer_steps": 0}, {"memory_share": 0}, {"memory_share": 1.1}, {"memory_batch": 0},
        {"important": 0}, {"important": 1}, {"beta": 1}, {"reorthogonalise": {"how": "hard"}},
    ],
)  # fmt: skip
def test_settings_have_bounds(own: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(own))):
        make_method(RunConfig.model_validate({"method": {"name": "rkif", **own}}))
