"""CoSO: steps against a loop in fp64, and no part of any whole step in a past subspace."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.coso.running import Running, looked
from cl_runner.methods.protocol import Method
from cl_runner.methods.shared import limits
from cl_runner.training.compatibility import check_method
from cl_runner.training.stage import StageRun
from tests.breadth import wide
from tests.distributed import on_ranks
from tests.methods.coso.test_sketch import naive_shrunk
from tests.methods.orders import learn, order_room
from tests.methods.steps import STEPS, THREE, label_logits, off, opposed
from tests.methods.test_terms import farthest, learned
from tests.stages import Kind, tiny_model

Array = NDArray[np.float64]
LR, RANK, SKETCH, THRESHOLD = 0.03, 5, 7, 0.8
# By ``every`` alone, as is the default.
OWN: dict[str, Any] = {
    "method__rank": RANK, "method__sketch": SKETCH, "method__threshold": THRESHOLD, "method__lr": LR,
    "method__looks": 0,
}  # fmt: skip


class Naive:
    """One matrix: the rule as the paper's code has it, in fp64, on the output side."""

    def __init__(self, every: int, rotate: bool) -> None:
        self.every, self.rotate = every, rotate
        self.M: Array | None = None
        self.begin()

    def begin(self) -> None:
        self.step = 0
        self.Q: Array | None = None
        self.S: Array | None = None
        self.m: Any = 0.0
        self.v: Any = 0.0

    def update(self, G: Array) -> Array:
        noise = 1e-5 * np.linalg.norm(G)  # a layer's gradient has as many directions as there are tokens of its own
        if self.M is not None:
            G = G - self.M @ self.M.T @ G
        if self.step % self.every == 0:
            U, s, _ = np.linalg.svd(G, full_matrices=False)
            Q = (U * (s > noise))[:, :RANK]
            if self.Q is not None:
                for i in range(RANK):  # of a vector and its negative, the nearer one
                    if Q[:, i] @ self.Q[:, i] < 0:
                        Q[:, i] *= -1
                if self.rotate:
                    R = Q.T @ self.Q
                    self.m, self.v = R @ self.m, R**2 @ self.v
            self.Q = Q
            new = naive_shrunk(G, SKETCH)
            self.S = new if self.S is None else naive_shrunk(np.concatenate([self.S, new], axis=1), SKETCH)
        assert self.Q is not None
        self.step += 1
        g = self.Q.T @ G
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        size = LR * np.sqrt(1 - 0.999**self.step) / (1 - 0.9**self.step)
        change: Array = -size * self.Q @ (self.m / (np.sqrt(self.v) + 1e-6))
        return change

    def end(self) -> None:
        assert self.S is not None
        lengths = (self.S**2).sum(0)
        count, held = 0, 0.0
        while held < THRESHOLD * lengths.sum():
            held += lengths[count]
            count += 1
        U, _, _ = np.linalg.svd(self.S[:, :count], full_matrices=False)
        self.M = U if self.M is None else np.concatenate([self.M, U], axis=1)


def loss_by_hand(answer: Any, kind: Kind, index: int, temperature: float) -> Tensor:
    """−log softmax(logits / temperature) of each label token of each row by itself, their mean. No padding anywhere."""
    terms = []
    for example in opposed(index).examples:
        scores = label_logits(answer, kind, example).double() / temperature
        odds = scores.exp() / scores.exp().sum(1, keepdim=True)
        terms += [-odds[place, token].log() for place, token in enumerate(example.target)]
    return torch.stack(terms).mean()


