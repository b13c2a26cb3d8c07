"""SD-LoRA: steps against a loop over explicit matrices, frozen directions to the bit, what is kept answers alike."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.maths import directions
from cl_runner.methods import make_method
from cl_runner.methods.sdlora import past as past_of
from cl_runner.methods.sdlora.directions import Directions
from cl_runner.methods.sdlora.past import Past
from cl_runner.training.compatibility import check_method
from cl_runner.training.stage import StageRun
from tests.breadth import wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import LR, STEPS, THREE, off, opposed
from tests.methods.test_terms import farthest, learned
from tests.stages import Kind, naive_loss, tiny_config, tiny_model


def by_hand(kind: Kind, config: Any, targets: list[str], stages: int, reference: bool) -> list[dict[str, Tensor]]:
    """ΔW of every target in all, after each stage: a sum over written-out directions, torch's AdamW."""
    model = tiny_model(kind)
    W0 = {t: model.get_submodule(t).weight.detach().clone() for t in targets}
    D: dict[str, list[Tensor]] = {t: [] for t in targets}
    carried: dict[str, list[float]] = {t: [] for t in targets}
    found = []
    for index in range(stages):
        dice = StageRun(order_room(Place(), "sdlora", kind=kind)[0], config, index).rng("adapter")
        A, B, alpha = {}, {}, {}
        one = [torch.tensor(0.8, requires_grad=True) for _ in range(index + 1)]
        for t, W in W0.items():
            A[t] = nn.init.kaiming_uniform_(torch.empty(2, W.shape[1]), a=5**0.5, generator=dice).requires_grad_()
            B[t] = torch.zeros(W.shape[0], 2, requires_grad=True)
            alpha[t] = one if reference else [torch.tensor(a, requires_grad=True) for a in (*carried[t], 2.0)]

        def delta(t: str, A: Any = A, B: Any = B, alpha: Any = alpha) -> Tensor:
            past = sum((a * d for a, d in zip(alpha[t], D[t], strict=False)), torch.zeros(()))
            return past + alpha[t][-1] * (B[t] @ A[t])

        def answer(delta: Any = delta, **inputs: Any) -> Any:
            weights = {f"{t}.weight": W + delta(t) for t, W in W0.items()}
            return torch.func.functional_call(model, weights, (), inputs)

        scalars = one if reference else [a for each in alpha.values() for a in each]
        optimizer = torch.optim.AdamW([*A.values(), *B.values(), *scalars], lr=LR, weight_decay=0.0)
        for _ in range(STEPS):
            optimizer.zero_grad()
            naive_loss(answer, kind, opposed(index).examples).backward()
            optimizer.step()
        found.append({t: delta(t).detach() for t in targets})
        for t in targets:
            a, b = A[t].detach(), B[t].detach()
            size = a.norm() * b.norm() if reference else (b @ a).norm()
            D[t].append(b @ a / size)
            carried[t] = [float(x.detach()) for x in alpha[t][:-1]] + [float(alpha[t][-1].detach() * size)]
    return found


def _steps(place: Place, kind: Kind, reference: bool) -> list[dict[str, Tensor]]:
    room, config = order_room(place, "sdlora", kind=kind, **THREE, method__reference=reference)
    found, frozen = [], []
    for index in range(3):
        learn(room, config, index, opposed(index))
        found.append(learned(room))
        frozen.append({t: (past.A.clone(), past.B.clone()) for t, past in room.method.past.items()})
    for before, after in pairwise(frozen):
        for t, (A, B) in before.items():
            assert torch.equal(after[t][0][: len(A)], A) and torch.equal(after[t][1][:, : B.shape[1]], B)
    for past in room.method.past.values():
        assert past.ranks == [2, 2, 2] and len(past.alpha) == 3
        for A, B in past.each() if not reference else ():
            assert float((B.double() @ A.double()).norm()) == pytest.approx(1.0, abs=1e-5)
    return found


