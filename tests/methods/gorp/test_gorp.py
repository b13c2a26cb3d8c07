"""GORP: steps of pairs and full-rank changes against a loop in fp64, what keeps off S, bases, refusals."""

from __future__ import annotations

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
from cl_runner.methods.gorp.moving import extended
from cl_runner.methods.gorp.settings import in_full
from cl_runner.methods.shared import limits
from cl_runner.training.compatibility import check_method
from cl_runner.training.stage import StageRun
from tests.command_line import NANO, call
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import LR, STEPS, THREE, Step, off, opposed, watch
from tests.methods.test_terms import farthest, learned
from tests.stages import Kind, naive_loss, tiny_model

Array = NDArray[np.float64]
LR_E, K, EVERY, FIRST = 0.03, 4, 3, 0.8
OWN: dict[str, Any] = {
    **THREE, "method__k": K, "method__every": EVERY, "method__lr": LR_E, "method__threshold": FIRST,
}  # fmt: skip
FULL = ("EncDecAttention", "v_proj")  # by default, of the tiny models' targets


def naive_extended(S: Array, M: Array, share: float) -> Array:
    """One vector at a time, until what S holds of M reaches the share."""
    whole = (M**2).sum()
    while ((S.T @ M) ** 2).sum() < share * whole:
        U, s, _ = np.linalg.svd(M - S @ (S.T @ M), full_matrices=False)
        if s[0] <= 1e-5 * np.sqrt(whole):
            break
        S = np.concatenate([S, U[:, :1]], axis=1)
    return S


def test_a_basis_takes_the_fewest_vectors_and_counts_what_it_holds() -> None:
    dice = np.random.default_rng(0)
    S, ours = np.zeros((9, 0)), None
    for share, count in ((0.7, None), (0.95, None), (0.95, None), (1.0, None), (1.0, 0)):
        M = dice.normal(size=(9, 4)) * np.array([3.0, 2.0, 1.0, 0.1])
        if share == 0.7:
            again = M
        before = S.shape[1]
        S, ours = naive_extended(S, M, share), extended(ours, torch.tensor(M).float(), share)
        assert ours.shape == S.shape and (count is None or S.shape[1] - before == count)
        assert off(ours @ ours.T, torch.tensor(S @ S.T)) < 1e-5
        torch.testing.assert_close(ours.T @ ours, torch.eye(ours.shape[1]), atol=1e-5, rtol=0)
        assert extended(ours, torch.tensor(again).float(), 0.7).shape == ours.shape  # it has enough of the first
    assert S.shape[1] == 9 and extended(None, torch.zeros(5, 3), 1.0).shape == (5, 0)


class Full:
    """E of one layer (m, n), fp64."""

    def __init__(self, frame: str) -> None:
        self.frame, self.S = frame, None
        self.begin()

    def begin(self) -> None:
        self.step, self.m, self.v = 0, np.zeros((K, K)), np.zeros((K, K))

    def update(self, G: Array) -> Array:
        size = np.linalg.norm(G)
        if self.frame == "full" and self.S is not None:
            G = G - self.S @ (self.S.T @ G)
        if self.step % EVERY == 0:
            U, s, V = np.linalg.svd(G, full_matrices=False)
            real = s[:K] > 1e-5 * size
            U, V = U[:, :K] * real, V[:K].T * real
            if self.step:
                for i in range(K):  # of a pair and its negative the nearer one
                    if U[:, i] @ self.U[:, i] < 0:
                        U[:, i], V[:, i] = -U[:, i], -V[:, i]
            self.U, self.V = U, V
        g = self.U.T @ G @ self.V
        g = g * (abs(g) > 1e-5 * size)
        if self.frame == "k" and self.S is not None:
            g = g - self.S @ (self.S.T @ g)
        self.step += 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g**2
        N = self.m / (1 - 0.9**self.step) / (np.sqrt(self.v / (1 - 0.999**self.step)) + 1e-8)
        found: Array = -LR_E * self.U @ N @ self.V.T
        return found

    def end(self, share: float) -> None:
        M = self.U @ self.m if self.frame == "full" else self.m
        self.S = naive_extended(np.zeros((len(M), 0)) if self.S is None else self.S, M, share)


ALPHA, DECAY = 0.7, 0.05


