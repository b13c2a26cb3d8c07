"""How a pair begins, against numpy; one that borrows from the weight: exact at its start, folded, on disk, restored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_runner.adapters.folding import Accumulator
from cl_runner.adapters.initialise import (
    context_part,
    gaussian,
    leading_inputs,
    orthogonal,
    qr_part,
    singular_part,
)
from cl_runner.adapters.kinds.lora import Lora
from cl_runner.adapters.layers import Layers
from cl_runner.adapters.pairs import Pair
from cl_runner.adapters.peft_folder import beside, load_adapter, own_pair
from cl_runner.config.schema import AdapterConfig
from tests.adapters.families import (
    FAMILIES,
    adapters_of,
    base_model,
    logits,
    off,
    random_pair,
    saved_as,
    with_updates,
)
from tests.adapters.test_folding import layer_of
from tests.adapters.test_peft_folder import plain

BF16 = torch.bfloat16
Matrix = NDArray[np.float64]
SHAPES = pytest.mark.parametrize(("m", "n"), [(12, 12), (9, 14), (14, 9)])
R, S = 4, 2.5


def weight(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def numbers(tensor: Tensor) -> Matrix:
    found: Matrix = tensor.detach().double().numpy()
    return found


def close(found: Tensor, wanted: Matrix, rtol: float = 1e-5) -> bool:
    return bool(np.linalg.norm(numbers(found) - wanted) <= rtol * np.linalg.norm(wanted))


# The factors.


def test_gaussian_is_peft_s_and_b_is_zero() -> None:
    A, B = gaussian(5, 4000, 8, torch.Generator().manual_seed(3))
    assert A.shape == (8, 4000) and B.shape == (5, 8) and not B.any()
    assert float(A.mean()) == pytest.approx(0, abs=3e-3) and float(A.std()) == pytest.approx(1 / 8, rel=0.02)
    assert torch.equal(A, gaussian(5, 4000, 8, torch.Generator().manual_seed(3))[0])


def test_orthogonal_is_not_zero_and_makes_nothing() -> None:
    m, n, r = 3000, 2000, 6
    A, B = orthogonal(m, n, r, torch.Generator().manual_seed(3))
    assert A.shape == (r, n) and B.shape == (m, r)
    assert np.linalg.norm(numbers(B) @ numbers(A)) < 1e-6 * np.linalg.norm(numbers(B)) * np.linalg.norm(numbers(A))
    for factor, d in ((A, n), (B, m)):
        squares = np.linalg.svd(numbers(factor), compute_uv=False) ** 2
        assert squares[r // 2 :].max() < 1e-10 * squares[0]  # half of the rank each
        assert squares[: r // 2] == pytest.approx([d / 100] * (r // 2), rel=0.2)  # normal numbers over ten


@SHAPES
def test_olora_takes_the_first_of_q_and_r(m: int, n: int) -> None:
    W = weight(m, n)
    A, B = qr_part(W, R)
    Q, upper = np.linalg.qr(numbers(W))
    assert close(B @ A, Q[:, :R] @ upper[:R])
    assert close(B.mT @ B, np.eye(R))
    assert all(not bool(row[:i].abs().max() > 1e-6) for i, row in enumerate(A) if i)
    A, B = qr_part(W, min(m, n))
    assert close(B @ A, numbers(W))


@SHAPES
def test_pissa_takes_the_leading_singular_directions(m: int, n: int) -> None:
    W = weight(m, n)
    A, B = singular_part(W, R, S)
    U, sigma, Vh = np.linalg.svd(numbers(W), full_matrices=False)
    assert close(S * B @ A, (U[:, :R] * sigma[:R]) @ Vh[:R])
    for gram in (A @ A.mT, B.mT @ B):
        assert close(gram, np.diag(sigma[:R] / S))  # halved evenly


@pytest.mark.parametrize("largest", [True, False])
@SHAPES
def test_corda_takes_components_of_the_weight_as_inputs_see_them(m: int, n: int, largest: bool) -> None:
    W, x = weight(m, n), numbers(weight(40, n, 1)) * np.linspace(0.1, 3, n)
    C = x.T @ x / 40
    A, B = context_part(W, torch.from_numpy(C), R, S, largest=largest)
    C = C / np.trace(C) * n + 0.01 * np.eye(n)
    U, sigma, Vh = np.linalg.svd(numbers(W) @ C, full_matrices=False)
    parts = [sigma[i] * np.outer(U[:, i], Vh[i] @ np.linalg.inv(C)) for i in range(min(m, n))]
    chosen = range(R) if largest else range(min(m, n) - R, min(m, n))
    assert close(S * B @ A, np.sum([parts[i] for i in chosen], axis=0), 1e-4)
    assert np.allclose(np.sum(parts, axis=0), numbers(W))  # all of them are W
    assert close(B.mT @ B, np.diag(sigma[list(chosen)] / S), 1e-4)
    other, _ = context_part(W, torch.from_numpy(7 * x.T @ x), R, S, largest=largest)
    assert off(other, A) < 1e-4  # how large inputs are, and how many, does not count
    of_noise, _ = context_part(W, torch.eye(n, dtype=torch.float64), R, S, largest=True)
    assert (
        off(of_noise.mT @ of_noise, (lambda a: a.mT @ a)(singular_part(W, R, S * 1.01)[0])) < 1e-4
    )  # then it is PiSSA


def test_eva_takes_the_leading_right_singular_vectors_of_the_inputs() -> None:
    x = numbers(weight(40, 12)) * np.linspace(0.3, 2, 12)
    moment = torch.from_numpy(x.T @ x / 40)
    A, found = leading_inputs(moment, R, torch.Generator())
    Vh = np.linalg.svd(x)[2][:R]
    assert found == R and np.allclose(np.abs(np.sum(numbers(A) * Vh, axis=1)), 1, atol=1e-6)
    assert float(A.gather(1, A.abs().argmax(1, keepdim=True)).min()) > 0
    again, _ = leading_inputs(moment + 1e-13, R, torch.Generator())
    assert off(again, A) < 1e-6


def test_eva_draws_what_inputs_do_not_span() -> None:
    x = numbers(weight(2, 12)).repeat(20, axis=0)  # many tokens, two different ones
    moment = torch.from_numpy(x.T @ x / 40)
    A, found = leading_inputs(moment, R, torch.Generator().manual_seed(1))
    assert found == 2 and close(A @ A.mT, np.eye(R))
    assert np.linalg.norm(numbers(A[2:]) @ x.T) < 1e-5 * np.linalg.norm(x)
    assert close(A[:2].mT @ A[:2], np.linalg.pinv(x) @ x)
    other, _ = leading_inputs(moment, R, torch.Generator().manual_seed(2))
    assert torch.equal(other[:2], A[:2]) and off(other[2:], A[2:]) > 0.1
    nothing, found = leading_inputs(torch.zeros(12, 12, dtype=torch.float64), R, torch.Generator())
    assert found == 0 and close(nothing @ nothing.mT, np.eye(R))


def test_the_kind_draws_what_is_set_and_scales_as_is_set() -> None:
    for init, draw in (("gaussian", gaussian), ("orthogonal", orthogonal)):
        kind = Lora(AdapterConfig(init=init))
        ours, plainly = (
            kind.fresh(6, 9, 4, torch.Generator().manual_seed(1)),
            draw(6, 9, 4, torch.Generator().manual_seed(1)),
        )
        assert all(map(torch.equal, ours, plainly))
    for init in ("default", "olora", "pissa", "eva", "corda"):
        A, B = Lora(AdapterConfig(init=init)).fresh(6, 9, 4, torch.Generator())
        assert A.any() and not B.any()
    config = AdapterConfig(r=16, alpha=8, rslora=True)
    assert config.scale(16) == 2.0 and AdapterConfig(r=16, alpha=8).scale(16) == 0.5
    assert config.borrows is config.reads_inputs is False


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_rslora_answers_and_lies_on_disk_with_its_scale(family: str, tmp_path: Path) -> None:
    base = base_model(family)
    config = AdapterConfig(r=4, alpha=6, dropout=0, rslora=True)
    adapters = Layers(copy.deepcopy(base), config, name_or_path="some/base", encoder_decoder=family == "t5")
    pair = random_pair(adapters, "one")
    assert pair.scale == adapters.scale == 3.0  # 6 / √4
    adapters.show(pair)
    wanted = logits(with_updates(base, [{t: 3.0 * pair.B[t] @ pair.A[t] for t in pair.A}]))
    assert off(logits(adapters.model), wanted) < 1e-5
    adapters.show(random_pair(adapters, "two", rank=9))
    assert adapters.scale == 2.0 and {layer.scaling["default"] for layer in adapters.layers.values()} == {2.0}
    adapters.show(pair)
    adapters.fold_live()
    saved_as(tmp_path / "a", adapters)
    assert off(logits(plain(base, tmp_path / "a")), wanted) < 1e-5


# A pair that borrows.


def borrow(adapters: Layers, stage: str = "one", seed: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A new pair that holds a large part of each weight: of all that is in it, its leading singular directions."""
    adapters.begin(stage, torch.Generator().manual_seed(seed))
    pairs = {
        t: singular_part(past.whole, adapters.rank_of(t), adapters.scale_of(t)) for t, past in adapters.past.items()
    }
    A, B = ({t: factors[i] for t, factors in pairs.items()} for i in (0, 1))
    adapters.begin_from_weight(A, B)
    return A, B


