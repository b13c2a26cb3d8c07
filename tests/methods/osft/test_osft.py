"""OSFT: steps against a loop in plain torch, and the top singular subspace untouched by whole steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods.osft.spectral import Spectral
from cl_runner.methods.shared import limits
from cl_runner.training.compatibility import check_method
from tests.breadth import wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import STEPS, THREE, opposed
from tests.methods.test_terms import farthest, learned
from tests.stages import Kind, naive_loss, tiny_model

LR, FIRST, LAST = 0.01, 0.4, 0.8
OWN: dict[str, Any] = {"method__lr": LR, "method__preserve_first": FIRST, "method__preserve_last": LAST}


def held(index: int, p: int) -> int:
    """Singular directions that stay, of p, at a stage of three."""
    return int((0.4, 0.6, 0.8)[index] * p + 1e-9)


def by_hand(kind: Kind, targets: list[str], stages: int) -> list[dict[str, Tensor]]:
    """ΔW of every target in all, after each stage: W = U_h S_h V_h + U S V written out, torch's AdamW."""
    model = tiny_model(kind)
    weights = {t: model.get_submodule(t).weight.detach().double() for t in targets}
    start = dict(weights)
    found = []
    for index in range(stages):
        high, low = {}, {}
        for t, W in weights.items():
            U, S, V = (torch.from_numpy(part) for part in np.linalg.svd(W.numpy(), full_matrices=False))
            k = held(index, len(S))
            high[t] = U[:, :k], S[:k], V[:k]
            low[t] = [part.float().requires_grad_(True) for part in (U[:, k:], S[k:], V[k:])]

        def whole(high: Any = high, low: Any = low) -> dict[str, Tensor]:
            return {
                t: (high[t][0] @ high[t][1].diag() @ high[t][2]).float() + low[t][0] @ low[t][1].diag() @ low[t][2]
                for t in targets
            }

        def answer(whole: Any = whole, **inputs: Any) -> Any:
            return torch.func.functional_call(model, {f"{t}.weight": W for t, W in whole().items()}, (), inputs)

        optimizer = torch.optim.AdamW([p for parts in low.values() for p in parts], lr=LR, weight_decay=0.0)
        for _ in range(STEPS):
            optimizer.zero_grad()
            naive_loss(answer, kind, opposed(index).examples).backward()
            for t, (U, _, V) in low.items():
                out = torch.eye(len(U)) - (high[t][0] @ high[t][0].T).float()
                into = torch.eye(V.shape[1]) - (high[t][2].T @ high[t][2]).float()
                U.grad, V.grad = out @ U.grad, V.grad @ into
            optimizer.step()
            for t, (U, _, V) in low.items():
                with torch.no_grad():
                    U.copy_((torch.eye(len(U)) - (high[t][0] @ high[t][0].T).float()) @ U)
                    V.copy_(V @ (torch.eye(V.shape[1]) - (high[t][2].T @ high[t][2]).float()))
        weights = {t: W.detach().double() for t, W in whole().items()}
        found.append({t: (weights[t] - start[t]).float() for t in targets})
    return found


def _steps(place: Place, kind: Kind) -> list[dict[str, Tensor]]:
    room, config = order_room(place, "osft", kind=kind, **THREE, **OWN)
    found = []
    for index in range(2):
        learn(room, config, index, opposed(index))
        found.append(learned(room))
    return found


@pytest.mark.parametrize(("kind", "ranks"), [("t5", 1), ("llama", 1), pytest.param("t5", 2, marks=wide)])
def test_steps_against_a_loop(kind: Kind, ranks: int) -> None:
    both = on_ranks(ranks, _steps, kind)
    wanted = by_hand(kind, list(both[0][0]), 2)
    for ours in both:
        assert farthest(ours[0], wanted[0]) < 2e-3 and farthest(ours[1], wanted[1]) < 2e-3
        assert farthest(ours[1], wanted[0]) > 0.1