def _steps(place: Place, kind: Kind, frame: str) -> None:
    more = {"method__frame": frame, "method__scale": ALPHA, "training__weight_decay": DECAY}
    room, config = order_room(place, "gorp", kind=kind, **OWN, **more)
    targets = room.adapters.targets()
    model = tiny_model(kind)
    W0 = {t: model.get_submodule(t).weight.detach().clone() for t in targets}
    past = {t: torch.zeros_like(W) for t, W in W0.items()}
    full = [t for t in targets if any(name in t for name in FULL)]
    assert 0 < len(full) < len(targets)
    rules = {t: Full(frame) for t in full}
    S: dict[str, Array] = {}
    for index in range(3):
        probe, _ = order_room(place, "inclora", kind=kind)
        probe.adapters.begin("probe", StageRun(probe, config, index).rng("adapter"))
        pair = probe.adapters.pair()
        pairs = {(t, f): getattr(pair, f)[t].clone().requires_grad_() for t in targets if t not in full for f in "AB"}
        E = {t: torch.zeros(targets[t], requires_grad=True) for t in full}
        for rule in rules.values():
            rule.begin()
        means = {name: np.zeros(p.shape) for name, p in pairs.items()}
        optimizer = torch.optim.AdamW(list(pairs.values()), lr=LR, weight_decay=DECAY)

        def delta(t: str, E: Any = E, pairs: Any = pairs) -> Tensor:
            found: Tensor = E[t] if t in E else 2.0 * pairs[t, "B"] @ pairs[t, "A"]
            return found

        def answer(delta: Any = delta, past: Any = past, **inputs: Any) -> Any:
            weights = {f"{t}.weight": W + past[t] + delta(t) for t, W in W0.items()}
            return torch.func.functional_call(model, weights, (), inputs)

        for _ in range(STEPS):
            optimizer.zero_grad()
            for e in E.values():
                e.grad = None
            naive_loss(answer, kind, opposed(index).examples).backward()
            for (t, f), p in pairs.items():
                assert p.grad is not None
                g = p.grad.double().numpy()
                if (basis := S.get(f"{t}.{f}")) is not None:
                    g = g - (g @ basis) @ basis.T if f == "A" else g - basis @ (basis.T @ g)
                means[t, f] = 0.9 * means[t, f] + 0.1 * g
                p.grad = torch.tensor(g).float()
            optimizer.step()
            for t, e in E.items():
                assert e.grad is not None
                step = ALPHA * torch.tensor(rules[t].update(e.grad.double().numpy())).float()
                e.data += step - LR_E * DECAY * e.data
        share = FIRST + (1 - FIRST) * index / 3
        for (t, f), mean in means.items():
            M = mean.T if f == "A" else mean
            S[f"{t}.{f}"] = naive_extended(S.get(f"{t}.{f}", np.zeros((len(M), 0))), M, share)
        for rule in rules.values():
            rule.end(share)
        past = {t: past[t] + delta(t).detach() for t in targets}
        learn(room, config, index, opposed(index))
        assert farthest(learned(room), past) < 2e-2, index
        wanted = {f"{t}.delta": rule.S for t, rule in rules.items()} | {
            f"{name[:-2]}.lora_{name[-1]}": basis for name, basis in S.items()
        }
        assert room.method.past.keys() == wanted.keys()
        for name, ours in room.method.past.items():
            theirs = torch.tensor(wanted[name])
            assert ours.shape == theirs.shape and off(ours @ ours.mT, theirs @ theirs.mT) < 5e-2, (index, name)


@pytest.mark.parametrize(("kind", "frame"), [("t5", "full"), ("llama", "full"), ("t5", "k")])
def test_whole_steps_by_hand(kind: Kind, frame: str) -> None:
    on_ranks(1, _steps, kind, frame)


def _shares(step: Step, past: dict[str, Tensor]) -> list[tuple[str, float, float]]:
    """Of each parameter the share of its edited gradient, and of its step, in S."""
    found = []
    for name, S in past.items():
        parts = []
        for change in (step.edited[name], step.after[name] - step.before[name]):
            turned = change.mT if name.endswith("A") else change
            parts.append(float((S.mT @ turned).norm() / change.norm().clamp(min=1e-12)))
        found.append((name, *parts))
    return found  # type: ignore[return-value]


def _off(place: Place, optimizer: str) -> tuple[float, float, float]:
    """The largest share in S: of a pair's gradients, of its steps, of a full-rank change's steps."""
    own = {**OWN, "training__lr": 2.0 if optimizer == "sgd" else LR, "training__optimizer": optimizer}
    room, config = order_room(place, "gorp", **own)
    worst = [0.0, 0.0, 0.0]
    for index in range(3):
        past = dict(room.method.past)
        steps = watch(room)
        end = room.method.end_task
        held: list[Any] = []

        def spy(stage: Any, end: Any = end, held: Any = held) -> None:
            held.append([(room.method.moments[n], stage.moments(n)) for n in room.method.moments])
            end(stage)

        room.method.end_task = spy
        learn(room, config, index, opposed(index))
        for ours, adams in held[0] if optimizer == "adamw" else ():
            moment = adams["exp_avg"]
            assert off(ours if ours.shape == moment.shape else ours.mT, moment) < 1e-5
        for step in steps if past else ():
            for name, gradient, change in _shares(step, past):
                if name.endswith("delta"):
                    worst[2] = max(worst[2], change)
                else:
                    worst[:2] = max(worst[0], gradient), max(worst[1], change)
        for S in room.method.past.values():
            torch.testing.assert_close(S.mT @ S, torch.eye(S.shape[1]), atol=1e-5, rtol=0)
    return worst[0], worst[1], worst[2]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_gradients_are_off_s_and_every_full_rank_step_but_a_pairs_steps_under_sgd_alone(optimizer: str) -> None:
    """What is called the first moment is Adam's, where Adam runs."""
    [(gradient, pair, full)] = on_ranks(1, _off, optimizer)
    assert gradient < 1e-5 and full < 1e-5
    assert pair < 1e-4 if optimizer == "sgd" else pair > 1e-2


