"""DOC: the tracked components and whole steps against loops, no past component in B's gradient, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.doc.tracking import Components, off_span, rank
from cl_runner.training.compatibility import check_method
from cl_runner.training.stage import StageRun
from tests.distributed import on_ranks
from tests.methods.moments import mean_inputs
from tests.methods.orders import learn, order_room
from tests.methods.restarted import DROPPED, restarted
from tests.methods.steps import LR, STEPS, THREE, Values, off, opposed, put, values, vector, watch
from tests.methods.test_carried import same
from tests.stages import Kind, naive_loss

Array = NDArray[np.float64]
OWN: dict[str, Any] = {"method__components": 3, "method__threshold": 0.2, "method__tracking": 0.05}


class Naive:
    """The components one number at a time, in fp64; ``lean[k][task]``: Σ of a task's coordinates along component k."""

    def __init__(self, components: int = 3, threshold: float = 0.2, tracking: float = 0.05) -> None:
        self.components, self.threshold, self.tracking = components, threshold, tracking
        self.v: list[Array] = []
        self.lean: list[dict[int, float]] = []
        self.T = 0

    def opposing(self, h: Array, task: int, past: int) -> list[int]:
        """Of the first ``past`` components those along which some past task leans another way than h."""
        found = []
        for k in range(past):
            along = float(h @ self.v[k])
            if any(other * along <= 0 for i, other in self.lean[k].items() if i < task):
                found.append(k)
        return found

    def take(self, h: Array, task: int) -> float:
        keep = max(0.0, (self.T - 2) / (self.T + 1)) * (1 - self.tracking)
        self.T += 1
        for k, v in enumerate(self.v):
            self.lean[k][task] = self.lean[k].get(task, 0.0) + float(h @ v) / float(np.sqrt(v @ v))
        rest = h.copy()
        for k, v in enumerate(self.v):
            self.v[k] = keep * v + (1 - keep) * rest * float(rest @ v) / float(np.sqrt(v @ v))
            rest = rest - float(rest @ self.v[k]) / float(self.v[k] @ self.v[k]) * self.v[k]
        left = float(np.sqrt(rest @ rest) / np.sqrt(h @ h))
        if len(self.v) < self.components * (task + 1) and left > self.threshold:
            self.v.append(rest)
            self.lean.append({task: float(np.sqrt(rest @ rest))})
        return left


def test_components_are_those_of_a_loop() -> None:
    dice = np.random.default_rng(0)
    frame = dice.normal(size=(5, 12))
    ours, naive = Components(torch.zeros(0, 12).double(), torch.zeros(0, 0).double()), Naive(components=2)
    lefts = []
    for step in range(40):
        task = step // 20
        h = dice.normal(size=3 + task) @ frame[: 3 + task] + 0.05 * dice.normal(size=12)
        past = 0 if not task else 2
        wanted = naive.opposing(h, task, past)
        agree = ours.agree(ours.coordinates(torch.tensor(h)), task)[:past]
        assert torch.nonzero(~agree)[:, 0].tolist() == wanted
        lefts.append(ours.take(torch.tensor(h), task, 2 * (task + 1), 0.2, 2.0, 0.05))
        assert lefts[-1] == pytest.approx(naive.take(h, task))
        np.testing.assert_allclose(ours.v.numpy(), np.array(naive.v), rtol=1e-9, atol=1e-12)
        lean = np.array([[of.get(t, 0.0) for of in naive.lean] for t in range(task + 1)])
        np.testing.assert_allclose(ours.lean.numpy(), lean, rtol=1e-9, atol=1e-12)
    assert len(ours.v) == 4 and ours.seen == 40
    held = ours.v
    assert ours.take(torch.zeros(12).double(), 1, 9, 0.2, 2.0, 0.05) == 0 and ours.v is held and ours.seen == 40


def test_off_the_span_of_rows_that_are_many_dependent_or_zero() -> None:
    dice = torch.Generator().manual_seed(0)
    v = torch.randn(4, 10, generator=dice)
    v = torch.cat([v, v[:1] + 1e-5 * v[1:2], 1e-6 * v[2:3], torch.zeros(1, 10)])
    G = torch.randn(10, 3, generator=dice)
    found = off_span(G, v)
    assert float((torch.nn.functional.normalize(v, dim=1) @ found).abs().max()) < 5e-6 * float(G.norm())
    Q = torch.linalg.qr(v[:4].double().T)[0]
    assert off(found, G.double() - Q @ (Q.T @ G.double())) < 1e-4 and rank(v) == 4
    assert float(off_span(G, torch.randn(14, 10, generator=dice)).norm()) < 1e-5 and rank(torch.zeros(0, 10)) == 0


