"""Re-orthogonalisation: factors, update and Adam's moments against their definitions; whole stages by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.commands.show import show_method
from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method, method_schema
from cl_runner.methods.protocol import Reorthogonalise, StagePlan
from cl_runner.settings import resolve
from cl_runner.training.compatibility import check_method
from cl_runner.training.options import reorthogonalise as option
from cl_runner.training.options.reorthogonalise import split
from cl_runner.training.stage import StageRun
from tests.breadth import paired, wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import LR, STEPS, THREE, Values, off, opposed, put, values, vector
from tests.stages import Kind, naive_loss

CASES = [
    (how, on, rescale) for how in ("hard", "soft") for on in ("A", "B", "both") for rescale in (False, True)
    if not (on == "both" and rescale)
]  # fmt: skip
# Both factors, and each way of rescaling, under each.
QUICK = [
    ("hard", "both", False), ("hard", "A", True), ("hard", "B", False), ("soft", "both", False), ("soft", "A", False),
    ("soft", "B", True),
]  # fmt: skip


@pytest.mark.parametrize("how", ["hard", "soft"])
def test_a_factor_is_its_two_parts(how: str) -> None:
    F = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    F[1] = 0  # as B at the start
    F[2, 0] = 0 if how == "soft" else F[2, 1] * 2  # no full rank, though not zero
    Q, R = split(F, how)
    torch.testing.assert_close(R @ Q, F, rtol=1e-12, atol=1e-12)
    for layer in (0, 3):
        if how == "hard":
            torch.testing.assert_close(Q[layer] @ Q[layer].T, torch.eye(3).double(), rtol=0, atol=1e-12)
            assert bool((R[layer].diagonal() > 0).all())
        else:
            assert torch.equal(R[layer], R[layer].diagonal().diag())
            torch.testing.assert_close(Q[layer], torch.nn.functional.normalize(F[layer], dim=1))
    assert torch.equal(Q[1:3], F[1:3]) and torch.equal(R[1:3], torch.eye(3).double().expand(2, 3, 3))


def rows(parameters: Values, target: str, factor: str) -> Tensor:
    found = parameters[f"{target}.lora_{factor}"].detach()
    return found if factor == "A" else found.T


def gradients(now: Values, target: str, upstream: Tensor) -> dict[str, Tensor]:
    """Of <upstream, B A>, whatever A and B are."""
    leaves = {f: now[f"{target}.lora_{f}"].detach().clone().requires_grad_() for f in "AB"}
    return dict(
        zip("AB", torch.autograd.grad((upstream * (leaves["B"] @ leaves["A"])).sum(), [*leaves.values()]), strict=True)
    )


def _once(place: Place, kind: Kind, how: str, on: str, rescale: bool, moments: bool | None = None) -> None:
    """Adam's moments are set to the gradient of a loss that hangs on ΔW alone, and to its square, just before."""
    settings = {"how": how, "every": 2, "on": on, "rescale": rescale, "moments": moments}
    mapped = rescale if moments is None else moments
    name = "seqlora" if on == "B" else "inclora"
    room, config = order_room(place, name, kind=kind, adapter__r=3, **THREE, method__reorthogonalise=settings)
    done, real = [], option.reorthogonalise
    dice = torch.Generator().manual_seed(0)

    def spy(stage: Any, given: Any, batch: Any) -> tuple[float, float]:
        before, upstream = values(room), {}
        for target in room.adapters.layers:
            m, n = before[f"{target}.lora_B"].shape[0], before[f"{target}.lora_A"].shape[1]
            upstream[target] = torch.randn(m, n, generator=dice)
            for factor, g in gradients(before, target, upstream[target]).items():
                stage.set_moments(f"{target}.lora_{factor}", {"exp_avg": g, "exp_avg_sq": g.square()})
        losses = real(stage, given, batch)
        after = values(room)
        for target in room.adapters.layers:
            for factor in "AB" if on == "both" else on:
                Q = rows(after, target, factor)
                gram = Q @ Q.T if how == "hard" else (Q @ Q.T).diagonal()
                wanted = torch.eye(3) if how == "hard" else torch.ones(3)
                torch.testing.assert_close(gram, wanted, atol=1e-5, rtol=0)
            updates = [v[f"{target}.lora_B"] @ v[f"{target}.lora_A"] for v in (before, after)]
            assert (off(updates[1], updates[0]) < 1e-5) == rescale
            moved, was = (gradients(v, target, upstream[target]) for v in (after if mapped else before, before))
            for factor in "AB":
                adam = stage.moments(f"{target}.lora_{factor}")
                assert off(adam["exp_avg"], moved[factor]) < 1e-3
                if how == "soft" or not mapped or (factor in on and not rescale):
                    assert off(adam["exp_avg_sq"], moved[factor].square()) < 1e-3
                else:
                    assert bool((adam["exp_avg_sq"] >= 0).all()) and adam["exp_avg_sq"].any()
                    assert off(adam["exp_avg_sq"], was[factor].square()) > 1e-3
        assert abs(losses[1] - losses[0]) < 1e-4 * losses[0] if rescale else losses[1] != losses[0]
        done.append(stage.step)
        return losses

    option.reorthogonalise = spy
    try:
        logged = [learn(room, config, index, opposed(index)).rows for index in range(2)]
    finally:
        option.reorthogonalise = real
    assert done == [2, 4, 2, 4]
    for of_stage in logged:
        again = [row for row in of_stage if "reorthogonalised" in row]
        assert [(row["step"], row["reorthogonalised"]) for row in again] == [(2, how), (4, how)]
        assert len([row for row in of_stage if "lr" in row]) == STEPS


