"""TreeLoRA: the search against loops, the penalty's gradient, whole steps by hand, two ranks, restarts, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import TrainingError
from cl_runner.methods import make_method
from cl_runner.methods.protocol import Progress
from cl_runner.methods.treelora.search import Search, probabilities
from cl_runner.training.sampling import BatchPlan, derived_seed
from cl_runner.training.stage import StageRun
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.restarted import DROPPED, restarted
from tests.methods.steps import LR, THREE, Values, off, opposed, put, values, vector
from tests.methods.test_carried import same
from tests.methods.test_pair_penalties import after
from tests.stages import Kind, naive_loss, widths

STRENGTH, EXPLORATION, EPOCHS, OF_EPOCH = 0.7, 0.5, 2, 3
OWN: dict[str, Any] = {"method__lambda1": STRENGTH, "method__exploration": EXPLORATION}
ROWS = 18  # of which six are a step's, in three micro-batches
STEPS = {**THREE, **OWN, "training__epochs": EPOCHS}


def naive_odds(far: list[list[float]], asked: list[list[int]], seen: int, steps: int, c: float) -> list[list[float]]:
    """By tasks and layers, one number at a time."""
    score = [
        [
            c / math.sqrt(2 * n + 1e-5) * math.sqrt(math.log(2 * steps * (seen + 1) * (seen + 2)))
            - (d / n if n else 0.0)
            for d, n in zip(*rows, strict=True)
        ]
        for rows in zip(far, asked, strict=True)
    ]
    flat = [number for row in score for number in row]
    unit = max(flat) - min(flat) + 1e-5
    exps = [[math.exp((number - max(flat)) / unit) for number in row] for row in score]
    sums = [sum(column) for column in zip(*exps, strict=True)]
    return [[number / total for number, total in zip(row, sums, strict=True)] for row in exps]


def test_odds_are_those_of_a_loop() -> None:
    far = [[0.0, 3.0, 8.0], [5.0, 0.0, 1.0]]
    asked = [[0, 1, 2], [4, 0, 1]]
    for seen, exploration in ((0, 1.0), (4, 0.3), (4, 0.0)):
        wanted = torch.tensor(naive_odds(far, asked, seen, 7, exploration), dtype=torch.float64)
        found = probabilities(torch.tensor(far).double(), torch.tensor(asked).double(), seen, 7, exploration)
        torch.testing.assert_close(found, wanted)
        assert float(found.max() / found.min()) < math.e + 1e-6
    nearer = probabilities(torch.tensor([[2.0], [6.0]]).double(), torch.ones(2, 1).double(), 3, 7, 1.0)[:, 0]
    assert nearer[0] > nearer[1]  # the one at less distance
    assert probabilities(torch.zeros(0, 3), torch.zeros(0, 3), 0, 5, 1.0).shape == (0, 3)


def taught(family: str = "qwen2", tasks: int = 2, step: int = 3) -> tuple[Any, Any, Any]:
    """A method with past tasks by lot, a stage at a step of an epoch of four, and its adapters."""
    adapters = after(0, family=family)
    method: Any = make_method(RunConfig.model_validate({"method": {"name": "treelora", "lambda1": 0.6}}))
    dice = torch.Generator().manual_seed(1)
    method.past = {t: torch.randn(tasks, *A.shape, generator=dice) for t, A in adapters.pair().A.items()}
    stage = SimpleNamespace(
        factors=adapters.groups, progress=Progress(step, 8, torch.tensor(2.5)), device=torch.device("cpu"),
        config=RunConfig.model_validate({"training": {"epochs": 2}}), plan=SimpleNamespace(name="b"),
        rng=lambda purpose: torch.Generator().manual_seed(derived_seed(purpose)),
    )  # fmt: skip
    return method, stage, adapters


@pytest.mark.parametrize("family", ["qwen2", "t5", "gpt2"])
def test_the_gradient_is_that_of_the_definition(family: str) -> None:
    """−ρ L a_k / R on A, none on B; the penalty itself is −ρ L."""
    method, stage, adapters = taught(family)
    found = method.penalty(stage)
    rho = 0.6 * 3 / 4
    assert found.dtype == torch.float32 and float(found.detach()) == pytest.approx(-rho * 2.5)
    pair = adapters.pair()
    chosen = dict(zip([t for g in adapters.groups() for t in g.targets], method._search.chosen.tolist(), strict=True))
    assert set(chosen.values()) == {0, 1}
    R = sum(float((pair.A[t].double() * method.past[t][k].double()).sum()) for t, k in chosen.items())
    ours = torch.autograd.grad(found, list(adapters.parameters().values()), allow_unused=True)
    for name, mine in zip(adapters.parameters(), ours, strict=True):
        target, role = name.rsplit(".", 1)
        if role == "lora_A":
            assert off(mine, -rho * 2.5 / R * method.past[target][chosen[target]]) < 1e-5
        else:
            assert mine is None or not mine.any()


def test_without_weight_or_past_there_is_none_and_a_step_that_is_done_again_chooses_the_same() -> None:
    method, stage, _ = taught()
    first = method.penalty(stage)
    held = method.step_state()
    assert torch.equal(method.penalty(stage), first) and same(method.step_state(), held)
    method.config.lambda1 = 0.0
    assert method.penalty(stage) is None
    method, stage, _ = taught()
    method.past = {}
    assert method.penalty(stage) is None and method._search.seen == 1  # and yet it looks


def test_what_has_no_direction_is_refused() -> None:
    method, stage, _ = taught(tasks=1)
    method.past = {target: torch.zeros_like(a) for target, a in method.past.items()}
    with pytest.raises(TrainingError, match=r"^b: treelora's A is at right angles .*; set method.lambda1=0 for this"):
        method.penalty(stage)


class Naive:
    """The rule on named A's, in the order that the layers stand in."""

    def __init__(self, config: Any, index: int, past: list[Values]) -> None:
        self.config, self.index, self.past = config, index, past
        self.total: Values = {}

    def extra(self, step: int, A: Values, loss: Tensor) -> Tensor:
        place = step % OF_EPOCH
        if place == 0:
            self.total = {n: torch.zeros_like(a) for n, a in A.items()}
            self.far = [[0.0] * len(A) for _ in self.past]
            self.asked = [[0] * len(A) for _ in self.past]
        self.total = {n: self.total[n] + a.detach() for n, a in A.items()}
        if not self.past:
            return torch.zeros(())
        odds = torch.tensor(naive_odds(self.far, self.asked, place, OF_EPOCH, EXPLORATION), dtype=torch.float64)
        dice = torch.Generator().manual_seed(derived_seed(self.config.seed, self.index, f"search/{step}"))
        chosen = torch.multinomial(odds.T, 1, generator=dice)[:, 0].tolist()
        R = torch.zeros(())
        for layer, (name, k) in enumerate(zip(A, chosen, strict=True)):
            self.asked[k][layer] += 1
            self.far[k][layer] += float((self.total[name] / (place + 1) - self.past[k][name]).abs().sum())
            R = R + (A[name] * self.past[k][name]).sum()
        return -STRENGTH * place / OF_EPOCH * loss.detach() * R / R.detach()

    def end(self) -> Values:
        return {n: total / OF_EPOCH for n, total in self.total.items()}