def gradients(room: Any, kind: Kind, examples: Any) -> Values:
    parameters = room.adapters.parameters()
    found = torch.autograd.grad(naive_loss(room.adapters.model, kind, examples), list(parameters.values()))
    return {name: g.double() for name, g in zip(parameters, found, strict=True)}


def edited(g: Values, slices: Any, chosen: list[int], v: list[Array]) -> Values:
    """B's gradients off each layer's slices, by a pseudo-inverse."""
    found = dict(g)
    for target, (start, end) in slices.items():
        V = np.array([v[k][start:end] for k in chosen]).reshape(len(chosen), end - start)
        V = V / np.maximum(np.linalg.norm(V, axis=1, keepdims=True), 1e-30)
        G = g[f"{target}.lora_B"].numpy()
        found[f"{target}.lora_B"] = torch.tensor(G - np.linalg.pinv(V, rcond=1e-6) @ (V @ G))
    return found


def _steps(place: Place, kind: Kind, spare: bool) -> None:
    room, config = order_room(place, "doc", kind=kind, **THREE, **OWN, method__spare=spare)
    hand, _ = order_room(place, "seqlora", kind=kind)
    naive = Naive()
    start, slices = 0, {}
    for target, (m, _n) in room.adapters.targets().items():
        slices[target] = (start, start + m)
        start += m
    cuts = []
    for index in range(3):
        stage = StageRun(room, config, index)
        room.method.build(stage)
        stage.close()
        examples, begun = opposed(index).examples, values(room)
        learn(room, config, index, opposed(index))
        put(hand, begun)
        parameters = hand.adapters.parameters()
        optimizer = torch.optim.AdamW(list(parameters.values()), lr=LR, weight_decay=0.0)
        past = len(naive.v)
        for _ in range(STEPS):
            x, g = mean_inputs(hand, kind, examples), gradients(hand, kind, examples)
            now = {name: p.detach().double() for name, p in parameters.items()}
            parts = []
            for target in slices:
                a, b = f"{target}.lora_A", f"{target}.lora_B"
                parts.append(2.0 * (g[b] @ (now[a] @ x[target]) + now[b] @ (g[a] @ x[target])))
            h = torch.cat(parts).numpy()
            chosen = naive.opposing(h, index, past) if spare else list(range(past))
            naive.take(h, index)
            cuts.append((len(chosen), past))
            for name, value in edited(g, slices, chosen, naive.v).items():
                parameters[name].grad = value.float()
            optimizer.step()
        assert off(vector(values(room)), vector(values(hand))) < 5e-3, index
        assert len(room.method.components.v) == len(naive.v)
    cut, there = map(sum, zip(*cuts, strict=True))
    assert 0 < cut < there if spare else 8 < cut == there
    assert off(room.method.components.v, torch.tensor(np.array(naive.v))) < 5e-2


@pytest.mark.parametrize(("kind", "spare"), [("t5", False), ("llama", True)])
def test_whole_steps_by_hand(kind: Kind, spare: bool) -> None:
    on_ranks(1, _steps, kind, spare)


def _off(place: Place, optimizer: str) -> tuple[float, float, float]:
    """Largest share along a past component's slice: of B's edited gradient, of its given one, and of B's step."""
    own = {**THREE, **OWN, "method__spare": False, "method__components": 4, "training__optimizer": optimizer}
    room, config = order_room(place, "doc", **own)
    worst = [0.0, 0.0, 0.0]
    for index in range(3):
        past = room.method.components.v.clone() if index else None
        steps = watch(room)
        after: list[Tensor] = []
        take = room.method.after_step

        def spy(stage: Any, take: Any = take, after: Any = after) -> None:
            after.append(room.method.components.v.clone())
            take(stage)

        room.method.after_step = spy
        learn(room, config, index, opposed(index))
        for step, v in zip(steps, after, strict=True):
            if past is None:
                continue
            widths = list(room.method.layers.values())
            for target, part in zip(room.method.layers, torch.split(v[: len(past)], widths, dim=1), strict=True):
                unit, name = torch.nn.functional.normalize(part, dim=1), f"{target}.lora_B"
                each = (step.edited[name], step.given[name], step.after[name] - step.before[name])
                norms = (step.given[name], step.given[name], each[2])
                found = [float((unit @ e).norm() / n.norm()) for e, n in zip(each, norms, strict=True)]
                worst = [max(pair) for pair in zip(worst, found, strict=True)]
    return worst[0], worst[1], worst[2]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_bs_gradient_has_no_part_along_past_components(optimizer: str) -> None:
    """Nor has its step under sgd; Adam's has."""
    [(edited, given, step)] = on_ranks(1, _off, optimizer)
    assert edited < 2e-5 and given > 0.1
    assert step < 2e-5 if optimizer == "sgd" else step > 1e-2


