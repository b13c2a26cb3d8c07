"""A base in 4 bits: what stands beside it answers as it does in an ordinary base of the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cl_runner.adapters.folding import Accumulator
from cl_runner.adapters.kind import Opening
from cl_runner.adapters.quantized import Quantized, dequantized, is_quantized, past_updates
from cl_runner.registry import KINDS
from tests.adapters.families import (
    adapters_of,
    base_model,
    logits,
    naive_updates,
    off,
    random_pair,
    saved_as,
    with_updates,
)
from tests.adapters.test_peft_folder import plain as loaded_by_peft
from tests.breadth import in_turn
from tests.four_bits import dequantised, in_4_bits, need, twins, weight_of
from tests.stages import Kind

BF16 = torch.bfloat16
FAMILIES: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 64, "d_kv": 16},
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "gpt2": {"n_embd": 64},
}


def layer_in_4_bits(m: int, n: int, compute: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A linear layer with a bias, on the CPU."""
    need()
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(seed)
    plain = torch.nn.Linear(n, m)
    layer = Linear4bit(n, m, compute_dtype=compute, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict(plain.state_dict())
    layer.to("cpu")
    layer.support_avx512bf16_for_cpu, layer.source_cls = False, torch.nn.Linear
    return layer.requires_grad_(False)


def factors(m: int, n: int, rank: int, seed: int = 0, size: float = 0.1) -> tuple[Tensor, Tensor, float]:
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(rank, n, generator=dice) * size, torch.randn(m, rank, generator=dice) * size, 1.5 + seed


def test_w0_is_what_the_codes_stand_for() -> None:
    layer = layer_in_4_bits(40, 128)
    past = past_updates(layer, None)
    assert isinstance(past, Quantized) and past.shape == (40, 128) == tuple(past.base.shape)
    assert torch.equal(past.base, weight_of(layer)) and torch.equal(past.whole, past.base)
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == 40 * 128 // 2


@pytest.mark.parametrize("form", ["factors", "sum"])
@pytest.mark.parametrize("compute", [torch.float32, BF16])
def test_outputs_and_gradients_are_those_of_the_summed_weight(form: str, compute: torch.dtype) -> None:
    m, n = 40, 64
    layer = layer_in_4_bits(m, n, compute)
    past = past_updates(layer, None)
    pairs = [factors(m, n, 1 + i, seed=i) for i in range(3)]
    total = sum(s * torch.einsum("mr,rn->mn", B.double(), A.double()) for A, B, s in pairs)
    for pair in pairs:
        past.add_pair(pair)
    assert isinstance(past, Quantized)
    if form == "sum":
        past.add_none()
    assert (past.right is None) == (form == "sum")
    assert past.sum is not None and off(past.sum, total) < 1e-6
    assert off(past.applied(), total) < (1e-6 if compute == torch.float32 else 0.01)
    weight, bias = weight_of(layer).double() + total, layer.bias.double()
    x = torch.randn(2, 5, n, generator=torch.Generator().manual_seed(3)).to(compute).requires_grad_()
    y = layer(x)
    given = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(compute)
    y.backward(given)
    near = 1e-6 if compute == torch.float32 else 0.01
    assert y.dtype == compute and off(y, F.linear(x.detach().double(), weight, bias)) < near
    assert off(x.grad, given.double() @ weight) < near


def test_untouched_or_restored_to_nothing_it_answers_as_bitsandbytes_does() -> None:
    layer = layer_in_4_bits(24, 64)
    codes = layer.weight.data.clone()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    alone = layer(x)
    past = past_updates(layer, None)
    assert past.sum is None and torch.equal(layer(x), alone)
    past.add_pair(factors(24, 64, 2))
    assert not torch.equal(layer(x), alone)
    past.set(torch.zeros(24, 64))
    assert off(layer(x), alone) < 1e-6
    past.set(None)
    assert past.sum is None and torch.equal(layer(x), alone) and "forward" not in vars(layer)
    assert torch.equal(layer.weight.data, codes)


@pytest.mark.parametrize("share", [1e-4, 1e-3, 0.3])
def test_what_a_bf16_forward_adds_is_the_update(share: float) -> None:
    """⟨y' − y, ΔW x⟩ / ‖ΔW x‖² over many inputs; an update that is added to outputs in bf16 mostly never arrives."""
    m, n, rows = 48, 64, 60_000
    layer = layer_in_4_bits(m, n, BF16)
    layer.bias.data.zero_()
    past = past_updates(layer, None)
    base = past.base.to(BF16).float()
    A, B, _ = factors(m, n, 4, size=1.0)
    scale = share * float(base.norm() / (B @ A).norm())
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(2)).to(BF16)
    exact, wanted = x.float() @ base.T, x.float() @ (scale * B @ A).T

    def arrives(y: Tensor) -> float:
        return float(((y.float() - exact) * wanted).sum() / wanted.square().sum())

    alone = layer(x)
    past.add_pair((A, B, scale))
    assert arrives(layer(x)) == pytest.approx(1.0, abs=0.02)
    past.add_none()
    assert arrives(layer(x)) == pytest.approx(1.0, abs=0.02)
    if share == 1e-4:
        assert arrives(alone + wanted.to(BF16)) < 0.2


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_folded_into_4_bits_an_update_would_be_lost(share: float) -> None:
    """The steps of a 4-bit weight are wider than updates are: what is left of one is mostly noise."""
    layer = layer_in_4_bits(64, 128)
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    base = dequantized(layer)
    update = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    update *= share * base.norm() / update.norm()
    again = dequantize_4bit(*quantize_4bit(base + update, quant_type="nf4", compress_statistics=True))
    assert off(again - base, update) > 0.6
    past = past_updates(layer, None)
    past.add(update)
    assert off(past.applied(), update) < 1e-6