def by_hand(
    kind: Kind, targets: list[str], stages: int, every: int, side: str, rotate: bool, temperature: float
) -> list[dict[str, Tensor]]:
    """ΔW of every target in all, after each stage."""
    model = tiny_model(kind)
    weights = {t: model.get_submodule(t).weight.detach().clone() for t in targets}
    start = {t: w.clone() for t, w in weights.items()}
    rules = {t: Naive(every, rotate) for t in targets}
    found = []
    for index in range(stages):
        for rule in rules.values():
            rule.begin()
        for _ in range(STEPS):
            for w in weights.values():
                w.requires_grad_(True)

            def answer(**inputs: Any) -> Any:
                return torch.func.functional_call(model, {f"{t}.weight": w for t, w in weights.items()}, (), inputs)

            loss = loss_by_hand(answer, kind, index, temperature)
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for (t, w), g in zip(weights.items(), gradients, strict=True):
                G = g.double().numpy()
                change = rules[t].update(G) if side == "output" else rules[t].update(G.T).T
                weights[t] = (w.detach() + torch.from_numpy(change).float()).detach()
        for rule in rules.values():
            rule.end()
        found.append({t: w - start[t] for t, w in weights.items()})
    return found


def _steps(
    place: Place, kind: Kind, every: int, side: str, rotate: bool, temperature: float
) -> list[dict[str, Tensor]]:
    own = {**OWN, "method__every": every, "method__side": side, "method__rotate": rotate}
    own["method__temperature"] = temperature
    room, config = order_room(place, "coso", kind=kind, **THREE, **own)
    found = []
    for index in range(2):
        learn(room, config, index, opposed(index))
        found.append(learned(room))
    return found


@pytest.mark.parametrize(
    ("kind", "every", "side", "rotate", "temperature", "ranks"),
    [
        pytest.param("t5", 1, "output", False, 1.0, 1, marks=wide),
        ("t5", 1, "output", False, 3.0, 1),
        ("llama", 3, "input", False, 1.0, 1),
        ("t5", 2, "output", True, 1.0, 2),
        pytest.param("llama", 2, "output", False, 3.0, 2, marks=wide),
    ],
)
def test_steps_against_a_loop(kind: Kind, every: int, side: str, rotate: bool, temperature: float, ranks: int) -> None:
    both = on_ranks(ranks, _steps, kind, every, side, rotate, temperature)
    wanted = by_hand(kind, list(both[0][0]), 2, every, side, rotate, temperature)
    for ours in both:
        assert farthest(ours[0], wanted[0]) < 2e-3 and farthest(ours[1], wanted[1]) < 2e-3
        assert farthest(ours[1], wanted[0]) > 0.1


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_that_of_logits_over_the_temperature(temperature: float, bf16: bool) -> None:
    """Row by row in fp64, of logits as the forward gives them; 1 is the loss of every other method, to the bit."""
    room, config = order_room(Place(), "coso", bf16=bf16, method__temperature=temperature)
    stage = StageRun(room, config, 0)
    room.method.build(stage)
    examples = opposed(0).examples
    tokens = sum(len(example.target) for example in examples)
    batch = stage.make_batch(examples, ["a"] * len(examples), [1 / tokens] * len(examples))
    with torch.no_grad():
        found, scores = room.method.loss(stage, batch), stage.forward(batch).double()
        wanted = torch.zeros((), dtype=torch.float64)
        for row, example in zip(scores, examples, strict=True):
            for logits, token in zip(row, example.target, strict=False):  # padding is behind
                odds = (logits / temperature).exp()
                wanted -= (odds[token] / odds.sum()).log() / tokens
        assert found.dtype == torch.float32 and off(found, wanted) < 1e-6
        assert torch.equal(found, Method.loss(room.method, stage, batch)) == (temperature == 1)


