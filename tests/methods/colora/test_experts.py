"""A term of experts against its formula, row by row; the matrices that stand for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.methods.colora.experts import Experts
from cl_runner.methods.colora.rounds import LiveRound, PastRound, Round

M, N, R, K, SCALE = 7, 5, 2, 3, 1.5


def random_values(seed: int = 0, experts: int = K) -> dict[str, Tensor]:
    """Factors of a round, no two tasks mixing alike."""
    dice = torch.Generator().manual_seed(seed)
    shapes = {
        "A": (experts, R, N), "B": (experts, M, R), "shared_A": (R, N), "shared_B": (M, R), "mix": (experts,),
    }  # fmt: skip
    return {name: torch.randn(*shape, generator=dice) for name, shape in shapes.items()}


def one(seed: int = 0, trains: bool = True, experts: int = K) -> Round:
    share = torch.rand(experts, generator=torch.Generator().manual_seed(100 + seed))
    return (LiveRound if trains else PastRound)(random_values(seed, experts), share / share.sum(), SCALE)


def by_hand(round: Round, x: Tensor, expert: int) -> Tensor:
    """``s (c_k · B_s A_s x + (1 − c_k) · B_k A_k x)`` of one vector."""
    of = round.values()
    c = 1 / (1 + torch.exp(-of["mix"][expert]))
    shared, own = of["shared_B"] @ (of["shared_A"] @ x), of["B"][expert] @ (of["A"][expert] @ x)
    return SCALE * (c * shared + (1 - c) * own)


def rows(b: int = 4, t: int = 3) -> Tensor:
    return torch.randn(b, t, N, generator=torch.Generator().manual_seed(9))


def test_hard_routing_is_each_rows_own_expert_alone() -> None:
    x, experts = rows(), [2, 0, 0, 1]
    first, second = one(0, trains=False), one(1)
    term = Experts({"round1": first, "round2": second}, dropout=0.0)
    route = torch.eye(K)[experts]
    found = term(x, {"round1": route, "round2": route})
    for row, expert in enumerate(experts):
        for place in range(x.shape[1]):
            wanted = by_hand(first, x[row, place], expert) + by_hand(second, x[row, place], expert)
            assert torch.allclose(found[row, place], wanted, atol=1e-5)
    nothing = term(x, {"round1": torch.zeros(4, K), "round2": route})
    alone = torch.stack([torch.stack([by_hand(second, v, e) for v in x[i]]) for i, e in enumerate(experts)])
    assert torch.allclose(nothing, alone, atol=1e-5)


def test_soft_routing_is_the_mean_of_what_the_experts_would_add() -> None:
    x, round = rows(), one()
    gate = torch.rand(4, K, generator=torch.Generator().manual_seed(1)).softmax(1)
    found = Experts({"round1": round}, dropout=0.0)(x, {"round1": gate})
    for row in range(4):
        wanted = sum(gate[row, k] * by_hand(round, x[row, 0], k) for k in range(K))
        assert torch.allclose(found[row, 0], wanted, atol=1e-5)


def test_experts_of_other_tasks_have_a_gradient_of_zero_and_a_place_in_the_graph() -> None:
    round = one()
    Experts({"round1": round}, dropout=0.0)(rows(), {"round1": torch.eye(K)[[1, 1, 1, 1]]}).square().sum().backward()
    for name, parameter in round.named_parameters():
        assert parameter.grad is not None, name
        if not name.startswith("shared"):
            assert parameter.grad[1].any() and not parameter.grad[[0, 2]].any(), name
        else:
            assert parameter.grad.any()


def test_one_matrix_stands_for_the_mean_by_share_or_for_what_is_asked() -> None:
    first, second = one(0, trains=False, experts=2), one(1)
    term, x = Experts({"round1": first, "round2": second}, dropout=0.0), rows(1)
    mean = sum(first.share[k] * by_hand(first, x[0, 0], k) for k in range(2))
    mean = mean + sum(second.share[k] * by_hand(second, x[0, 0], k) for k in range(K))
    assert torch.allclose(term.update() @ x[0, 0], mean, atol=1e-5)
    A, B = term.factors()
    assert A.shape == (3 * R + 4 * R, N) and B.shape == (M, 7 * R)
    assert torch.allclose(B @ A, term.update())
    own = sum(second.share[k] * by_hand(second, x[0, 0], k) for k in range(K))
    assert torch.allclose(term.own() @ x[0, 0], own, atol=1e-5)
    term.asked = {"round1": torch.tensor([0.0, 1.0]), "round2": torch.tensor([1.0, 0.0, 0.0])}
    assert term.factors()[0].shape == (4 * R, N)  # of each round the shared pair and one expert
    wanted = by_hand(first, x[0, 0], 1) + by_hand(second, x[0, 0], 0)
    assert torch.allclose(term.update() @ x[0, 0], wanted, atol=1e-5)


def test_what_is_frozen_is_no_parameter_and_is_not_dropped() -> None:
    first, second = one(0, trains=False), one(1)
    term = Experts({"round1": first, "round2": second}, dropout=0.5).train()
    assert {name for name, _ in term.named_parameters()} == {f"rounds.round2.{name}" for name in Round.NAMES}
    x, on, off = rows(), torch.eye(K)[[0, 1, 2, 0]], torch.zeros(4, K)
    still = [term(x, {"round1": on, "round2": off}) for _ in range(2)]
    moving = [term(x, {"round1": off, "round2": on}) for _ in range(2)]
    assert torch.equal(*still) and not torch.equal(*moving)


def test_a_finished_round_is_stacked_once_and_adds_what_it_added_while_it_trained() -> None:
    values, live, past = random_values(), one(), one(trains=False)
    for round in (live, past):
        found = round.values()
        assert list(found) == list(values) and all(torch.equal(found[name], values[name]) for name in values)
    gate = torch.rand(4, K, generator=torch.Generator().manual_seed(1)).softmax(1)
    assert torch.equal(past(rows(), gate), live(rows(), gate))
    assert all(torch.equal(a, b) for a, b in zip(past.factors(gate[0]), live.factors(gate[0]), strict=True))
    held = past.stacked()
    past(rows(), gate)
    assert all(now is before for now, before in zip(past.stacked(), held, strict=True))
    memory = {part.untyped_storage().data_ptr() for part in (*held, past.mix)}
    assert {part.untyped_storage().data_ptr() for part in past.values().values()} == memory  # no second copy


def test_a_fresh_round_adds_nothing_and_mixes_half_and_half() -> None:
    made: Any = [LiveRound.fresh(M, N, K, R, SCALE, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(made[0].A, made[1].A) and not torch.equal(made[0].A, made[2].A)
    entries = made[0].A.detach()
    assert float(entries.abs().max()) <= N**-0.5 and float(entries.std()) == pytest.approx((3 * N) ** -0.5, rel=0.3)
    assert not made[0].B.any() and not made[0].shared_B.any()
    assert torch.equal(made[0].mix.sigmoid(), torch.full((K,), 0.5))
    assert not Experts({"r": made[0]}, 0.0)(rows(), {"r": torch.eye(K)[[0, 1, 2, 0]]}).any()


def test_under_autocast_what_routes_is_not_rounded() -> None:
    x, round = rows(), one()
    gate = torch.rand(4, K, generator=torch.Generator().manual_seed(1)).softmax(1)
    exact = round(x, gate).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = Experts({"round1": round}, dropout=0.0)(x.bfloat16(), {"round1": gate})
    assert float((found.detach().float() - exact).norm() / exact.norm()) < 0.02
