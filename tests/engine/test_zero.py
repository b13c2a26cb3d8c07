"""The engine against torch's own autograd and optimizers on the whole batch at once, with one rank and with two."""

from __future__ import annotations

import gc
import json
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cl_runner.config.schema import TrainingConfig
from cl_runner.engine import zero as engine_module
from cl_runner.engine.optim import ParameterGroup
from cl_runner.engine.process import Place
from cl_runner.engine.replicated import engine_for
from cl_runner.engine.zero import OWNED, Autocast, deepspeed_config, read_deepspeed_json
from cl_runner.errors import TrainingError, UserError
from tests.distributed import on_ranks as on_ranks_of

ROWS = 12
ZERO = 2  # what ``training.zero`` is where nothing else is said, in every process that works for the test
Values = dict[str, Tensor]


@pytest.fixture(params=[2, 1, 0])
def zero(request: pytest.FixtureRequest) -> Iterator[int]:
    global ZERO
    ZERO = request.param
    yield ZERO
    ZERO = 2


def both(test: Callable[..., None]) -> Any:
    """One rank and two, under each ZeRO."""
    return pytest.mark.usefixtures("zero")(pytest.mark.parametrize("ranks", [1, 2])(test))


def on_ranks(ranks: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    return on_ranks_of(ranks, under, ZERO, body, *args)


def under(place: Place, given: int, body: Callable[..., Any], *args: Any) -> Any:
    global ZERO
    before, ZERO = ZERO, given
    try:
        return body(place, *args)
    finally:
        ZERO = before


class Small(nn.Module):
    """A frozen layer with a pair beside it, and a parameter that no loss reaches unless asked to."""

    def __init__(self, base_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def made(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) * 0.5

        self.base = nn.Parameter(made(5, 6).to(base_dtype), requires_grad=False)
        self.A = nn.Parameter(made(2, 6))
        self.B = nn.Parameter(made(5, 2))
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.base.dtype), self.base) + nn.functional.linear(
            nn.functional.linear(x, self.A), self.B
        )

    def named(self, *names: str) -> dict[str, nn.Parameter]:
        return {name: getattr(self, name) for name in names or ("A", "B")}