def _orthogonal(place: Place, kind: Kind, side: str) -> tuple[float, float, int]:
    """The largest share of a whole step in the past subspace, of stages 2 and 3; the same of the gradients."""
    room, config = order_room(place, "coso", kind=kind, **{**THREE, **OWN, "method__side": side, "method__every": 2})
    method, shares, gradients, steps = room.method, [0.0], [0.0], []
    whole = method.whole_step

    def on(target: str, change: Tensor) -> float:
        M = method.past[target].double()
        change = change.double() if side == "output" else change.double().mT
        return float((M.mT @ change).norm() / change.norm())

    def spy(stage: Any, name: str, gradient: Tensor, lr: float) -> Tensor:
        if stage.index:
            gradients.append(on(name.removesuffix(".delta"), gradient))
        found: Tensor = whole(stage, name, gradient, lr)
        return found

    method.whole_step = spy
    before: dict[str, Tensor] = {}

    def after(stage: Any) -> None:
        now = {n: p.detach().clone() for n, p in stage.parameters().items()}
        for name, value in now.items() if stage.index else ():
            change = value - before[name] if stage.progress.step > 1 else value
            assert float(change.norm()) > 1e-3
            shares.append(on(name.removesuffix(".delta"), change))
            steps.append(name)
        before.update(now)

    method.after_step = after
    for index in range(3):
        learn(room, config, index, opposed(index))
    for M in method.past.values():
        torch.testing.assert_close(M.mT @ M, torch.eye(M.shape[1]), atol=1e-5, rtol=0)
    return max(shares), max(gradients), len(steps)


@pytest.mark.parametrize(
    ("kind", "side", "ranks"),
    [("t5", "output", 1), pytest.param("t5", "output", 2, marks=wide), ("llama", "input", 2)],
)
def test_no_step_has_a_part_in_the_past_subspace(kind: Kind, side: str, ranks: int) -> None:
    """Below 1e-5 of its norm, weight decay 0, accumulation 3 (two ranks: 2)."""
    for share, of_gradient, steps in on_ranks(ranks, _orthogonal, kind, side):
        assert share < 1e-5 and of_gradient > 0.1 and steps % (2 * STEPS) == 0 and steps


def _full(place: Place) -> None:
    """When past subspaces fill a side, there is nowhere to go, and rounding is no direction."""
    own = {**OWN, "method__rank": 32, "method__sketch": 32, "method__threshold": 1.0, "method__every": 1}
    room, config = order_room(place, "coso", **{**THREE, **own, "training__micro_batch": 6})
    after: list[dict[str, Tensor]] = []
    for index in range(2):
        learn(room, config, index, opposed(index))
        after.append(learned(room))
    full = [target for target, M in room.method.past.items() if M.shape[1] == 32]
    assert full and all(float(after[0][t].norm()) > 0.1 for t in full)  # they did learn while there was room
    learn(room, config, 2, opposed(2))
    assert all(float((learned(room)[t] - after[1][t]).norm()) < 1e-3 * float(after[1][t].norm()) for t in full)


def test_a_full_subspace_stops_a_layer() -> None:
    on_ranks(1, _full)


def _looks(place: Place, steps: int, every: int, looks: int) -> list[int]:
    """The steps at which every target's gradient was looked at, in two stages."""
    settings = {**THREE, **OWN, "training__epochs": steps, "method__every": every, "method__looks": looks}
    room, config = order_room(place, "coso", **settings)
    seen: list[int] = []

    def spy(stage: Any, *rest: Any) -> Running:
        seen.append(stage.progress.step)
        return looked(stage, *rest)

    with mock.patch("cl_runner.methods.coso.method.looked", spy):
        for index in range(2):
            learn(room, config, index, opposed(index))
    targets = len(room.adapters.past)
    assert seen == [step for step in seen[::targets] for _ in range(targets)]
    return seen[::targets]


@pytest.mark.parametrize(
    ("steps", "every", "looks", "seen"),
    [
        (6, 20, 0, [0]),  # by every alone
        (6, 4, 0, [0, 4]),
        pytest.param(6, 20, 10, [0, 1, 2, 3, 4, 5], marks=wide),  # as many as there are steps
        (7, 20, 3, [0, 2, 4, 6]),  # at least three
        pytest.param(7, 1, 3, [0, 1, 2, 3, 4, 5, 6], marks=wide),  # every is the most steps between two
    ],
)
def test_a_short_stage_has_looks_enough(steps: int, every: int, looks: int, seen: list[int]) -> None:
    assert on_ranks(1, _looks, steps, every, looks) == [[*seen, *seen]]