def _steps(place: Place, kind: Kind) -> None:
    room, config = order_room(place, "treelora", kind=kind, **STEPS)
    hand, _ = order_room(place, "seqlora", kind=kind)
    past: list[Values] = []
    for index in range(3):
        stage = StageRun(room, config, index)
        room.method.build(stage)
        order = [f"{t}.lora_A" for group in stage.factors() for t in group.targets]
        stage.close()
        begun = values(room)
        own = opposed(index, rows=ROWS)
        learn(room, config, index, own)
        plan = BatchPlan.make(ROWS, config.training, 1)
        rows = list(plan.step_rows(config.seed, index, widths(own.examples)))
        ends = []
        for weight in (1.0, 0.0):
            put(hand, begun)
            parameters = hand.adapters.parameters()
            optimizer = torch.optim.AdamW(list(parameters.values()), lr=LR, weight_decay=0.0)
            rule = Naive(config, index, past)
            for step in range(EPOCHS * OF_EPOCH):
                loss = naive_loss(hand.adapters.model, kind, [own.examples[i] for i in rows[step]])
                extra = rule.extra(step, {name: parameters[name] for name in order}, loss)
                optimizer.zero_grad()
                (loss + weight * extra).backward()
                optimizer.step()
            ends.append((values(hand), rule.end()))
        assert off(vector(values(room)), vector(ends[0][0])) < 1e-3, index
        assert not index or off(vector(values(room)), vector(ends[1][0])) > 1e-2
        past.append(ends[0][1])
        for name, mean in ends[0][1].items():
            assert off(room.method.past[name.removesuffix(".lora_A")][index], mean) < 1e-3


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_whole_steps_by_hand(kind: Kind) -> None:
    """Three micro-batches a step, two epochs of three steps a stage; the first stage is seqlora's."""
    on_ranks(1, _steps, kind)