def data(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(ROWS, 6, generator=generator), torch.randn(ROWS, 5, generator=generator)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Sum over rows; the mean is taken by who calls."""
    return (model(x).float() - y).square().sum(1).sum()


class Work:
    """An engine over ``Small``, and a step of it over the rows of ``data``, dealt out as the runner deals them."""

    def __init__(
        self,
        place: Place,
        accumulation: int = 1,
        groups: Sequence[ParameterGroup] | None = None,
        model: Small | None = None,
        bf16: bool = False,
        **training: Any,
    ) -> None:
        self.place, self.accumulation = place, accumulation
        self.model = model or Small()
        self.root = Autocast(self.model, torch.device("cpu"), bf16)
        settings = TrainingConfig.model_validate({"zero": ZERO, "clip": 0.0, "lr": 0.05, **training})
        self.micro = ROWS // (place.ranks * accumulation)
        self.engine = engine_for(settings)(
            self.root,
            groups or [ParameterGroup(self.model.named())],
            settings,
            place,
            micro_batch=self.micro,
            accumulation=accumulation,
        )

    def backward(self, step: int = 0, penalty: Callable[[], Tensor] | None = None) -> None:
        """All micro-batches of a step up to the last backward."""
        x, y = data(step)
        for slot in range(self.accumulation):
            start = (slot * self.place.ranks + self.place.rank) * self.micro
            rows = slice(start, start + self.micro)
            loss = self.engine.forward(lambda rows=rows: loss_of(self.model, x[rows], y[rows]))  # type: ignore[misc]
            loss = loss * self.place.ranks / ROWS
            last = slot == self.accumulation - 1
            self.engine.backward(loss + penalty() if last and penalty else loss)
            if not last:
                self.engine.next_micro_batch()

    def step(self, step: int = 0, penalty: Callable[[], Tensor] | None = None) -> float:
        self.backward(step, penalty)
        norm = self.engine.clip()
        self.engine.step()
        return norm

    def values(self, *names: str) -> Values:
        return {name: p.detach().clone() for name, p in self.model.named(*names).items()}

    def masters(self, *names: str) -> Values:
        from deepspeed.utils import safe_get_full_fp32_param

        if ZERO == 0:
            return self.values(*names)
        return {name: safe_get_full_fp32_param(p) for name, p in self.model.named(*names).items()}

    def done(self, *names: str) -> Values:
        values = self.values(*names)
        self.engine.destroy()
        return values


def naive_gradients(model: Small, step: int = 0, penalty: Callable[[Small], Tensor] | None = None) -> Values:
    x, y = data(step)
    loss = loss_of(model, x, y) / ROWS
    if penalty:
        loss = loss + penalty(model)
    named = model.named()
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def naive_steps(
    model: Small,
    optimizer: torch.optim.Optimizer,
    steps: int,
    penalty: Callable[[Small], Tensor] | None = None,
    clip: float = 0.0,
) -> Values:
    for step in range(steps):
        for name, gradient in naive_gradients(model, step, penalty).items():
            getattr(model, name).grad = gradient
        if clip:
            nn.utils.clip_grad_norm_(model.named().values(), clip)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named().items()}


def close(ours: Values, theirs: Values, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert list(ours) == list(theirs)
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def equal(ours: Values, theirs: Values) -> None:
    close(ours, theirs, 0.0, 0.0)


# --- precision (rule 1)


def precise(place: Place) -> dict[str, Any]:
    work = Work(place, 2, model=Small(torch.bfloat16), bf16=True)
    work.backward()
    gradients = work.engine.whole_gradients()
    work.engine.step()
    for step in range(1, 4):
        work.step(step)
    found = {
        "gradients": gradients,
        "values": work.values(),
        "masters": work.masters(),
        "bf16": work.engine._engine.bfloat16_enabled(),
        "autocast": work.engine._engine.torch_autocast_enabled(),
        "base": work.model.base.dtype,
    }
    # A factor inside an autocast forward computes in bf16.
    found["product"] = work.root(lambda: work.model.A @ work.model.A.T).dtype
    work.engine.destroy()
    return found


@both
def test_what_trains_is_fp32_and_its_own_master(ranks: int) -> None:
    for found in on_ranks(ranks, precise):
        assert all(value.dtype == torch.float32 for value in found["values"].values())
        equal(found["values"], found["masters"])
        assert not found["bf16"] and not found["autocast"]
        assert found["base"] == torch.bfloat16 and found["product"] == torch.bfloat16
        assert all(gradient.dtype == torch.float32 for gradient in found["gradients"].values())
        # The gradient of bf16 compute: near the fp32 one, but not it.
        exact = naive_gradients(Small(torch.bfloat16))
        for name, gradient in found["gradients"].items():
            off = float((gradient - exact[name]).norm() / exact[name].norm())
            assert 1e-5 < off < 0.03
            # Summed in fp32: not rounded to bf16 on the way between ranks or micro-batches.
            assert not torch.equal(gradient, gradient.bfloat16().float())


def test_what_trains_must_be_fp32() -> None:
    model = Small()
    model.A.data = model.A.data.bfloat16()
    with pytest.raises(TrainingError, match=r"A trains and is torch\.bfloat16"):
        Work(Place(), model=model)


def test_a_forward_without_gradients_costs_later_ones_nothing() -> None:
    model = Small()
    root = Autocast(model, torch.device("cpu"), True)
    x, y = data()

    def distil() -> Tensor:
        with torch.no_grad():
            before = model(x)
            model.A.add_(1.0)
            moved = model(x)
        assert not torch.equal(before, moved)  # a cached cast of A would not have seen the write
        return loss_of(model, x, y)

    assert torch.autograd.grad(root(distil), [model.A])[0].abs().sum() > 0


# --- one graph (rule 2), the mean (rule 3), the penalty (rule 4)


def gradients(place: Place, accumulation: int, punished: bool = False) -> Values:
    work = Work(place, accumulation)
    for step in range(2):  # the second step has nothing left of the first
        penalty = (lambda: 3.0 * work.model.A.abs().sum()) if punished else None
        work.backward(step, penalty)
        found = work.engine.whole_gradients()
        equal(found, work.engine.whole_gradients())
        work.engine.step()
    work.engine.destroy()
    return found


@both
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("punished", [False, True])
def test_gradients_are_those_of_the_whole_batch(ranks: int, accumulation: int, punished: bool) -> None:
    def penalty(model: Small) -> Tensor:
        return 3.0 * model.A.abs().sum() if punished else torch.zeros(())

    reference = Small()
    naive_steps(reference, torch.optim.AdamW(reference.named().values(), lr=0.05, weight_decay=0.0), 1, penalty)
    expected = naive_gradients(reference, 1, penalty)
    for found in on_ranks(ranks, gradients, accumulation, punished):
        close(found, expected)


def divided_by_deepspeed(place: Place, accumulation: int) -> Values:
    """As the reference's scripts run: the penalty on every micro-batch's mean loss, DeepSpeed's division on all."""
    work = Work(place, accumulation)
    x, y = data()
    for slot in range(accumulation):
        start = (slot * place.ranks + place.rank) * work.micro
        rows = slice(start, start + work.micro)
        loss = work.engine.forward(lambda rows=rows: loss_of(work.model, x[rows], y[rows]) / work.micro)  # type: ignore[misc]
        work.engine._engine.backward(loss + 3.0 * work.model.A.abs().sum())
        if slot < accumulation - 1:
            work.engine.next_micro_batch()
    found = work.engine.whole_gradients()
    work.engine.step()
    work.engine.destroy()
    return found


@both
@pytest.mark.parametrize("accumulation", [1, 3])
def test_under_deepspeed_the_references_penalty_counts_once_a_step(ranks: int, accumulation: int) -> None:
    """What ``training.penalty_at: step`` rests on in the published settings, whatever the accumulation."""
    expected = naive_gradients(Small(), penalty=lambda model: 3.0 * model.A.abs().sum())
    for found in on_ranks(ranks, divided_by_deepspeed, accumulation):
        close(found, expected)


def experts(place: Place) -> Values:
    """Rank r asks expert r: indexed out of one stacked parameter, with a mask for what is not there."""
    model = Small()
    model.stack = nn.Parameter(torch.ones(3, 4))
    root = Autocast(model, torch.device("cpu"), False)
    groups = [ParameterGroup({"stack": model.stack})]
    training = TrainingConfig(clip=0.0, zero=ZERO)
    engine = engine_for(training)(root, groups, training, place, micro_batch=1, accumulation=2)
    x = torch.arange(4.0)
    for slot in range(2):
        chosen = torch.tensor([place.rank])
        here = torch.tensor(1.0 if slot == 0 else 0.0)
        loss = engine.forward(lambda c=chosen, h=here: (model.stack[c] * x).sum() * h)  # type: ignore[misc]
        engine.backward(loss)
        if slot == 0:
            engine.next_micro_batch()
    found = engine.whole_gradients()
    engine.destroy()
    return found


@both
def test_experts_in_one_stack_have_their_share_of_the_mean(ranks: int) -> None:
    expected = torch.zeros(3, 4)
    expected[:ranks] = torch.arange(4.0) / ranks
    for found in on_ranks(ranks, experts):
        torch.testing.assert_close(found["stack"], expected)


def unreached(place: Place) -> tuple[Values, Values]:
    """A loss that reaches no parameter, one that only a penalty reaches, and a parameter that nothing reaches."""
    model = Small()
    work = Work(place, 2, [ParameterGroup(model.named("A", "B", "gain"))], model=model)
    for slot in range(2):
        loss = work.engine.forward(lambda: torch.tensor(2.0))
        work.engine.backward(loss + 3.0 * model.A.sum() if slot else loss)
        if slot == 0:
            work.engine.next_micro_batch()
    found = work.engine.whole_gradients()
    assert work.engine.gradient_norm() == pytest.approx(3.0 * math.sqrt(12))
    work.engine.step()
    return found, work.done("A", "B", "gain")


@both
def test_parameters_that_no_loss_reaches_stay(ranks: int) -> None:
    model = Small()
    for found, values in on_ranks(ranks, unreached):
        assert torch.equal(found["A"], torch.full((2, 6), 3.0))
        assert not found["B"].any() and not found["gain"].any()
        equal({n: values[n] for n in ("B", "gain")}, {n: p.detach() for n, p in model.named("B", "gain").items()})
        assert not torch.equal(values["A"], model.A)


# --- clipping (rule 5)


def clipped(place: Place, accumulation: int) -> dict[str, Any]:
    work = Work(place, accumulation, clip=0.5)
    before = work.engine._engine.gradient_clipping()
    work.backward()
    raw = work.engine.whole_gradients()
    norm = work.engine.clip()
    found = {"deepspeed": before, "raw": raw, "norm": norm, "clipped": work.engine.whole_gradients()}
    found["norm_after"] = work.engine.gradient_norm()
    work.engine.destroy()
    return found


@both
@pytest.mark.parametrize("accumulation", [1, 3])
def test_clipping_is_by_the_whole_norm(ranks: int, accumulation: int) -> None:
    expected = naive_gradients(Small())
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    assert norm > 0.5
    for found in on_ranks(ranks, clipped, accumulation):
        assert found["deepspeed"] == 0.0  # unset would be 1.0
        assert found["norm"] == pytest.approx(norm, rel=1e-5)
        close(found["raw"], expected)
        close(found["clipped"], {name: g * 0.5 / norm for name, g in expected.items()})
        assert found["norm_after"] == pytest.approx(0.5, rel=1e-4)


def edited(place: Place) -> Values:
    model = Small()
    work = Work(place, groups=[ParameterGroup(model.named(), rule="sgd")], model=model, clip=0.5, lr=1.0)
    work.backward()
    work.engine.clip()
    work.engine.set_whole_gradients({"A": torch.full((2, 6), 100.0)})
    work.engine.step()
    return work.done()


@both
def test_what_is_edited_is_not_scaled_again(ranks: int) -> None:
    start = Small()
    norm = math.sqrt(sum(float(g.square().sum()) for g in naive_gradients(start).values()))
    for values in on_ranks(ranks, edited):
        torch.testing.assert_close(values["A"], start.A.detach() - 100.0)
        torch.testing.assert_close(values["B"], start.B.detach() - naive_gradients(start)["B"] * 0.5 / norm)


def little(place: Place) -> tuple[float, Values]:
    """Fewer numbers than ranks: one rank owns nothing but padding."""
    model = Small()
    work = Work(place, groups=[ParameterGroup({"gain": model.gain}, rule="sgd")], model=model, clip=0.5, lr=1.0)
    loss = work.engine.forward(lambda: (model.gain * 4.0).sum())
    work.engine.backward(loss)
    norm = work.engine.clip()
    work.engine.step()
    return norm, work.done("gain")


@both
def test_a_rank_without_a_share(ranks: int) -> None:
    for norm, values in on_ranks(ranks, little):
        assert norm == 4.0
        torch.testing.assert_close(values["gain"], torch.tensor([0.5]))


# --- writes (rule 6)


def written(place: Place, plainly: bool) -> tuple[Values, Values, Values]:
    model = Small()
    work = Work(place, groups=[ParameterGroup(model.named(), rule="sgd")], model=model)
    work.step(0)
    value = torch.full((2, 6), 7.0)
    if plainly:
        model.A.data.copy_(value)
    else:
        work.engine.write({"A": value})
    at_once = work.values()
    work.backward(1)
    gradient = work.engine.whole_gradients()
    work.engine.step()
    return at_once, gradient, work.done()


@both
def test_a_write_lasts(ranks: int) -> None:
    for at_once, gradient, after in on_ranks(ranks, written, False):
        assert torch.equal(at_once["A"], torch.full((2, 6), 7.0))
        torch.testing.assert_close(after["A"], 7.0 - 0.05 * gradient["A"])


@both
def test_a_plain_write_is_lost(ranks: int) -> None:
    """Why there is ``write``: if this ever fails, a plain write has come to last."""
    if ZERO == 0:
        return  # the parameter is all there is
    start = Small()
    start_after = start.A.detach() - 0.05 * naive_gradients(start, 0)["A"]
    for at_once, gradient, after in on_ranks(ranks, written, True):
        assert torch.equal(at_once["A"], torch.full((2, 6), 7.0))
        torch.testing.assert_close(after["A"], start_after - 0.05 * gradient["A"])


def written_between(place: Place) -> tuple[Values, Values]:
    """A write between backward and step, which a ``whole`` rule is."""
    model = Small()
    groups = [ParameterGroup({"A": model.A}, rule="whole"), ParameterGroup({"B": model.B})]
    work = Work(place, 3, groups, model=model)
    for step in range(3):
        work.backward(step)
        gradient = work.engine.whole_gradients()
        work.engine.write({"A": model.A.detach() - 0.05 * gradient["A"]})
        work.engine.step()
        equal(work.values(), work.masters())
    return gradient, work.done()


@both
def test_the_whole_rule_is_what_the_method_makes_of_it(ranks: int) -> None:
    reference = Small()
    sgd, adamw = torch.optim.SGD([reference.A], lr=0.05), torch.optim.AdamW([reference.B], lr=0.05, weight_decay=0.0)
    for step in range(3):
        expected = naive_gradients(reference, step)
        reference.A.grad, reference.B.grad = expected["A"], expected["B"]
        sgd.step()
        adamw.step()
    for gradient, values in on_ranks(ranks, written_between):
        close(gradient, expected)
        close(values, {name: p.detach() for name, p in reference.named().items()})


def whole_alone(place: Place) -> Values:
    model = Small()
    work = Work(place, groups=[ParameterGroup(model.named(), rule="whole")], model=model)
    work.backward()
    work.engine.write({"A": torch.ones(2, 6)})
    work.engine.step()
    assert work.engine.moments("A") is None
    return work.done()


@both
def test_an_engine_may_have_nothing_but_whole_rules(ranks: int) -> None:
    for values in on_ranks(ranks, whole_alone):
        equal(values, {"A": torch.ones(2, 6), "B": Small().B.detach()})


# --- other gradients (rule 7)


def looked_aside(place: Place, aside: bool) -> tuple[Values, Values, Values]:
    work = Work(place, 3)
    other: Values = {}
    for step in range(3):
        work.backward(step)
        if aside:
            x, y = data(50 + step)
            found = torch.autograd.grad(
                loss_of(work.model, x[place.rank :: place.ranks], y[place.rank :: place.ranks]) / ROWS,
                [work.model.A, work.model.B],
            )
            other = {n: work.engine.all_reduce(g) for n, g in zip("AB", found, strict=True)}
        gradients = work.engine.whole_gradients()
        work.engine.step()
    return other, gradients, work.done()


@both
def test_a_gradient_between_backward_and_step_leaves_the_step_alone(ranks: int) -> None:
    plain = on_ranks(ranks, looked_aside, False)
    for (_, gradients, values), (other, same, same_values) in zip(
        plain, on_ranks(ranks, looked_aside, True), strict=True
    ):
        equal(same, gradients)
        equal(same_values, values)
        assert other["A"].abs().sum() > 0


# --- rules, rates, decay, moments


def optimised(place: Place, accumulation: int) -> tuple[Values, Values]:
    model = Small()
    groups = [
        ParameterGroup({"A": model.A}, lr_scale=0.5, weight_decay=0.1, options={"betas": (0.8, 0.9)}),
        ParameterGroup({"B": model.B}, rule="sgd", lr_scale=2.0, weight_decay=0.2, options={"momentum": 0.9}),
        ParameterGroup({}),
    ]
    work = Work(place, accumulation, groups, model=model, clip=1.0)
    for step in range(4):
        work.engine.set_lr(0.05 / (step + 1))
        work.step(step)
    equal(work.values(), work.masters())
    moments = work.engine.moments("A")
    assert moments is not None
    assert work.engine.moments("B") is None
    return moments, work.done()


@both
@pytest.mark.parametrize("accumulation", [1, 3])
def test_rules_rates_and_decay(ranks: int, accumulation: int) -> None:
    reference = Small()
    adamw = torch.optim.AdamW([reference.A], weight_decay=0.1, betas=(0.8, 0.9))
    sgd = torch.optim.SGD([reference.B], weight_decay=0.2, momentum=0.9)
    for step in range(4):
        adamw.param_groups[0]["lr"] = 0.05 / (step + 1) * 0.5
        sgd.param_groups[0]["lr"] = 0.05 / (step + 1) * 2.0
        found = naive_gradients(reference, step)
        reference.A.grad, reference.B.grad = found["A"], found["B"]
        nn.utils.clip_grad_norm_([reference.A, reference.B], 1.0)
        adamw.step()
        sgd.step()
    for moments, values in on_ranks(ranks, optimised, accumulation):
        close(values, {name: p.detach() for name, p in reference.named().items()})
        state = adamw.state[reference.A]
        close(moments, {key: state[key] for key in ("exp_avg", "exp_avg_sq")}, atol=1e-8)


def with_moments(place: Place) -> tuple[Any, Values, Values]:
    work = Work(place)
    first = work.engine.moments("A")
    work.step(0)
    kept = {"exp_avg": torch.full((2, 6), 0.3), "exp_avg_sq": torch.full((2, 6), 0.2)}
    work.engine.set_moments("A", kept)
    back = work.engine.moments("A")
    assert back is not None
    equal(back, kept)
    work.step(1)
    after = work.engine.moments("A")
    assert after is not None
    return first, after, work.done()


@both
def test_moments_can_be_read_and_set(ranks: int) -> None:
    reference = Small()
    optimizer = torch.optim.AdamW(reference.named().values(), lr=0.05, weight_decay=0.0)
    naive_steps(reference, optimizer, 1)
    optimizer.state[reference.A]["exp_avg"].fill_(0.3)
    optimizer.state[reference.A]["exp_avg_sq"].fill_(0.2)
    for name, gradient in naive_gradients(reference, 1).items():
        getattr(reference, name).grad = gradient
    optimizer.step()
    for first, after, values in on_ranks(ranks, with_moments):
        assert first is None
        state = optimizer.state[reference.A]
        close(after, {key: state[key] for key in ("exp_avg", "exp_avg_sq")})
        close(values, {name: p.detach() for name, p in reference.named().items()})


def test_moments_need_a_step_and_adam() -> None:
    on_ranks(1, no_moments)


def no_moments(place: Place) -> None:
    model = Small()
    groups = [ParameterGroup({"A": model.A}), ParameterGroup({"B": model.B}, rule="sgd")]
    work = Work(place, groups=groups, model=model)
    moments = {"exp_avg": torch.zeros(2, 6)}
    with pytest.raises(TrainingError, match="A has no moments before the first step"):
        work.engine.set_moments("A", moments)
    work.step()
    work.engine.set_moments("A", moments)
    with pytest.raises(TrainingError, match=r"B has no moments .* nor under another rule"):
        work.engine.set_moments("B", {"exp_avg": torch.zeros(5, 2)})
    work.engine.destroy()


# --- what is not finite


def not_finite(place: Place) -> tuple[int, Values, Values]:
    work = Work(place)
    work.step(0)
    before = work.values()
    work.backward(1)
    work.engine.set_whole_gradients({"A": torch.full((2, 6), math.nan)})
    work.engine.step()
    skipped = work.values()
    equal(skipped, before)
    count = work.engine.skipped
    work.step(1)
    assert work.engine.skipped == count
    return count, before, work.done()


@both
def test_a_step_that_is_not_finite_is_skipped_and_counted(ranks: int) -> None:
    for count, before, after in on_ranks(ranks, not_finite):
        assert count == 1
        assert all(value.isfinite().all() for value in after.values())
        assert not torch.equal(before["A"], after["A"])


def infinite_norm(place: Place) -> tuple[float, bool]:
    work = Work(place, clip=1.0)
    loss = work.engine.forward(lambda: (work.model.A * math.inf).sum() * (1.0 if place.rank == 0 else 0.0))
    work.engine.backward(loss)
    norm = work.engine.clip()
    work.engine.destroy()
    return norm, True


@both
def test_every_rank_learns_of_a_gradient_that_is_not_finite(ranks: int) -> None:
    for norm, _ in on_ranks(ranks, infinite_norm):
        assert not math.isfinite(norm)


# --- activation checkpointing inside the engine


def checkpointed(place: Place, reentrant: bool) -> Values:
    work = Work(place, 3)
    model = work.model
    x, y = data()

    def compute(rows: slice) -> Tensor:
        hidden = checkpoint(lambda z: torch.tanh(model(z)), x[rows].requires_grad_(), use_reentrant=reentrant)
        return (hidden - y[rows]).square().sum() * place.ranks / ROWS

    for slot in range(3):
        start = (slot * place.ranks + place.rank) * work.micro
        loss = work.engine.forward(lambda s=start: compute(slice(s, s + work.micro)))  # type: ignore[misc]
        work.engine.backward(loss)
        if slot < 2:
            work.engine.next_micro_batch()
    found = work.engine.whole_gradients()
    work.engine.destroy()
    return found


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(ranks: int, reentrant: bool) -> None:
    model = Small()
    x, y = data()
    loss = (torch.tanh(model(x)) - y).square().sum() / ROWS
    expected = dict(zip("AB", torch.autograd.grad(loss, [model.A, model.B]), strict=True))
    for found in on_ranks(ranks, checkpointed, reentrant):
        close(found, expected)


# --- life and death


def lives(place: Place) -> list[dict[str, Any]]:
    model = Small()
    root = Autocast(model, torch.device("cpu"), False)
    seen, dead = [], []
    for stage in range(3):
        group = ParameterGroup(model.named())
        training = TrainingConfig(clip=0.0, lr=0.05, zero=ZERO)
        engine = engine_for(training)(root, [group], training, place, micro_batch=ROWS, accumulation=1)
        x, y = data(stage)
        engine.backward(engine.forward(lambda x=x, y=y: loss_of(model, x, y) / ROWS))  # type: ignore[misc]
        engine.step()
        before = {name: p.detach().clone() for name, p in model.named().items()}
        dead += [weakref.ref(engine._engine), weakref.ref(engine._optimizer)]
        dead += [weakref.ref(engine._optimizer.single_partition_of_fp32_groups[0])] if ZERO else []
        engine.destroy()
        del engine
        gc.collect()
        after = {name: p.detach().clone() for name, p in model.named().items()}
        seen.append(
            {
                "kept": all(torch.equal(before[n], after[n]) for n in before),
                "alive": sum(ref() is not None for ref in dead),
                "hooks": len(root._forward_hooks) + len(root._forward_pre_hooks),
                "marks": sorted(set(vars(model.A)) | set(vars(model.B))),
                "storage": model.A.untyped_storage().nbytes(),
                "grad": model.A.grad,
                "values": after,
            }
        )
    return seen


@both
def test_an_engine_leaves_nothing_but_the_values(ranks: int) -> None:
    for stages in on_ranks(ranks, lives):
        reference = Small()
        for number, found in enumerate(stages):
            assert found["kept"] and found["alive"] == 0 and found["hooks"] == 0 and found["grad"] is None
            assert found["storage"] == 2 * 6 * 4  # not a view into ZeRO's flat buffer
            # A new engine is a new optimizer: one Adam step from where the last one ended.
            optimizer = torch.optim.AdamW(reference.named().values(), lr=0.05, weight_decay=0.0)
            for name, gradient in naive_gradients(reference, number).items():
                getattr(reference, name).grad = gradient
            optimizer.step()
            close(found["values"], {name: p.detach() for name, p in reference.named().items()})


def died_in_the_middle(place: Place) -> Values:
    """Destroyed between two micro-batches, then wrapped again: nothing is left of the half step."""
    model = Small()
    work = Work(place, 3, model=model)
    x, y = data(7)
    work.engine.backward(work.engine.forward(lambda: loss_of(model, x, y)))
    work.engine.next_micro_batch()
    work.engine.destroy()
    again = Work(place, 3, model=model)
    again.backward()
    found = again.engine.whole_gradients()
    again.engine.destroy()
    return found


@both
def test_a_half_step_does_not_reach_the_next_stage(ranks: int) -> None:
    for found in on_ranks(ranks, died_in_the_middle):
        close(found, naive_gradients(Small()))


def another_trains(place: Place) -> Values:
    """A asks for gradients while B alone trains; then both train."""
    model = Small()
    first = Work(place, groups=[ParameterGroup({"B": model.B}, rule="sgd")], model=model, lr=1e-12)
    first.step()
    first.engine.destroy()
    assert ZERO == 0 or model.A.grad is not None
    second = Work(place, model=model)
    second.backward()
    found = second.engine.whole_gradients()
    second.engine.destroy()
    return found


@both
def test_a_gradient_of_an_earlier_stage_is_not_added_to(ranks: int) -> None:
    for found in on_ranks(ranks, another_trains):
        close(found, naive_gradients(Small()))


def test_the_environment_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    before = dict(os.environ)
    for _ in range(2):  # and a group can be brought up again
        engine_module.start(Place())
        try:
            assert os.environ["RANK"] == "0" and int(os.environ["MASTER_PORT"]) > 0
            engine_module.start(Place())  # does nothing
            assert torch.distributed.get_world_size() == 1
            Work(Place()).done()
        finally:
            engine_module.stop()
        assert dict(os.environ) == before
        assert not torch.distributed.is_initialized()
    engine_module.stop()


def told(place: Place) -> Any:
    return engine_module.broadcast_object(place, {"from": place.rank})


@both
def test_an_object_of_rank_0_for_all(ranks: int) -> None:
    assert on_ranks(ranks, told) == [{"from": 0}] * ranks


# --- DeepSpeed's configuration


def read(file: Path, **training: Any) -> dict[str, Any]:
    return read_deepspeed_json(TrainingConfig.model_validate({"deepspeed": str(file), **training}))


def settings(**training: Any) -> dict[str, Any]:
    return deepspeed_config(TrainingConfig.model_validate(training), micro_batch=2, accumulation=3, ranks=4)


def test_our_configuration() -> None:
    made = settings()
    assert made["train_batch_size"] == 24
    assert made["train_micro_batch_size_per_gpu"] == 2 and made["gradient_accumulation_steps"] == 3
    assert made["gradient_clipping"] == 0.0
    assert made["zero_optimization"]["stage"] == 2
    assert [settings(zero=zero)["zero_optimization"]["stage"] for zero in (0, 1, 2)] == [0, 1, 2]
    assert not {"bf16", "fp16", "amp", "torch_autocast", "optimizer", "scheduler"} & set(made)


def test_a_json_is_merged(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"reduce_bucket_size": 5, "stage": 2}, "wall_clock_breakdown": true}')
    made, ours = settings(deepspeed=str(file)), settings()
    assert made["zero_optimization"] == {**ours["zero_optimization"], "reduce_bucket_size": 5}
    assert made["wall_clock_breakdown"] is True
    assert made["gradient_clipping"] == 0.0
    assert ours["zero_optimization"]["reduce_bucket_size"] != 5
    with pytest.raises(UserError, match=r"zero_optimization\.stage is 2, and training\.zero is 1"):
        settings(deepspeed=str(file), zero=1)