@pytest.mark.parametrize(("how", "on", "rescale"), paired(CASES, QUICK))
def test_factors_update_and_moments(how: str, on: str, rescale: bool) -> None:
    on_ranks(1, _once, "llama" if rescale else "t5", how, on, rescale)


@pytest.mark.parametrize(("how", "on", "rescale"), paired([case for case in CASES if case[1] != "both"], QUICK))
def test_moments_may_go_the_other_way(how: str, on: str, rescale: bool) -> None:
    on_ranks(1, _once, "t5", how, on, rescale, not rescale)


def _by_hand(place: Place, how: str, rescale: bool) -> None:
    """All rows in one micro-batch: then the logged losses are known too."""
    name = f"{how}-orth"
    own = {"how": how, "every": 2, "rescale": rescale}
    room, config = order_room(place, name, **{**THREE, "training__micro_batch": 6}, method__reorthogonalise=own)
    hand, _ = order_room(place, "seqlora")
    hand.adapters.begin("a", StageRun(room, config, 0).rng("adapter"))
    begun = values(hand)
    for index in range(2):
        outcome = learn(room, config, index, opposed(index))
        parameters = hand.adapters.parameters()
        put(hand, begun)  # each stage from where ours began it: Adam at this rate makes much of the last digit
        begun = outcome.parameters
        optimizer = torch.optim.AdamW(list(parameters.values()), lr=LR, weight_decay=0.0)
        losses = []
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            naive_loss(hand.adapters.model, "t5", opposed(index).examples).backward()
            optimizer.step()
            if step % 2 == 0:
                losses.append(float(naive_loss(hand.adapters.model, "t5", opposed(index).examples).detach()))
                for target in hand.adapters.layers:
                    _naive(how, rescale, parameters[f"{target}.lora_A"], parameters[f"{target}.lora_B"], optimizer)
                losses.append(float(naive_loss(hand.adapters.model, "t5", opposed(index).examples).detach()))
        assert off(vector(outcome.parameters), vector(values(hand))) < 1e-4
        logged = [row[key] for row in outcome.rows if "loss_before" in row for key in ("loss_before", "loss_after")]
        assert logged == pytest.approx(losses, rel=1e-4)


@torch.no_grad()
def _naive(how: str, rescale: bool, A: Any, B: Any, optimizer: Any) -> None:
    """Gram-Schmidt row by row, or norms; entries of Adam's moments one after the other."""
    F, r = A.double(), len(A)
    Q, R = torch.zeros_like(F), torch.zeros(r, r, dtype=torch.float64)
    for i in range(r):
        rest = F[i].clone()
        for j in range(i if how == "hard" else 0):
            R[i, j] = F[i] @ Q[j]
            rest -= R[i, j] * Q[j]
        R[i, i] = rest.norm()
        Q[i] = rest / R[i, i]
    A.copy_(Q)
    if not rescale:
        return
    B.copy_(B.double() @ R)
    inverse = torch.linalg.inv(R)
    for parameter, by in ((A, R.T), (B, inverse)):
        state = optimizer.state[parameter]
        for key, factors in (("exp_avg", by), ("exp_avg_sq", by**2)):
            old = state[key].double() if parameter is A else state[key].double().T
            new = torch.stack([sum(factors[i, j] * old[j] for j in range(r)) for i in range(r)])
            state[key].copy_(new if parameter is A else new.T)


@pytest.mark.parametrize("how", ["hard", "soft"])
@pytest.mark.parametrize("rescale", [False, True])
def test_stages_by_hand(how: str, rescale: bool) -> None:
    on_ranks(1, _by_hand, how, rescale)