def test_factors_stay_while_they_are_smaller_and_the_sum_is_the_same_to_the_bit() -> None:
    m, n = 24, 64  # 17 columns of both factors are as many numbers as 24 × 64, or more
    pairs = [factors(m, n, 6, seed=i) for i in range(4)]
    one = past_updates(layer_in_4_bits(m, n), None)
    assert isinstance(one, Quantized)
    for count, pair in enumerate(pairs, 1):
        before = one.sum_later()
        kept = before()
        one.add_pair(pair)
        wanted = pairs[0][2] * pairs[0][1] @ pairs[0][0]
        for A, B, s in pairs[1:count]:
            wanted = wanted + (s * B) @ A
        assert one.sum is not None and torch.equal(one.sum, wanted)
        assert (one.right is None) == (count > 2)
        assert kept is None or torch.equal(before(), kept)  # of then, whatever was folded since
        other = past_updates(layer_in_4_bits(m, n), None)
        other.restore(wanted if count == 4 else None, pairs[:count], dense=False)
        x = torch.randn(3, n, generator=torch.Generator().manual_seed(5))
        assert torch.equal(one.layer(x), other.layer(x)) and torch.equal(other.sum, wanted)
    numbers = {rank: one.beside_bytes(rank, dense=False) for rank in (6, 12, 18, 24)}
    assert numbers == {6: 4 * 6 * 88, 12: 4 * 12 * 88, 18: 4 * m * n, 24: 4 * m * n}
    assert one.beside_bytes(6, dense=True) == 4 * m * n


def opened(name: str, model: Any, kind: Kind) -> Any:
    """Adapters of a kind around a model, begun; the same numbers for both of ``twins``."""
    found = KINDS.get(name)
    wanted: dict[str, Any] = {
        "kind": name, "dropout": 0.0, "r": 4, "block_size": 4, "frequencies": 50, "vector_length": 4, "vectors": 8,
    }  # fmt: skip
    if name == "ia3":
        wanted["target_modules"] = ["k", "v"] if kind == "t5" else ["k_proj", "v_proj", "down_proj"]
    config = found.Config.model_validate({key: wanted[key] for key in wanted if key in found.Config.model_fields})
    adapters = found(config).open(Opening(model, "tiny", None, kind == "t5"))
    adapters.begin("one", torch.Generator().manual_seed(0))
    return adapters


def shaken(adapters: Any) -> None:
    """Parameters that are all at work."""
    dice = torch.Generator().manual_seed(1)
    for parameter in adapters.parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=dice)


QUANTIZED = [name for name in KINDS.ours if KINDS.get(name).quantized and name != "prompts"]