@pytest.mark.parametrize("key", sorted(OWNED))
def test_keys_of_ours_are_refused(key: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    inner = given
    *outer, last = key.split(".")
    for part in outer:
        inner = inner.setdefault(part, {})
    inner[last] = 1
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(given))
    with pytest.raises(UserError, match=rf"ds\.json: '{key}' is decided by training\.") as error:
        read(file)
    assert OWNED[key] in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"zero_optimization": {"stage": 3}}', "stage is 3, and training.zero is 2; set training.zero, and remove it"),
        ('{"zero_optimization": 2}', "zero_optimization must be a JSON object"),
        (None, "No such file"),
    ],
)
def test_a_json_that_will_not_do(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        read(file)


def with_json(place: Place, file: str) -> Values:
    work = Work(place, 3, deepspeed=file)
    work.step()
    return work.done()


@both
def test_a_merged_json_runs(ranks: int, tmp_path: Path) -> None:
    """A bucket smaller than the parameters: many reductions a backward."""
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"reduce_bucket_size": 5, "allgather_bucket_size": 6}}')
    reference = Small()
    expected = naive_steps(reference, torch.optim.AdamW(reference.named().values(), lr=0.05, weight_decay=0.0), 1)
    for values in on_ranks(ranks, with_json, str(file)):
        close(values, expected)