def move(adapters: Layers, seed: int = 5) -> None:
    """As training would: both factors change a little."""
    dice = torch.Generator().manual_seed(seed)
    for parameter in adapters.parameters().values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=dice)


PATTERNS: dict[str, Any] = {"ranks": {"q(_proj)?": 3}, "alphas": {"v(_proj)?": 5.0}}


def zero(adapters: Layers) -> Pair:
    return random_pair(adapters, "zero", size=0.1)


def learned(adapters: Layers, A0: dict[str, Tensor], B0: dict[str, Tensor]) -> dict[str, Tensor]:
    """s (B A − B0 A0) by the definition, fp64."""
    now = adapters.parameters()
    return {
        t: adapters.scale_of(t)
        * (now[f"{t}.lora_B"].double() @ now[f"{t}.lora_A"].double() - B0[t].double() @ A0[t].double()).detach()
        for t in A0
    }


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_base_and_pair_answer_as_before_and_what_changes_is_the_update(family: str, past: bool) -> None:
    base = base_model(family)
    adapters = adapters_of(copy.deepcopy(base), family)
    earlier = [zero(adapters)] if past else []
    for pair in earlier:
        adapters.fold(pair)
    updates: list[Any] = [{t: pair.update(t) for t in pair.A} for pair in earlier]
    before = logits(adapters.model)
    A0, B0 = borrow(adapters)
    assert off(logits(adapters.model), before) < 1e-5
    assert adapters.update_norm() == pytest.approx(0, abs=1e-6)
    for target, accumulator in adapters.past.items():
        kept = accumulator.whole - adapters.scale_of(target) * B0[target] @ A0[target]
        assert off(accumulator.base.float() + accumulator.applied(), kept) < 1e-6  # the weight is without it
        assert off(kept, accumulator.whole) > 0.1
        assert (accumulator.sum is None) == (not past)  # and it is no past update
    adapters.show(None)
    assert torch.equal(logits(adapters.model), before)  # given back
    A0, B0 = borrow(adapters)
    move(adapters)
    update = learned(adapters, A0, B0)
    wanted = logits(with_updates(base, [*updates, update]))
    assert off(logits(adapters.model), wanted) < 1e-5 and off(before, wanted) > 0.01
    assert all(off(found, update[t]) < 1e-5 for t, found in adapters.live_update().items())
    norm = sum(float(delta.square().sum()) for delta in update.values()) ** 0.5
    assert adapters.update_norm() == pytest.approx(norm, rel=1e-5)
    assert {group.A.shape[1] for group in adapters.groups()} == {adapters.rank}  # what trains is r rows

    adapters.fold_live()
    assert off(logits(adapters.model), wanted) < 1e-5
    folded = adapters.folded[-1]
    assert (folded.rank, folded.A0) == (2 * adapters.rank, {})
    assert not any(accumulator.lends for accumulator in adapters.past.values())
    seen = adapters.groups()[0].past if adapters.folded else None
    assert seen is not None and seen.rows("A").shape[1] == sum(pair.rank for pair in adapters.folded)
    assert torch.equal(
        seen.rows("A")[0, -adapters.rank :], A0[seen.targets[0]]
    )  # penalties see what it read as it began


