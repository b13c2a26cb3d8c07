"""Folded updates against explicit sums; the update that a bf16 forward really applies; the base back to the bit."""

from __future__ import annotations

import copy
import random
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from cl_runner.adapters.folding import Accumulator
from tests.adapters.families import (
    FAMILIES,
    adapters_of,
    base_model,
    logits,
    naive_updates,
    off,
    random_pair,
    with_updates,
)

BF16 = torch.bfloat16


def layer_of(kind: str, m: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layer = nn.Linear(n, m) if kind == "linear" else Conv1D(m, n)
    layer.weight.data.normal_(std=n**-0.5)
    layer.bias.data.normal_()
    return layer.to(dtype).requires_grad_(False)


def update_for(layer: nn.Module, m: int, n: int, share: float, seed: int = 1) -> Tensor:
    """A random update, (m, n), ``share`` of the weight's norm."""
    update = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    return update * (share * layer.weight.float().norm() / update.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_model_answers_like_the_explicit_sum(family: str) -> None:
    base = base_model(family)
    plain = copy.deepcopy(base)
    adapters = adapters_of(base, family)
    before = logits(adapters.model)
    assert torch.equal(before, logits(plain))
    shapes = {tuple(past.base.shape) for past in adapters.past.values()}
    assert shapes == {"qwen2": {(24, 24), (12, 24)}, "gpt2": {(72, 24)}}.get(family, {(24, 24)})
    pairs = [random_pair(adapters, f"s{i}", rank=1 + i, scale=(2.0, 0.3, 1.7)[i], seed=i) for i in range(3)]
    for done, pair in enumerate(pairs):
        adapters.fold(pair)
        wanted = logits(with_updates(plain, naive_updates(adapters, pairs[: done + 1])))
        assert off(logits(adapters.model), wanted) < 1e-5
        assert off(before, wanted) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_the_live_pair_comes_on_top_of_the_folded_ones(family: str) -> None:
    base = base_model(family)
    plain = copy.deepcopy(base)
    adapters = adapters_of(base, family)
    pairs = [random_pair(adapters, f"s{i}", seed=i) for i in range(3)]
    adapters.fold(pairs[0])
    adapters.fold(pairs[1])
    adapters.show(pairs[2])
    assert off(logits(adapters.model), logits(with_updates(plain, naive_updates(adapters, pairs)))) < 1e-5
    answers = logits(adapters.model)
    adapters.fold_live()
    assert adapters.live is None and [pair.stage for pair in adapters.folded] == ["s0", "s1", "s2"]
    assert off(logits(adapters.model), answers) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_restore_without_pairs_gives_the_base_to_the_bit(family: str, dtype: torch.dtype) -> None:
    base = base_model(family).to(dtype)
    plain = copy.deepcopy(base)
    before = logits(plain)
    adapters = adapters_of(base, family)
    for i in range(3):
        adapters.fold(random_pair(adapters, f"s{i}", seed=i, size=0.02))
    assert not torch.equal(logits(adapters.model), before)
    adapters.restore([], {}, None)
    assert torch.equal(logits(adapters.model), before)
    for target, past in adapters.past.items():
        weight = plain.get_submodule(target).weight
        assert torch.equal(past.weight, weight) and past.weight.stride() == weight.stride()
        assert past.sum is None and past.beside is None and not past.layer._forward_pre_hooks


def test_folding_one_by_one_or_at_once_gives_the_same_bits_and_another_order_does_not() -> None:
    base = base_model("t5")
    one_by_one, at_once = adapters_of(copy.deepcopy(base)), adapters_of(copy.deepcopy(base))
    pairs = [random_pair(one_by_one, f"s{i}", seed=i) for i in range(4)]
    for pair in pairs:
        one_by_one.fold(pair)
    at_once.restore(pairs, {}, None)
    wanted = {target: past.sum for target, past in one_by_one.past.items()}
    for target, past in at_once.past.items():
        assert torch.equal(past.sum, wanted[target])
        assert torch.equal(past.weight, one_by_one.past[target].weight)
        plain = pairs[0].scale * pairs[0].B[target] @ pairs[0].A[target]
        for pair in pairs[1:]:
            plain = plain + (pair.scale * pair.B[target]) @ pair.A[target]
        assert torch.equal(past.sum, plain)
    other = 0
    for order in permutations(pairs):
        at_once.restore(order, {}, None)
        other += any(not torch.equal(past.sum, wanted[target]) for target, past in at_once.past.items())
    assert other > 0  # the order is part of the result, so the test above could fail


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(
    ("share", "beside"), [(1e-5, True), (1e-4, True), (1e-3, True), (1e-2, True), (0.05, True), (2.0, False)]
)
def test_the_update_survives_in_bf16(kind: str, share: float, beside: bool) -> None:
    m, n = 48, 64
    layer = layer_of(kind, m, n, BF16)
    accumulator = Accumulator(layer, kind == "conv1d")
    base = accumulator.base.float().clone()
    update = update_for(layer, m, n, share)
    rounded = (base + update).to(BF16).float() - base
    accumulator.set(update)
    assert (accumulator.beside is not None) == beside == (off(rounded, update) > 0.01)
    assert off(accumulator.applied(), update) < 0.01
    assert torch.equal(accumulator.base.float(), base) and accumulator.sum is update


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("share", [1e-4, 1e-3, 2.0])
def test_what_a_bf16_forward_adds_is_the_update(kind: str, share: float) -> None:
    """Outputs are rounded to bf16, to far more than a small update; over many inputs that averages out, or is lost.

    Share of the update that arrives: ⟨y' - y, ΔW x⟩ / ‖ΔW x‖². A rounded weight, and a second product added to the
    first in bf16, both let 6 % of an update of 1e-4 arrive.
    """
    m, n, rows = 48, 64, 60_000
    layer = layer_of(kind, m, n, BF16)
    layer.bias.data.zero_()
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(2)).to(BF16)
    accumulator = Accumulator(layer, kind == "conv1d")
    update = update_for(layer, m, n, share)
    exact = x.float() @ accumulator.base.float().T
    wanted = x.float() @ update.T
    accumulator.set(update)

    def arrives(y: Tensor) -> float:
        return float(((y.float() - exact) * wanted).sum() / wanted.square().sum())

    y = layer(x)
    assert y.dtype == BF16
    assert arrives(y) == pytest.approx(1.0, abs=0.02)
    if share < 1e-3:
        first = F.linear(x, accumulator.base)
        assert arrives(first + F.linear(x, update.to(BF16))) < 0.2
        assert arrives(F.linear(x, (accumulator.base.float() + update).to(BF16))) < 0.2


@pytest.mark.parametrize("share", [1e-3, 2.0])
def test_an_fp32_base_under_bf16_autocast_keeps_the_update_too(share: float) -> None:
    m, n, rows = 48, 64, 20_000
    layer = layer_of("linear", m, n)
    layer.bias.data.zero_()
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(2))
    accumulator = Accumulator(layer, transposed=False, compute=BF16)
    update = update_for(layer, m, n, share)
    exact = x.to(BF16).float() @ layer.weight.to(BF16).float().T
    wanted = x.to(BF16).float() @ update.T
    accumulator.set(update)
    assert accumulator.base.dtype == torch.float32 and (accumulator.beside is None) == (share == 2.0)
    assert off(accumulator.applied(), update) < 0.01
    with torch.autocast("cpu", BF16):
        y = layer(x)
    assert y.dtype == BF16
    assert float(((y.float() - exact) * wanted).sum() / wanted.square().sum()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_side_by_side_keeps_bias_and_gradient(kind: str) -> None:
    m, n = 24, 16
    layer = layer_of(kind, m, n, BF16)
    accumulator = Accumulator(layer, kind == "conv1d")
    update = update_for(layer, m, n, 0.05)
    total = accumulator.base.float() + update
    accumulator.set(update)
    assert accumulator.beside is not None
    x = torch.randn(2, 5, n).to(BF16).requires_grad_()
    y = layer(x)
    assert y.shape == (2, 5, m)
    assert off(y, F.linear(x.float(), total, layer.bias.float())) < 0.01
    g = torch.randn_like(y)
    y.backward(g)
    assert off(x.grad, g.float() @ total) < 0.01


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_any_sequence_of_sets_and_adds_ends_like_the_last_ones_alone(kind: str, dtype: torch.dtype) -> None:
    m, n = 12, 20
    dice = random.Random(3)
    worn = Accumulator(layer_of(kind, m, n, dtype), kind == "conv1d")
    base = worn.base.clone()
    since: list[Tensor] = []
    seen = set()
    for step in range(60):
        share = dice.choice([1e-3, 3.0])
        update = update_for(worn.layer, m, n, share, seed=step)
        what = dice.choice(["none", "set", "add", "add", "add"])
        if what == "none":
            worn.set(None)
            since = []
        elif what == "set":
            worn.set(update)
            since = [update]
        else:
            worn.add(update)
            since.append(update)
        fresh = Accumulator(layer_of(kind, m, n, dtype), kind == "conv1d")
        for one in since:
            fresh.add(one)
        assert torch.equal(worn.weight, fresh.weight) and torch.equal(worn.base, base)
        assert (worn.sum is None) == (not since) and (worn.sum is None or torch.equal(worn.sum, fresh.sum))
        assert len(worn.layer._forward_pre_hooks) == (worn.beside is not None)
        seen.add((worn.sum is None, worn.beside is None))
    assert len(seen) == (3 if dtype == BF16 else 2)


def held(accumulator: Accumulator) -> dict[int, int]:
    """Storages that the accumulator and its layer hold, in bytes."""
    tensors = [accumulator.weight, *(v for v in vars(accumulator).values() if isinstance(v, Tensor))]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_no_needless_copies() -> None:
    m, n = 24, 16
    entries = m * n
    fp32 = Accumulator(layer_of("linear", m, n), False)
    assert sum(held(fp32).values()) == 4 * entries
    fp32.set(None)
    assert sum(held(fp32).values()) == 4 * entries  # a method that folds nothing pays nothing
    fp32.set(update_for(fp32.layer, m, n, 0.01))
    assert sum(held(fp32).values()) == 3 * 4 * entries  # W0, the weight, the sum
    fp32.set(None)
    assert sum(held(fp32).values()) == 4 * entries
    bf16 = Accumulator(layer_of("linear", m, n, BF16), False)
    bf16.set(update_for(bf16.layer, m, n, 0.01))
    assert sum(held(bf16).values()) == (2 + 2 + 4) * entries  # W0 and the update side by side, the sum


def test_an_update_of_zero_stays_in_the_weight() -> None:
    accumulator = Accumulator(layer_of("linear", 8, 8, BF16), False)
    accumulator.set(torch.zeros(8, 8))
    assert accumulator.beside is None and torch.equal(accumulator.weight, accumulator.base)


def test_bf16_models_apply_every_stage() -> None:
    """The whole model: fifteen small updates reach a bf16 LLaMA as they reach an fp32 one."""
    base = base_model("llama").to(BF16)
    adapters = adapters_of(base, "llama")
    for i in range(15):
        adapters.fold(random_pair(adapters, f"s{i}", seed=i, size=0.004))
    for target, past in adapters.past.items():
        wanted = sum(update[target] for update in naive_updates(adapters, adapters.folded))
        assert off(past.applied(), wanted) < 0.01
        assert float(wanted.norm() / past.base.float().norm()) < 2e-3