def _shared(place: Place, full: list[str] | None) -> list[str]:
    room, config = order_room(place, "gorp", method__full=full)
    outcome = learn(room, config, 0, opposed(0))
    said = room.method.free_share(outcome.stage)
    assert 0 < said < 1
    return sorted({name.rpartition(".")[2] for name in outcome.parameters})


def test_what_trains_in_full_is_named() -> None:
    assert on_ranks(1, _shared, None) == [["delta", "lora_A", "lora_B"]]
    assert on_ranks(1, _shared, []) == [["lora_A", "lora_B"]]
    assert on_ranks(1, _shared, ["q", "v"]) == [["delta"]]
    names = ["a.SelfAttention.q", "a.EncDecAttention.q", "b.mlp.gate_proj", "b.v_proj"]
    assert in_full(names, None) == ["a.EncDecAttention.q"] and in_full(names[2:], None) == ["b.mlp.gate_proj"]
    assert in_full(names[3:], None) == ["b.v_proj"] and in_full(names, ["mlp", "q"]) == [*names[:2], names[2]]
    with pytest.raises(UserError, match=r"^method.full: no target layer is of cross-attention, gates, .* q, or"):
        in_full(names[:1], None)
    with pytest.raises(UserError, match=r"^method.full: 'v' is no target layer, nor around one; there are q, "):
        in_full(names, ["q", "v"])


def test_a_layer_that_is_none_is_refused_before_weights_are_loaded(tmp_path: Path) -> None:
    asked = ("--order", "order1", "--method", "gorp", *NANO, "--set", "method.full=[nope]", "--dry-run")
    refused = call("train", *asked, cwd=tmp_path)
    assert refused.code == 2 and "'nope' is no target layer" in refused.line


def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory", lambda device: ("one GPU", 80 * 10**9))
    room, config = order_room(Place(), "gorp", "abc", adapter__r=8, method__threshold=0.9, method__last_threshold=0.8)
    with pytest.raises(UserError, match=r"^method.last_threshold: 0.8 is below method.threshold 0.9;"):
        check_method(config, room.order)
    room, config = order_room(Place(), "gorp", "abc", adapter__r=8)
    check_method(config, room.order, [(1024, 512)] * 10)
    # 8 · 1536 · 10 floats
    assert room.method.grows(config, [(1024, 512)] * 10) == (
        "carries up to 0.492 MB a task, 1.47 MB in all: past bases of 10 layers"
    )
    room, config = order_room(Place(), "gorp", method__max_gb=1e-5)
    with pytest.raises(UserError, match=r"^method.full: full-rank changes of 2 layers take 0.041 MB, over"):
        room.method.build(StageRun(room, config, 0))
    room, config = order_room(Place(), "gorp", "abc", adapter__r=8, method__max_gb=1e-3)
    # 3 · 8 columns on both sides, or on one: 24 (1024 + 512) floats a layer
    with pytest.raises(UserError, match=r"^adapter.target_modules: past bases of 10 layers over 3 tasks take 1.47 MB"):
        check_method(config, room.order, [(1024, 512)] * 10)
    for key, value in (("frame", "k"), ("k", 4)):
        config = RunConfig.model_validate({"method": {"name": "gorp"}, "tasks": {"b": {f"method.{key}": value}}})
        with pytest.raises(UserError, match=f"^method.{key}: the same for all tasks; set it once$"):
            make_method(config).check(config)
    bad: dict[str, tuple[Any, ...]] = {
        "k": (0,), "every": (0,), "threshold": (0, 1.01), "last_threshold": (0, 1.01), "lr": (0,), "scale": (0, -1),
        "frame": ("m",), "max_gb": (0,),
    }  # fmt: skip
    for setting, numbers in bad.items():
        for value in numbers:
            with pytest.raises(ValueError, match=setting):
                make_method(RunConfig.model_validate({"method": {"name": "gorp", setting: value}}))
