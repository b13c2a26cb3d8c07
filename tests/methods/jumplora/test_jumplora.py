"""JumpLoRA: the gate and its gradients against loops, whole stages against explicit weights, IncLoRA without it."""

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
from cl_runner.methods.jumplora.gate import as_many_over, jump
from cl_runner.training.stage import StageRun
from tests.breadth import wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import LR, STEPS, THREE, Values, off, opposed, values
from tests.methods.test_terms import learned
from tests.stages import Kind, naive_loss, tiny_model

WIDTH, LAMBDA = 0.05, 20.0
OWN: dict[str, Any] = {"method__lambda1": LAMBDA, "method__width": WIDTH, "method__start": 0.3, "method__z": -3.0}


def test_the_gate_and_its_gradients_entry_by_entry() -> None:
    dice = torch.Generator().manual_seed(0)
    D = torch.randn(7, 5, generator=dice, dtype=torch.float64).mul_(0.1).requires_grad_()
    z = torch.tensor([-2.5], dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(7, 5, generator=dice, dtype=torch.float64)
    found = jump(D, z, WIDTH)
    by_D, by_z = torch.autograd.grad(found, [D, z], upstream)
    theta, total, counted = math.exp(-2.5), 0.0, 0
    for i in range(7):
        for j in range(5):
            d, g = float(D[i, j].detach()), float(upstream[i, j])
            kept = abs(d) > theta
            assert float(found[i, j].detach()) == (d if kept else 0.0)
            assert float(by_D[i, j]) == (g if kept else 0.0)
            if abs(abs(d) - theta) / WIDTH < 0.5:
                total += math.copysign(1, d) * g
                counted += 1
    assert counted > 3
    assert float(by_z) == pytest.approx(theta * -theta / WIDTH * total / 35, rel=1e-12)


@pytest.mark.parametrize("count", [1, 7, 31, 47])
def test_so_many_entries_lie_over_the_threshold(count: int) -> None:
    dice = torch.Generator().manual_seed(count)
    products = [torch.randn(shape, generator=dice) for shape in ((4, 5), (2, 6), (4, 4))]
    theta = as_many_over(products, count)
    assert sum(int((product.abs() > theta).sum()) for product in products) == count


def test_of_fewer_entries_all_lie_over_it_and_ties_go_one_way() -> None:
    assert 0 < as_many_over([torch.ones(2, 2)], 9) < 1
    assert int((torch.ones(2, 2) > as_many_over([torch.ones(2, 2)], 2)).sum()) in (0, 4)


def gated(D: Tensor, z: Tensor) -> Tensor:
    """J(D), whose gradient by z autograd finds by itself: each entry near θ moves by a constant times θ."""
    theta = z.exp()
    here = theta.detach()
    near = ((D.detach().abs() - here) / WIDTH).abs() < 0.5
    return D * (D.detach().abs() > here) + -here / WIDTH / D.numel() * near * D.detach().sign() * (theta - here)


def elsewhere(ours: Values, theirs: Values) -> float:
    """The share of entries that differ: one next to θ may by rounding be on its other side."""
    apart = sum(int(((ours[t] - theirs[t]).abs() > 1e-3 * theirs[t].abs().max()).sum()) for t in theirs)
    return apart / sum(value.numel() for value in theirs.values())


def _stages(place: Place, kind: Kind, threshold: str) -> None:
    room, config = order_room(place, "jumplora", kind=kind, **THREE, **OWN, method__threshold=threshold)
    model = tiny_model(kind)
    W0 = {t: model.get_submodule(t).weight.detach().clone() for t in room.adapters.past}
    past = {t: torch.zeros_like(w) for t, w in W0.items()}
    scale = room.adapters.scale_of(next(iter(W0)))
    for index in range(3):
        stage = StageRun(room, config, index)
        room.method.build(stage)
        stage.close()
        begun, names = values(room), dict(room.method.z)
        assert len(names) == (1 if threshold == "global" else 2)
        learn(room, config, index, opposed(index))
        A, B = ({t: begun[f"{t}.{f}"].clone().requires_grad_() for t in W0} for f in "AB")
        z = {name: begun[name].clone().requires_grad_() for name in names}
        of = {t: z[name] for name, targets in names.items() for t in targets}
        optimizer = torch.optim.AdamW([*A.values(), *B.values(), *z.values()], lr=LR, weight_decay=0.0)
        for step in range(STEPS):
            p = max(0.0, min((step - 1) / (3 - 1), 1.0))  # of four steps the first has no gate, the fourth it alone
            D = {t: B[t] @ A[t] for t in W0}
            mixed = {t: scale * (p * gated(D[t], of[t]) + (1 - p) * D[t]) for t in W0}
            weights = {f"{t}.weight": W0[t] + past[t] + mixed[t] for t in W0}

            def answer(weights: Values = weights, **inputs: Any) -> Any:
                return torch.func.functional_call(model, weights, (), inputs)

            loss = naive_loss(answer, kind, opposed(index).examples)
            if index:
                loss = loss + LAMBDA / len(W0) * sum((mixed[t] * past[t]).square().sum() for t in W0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step == 0:
                for name, targets in names.items():
                    entries = torch.cat([(B[t] @ A[t]).detach().abs().flatten() for t in targets]).sort().values
                    count = sum(A[t].numel() + B[t].numel() for t in targets)
                    z[name].data.fill_(math.log(float(entries[-count - 1 : -count + 1].prod().sqrt())))
        before = past
        past = {t: past[t] + (scale * (B[t] @ A[t]) * ((B[t] @ A[t]).abs() > of[t].exp())).detach() for t in W0}
        assert elsewhere(learned(room), past) < 0.005, index
        kept = sum(int((past[t] - before[t]).count_nonzero()) for t in W0)
        assert 0.002 < kept / sum(update.numel() for update in past.values()) < 0.98


@pytest.mark.parametrize(
    ("kind", "threshold", "ranks"),
    [("t5", "global", 1), ("llama", "block", 1), pytest.param("t5", "block", 2, marks=wide)],
)
def test_three_stages_against_explicit_weights(kind: Kind, threshold: str, ranks: int) -> None:
    on_ranks(ranks, _stages, kind, threshold)


def _without(place: Place, kind: Kind) -> None:
    """While p is 0 there is no gate: with λ 0 every step is IncLoRA's."""
    own = {"method__lambda1": 0.0, "method__start": 0.99, "method__end": 1.0}
    room, config = order_room(place, "jumplora", kind=kind, **THREE, **own)
    plain, same = order_room(place, "inclora", kind=kind, **THREE)
    room.method.end_task = lambda stage: None  # what it is before the gate has the last word
    ours, theirs = learn(room, config, 0, opposed(0)).parameters, learn(plain, same, 0, opposed(0)).parameters
    for target in plain.adapters.past:
        for factor in "AB":
            assert off(ours[f"{target}.{factor}"], theirs[f"{target}.lora_{factor}"]) < 1e-4


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_without_gate_and_penalty_it_is_inclora(kind: Kind) -> None:
    on_ranks(1, _without, kind)


def _forward(place: Place) -> list[Tensor]:
    """Logits with the same A and B in place of the gated term and of the pair."""
    found = []
    for name in ("jumplora", "inclora"):
        room, config = order_room(place, name, **THREE)
        stage = StageRun(room, config, 0)
        room.method.build(stage)
        parameters, dice = room.adapters.parameters(), torch.Generator().manual_seed(1)
        for B in stage.named("B").values():
            parameters[B].data.copy_(torch.randn(parameters[B].shape, generator=dice))
        rows = opposed(0)
        with torch.no_grad(), stage.without_dropout():
            found.append(stage.forward(stage.make_batch(rows.examples, rows.tasks, [1.0] * len(rows.examples))))
        stage.close()
    return found


def test_a_forward_without_gate_is_incloras() -> None:
    [[ours, theirs]] = on_ranks(1, _forward)
    assert off(ours, theirs) < 1e-6


def _said(place: Place) -> list[str]:
    found = []
    for z in (-3.0, 5.0):
        room, config = order_room(place, "jumplora", **THREE, method__z=z)
        if z > 0:
            room.method._place = lambda stage: None
        learn(room, config, 0, opposed(0))
        found.append(room.method.said(None))
    return found


def test_what_the_gate_keeps_is_said() -> None:
    [[some, none]] = on_ranks(1, _said)
    assert some.startswith("the gate keeps ") and some.endswith(" % of the update's entries")
    assert none.startswith("warning: the gate keeps no entry of the update")


def test_what_cannot_be_is_refused() -> None:
    made = RunConfig.model_validate({"method": {"name": "jumplora", "max_gb": 1.6e-5}})
    with pytest.raises(UserError) as refused:
        make_method(made).check(made, [(32, 32), (16, 24)])
    assert str(refused.value) == (
        "adapter.target_modules: gated updates of 2 layers take 0.0169 MB, over method.max_gb 1.6e-05; name fewer "
        "layers, or set a larger max_gb"
    )
    made = RunConfig.model_validate({"method": {"name": "jumplora", "start": 0.8}})
    with pytest.raises(UserError, match=r"^method.start: 0.8 is not before method.end 0.8; set a smaller one$"):
        make_method(made).check(made)
    for own, said in (
        ({"width": 0}, "width"),
        ({"lambda1": -1}, "lambda1"), ({"start": -0.1}, "start"), ({"threshold": "layer"}, "threshold"),
        ({"z": math.inf}, "z"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            make_method(RunConfig.model_validate({"method": {"name": "jumplora", **own}}))