@pytest.mark.parametrize(
    ("kind", "reference", "ranks"),
    [("t5", False, 1), ("llama", True, 1), pytest.param("t5", True, 2, marks=wide), ("llama", False, 2)],
)
def test_steps_against_a_loop(kind: Kind, reference: bool, ranks: int) -> None:
    both = on_ranks(ranks, _steps, kind, reference)
    _, config = order_room(Place(), "sdlora", kind=kind, **THREE)
    wanted = by_hand(kind, config, list(both[0][0]), 3, reference)
    for ours in both:
        for index in range(3):
            assert farthest(ours[index], wanted[index]) < 5e-3, index
        assert farthest(ours[2], wanted[1]) > 0.1


def _parameters(place: Place, reference: bool) -> list[str]:
    room, config = order_room(place, "sdlora", **THREE, method__reference=reference)
    learn(room, config, 0, opposed(0))
    stage = StageRun(room, config, 1)
    room.method.build(stage)
    stage.close()
    first = next(iter(room.adapters.past))
    return [n for n in stage.parameters() if n.startswith(first) or n == "alpha"] + [
        str(tuple(stage.parameters()["alpha" if reference else f"{first}.alpha"].tolist()))
    ]


def test_magnitudes_are_of_each_layer_or_one_for_all() -> None:
    [paper], [reference] = on_ranks(1, _parameters, False), on_ranks(1, _parameters, True)
    first = "encoder.block.0.layer.0.SelfAttention.q"
    assert paper[:-1] == [f"{first}.{name}" for name in ("alpha", "A", "B")] and paper[-1].endswith(", 2.0)")
    assert reference[:-1] == ["alpha", f"{first}.A", f"{first}.B"] and "0.8" in reference[-1]
    assert len(set(reference[-1].strip("()").split(", "))) == 1  # all anew


def test_the_term_is_its_formula() -> None:
    dice = torch.Generator().manual_seed(0)
    A, B = torch.randn(5, 6, generator=dice), torch.randn(4, 5, generator=dice)
    new = torch.randn(2, 6, generator=dice), torch.randn(4, 2, generator=dice)
    term = Directions(A, B, [2, 3], nn.Parameter(torch.tensor([0.5, -2.0, 3.0])), new, dropout=0.5).eval()
    wanted = 0.5 * B[:, :2] @ A[:2] - 2.0 * B[:, 2:] @ A[2:] + 3.0 * new[1] @ new[0]
    torch.testing.assert_close(term.update(), wanted)
    torch.testing.assert_close(term.own(), 3.0 * new[1] @ new[0])
    x = torch.randn(2, 3, 6, generator=dice)
    torch.testing.assert_close(term(x, {}), x @ wanted.T)
    # Only the new pair's input is dropped.
    past = x @ (0.5 * B[:, :2] @ A[:2] - 2.0 * B[:, 2:] @ A[2:]).T
    torch.manual_seed(0)
    kept = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(term.train()(x, {}), past + 3.0 * kept @ new[0].T @ new[1].T)


def learns(reuse: float, A: Tensor, B: Tensor, past: Past | None, alpha: list[float]) -> Past:
    config = tiny_config()
    config = type(config).model_validate({**config.model_dump(), "method": {"name": "sdlora", "reuse": reuse}})
    method: Any = make_method(config)
    held = past or Past(torch.zeros(0, A.shape[1]), torch.zeros(len(B), 0), [], torch.zeros(0))
    term = Directions(held.A, held.B, held.ranks, nn.Parameter(torch.tensor(alpha)), (A, B))
    found = past_of.learned(term, held.ranks, method.config)
    now = Directions(found.A, found.B, found.ranks, nn.Parameter(found.alpha))
    if not reuse:
        assert off(now.update().detach(), term.update().detach()) < 1e-6
    return found