def _ranks(place: Place) -> tuple[Tensor, dict[str, Tensor]]:
    """Five rows in micro-batches of one: of two ranks with three each, one takes a row that does not count."""
    room, config = order_room(place, "doc", **{**THREE, **OWN, "training__micro_batch": 1, "training__epochs": 2})
    for index in range(2):
        learn(room, config, index, opposed(index, rows=5))
    return vector(values(room)), room.method.state().tensors


def test_two_ranks_do_what_one_does() -> None:
    (alone,) = on_ranks(1, _ranks)
    first, second = on_ranks(2, _ranks)
    assert torch.equal(first[0], second[0]) and off(first[0], alone[0]) < 1e-3
    for name, held in alone[1].items():
        assert torch.equal(first[1][name], second[1][name]) and off(first[1][name], held) < 1e-3


def _resumed(place: Place, folder: str) -> None:
    for straight, room, outcome in restarted(lambda: order_room(place, "doc", **{**THREE, **OWN, **DROPPED}), folder):
        assert torch.equal(vector(values(room)), vector(values(straight)))
        assert same(room.method.state(), straight.method.state())
        assert outcome.rows[-1]["components"] == len(room.method.components.v) > 0
        assert 0 <= outcome.rows[-1]["left_of_h"] <= 1
        free = room.method.free_share(outcome.stage)
        assert free == pytest.approx(1 - len(room.method.components.v) / 32, abs=0.05)


def test_restarted_at_every_stage_it_is_the_same_to_the_bit(tmp_path: Path) -> None:
    on_ranks(1, _resumed, str(tmp_path))


def _bf16(place: Place) -> None:
    room, config = order_room(place, "doc", bf16=True, **{**THREE, **OWN})
    for index in range(2):
        outcome = learn(room, config, index, opposed(index))
    assert outcome.losses[-1] < outcome.losses[0]
    kept = [*outcome.parameters.values(), *room.method.state().tensors.values()]
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in kept)


def test_in_bf16_what_trains_and_what_is_carried_is_fp32() -> None:
    on_ranks(1, _bf16)


def test_what_cannot_work_is_refused() -> None:
    def check(shapes: Any, tasks: str = "abcdefghijklmno", **own: Any) -> None:
        room, config = order_room(Place(), "doc", tasks, **{f"method__{name}": value for name, value in own.items()})
        check_method(config, room.order)
        check_method(config, room.order, shapes)

    large = [(1024, 1024)] * 144
    check(large)
    with pytest.raises(
        UserError,
        match=r"^method.components: 74 for each of 14 past tasks are 1036 directions, all that a layer of 1024 outputs "
        r"has; set 73 or less$",
    ):
        check(large, components=74)
    check(large, components=73)
    with pytest.raises(UserError, match=r"^method.components: 14 past tasks leave a layer of 12 outputs no direction;"):
        check([(12, 64)])
    with pytest.raises(
        UserError,
        match=r"^method.components: 720 components of 144 layers' outputs take 425 MB, over method.max_gb 0.4; set few",
    ):
        check(large, max_gb=0.4)
    room, config = order_room(Place(), "doc", "abc")
    # 48 · 10 · 1024 floats
    assert room.method.grows(config, [(1024, 512)] * 10) == (
        "carries up to 1.97 MB a task, 5.9 MB in all: components of 10 layers' outputs"
    )
    bad: dict[str, tuple[float, ...]] = {
        "components": (0, 1.5), "threshold": (0, 1), "amnesic": (-1, math.inf), "tracking": (-0.1, 1), "max_gb": (0,),
    }  # fmt: skip
    for setting, numbers in bad.items():
        for value in numbers:
            with pytest.raises(ValueError, match=setting):
                make_method(RunConfig.model_validate({"method": {"name": "doc", setting: value}}))


def _left_out(place: Place) -> list[float]:
    """Tokens of a layer's mean input at each step that was made, where the second step's loss is NaN."""
    room, config = order_room(place, "doc", **THREE, method__components=3, training__non_finite="skip")
    method, seen = room.method, []
    edit, loss = method.edit_gradients, method.loss

    def spy(stage: Any, gradients: dict[str, Tensor]) -> Any:
        seen.append(float(next(iter(method._inputs.values()))[-1]))
        return edit(stage, gradients)

    method.edit_gradients = spy
    method.loss = lambda stage, batch: loss(stage, batch) * (float("nan") if stage.progress.step == 1 else 1.0)
    assert learn(room, config, 0, opposed(0)).trained.skipped == 1
    return seen


def test_a_step_that_is_left_out_leaves_nothing_to_the_next() -> None:
    [seen] = on_ranks(1, _left_out)
    assert len(seen) == STEPS - 1 and len(set(seen)) == 1