def test_a_json_with_a_key_that_deepspeed_does_not_know(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"reduce_buckett_size": 5}}')
    with pytest.raises(UserError, match=r"training\.deepspeed: .*ds\.json: .*reduce_buckett_size"):
        on_ranks(1, with_json, str(file))


def test_what_zero_cannot_be() -> None:
    with pytest.raises(ValidationError, match="cannot be 3: it splits the base's weights too"):
        TrainingConfig.model_validate({"zero": 3})
    with pytest.raises(ValidationError, match="offload_optimizer needs 1 or 2"):
        TrainingConfig(zero=0, offload_optimizer=True)


def offloaded(place: Place, accumulation: int, offload: bool) -> dict[str, Any]:
    work = Work(place, accumulation, offload_optimizer=offload, clip=0.7)
    norms = [work.step(step, lambda: 0.1 * work.model.A.square().sum()) for step in range(3)]
    work.backward(3)
    raw = work.engine.whole_gradients()
    work.engine.set_whole_gradients({"A": torch.ones(2, 6)})
    back = work.engine.whole_gradients()
    work.engine.step()
    work.engine.write({"B": torch.full((5, 2), 2.0)})
    work.step(4)
    moments = work.engine.moments("A")
    return {"norms": norms, "raw": raw, "back": back, "moments": moments, "values": work.done()}


