"""OLieRA: its penalty from factors against whole matrices, steps of three tasks against explicit weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.oliera.multiplied import Order
from cl_runner.methods.oliera.overlap import overlap_of_identity, overlap_of_ones
from cl_runner.training.stage import StageRun
from tests.breadth import wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import LR, STEPS, THREE, off, opposed, values
from tests.methods.test_terms import farthest, learned
from tests.stages import Kind, naive_loss, tiny_model

LAMBDA = 3.0
OWN: dict[str, Any] = {"method__lambda1": LAMBDA, "method__lr": LR}
SHAPES = [(32, 32), (16, 24)]


@pytest.mark.parametrize(("neutral", "m", "n"), [("ones", 7, 5), ("ones", 4, 4), ("identity", 6, 6)])
def test_the_overlap_from_factors_is_that_of_whole_matrices(neutral: str, m: int, n: int) -> None:
    dice = torch.Generator().manual_seed(m)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice, dtype=torch.float64)

    A, B = made(3, 2, n).requires_grad_(), made(3, m, 2).requires_grad_()
    past_A, past_B = made(3, 4, 2, n), made(3, 4, m, 2)
    J = torch.ones(m, n, dtype=torch.float64) if neutral == "ones" else torch.eye(n, dtype=torch.float64)
    rows = []
    for layer in range(3):
        now = J + B[layer] @ A[layer]
        each = zip(past_A[layer], past_B[layer], strict=True)
        rows.append([(now @ (J + b @ a).T).square().sum().sqrt() for a, b in each])
    wanted = torch.stack([torch.stack(row) for row in rows])
    found = (overlap_of_ones if neutral == "ones" else overlap_of_identity)(A, B, past_A, past_B)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    upstream = made(3, 4)
    for ours, theirs in zip(*(torch.autograd.grad(each, [A, B], upstream) for each in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def f(E: Tensor, order: Order) -> Tensor:
    return {1: 1 + E, 2: 1 + E + E * E / 2, "exact": torch.exp(E)}[order]


def _steps(place: Place, kind: Kind, order: Order, neutral: str) -> None:
    own = {**OWN, "method__order": order, "method__neutral": neutral}
    room, config = order_room(place, "oliera", kind=kind, **THREE, **own)
    model = tiny_model(kind)
    W0 = {t: model.get_submodule(t).weight.detach().clone() for t in room.adapters.past}
    for target, weight in W0.items():
        weight[0, 0] = 0.0  # what is zero stays zero, whatever multiplies it
        room.adapters.past[target].weight.data[0, 0] = 0.0
    past: list[dict[str, Tensor]] = []  # D_j
    for index in range(3):
        stage = StageRun(room, config, index)
        room.method.build(stage)
        stage.close()
        begun = values(room)
        learn(room, config, index, opposed(index))
        A, B = ({t: begun[f"{t}.{factor}"].clone().requires_grad_() for t in W0} for factor in "AB")
        optimizer = torch.optim.AdamW([*A.values(), *B.values()], lr=LR, weight_decay=0.0)
        for _ in range(STEPS):
            D = {t: room.adapters.scale_of(t) * B[t] @ A[t] for t in W0}
            weights = {f"{t}.weight": W0[t] * f(sum((each[t] for each in past), D[t]), order) for t in W0}

            def answer(weights: dict[str, Tensor] = weights, **inputs: Any) -> Any:
                return torch.func.functional_call(model, weights, (), inputs)

            loss = naive_loss(answer, kind, opposed(index).examples)
            for target, now in D.items():
                J = torch.ones_like(now) if neutral == "ones" else torch.eye(len(now))
                for old in past:
                    norm = ((J + now) @ (J + old[target]).T).square().sum().sqrt()
                    loss = loss + LAMBDA / len(D) * norm / now.numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        past.append({t: (room.adapters.scale_of(t) * B[t] @ A[t]).detach() for t in W0})
        total = {t: sum((each[t] for each in past[1:]), past[0][t]) for t in W0}
        found = learned(room)
        assert farthest(found, {t: W0[t] * (f(E, order) - 1) for t, E in total.items()}) < 2e-3, index
        assert all(float(update[0, 0]) == 0 for update in found.values())
    if order == "exact":  # three tasks folded are the product of three exponentials
        product = {t: W0[t] * torch.stack([each[t].exp() for each in past]).prod(0) - W0[t] for t in W0}
        assert farthest(learned(room), product) < 2e-3


@pytest.mark.parametrize(
    ("kind", "order", "neutral", "ranks"),
    [
        ("t5", 2, "ones", 1),
        ("llama", "exact", "ones", 1),
        ("t5", 1, "identity", 1),
        pytest.param("t5", "exact", "ones", 2, marks=wide),
    ],
)
def test_three_tasks_against_explicit_weights(kind: Kind, order: Order, neutral: str, ranks: int) -> None:
    on_ranks(ranks, _steps, kind, order, neutral)


def _felt(place: Place) -> float:
    after = []
    for weight in (0.0, LAMBDA):
        room, config = order_room(place, "oliera", **THREE, **{**OWN, "method__lambda1": weight})
        for index in range(2):
            learn(room, config, index, opposed(index))
        after.append(torch.cat([update.flatten() for update in learned(room).values()]))
    return off(*after)


def test_the_penalty_is_felt() -> None:
    [distance] = on_ranks(1, _felt)
    assert distance > 1e-2


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            {"neutral": "identity"},
            "method.neutral: I exists only for square layers, and one is 16 × 24; set ones, or other "
            "adapter.target_modules",
        ),
        (
            {"max_gb": 1.6e-5},
            "adapter.target_modules: exponents and updates of 2 layers take 0.0169 MB, over method.max_gb 1.6e-05; "
            "name fewer layers, or set a larger max_gb",
        ),
    ],
)
def test_what_cannot_be_is_refused(own: dict[str, Any], said: str) -> None:
    made = RunConfig.model_validate({"method": {"name": "oliera", **own}})
    assert make_method(made).check(made) is None
    with pytest.raises(UserError) as refused:
        make_method(made).check(made, SHAPES)
    assert str(refused.value) == said


@pytest.mark.parametrize("own", [{"lambda1": -1}, {"lambda1": math.nan}, {"order": 3}, {"neutral": "zero"}, {"lr": 0}])
def test_settings_have_bounds(own: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(own))):
        make_method(RunConfig.model_validate({"method": {"name": "oliera", **own}}))