@pytest.mark.parametrize("family", FAMILIES)
def test_on_disk_it_is_a_plain_pair_beside_the_weight_as_it_was(family: str, tmp_path: Path) -> None:
    """Kept and folded, alone and after another; a second stage begins rightly from either."""
    base, more = base_model(family), PATTERNS if family in ("t5", "llama") else {}
    for past in (False, True):
        adapters = adapters_of(copy.deepcopy(base), family, **more)
        if past:
            adapters.fold(zero(adapters))
        borrow(adapters)
        move(adapters)
        answers = logits(adapters.model)
        adapters.keep_live()
        live = adapters.kept["one"]
        kept = saved_as(tmp_path / f"kept{past}", adapters, live)
        assert off(logits(plain(copy.deepcopy(base), tmp_path / f"kept{past}")), answers) < 1e-5
        tensors = beside(kept, "one", adapters.held())
        own = own_pair(tmp_path / f"kept{past}", "one", kept, tensors)
        for ours, theirs in ((own.A, live.A), (own.B, live.B), (own.A0, live.A0), (own.B0, live.B0)):
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[t], theirs[t]) for t in ours)
        again = adapters_of(copy.deepcopy(base), family, **more)
        held = load_adapter(
            tmp_path / f"kept{past}",
            "one",
            kept,
            tensors,
            "one",
            lambda _, room=again: zero(room),
            {},  # type: ignore[misc]
        )
        again.restore(held.folded, held.kept, held.live, sums=held.sums, dense=held.dense)
        assert torch.equal(logits(again.model), answers)
        assert all(torch.equal(again.past[t].weight, adapters.past[t].weight) for t in adapters.past)
        for one in (adapters, again):  # it trains on
            one.rename("two")
            assert one.update_norm() == pytest.approx(0, abs=1e-6)
            move(one, seed=6)
        assert torch.equal(logits(again.model), logits(adapters.model))
        change = sum(
            float((adapters.live_update()[t].double() - live.update(t).double()).square().sum()) for t in live.A
        )
        assert adapters.update_norm() == pytest.approx(change**0.5, rel=1e-3)

        adapters.show(live)
        adapters.kept.clear()
        adapters.fold_live()
        saved = saved_as(tmp_path / f"folded{past}", adapters)
        assert off(logits(plain(copy.deepcopy(base), tmp_path / f"folded{past}")), answers) < 1e-5
        assert [pair.rank for pair in saved.pairs] == [2] * past + [4] and not any(p.borrows for p in saved.pairs)


