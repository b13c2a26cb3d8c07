"""OA-Adapter: steps of three tasks against adapters behind explicit weights, its dimensions, where it stands."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.methods import make_method, method_schema
from cl_runner.settings import resolve
from cl_runner.training.stage import StageRun
from tests.breadth import wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import STEPS, THREE, off, opposed, values
from tests.methods.test_terms import farthest, learned
from tests.stages import Kind, naive_loss, tiny_model

LAMBDA, LR = 5.0, 0.03
OWN: dict[str, Any] = {"method__lambda1": LAMBDA, "method__tau": 0.3}
OUTPUTS: dict[Kind, list[str]] = {"t5": ["o", "wo"], "llama": ["o_proj", "down_proj"]}


def _steps(place: Place, kind: Kind) -> None:
    settings = {**THREE, **OWN, "training__lr": LR, "adapter__target_modules": OUTPUTS[kind], "adapter__r": 4}
    room, config = order_room(place, "oa", kind=kind, **settings)
    model = tiny_model(kind)
    W0 = {t: model.get_submodule(t).weight.detach().clone() for t in room.adapters.past}
    past: list[dict[str, Tensor]] = []  # of each task W2 diag(γ)
    total = {t: torch.zeros_like(w) for t, w in W0.items()}
    for index in range(3):
        stage = StageRun(room, config, index)
        room.method.build(stage)
        stage.close()
        begun = values(room)
        learn(room, config, index, opposed(index))
        now = {name: value.clone().requires_grad_() for name, value in begun.items()}
        optimizer = torch.optim.AdamW(list(now.values()), lr=LR, weight_decay=0.0)

        def outputs(t: str, now: dict[str, Tensor] = now) -> Tensor:
            """W2 diag(γ), γ dimension by dimension."""
            g, tau = now[f"{t}.g"], now[f"{t}.tau"]
            gamma = [torch.sign(each) * torch.clamp(each.abs() - tau[0], min=0) for each in g]
            return torch.stack([gamma[j] * now[f"{t}.W2"][:, j] for j in range(len(g))], 1)

        for _ in range(STEPS):
            weights = {f"{t}.weight": w + total[t] + outputs(t) @ now[f"{t}.W1"] @ w for t, w in W0.items()}

            def answer(weights: dict[str, Tensor] = weights, **inputs: Any) -> Any:
                return torch.func.functional_call(model, weights, (), inputs)

            loss = naive_loss(answer, kind, opposed(index).examples)
            for t in W0:
                W2 = now[f"{t}.W2"]
                for old in past:
                    pairs = [(W2[:, k] @ old[t][:, j]).square() for k in range(4) for j in range(4)]
                    loss = loss + LAMBDA / len(W0) * torch.stack(pairs).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        update = {t: (outputs(t) @ now[f"{t}.W1"] @ w).detach() for t, w in W0.items()}
        total = {t: total[t] + update[t] for t in W0}
        past.append({t: outputs(t).detach() for t in W0})
        assert farthest(learned(room), total) < 2e-3, index
        on = {t: sum(float((g.abs() - now[f"{t}.tau"]).detach()) > 0 for g in now[f"{t}.g"].detach()) for t in W0}
        assert all(int(torch.linalg.matrix_rank(update[t].double(), tol=1e-6)) <= on[t] for t in W0)
        assert 0 < sum(on.values()) < 4 * len(on)
        assert room.method.said(None) == f"{sum(on.values())} of {4 * len(on)} dimensions are on"
        folded = room.adapters.folded[-1]
        for t in W0:  # no dimension that is off is in what was folded
            assert int(folded.B[t].count_nonzero(dim=0).count_nonzero()) <= on[t]


@pytest.mark.parametrize(("kind", "ranks"), [("t5", 1), ("llama", 1), pytest.param("t5", 2, marks=wide)])
def test_three_tasks_against_adapters_behind_explicit_weights(kind: Kind, ranks: int) -> None:
    on_ranks(ranks, _steps, kind)


def _felt(place: Place) -> float:
    after = []
    for weight in (0.0, 1000.0):
        room, config = order_room(place, "oa", **THREE, **{**OWN, "method__lambda1": weight})
        for index in range(2):
            learn(room, config, index, opposed(index))
        after.append(torch.cat([update.flatten() for update in learned(room).values()]))
    return off(*after)


def test_the_penalty_is_felt() -> None:
    [distance] = on_ranks(1, _felt)
    assert distance > 1e-2


def _off(place: Place) -> str:
    room, config = order_room(place, "oa", **THREE, method__tau=0.99)
    stage = StageRun(room, config, 0)
    room.method.build(stage)
    stage.close()
    room.method.build = lambda stage: None
    for term in room.adapters.terms.of.values():
        term.g.data.fill_(0.01)
    learn(room, config, 0, opposed(0))
    said: str = room.method.said(None)
    return said


def test_where_every_dimension_is_off_it_is_said() -> None:
    assert on_ranks(1, _off) == ["warning: every dimension is off: nothing was learned; set a smaller method.tau"]


def test_it_stands_behind_the_sublayers_unless_layers_are_named() -> None:
    def made(*sets: str) -> Any:
        return resolve(sets=["method.name=oa", *sets], method_schema=method_schema)

    found = made()
    assert found.config.adapter.target_modules == ["outputs"]
    assert found.origin["adapter.target_modules"] == "method oa"
    assert made("adapter.target_modules=qv").config.adapter.target_modules == ["qv"]
    assert found.baseline.adapter.target_modules == ["outputs"], "no difference that a run's name would have to say"
    assert resolve(sets=["method.name=olora"], method_schema=method_schema).config.adapter.target_modules is None


@pytest.mark.parametrize("own", [{"lambda1": -1}, {"lambda1": math.inf}, {"tau": -0.1}, {"tau": 1.0}])
def test_settings_have_bounds(own: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(own))):
        make_method(RunConfig.model_validate({"method": {"name": "oa", **own}}))
