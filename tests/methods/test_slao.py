"""SLAO: three tasks against the steps by hand and the closed form of the merge, and its Fisher's shares by entry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.training.stage import StageRun
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import STEPS, THREE, Values, by_hand, gradient, off, opposed, put, values, vector
from tests.stages import Kind, naive_loss


def begun(room: Any) -> list[Values]:
    """What trains as the first step of each stage finds it, from now on."""
    method, found = room.method, []
    begin = method.begin_task

    def spy(stage: Any) -> None:
        begin(stage)
        found.append(values(room))

    method.begin_task = spy
    return found


def next_start(tuned: Values) -> Values:
    """By numpy: A from the QR of its transpose, the diagonal of R positive, B as it was."""
    found = dict(tuned)
    for name, A in tuned.items():
        if name.endswith("lora_A"):
            Q, R = np.linalg.qr(A.double().numpy().T)
            found[name] = torch.from_numpy((Q * np.where(np.diag(R) < 0, -1, 1)).T).float()
    return found


def _steps(place: Place, kind: Kind) -> None:
    room, config = order_room(place, "slao", kind=kind, **THREE)
    starts, tuned = begun(room), []
    for index in range(3):
        learn(room, config, index, opposed(index))
        start = next_start(tuned[-1]) if tuned else starts[0]
        assert off(vector(starts[index]), vector(start)) < 1e-3
        for name, A in starts[index].items():
            if index and name.endswith("lora_A"):
                torch.testing.assert_close(A @ A.mT, torch.eye(len(A)), atol=1e-6, rtol=0)
                old = tuned[-1][name]
                torch.testing.assert_close(old @ A.mT @ A, old, atol=2e-3, rtol=1e-3)  # the same span
        tuned.append(by_hand(kind, start, opposed(index).examples, STEPS))
    ours = room.adapters.kept["c"]
    a, b = 1 / 2**0.5, 1 / 3**0.5
    weights = [(1 - a) * (1 - b), a * (1 - b), b]
    for target in room.adapters.layers:
        wanted = sum(w * of[f"{target}.lora_B"] for w, of in zip(weights, tuned, strict=True))
        assert off(ours.B[target], wanted) < 2e-3 and off(ours.A[target], tuned[2][f"{target}.lora_A"]) < 2e-3
        assert off(ours.B[target], tuned[2][f"{target}.lora_B"]) > 1e-2
    assert room.adapters.folded == [] and room.adapters.live == "c"


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_three_tasks_by_hand(kind: Kind) -> None:
    on_ranks(1, _steps, kind)


def _fisher(place: Place) -> None:
    own: dict[str, Any] = {**THREE, "method__fisher_beta": 0.5, "method__fisher_samples": 6}
    room, config = order_room(place, "slao", **own)
    probe, _ = order_room(place, "seqlora")
    probe.adapters.begin("probe")
    names = list(probe.adapters.parameters())
    past: dict[str, Tensor] = {}
    merged: dict[str, Tensor] = {}
    for index in range(3):
        learn(room, config, index, opposed(index))
        method, pair = room.method, room.adapters.kept["abc"[index]]
        tuned = {f"{t}.lora_A": A for t, A in method.A.items()} | {f"{t}.lora_B": B for t, B in method.B.items()}
        for target, B in method.B.items():
            if index:
                F = past[target]
                shares = (index + 1) ** -0.5 / (1 + 0.5 * F / F.mean())
                assert float(shares.max() / shares.min()) > 1.1
                assert off(pair.B[target], merged[target] + shares * (B - merged[target])) < 1e-4
            else:
                assert torch.equal(pair.B[target], B)
            merged[target] = pair.B[target]
        put(probe, {name: tuned[name] for name in names})
        rows = opposed(index).examples
        squares = [gradient(probe, naive_loss(probe.adapters.model, "t5", [e]) * len(e.target)).square() for e in rows]
        sizes = [tuned[name].numel() for name in names]
        for name, F in zip(names, torch.split(torch.stack(squares).mean(0), sizes), strict=True):
            target = name.removesuffix(".lora_B")
            if name.endswith("lora_B"):
                past[target] = past.get(target, 0) + F.view(tuned[name].shape)
                assert off(method.fisher[target], past[target]) < 1e-3


def test_where_past_tasks_have_fisher_b_changes_less() -> None:
    on_ranks(1, _fisher)


def _beta_0(place: Place) -> None:
    """Whatever the Fisher of earlier tasks: it is not looked at, and not taken."""
    room, config = order_room(place, "slao", **THREE)
    for index in range(2):
        learn(room, config, index, opposed(index))
    assert not room.method.fisher
    room.method.fisher = {target: torch.ones_like(B) for target, B in room.method.B.items()}
    assert {room.method._share(StageRun(room, config, 2), target) for target in room.method.B} == {3**-0.5}


def test_beta_0_is_without_it() -> None:
    on_ranks(1, _beta_0)


def _deficient(place: Place) -> None:
    room, config = order_room(place, "slao", training__epochs=1)
    stage = learn(room, config, 0).stage
    assert room.method.said(stage) == ""
    first, *rest = room.method.A
    room.method.A[first][1] = 2 * room.method.A[first][0]
    assert room.method.said(learn(room, config, 1).stage) == (
        f"warning: A of {first} had no full rank after the task before; the rest of its orthonormal rows were "
        "arbitrary; set a smaller adapter.r"
    )
    for target in (first, *rest):
        room.method.A[target][1] = 0
    assert f"A of {first} and {len(rest)} others had" in room.method.said(learn(room, config, 2).stage)


def test_an_a_without_full_rank_is_said() -> None:
    on_ranks(1, _deficient)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"adapter": {"r": 25}},
            "adapter.r: slao begins with 25 orthonormal rows, and a layer is 16 × 24; set 16 or less",
        ),
        *(
            (
                {"adapter": {"init": init}},
                f"adapter.init={init}: the pair begins with a part of the weight, and slao begins each task with "
                "another A; leave it out",
            )
            for init in ("pissa", "loftq")
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_start(config: dict[str, Any], said: str) -> None:
    made = RunConfig.model_validate({**config, "method": {"name": "slao"}})
    with pytest.raises(UserError) as refused:
        make_method(made).check(made, [(32, 32), (16, 24)])
    assert str(refused.value) == said


@pytest.mark.parametrize("own", [{"fisher_beta": -0.1}, {"fisher_beta": float("inf")}, {"fisher_samples": 0}])
def test_settings_have_bounds(own: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(own))):
        make_method(RunConfig.model_validate({"method": {"name": "slao", **own}}))