def test_a_pair_is_repaid_and_borrows_again_to_the_bit() -> None:
    adapters = adapters_of(base_model("t5"), **PATTERNS)
    borrow(adapters)
    move(adapters)
    pair = adapters.pair()
    whole = pair.repaid()
    assert (
        whole.rank == 4
        and set(whole.ranks.values()) == {6}
        and whole.scales == pair.scales
        and whole.repaid() is whole
        and not whole.A0
    )
    again = whole.borrowing()
    assert (again.rank, again.scale, again.ranks, again.scales) == (pair.rank, pair.scale, pair.ranks, pair.scales)
    for name in ("A", "B", "A0", "B0"):
        assert all(torch.equal(getattr(again, name)[t], tensor) for t, tensor in getattr(pair, name).items())
    assert all(torch.equal(pair.update(t), whole.update(t)) for t in pair.A)
    assert random_pair(adapters, "one").lent(next(iter(pair.A))) is None


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("past", [None, 1e-3, 0.05])
def test_in_bf16_neither_what_is_lent_nor_the_past_is_lost(kind: str, past: float | None) -> None:
    m, n = 48, 64
    layer = layer_of(kind, m, n, BF16)
    accumulator = Accumulator(layer, kind == "conv1d")
    base = accumulator.base.float().clone()
    size = float(base.norm())
    total = None if past is None else past * size * weight(m, n, 1) / float(weight(m, n, 1).norm())
    A, B = singular_part(base, 1, 1.0)
    lent = B @ A
    accumulator.set(total)
    accumulator.lend(lent)
    wanted = -lent if total is None else total - lent
    assert off(accumulator.applied(), wanted) < 0.01
    assert accumulator.sum is total and torch.equal(accumulator.base.float(), base)
    if total is not None:
        rounded = (base + wanted).to(BF16).float() - base  # 1 % of what is lent, and more of the past
        lost, would_be = accumulator.applied() - wanted, rounded - wanted
        assert off(rounded, wanted) < 0.01 < float(would_be.norm() / total.norm())
        assert accumulator.beside is not None and float(lost.norm()) < 0.5 * float(would_be.norm())
    accumulator.give_back()
    plainly = Accumulator(layer_of(kind, m, n, BF16), kind == "conv1d")
    plainly.set(total)
    assert torch.equal(accumulator.weight, plainly.weight)
    accumulator.set(None)
    assert torch.equal(layer.weight, layer_of(kind, m, n, BF16).weight)


@pytest.mark.parametrize("family", ["t5", "llama", "gpt2"])
def test_in_bf16_it_begins_as_the_weight_answers_but_for_rounding(family: str) -> None:
    base = base_model(family)
    exact = logits(base)
    adapters = adapters_of(copy.deepcopy(base).to(BF16), family)
    before = off(logits(adapters.model), exact)  # what bf16 alone makes of it
    borrow(adapters)
    assert off(logits(adapters.model), exact) < 3 * before < 0.1
    move(adapters)
    update = adapters.live_update()
    adapters.fold_live()
    for target, past in adapters.past.items():
        assert (
            past.sum is not None and off(past.sum, update[target]) < 1e-5 and off(past.applied(), update[target]) < 0.01
        )


def test_a_pair_without_anything_borrowed_is_as_it_was() -> None:
    """Nothing of a weight is touched, and nothing new stands on disk."""
    adapters = adapters_of(base_model("t5"))
    weights = {t: past.weight.clone() for t, past in adapters.past.items()}
    adapters.begin("one", torch.Generator())
    adapters.show(
        Pair("two", 2, 3.0, *({t: p.clone() for t, p in f.items()} for f in (adapters.pair().A, adapters.pair().B)))
    )
    assert adapters.pair().A0 == adapters.pair().B0 == {}
    assert all(torch.equal(past.weight, weights[t]) and not past.lends for t, past in adapters.past.items())