def _ranks(place: Place) -> list[Values]:
    found = []
    for number, (how, on, rescale) in enumerate(CASES):
        own = {"how": how, "every": 2, "on": on, "rescale": rescale}
        kind: Kind = "t5" if number % 2 else "llama"
        few = {**THREE, "training__micro_batch": 1, "training__epochs": 3}
        room, config = order_room(place, "olora", kind=kind, bf16=number == 0, **few, method__reorthogonalise=own)
        for index in range(2):
            outcome = learn(room, config, index, opposed(index, rows=5))
        assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in outcome.parameters.values())
        found.append(outcome.parameters)
    return found


@wide
def test_two_ranks_do_what_one_does() -> None:
    (alone,), (first, second) = on_ranks(1, _ranks), on_ranks(2, _ranks)
    for number, (one, a, b) in enumerate(zip(alone, first, second, strict=True)):
        assert torch.equal(vector(a), vector(b)), CASES[number]
        assert number == 0 or off(vector(a), vector(one)) < 2e-3, CASES[number]


# Settings.


def test_names_and_settings() -> None:
    def made(name: str, *sets: str, model: str = "google-t5/t5-base") -> Any:
        flags = {"method.name": name, "model.name": model}
        config = resolve(order="order1", flags=flags, sets=list(sets), method_schema=method_schema).config
        again = RunConfig.model_validate(config.model_dump(mode="json"))
        assert make_method(again).reorthogonalise == make_method(config).reorthogonalise
        return make_method(config).reorthogonalise

    assert made("seqlora") is None and made("ogd") is None and made("coso") is None
    assert made("hard-orth") == Reorthogonalise(how="hard", every=100, on="A", rescale=False)
    assert made("hard-orth", model="tiny-t5") == Reorthogonalise(how="hard", every=10, on="A", rescale=False)
    soft = made("soft-orth", model="tiny-t5")
    assert (soft.how, soft.every) == ("soft", 10)
    soft = made("soft-orth", "method.reorthogonalise={every: 7, rescale: true}")
    assert (soft.how, soft.every, soft.rescale) == ("soft", 7, True)
    every = ("seqlora", "inclora", "pertask", "mtl", "replay", "ewc", "lwf", "agem", "gem", "migu", "olora", "nlora",
             "sparse-orth", "clora", "grassmann", "sure")  # fmt: skip
    for name in every:
        assert made(name, "method.reorthogonalise={how: soft, every: 3}").every == 3
    for wrong, said in (
        ("{how: firm}", "method.reorthogonalise.how must be one of hard, soft"),
        ("{every: 0}", "method.reorthogonalise.every must be at least 1"),
        ("{on: both, rescale: true}", "cannot rescale on: both, as no factor is left to correct; use A or B"),
    ):
        with pytest.raises(UserError) as refused:
            made("hard-orth", f"method.reorthogonalise={wrong}")
        assert said in str(refused.value) and "\n" not in str(refused.value)


def test_what_cannot_be_orthonormal_is_refused() -> None:
    stages = [StagePlan("a", ("a",))]

    def check(name: str, shapes: Any = None, r: int = 8, **own: Any) -> None:
        config = {"adapter": {"r": r}, "method": {"name": name, **own}}
        check_method(RunConfig.model_validate(config), stages, shapes)

    with pytest.raises(UserError, match=r"^method.reorthogonalise: there are no factors under full fine-tuning"):
        check("pertask", train="full", reorthogonalise={"how": "soft"})
    check("hard-orth", [(4, 8)])
    with pytest.raises(
        UserError, match=r"of 9 rows in 8 dimensions not all can be orthonormal; set adapter.r to 8 or le"
    ):
        check("hard-orth", [(4, 8)], r=9)
    with pytest.raises(UserError, match=r"of 8 rows in 4 dimensions"):
        check("hard-orth", [(4, 8)], reorthogonalise={"on": "both"})
    check("soft-orth", [(4, 8)], r=9)


def test_a_user_is_shown_what_may_be_set(capsys: pytest.CaptureFixture[str]) -> None:
    show_method("soft-orth", as_json=False)
    line = 'method.reorthogonalise = {how: soft, every: 100, "on": A, rescale: false, moments: null}'
    assert f"{line}\n" in capsys.readouterr().out
    show_method("hard-orth", as_json=True)
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["reorthogonalise"]["default"] == {
        "how": "hard", "every": 100, "on": "A", "rescale": False, "moments": None,
    }  # fmt: skip