def test_a_direction_that_old_ones_make_up_is_theirs() -> None:
    dice = torch.Generator().manual_seed(1)

    def some() -> tuple[Tensor, Tensor]:
        return torch.randn(2, 6, generator=dice), torch.randn(4, 2, generator=dice)

    first, second = some(), some()
    past = learns(0.0, *first, None, [3.0])
    assert float(past.alpha) == pytest.approx(3 * float((first[1] @ first[0]).norm()))
    past = learns(0.0, *second, past, [past.alpha.item(), 1.5])
    assert past.ranks == [2, 2]
    alpha = [*past.alpha.tolist(), 2.0]
    again = first[0], 4 * first[1]  # ‖4 B A‖ along the first direction
    before = Directions(past.A, past.B, past.ranks, nn.Parameter(torch.tensor(alpha)), again).update().detach()
    found = learns(0.01, *again, past, alpha)
    assert found.A is past.A and found.B is past.B and found.ranks == [2, 2]
    now = Directions(found.A, found.B, found.ranks, nn.Parameter(found.alpha)).update().detach()
    assert off(now, before) < 1e-5 and off(found.alpha, past.alpha) > 0.1
    other = learns(0.01, *some(), past, alpha)
    assert other.ranks == [2, 2, 2]
    none = learns(0.01, first[0], torch.zeros(4, 2), past, alpha)  # nothing learned
    assert none.ranks == [2, 2, 2] and not none.B[:, 4:].any() and none.alpha[-1] == 0


def test_old_directions_are_fitted_where_the_new_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a resume on a GPU: the state's directions are on the CPU, those of the layer are not."""
    asked = []

    def fit(old: Any, new: Any) -> tuple[Tensor, float]:
        asked.extend(factor.device.type for pair in (*old, new) for factor in pair)
        return torch.zeros(len(old), dtype=torch.float64, device="meta"), 0.0

    monkeypatch.setattr(directions, "fitted", fit)
    config = tiny_config()
    config = type(config).model_validate({**config.model_dump(), "method": {"name": "sdlora", "reuse": 0.5}})
    method: Any = make_method(config)
    past = Past(torch.ones(3, 6), torch.ones(4, 3), [2, 1], torch.ones(2))
    pair = torch.ones(2, 6), torch.ones(4, 2)
    term = Directions(past.A, past.B, past.ranks, nn.Parameter(torch.ones(3)), pair).to("meta")
    found = past_of.learned(term, past.ranks, method.config)
    assert asked == ["meta"] * 6 and {found.A.device.type, found.B.device.type, found.alpha.device.type} == {"meta"}


def _decaying(place: Place) -> list[list[int]]:
    own = {"method__rank_decay": [4, 1], "method__decay_every": 2, "adapter__r": 6}
    room, config = order_room(place, "sdlora", "abcdef", **{**THREE, **own})
    for index in range(6):
        learn(room, config, index, opposed(index % 3))
    return [past.ranks for past in room.method.past.values()]


def test_ranks_decay() -> None:
    [ranks] = on_ranks(1, _decaying)
    assert all(each == [6, 6, 4, 4, 1, 1] for each in ranks)


def test_what_cannot_work_is_refused() -> None:
    def check(shapes: Any = None, **settings: Any) -> None:
        room, config = order_room(Place(), "sdlora", "abcdefghijklmno", **settings)
        check_method(config, room.order)
        check_method(config, room.order, shapes)

    check([(1024, 1024)] * 144)
    with pytest.raises(UserError, match=r"^method.reuse: .* set method.reference=false$"):
        check(method__reference=True, method__reuse=0.1)
    # (4 · 64 + 11 · 32) · 224 · 8192 floats
    with pytest.raises(
        UserError, match=r"^adapter.r: directions of 224 layers over 15 tasks take 4.46 GB, .*max_gb 4;"
    ):
        check([(4096, 4096)] * 224, adapter__r=64, method__rank_decay=[32], method__max_gb=4)
    room, config = order_room(Place(), "sdlora", "abc", adapter__r=8, method__rank_decay=[4], method__decay_every=2)
    # (8 + 8 + 4) · 10 · 1536 floats
    assert room.method.grows(config, [(1024, 512)] * 10) == (
        "carries 0.492 MB a task, 1.23 MB in all: directions of 10 layers"
    )
    with pytest.raises(ValueError, match="a rank is 1 or more"):
        check(method__rank_decay=[0])