def _ranks(place: Place) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """Five rows in micro-batches of one: of two ranks with three each, one takes a row that does not count."""
    room, config = order_room(place, "treelora", **{**STEPS, "training__global_batch": 5, "training__micro_batch": 1})
    for index in range(3):
        rows = learn(room, config, index, opposed(index, rows=10)).rows
    return vector(values(room)), room.method.state().tensors, rows[-1]


def test_two_ranks_do_what_one_does() -> None:
    (alone,) = on_ranks(1, _ranks)
    first, second = on_ranks(2, _ranks)
    assert torch.equal(first[0], second[0]) and off(first[0], alone[0]) < 1e-3
    for name, a in alone[1].items():
        assert torch.equal(first[1][name], second[1][name]) and off(first[1][name], a) < 1e-3 and len(a) == 3
    for key in ("loss", "penalty", "penalty_gradient_ratio"):  # each rank has a share of its own of the penalty
        assert first[2][key] == second[2][key] == pytest.approx(alone[2][key], rel=1e-2), key


def _resumed(place: Place, folder: str) -> None:
    for straight, room, _ in restarted(lambda: order_room(place, "treelora", **{**STEPS, **DROPPED}), folder):
        assert torch.equal(vector(values(room)), vector(values(straight)))
        assert same(room.method.state(), straight.method.state())


def test_restarted_at_every_stage_it_is_the_same_to_the_bit(tmp_path: Path) -> None:
    on_ranks(1, _resumed, str(tmp_path))


def _bf16(place: Place) -> None:
    room, config = order_room(place, "treelora", bf16=True, **{**THREE, **OWN})
    for index in range(2):
        outcome = learn(room, config, index, opposed(index))
    assert outcome.losses[-1] < outcome.losses[0]
    kept = [*outcome.parameters.values(), *room.method.past.values()]
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in kept)


def test_in_bf16_what_trains_and_what_is_carried_is_fp32() -> None:
    on_ranks(1, _bf16)


def test_how_much_it_will_carry_is_said() -> None:
    room, config = order_room(Place(), "treelora", "abc", adapter__r=8)
    # 8 · 512 · 10 floats
    assert room.method.grows(config, [(1024, 512)] * 10) == "carries 0.164 MB a task, 0.492 MB in all: A of 10 layers"
    for setting in ("lambda1", "exploration"):
        for value in (-1, math.inf, math.nan):
            with pytest.raises(ValueError, match=setting):
                make_method(RunConfig.model_validate({"method": {"name": "treelora", setting: value}}))


def _none(place: Place) -> int:
    room, config = order_room(place, "treelora", training__epochs=0)
    learn(room, config, 0, opposed(0))
    return len(room.method.past)


def test_of_a_stage_without_a_step_nothing_is_kept() -> None:
    assert on_ranks(1, _none) == [0]


def test_an_epoch_begins_anew() -> None:
    search = Search.begin(["a"], 2)
    past = {"a": torch.stack([torch.zeros(1, 2), torch.ones(1, 2)])}
    for step in range(3):
        search.look({"a": torch.full((1, 2), float(step))}, past, 3, 1.0, torch.Generator().manual_seed(step))
    assert search.seen == 3 and float(search.asked.sum()) == 3 and search.mean()["a"].tolist() == [[1.0, 1.0]]