def _decays(place: Place) -> None:
    """One step from a ΔW that is not 0, with weight decay and without, against lr · decay · ΔW of before the step."""
    after = []
    for decay in (0.0, 0.5):
        settings = {**THREE, **OWN, "training__weight_decay": decay, "training__epochs": 2, "method__every": 1}
        room, config = order_room(place, "coso", **settings)
        whole: Any = room.method.whole_step
        found: dict[str, tuple[float, Tensor, Tensor]] = {}

        def spy(stage: Any, name: str, gradient: Tensor, lr: float, whole: Any = whole, found: Any = found) -> Tensor:
            update: Tensor = whole(stage, name, gradient, lr)
            if stage.progress.step == 1:
                found[name] = lr, stage.parameters()[name].detach().clone(), update
            return update

        room.method.whole_step = spy
        learn(room, config, 0, opposed(0))
        after.append(found)
    for name, (lr, delta, plain) in after[0].items():
        assert float(delta.norm()) > 1e-3 and torch.equal(after[1][name][1], delta)  # the first step is from 0
        torch.testing.assert_close(after[1][name][2], plain - lr * 0.5 * delta, atol=1e-7, rtol=1e-4)
        assert off(after[1][name][2], plain) > 1e-3


def test_weight_decay_shrinks_the_update() -> None:
    on_ranks(1, _decays)


def _other_library(place: Place) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """On rank 1 singular vectors and values come out a little other, by far more than rounding.

    Every step's update, what was learned, and what is carried.
    """
    room, config = order_room(place, "coso", **{**THREE, **OWN, "method__every": 2})
    svd, dice = torch.linalg.svd, torch.Generator().manual_seed(0)
    whole: Any = room.method.whole_step
    updates: dict[str, Tensor] = {}

    def spy(stage: Any, name: str, gradient: Tensor, lr: float) -> Tensor:
        found: Tensor = whole(stage, name, gradient, lr)
        updates[f"{stage.index}/{stage.progress.step}/{name}"] = found
        return found

    def other(matrix: Tensor, full_matrices: bool = True) -> Any:
        U, S, V = svd(matrix, full_matrices=full_matrices)
        return torch.return_types.linalg_svd((U + 0.05 * torch.randn(U.shape, generator=dice), 1.01 * S, V))

    room.method.whole_step = spy
    with mock.patch.object(torch.linalg, "svd", other if place.rank else svd):
        for index in range(2):
            learn(room, config, index, opposed(index))
    return updates, learned(room), room.method.state().tensors


def test_all_ranks_do_as_the_first() -> None:
    first, second = on_ranks(2, _other_library)
    for mine, theirs in zip(first, second, strict=True):
        assert list(mine) == list(theirs) and mine and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory", lambda device: ("one GPU", 80 * 10**9))

    def check(shapes: Any = None, **settings: Any) -> None:
        room, config = order_room(Place(), "coso", "abcdefghijklmno", **settings)
        check_method(config, room.order, shapes)

    check([(1024, 1024)] * 144)
    with pytest.raises(UserError, match=r"^training.optimizer: sgd: coso makes its own steps"):
        check(training__optimizer="sgd")
    large = [(4096, 4096)] * 64  # q and v of LLaMA-7B
    check(large)
    # 64 (5 · 4096² + 4096 · 15 · 160 + 4096 (70 + 160) + 2 · 70 · 4096) floats
    with pytest.raises(
        UserError,
        match=r"^adapter.target_modules: dense updates and subspaces of 64 layers over 15 tasks take 24.4 GB, over "
        r"method.max_gb 20; name fewer layers, or set a larger",
    ):
        check(large, method__max_gb=20)
    room, config = order_room(Place(), "coso", "abc", method__sketch=100)
    # 1024 · 100 floats a task and layer, three of them
    assert room.method.grows(config, [(1024, 512)] * 10) == (
        "carries up to 4.1 MB a task, 12.3 MB in all: past subspaces of 10 layers"
    )
    for setting in ("threshold", "temperature"):
        with pytest.raises(ValueError, match=setting):
            make_method(RunConfig.model_validate({"method": {"name": "coso", setting: 0}}))