@both
@pytest.mark.parametrize("accumulation", [1, 3])
def test_optimizer_states_in_cpu_memory_give_the_same(ranks: int, accumulation: int) -> None:
    plain = on_ranks(ranks, offloaded, accumulation, False)
    if ZERO == 0:
        return
    for ours, theirs in zip(on_ranks(ranks, offloaded, accumulation, True), plain, strict=True):
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-6)
        for key in ("raw", "back", "moments", "values"):
            close(ours[key], theirs[key])


def of_groups(place: Place) -> tuple[Values, Values]:
    model = Small()
    groups = [ParameterGroup({"A": model.A}), ParameterGroup({"B": model.B}, lr_scale=0.5)]
    work = Work(place, groups=groups, model=model)
    work.step(0)
    work.step(1)
    first, second = work.engine.moments("A"), work.engine.moments("B")
    assert first is not None and second is not None
    work.engine.destroy()
    return first, second


@both
def test_moments_of_every_group_can_be_read(ranks: int) -> None:
    reference = Small()
    optimizer = torch.optim.AdamW(
        [{"params": [reference.A], "lr": 0.05}, {"params": [reference.B], "lr": 0.025}], weight_decay=0.0
    )
    naive_steps(reference, optimizer, 2)
    for found in on_ranks(ranks, of_groups):
        for moments, parameter in zip(found, (reference.A, reference.B), strict=True):
            state = optimizer.state[parameter]
            close(moments, {key: state[key] for key in ("exp_avg", "exp_avg_sq")})