def _untouched(place: Place, kind: Kind) -> tuple[float, float, int]:
    """After every step: the largest part of ΔW in the upper singular vectors, as a share of ΔW; and of Adam alone."""
    room, config = order_room(place, "osft", kind=kind, **THREE, **OWN)
    method, shares, plain = room.method, [0.0], [0.0]
    project = method.after_step
    begun: dict[str, tuple[Tensor, Tensor]] = {}

    def share(target: str, delta: Tensor) -> float:
        U, V = begun[target]
        delta = delta.double()
        return max(float((U.T @ delta).norm()), float((delta @ V.T).norm())) / float(delta.norm())

    def spy(stage: Any) -> None:
        if stage.progress.step == 1:
            for target, past in room.adapters.past.items():
                U, _, V = np.linalg.svd(past.whole.double().numpy(), full_matrices=False)
                k = held(stage.index, min(U.shape[0], V.shape[1]))
                begun[target] = torch.from_numpy(U[:, :k]), torch.from_numpy(V[:k])
        plain.append(max(share(target, delta) for target, delta in room.adapters.live_update().items()))
        project(stage)
        for target, delta in room.adapters.live_update().items():
            assert float(delta.norm()) > 1e-2
            shares.append(share(target, delta))

    method.after_step = spy
    for index in range(3):
        learn(room, config, index, opposed(index))
    return max(shares), max(plain), len(shares)


@pytest.mark.parametrize(("kind", "ranks"), [pytest.param("t5", 1, marks=wide), ("t5", 2), ("llama", 1)])
def test_no_step_touches_the_upper_singular_subspace(kind: Kind, ranks: int) -> None:
    """Below 1e-4 of ΔW's norm on either side, weight decay 0, accumulation 3 (two ranks: 2)."""
    for share, plain, count in on_ranks(ranks, _untouched, kind):
        assert share < 1e-4 and count > 3 * STEPS
        assert plain > 0.05  # projected gradients alone would not have done: Adam leaves the subspace


def test_the_term_begins_at_nothing_and_says_what_it_adds() -> None:
    W = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    term = Spectral(U, S, V, high=2)
    assert {name: tuple(p.shape) for name, p in term.named_parameters()} == {"U": (5, 3), "S": (3,), "V": (3, 8)}
    x = torch.randn(2, 3, 8)
    assert not term.update().any() and not term(x, {}).any()
    term.S.data.zero_()
    torch.testing.assert_close(W + term.update(), U[:, :2] @ S[:2].diag() @ V[:2])
    torch.testing.assert_close(term(x, {}), x @ term.update().T)
    with torch.autocast("cpu", torch.bfloat16):
        assert term.update().dtype == torch.float32 and term(x, {}).dtype == torch.bfloat16


def _ranks_held(place: Place) -> list[int]:
    room, config = order_room(place, "osft", "abcd", **THREE, method__preserve_first=0.0, method__preserve_last=0.999)
    found = []
    for index in range(4):
        learn(room, config, index, opposed(index % 3))
        from cl_runner.training.stage import StageRun

        stage = StageRun(room, config, index)
        room.method.build(stage)
        stage.close()
        found.append(next(iter(room.adapters.terms.of.values())).high_U.shape[1])
        room.adapters.show(None)
    return found


def test_what_is_held_grows_and_something_always_learns() -> None:
    assert on_ranks(1, _ranks_held) == [[0, 10, 21, 31]]  # of 32


def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory", lambda device: ("one GPU", 80 * 10**9))

    def check(shapes: Any = None, **settings: Any) -> None:
        room, config = order_room(Place(), "osft", **settings)
        check_method(config, room.order)
        check_method(config, room.order, shapes)

    check([(1024, 1024)] * 144)
    with pytest.raises(UserError, match=r"^method.preserve_last: 0.2 is less than method.preserve_first 0.5; "):
        check(method__preserve_first=0.5, method__preserve_last=0.2)
    check([(4096, 4096)] * 64)  # q and v of LLaMA-7B
    check([(1024, 1024)] * 288 + [(4096, 1024), (1024, 4096)] * 48)  # every linear layer of T5-large
    # 224 (2 · 4096² (0.3 + 5 · 0.7) + 2 · 4096²) floats
    with pytest.raises(
        UserError,
        match=r"^adapter.target_modules: SVDs of 224 layers, and what their training needs take 144 GB, over "
        r"method.max_gb 64; name fewer layers, or",
    ):
        check([(4096, 4096)] * 224)
    # All held but a tenth: 224 (2 · 4096² (0.9 + 5 · 0.1) + 2 · 4096²) floats
    with pytest.raises(UserError, match=r" take 72.2 GB, over method.max_gb 64"):
        check([(4096, 4096)] * 224, method__preserve_first=0.9, method__preserve_last=0.9)