@pytest.mark.parametrize(("name", "kind"), in_turn(QUANTIZED, ["t5", "llama"]))
def test_a_kind_makes_of_4_bits_what_it_makes_of_the_same_weights(name: str, kind: Kind) -> None:
    """As it begins, trained, folded, and with a second set beside what was folded; gradients too."""
    quantized, plain = twins(kind)
    base = logits(plain)
    assert off(logits(quantized), base) < 1e-6
    ours, theirs = opened(name, quantized, kind), opened(name, plain, kind)
    assert any(isinstance(past, Quantized) for past in ours.past.values())
    start = 2e-3 if name in ("vblora", "lora-xs") else 1e-6  # the two that begin near nothing, not at it
    assert off(logits(ours.model), base) < start
    for stage in ("one", "two"):
        if stage == "two":
            for adapters in (ours, theirs):
                adapters.fold_live()
            assert off(logits(ours.model), logits(theirs.model)) < 1e-5
            for adapters in (ours, theirs):
                adapters.begin("two", torch.Generator().manual_seed(2))
        for adapters in (ours, theirs):
            shaken(adapters)
        assert off(logits(ours.model), logits(theirs.model)) < 1e-5
        assert off(logits(ours.model), base) > 0.01
        found, wanted = gradients(ours), gradients(theirs)
        assert found.keys() == wanted.keys() and any(float(g.norm()) > 0 for g in wanted.values())
        assert max(off(found[n], g) for n, g in wanted.items() if float(g.norm()) > 1e-6) < 1e-4


def gradients(adapters: Any) -> dict[str, Tensor]:
    ids = torch.arange(3, 10)[None]
    adapters.train(True)
    model, named = adapters.model, adapters.parameters()
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    loss = model(input_ids=ids, **given, use_cache=False).logits.square().mean()
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


@pytest.mark.parametrize("name", [name for name in KINDS.ours if not KINDS.get(name).quantized and name != "full"])
def test_a_kind_that_is_refused_could_not(name: str) -> None:
    """Its forward reads the weight, as numbers or for its shape, which 4 bits beside a sum do not have."""
    quantized, _ = twins()
    with pytest.raises(RuntimeError):
        adapters = opened(name, quantized, "t5")
        shaken(adapters)
        logits(adapters.model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["pairs", "sum"])
def test_a_stage_is_a_plain_peft_folder_on_4_bits_and_on_the_whole_base(family: str, form: str, tmp_path: Path) -> None:
    whole = base_model(family, 1, **FAMILIES[family])
    quantized = in_4_bits(whole)
    adapters = adapters_of(copy.deepcopy(quantized), family)
    for i in range(3):
        adapters.fold(random_pair(adapters, f"s{i}", rank=20 if form == "sum" else 2, seed=i))
    saved = saved_as(tmp_path / "a", adapters)
    assert (saved.own == "adapter") == (form == "pairs")
    answers = logits(adapters.model)
    updates = naive_updates(adapters, adapters.folded)
    assert off(answers, logits(with_updates(dequantised(whole, quantized), updates))) < 1e-5
    assert off(logits(loaded_by_peft(quantized, tmp_path / "a")), answers) < 1e-5
    on_whole = logits(loaded_by_peft(copy.deepcopy(whole), tmp_path / "a"))
    assert off(on_whole, logits(with_updates(whole, updates))) < 1e-5
    assert off(on_whole, answers) > 0.01  # another base


def test_layers_that_are_not_in_4_bits_are_folded_into() -> None:
    """T5's ``wo``, which transformers leaves as it is."""
    quantized, plain = twins()
    adapters = adapters_of(quantized, targets=["q", "wo"])
    kinds = {target.rsplit(".", 1)[-1]: type(past) for target, past in adapters.past.items()}
    assert kinds == {"q": Quantized, "wo": Accumulator}
    pairs = [random_pair(adapters, f"s{i}", seed=i) for i in range(2)]
    for pair in pairs:
        adapters.fold(pair)
    assert off(logits(adapters.model), logits(with_updates(plain, naive_updates(adapters, pairs)))) < 1e-5
    assert not is_quantized(adapters.past[next(t for t in adapters.past if t.endswith("wo"))].layer)