# --- what it holds between two steps


def gone_on(place: Place, accumulation: int) -> None:
    """A new engine, given what another held after two steps, takes the same third and fourth step, to the bit."""

    def fresh() -> Work:
        model = Small()
        groups = [
            ParameterGroup({"A": model.A}, weight_decay=0.1),
            ParameterGroup({"B": model.B}, rule="sgd", options={"momentum": 0.9}),
        ]
        return Work(place, accumulation, groups, model=model, clip=1.0)

    work = fresh()
    for step in range(4):
        if step == 2:
            held, counts = work.engine.state()
            again = json.loads(json.dumps(counts))
        work.step(step)
    wanted, _ = work.engine.state()
    work.engine.destroy()
    assert counts == {"steps": 2, "skipped": 0}
    assert sorted(held) == ["exp_avg.A", "exp_avg_sq.A", "momentum_buffer.B", "parameter.A", "parameter.B"]
    work = fresh()
    work.engine.load_state(held, again)
    equal(work.engine.state()[0], held)
    for step in (2, 3):
        work.step(step)
    equal(work.engine.state()[0], wanted)
    equal(work.values(), work.masters())
    work.engine.destroy()


@both
@pytest.mark.parametrize("accumulation", [1, 3])
def test_another_engine_goes_on_to_the_bit(ranks: int, accumulation: int) -> None:
    on_ranks(ranks, gone_on, accumulation)
