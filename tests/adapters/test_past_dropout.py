"""Past pairs under dropout: folded, they make of an input what the reference code's unfolded ones make of it."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cl_runner.adapters.layers import Layers
from cl_runner.adapters.pairs import Pair
from cl_runner.models.forward import checkpoint_activations
from tests.adapters.families import FAMILIES, VOCABULARY, adapters_of, base_model, logits, off, random_pair

P = 0.3


class Unfolded(nn.Module):
    """A layer as the reference code has it: one mask, then every pair, past or new, on what it left of the input."""

    def __init__(self, base: nn.Module, target: str, pairs: Sequence[Pair]) -> None:
        super().__init__()
        self.base, self.target, self.pairs = base, target, pairs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        left = functional.dropout(x, P, self.training)
        for pair in self.pairs:
            y = y + pair.scales.get(self.target, pair.scale) * (left @ pair.A[self.target].T @ pair.B[self.target].T)
        return y


def unfolded(base: Any, adapters: Layers, pairs: Sequence[Pair]) -> Any:
    model = copy.deepcopy(base)
    for target in adapters.layers:
        above, _, name = target.rpartition(".")
        parent = model.get_submodule(above)
        setattr(parent, name, Unfolded(getattr(parent, name), target, pairs))
    return model


def opened(family: str = "t5", stages: int = 3, dropout_past: bool = True, **more: Any) -> tuple[Any, Layers]:
    """A base, and adapters of its copy after so many stages (of ranks 1, 2, …, or as patterns say), with a random live
    pair."""
    base = base_model(family)
    adapters = adapters_of(copy.deepcopy(base), family, dropout=P, dropout_past=dropout_past, **more)
    for number in range(stages):
        own = {} if "ranks" in more else {"rank": 1 + number, "scale": (2.0, 0.3, 1.7)[number % 3]}
        adapters.fold(random_pair(adapters, f"s{number}", seed=number, **own))
    adapters.begin("now", torch.Generator().manual_seed(0))
    adapters.show(random_pair(adapters, "now", seed=99))
    return base, adapters


def training(model: Any, seed: int = 0) -> Tensor:
    """Logits of fixed random input in a training forward, its mask drawn from ``seed``."""
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
    model.train()
    torch.manual_seed(seed)
    more = {"decoder_input_ids": ids[:, :4].flip(1)} if model.config.is_encoder_decoder else {}
    found: Tensor = model(input_ids=ids, use_cache=False, **more).logits
    return found


def loss(scores: Tensor) -> Tensor:
    """Something that depends on every logit."""
    return scores.float().log_softmax(-1).square().mean()


def gradients(adapters: Layers, scores: Tensor) -> dict[str, Tensor]:
    named = adapters.parameters()
    return dict(zip(named, torch.autograd.grad(loss(scores), list(named.values())), strict=True))


MIXED = {"ranks": {r"layers\.0\..*q_proj": 1, "v_proj": 5}, "alphas": {"q_proj": 3.0}}


@pytest.mark.parametrize(("family", "more"), [*((family, {}) for family in FAMILIES), ("qwen2", MIXED)])
def test_a_training_forward_is_that_of_the_unfolded_pairs(family: str, more: dict[str, Any]) -> None:
    base, adapters = opened(family, **more)
    live = adapters.pair("now")
    for factor in (live.A, live.B):
        for tensor in factor.values():
            tensor.requires_grad_()
    reference = unfolded(base, adapters, [*adapters.folded, live])
    for seed in range(3):
        ours, theirs = training(adapters.model, seed), training(reference, seed)
        assert off(ours, theirs) < 1e-5
        wanted = torch.autograd.grad(loss(theirs), [*live.A.values(), *live.B.values()])
        named = zip([f"{t}.lora_{f}" for f in "AB" for t in live.A], wanted, strict=True)
        found = gradients(adapters, ours)
        assert all(off(found[name], gradient) < 1e-4 for name, gradient in named)
    _, folded = opened(family, dropout_past=False, **more)
    assert off(training(folded.model), training(reference)) > 0.01


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_without_dropout_the_folded_weight_answers_alone(family: str) -> None:
    _, with_it = opened(family)
    _, without = opened(family, dropout_past=False)
    assert torch.equal(logits(with_it.model.eval()), logits(without.model.eval()))
    training(with_it.model)
    assert torch.equal(logits(with_it.model.eval()), logits(without.model.eval()))  # a forward leaves nothing behind


def test_the_first_stage_is_what_it_was() -> None:
    _, with_it = opened(stages=0)
    _, without = opened(stages=0, dropout_past=False)
    assert torch.equal(training(with_it.model), training(without.model))


def test_with_b_zero_the_loss_moves_with_the_mask() -> None:
    """At a stage's first step the reference's loss is drawn, that of a folded weight alone is one number."""

    def losses(dropout_past: bool) -> list[float]:
        _, adapters = opened(dropout_past=dropout_past)
        adapters.begin("next", torch.Generator().manual_seed(0))
        return [float(loss(training(adapters.model, seed)).detach()) for seed in range(8)]

    assert len(set(losses(False))) == 1
    assert statistics.stdev(losses(True)) > 0.001


def test_layers_without_a_live_pair_add_nothing() -> None:
    """Not even what a forward left behind that was cut off between a layer's dropout and its end."""

    def stop(*_: Any) -> None:
        raise InterruptedError

    _, adapters = opened()
    last = list(adapters.layers.values())[-1]
    cut = last.lora_B["default"].register_forward_pre_hook(stop)
    with pytest.raises(InterruptedError):
        training(adapters.model)
    cut.remove()
    adapters.show(None)
    assert torch.equal(training(adapters.model), training(adapters.model, seed=1))


def test_factors_that_are_read_at_every_step_are_not_let_go_of() -> None:
    _, adapters = opened(stages=6)  # 21 rows in 24 dimensions: the folder holds whole matrices
    _, other = opened(stages=6, dropout_past=False)
    before = training(adapters.model)
    for one in (adapters, other):
        one.let_go({})
    assert all(pair.held for pair in adapters.folded) and not any(pair.held for pair in other.folded)
    assert torch.equal(training(adapters.model), before)


def test_the_pairs_that_are_read_are_those_of_the_sum_now() -> None:
    base, adapters = opened()
    training(adapters.model)
    live, folded = adapters.pair(), list(adapters.folded)
    adapters.restore(folded[:2], {}, None)
    adapters.show(live)
    assert off(training(adapters.model), training(unfolded(base, adapters, [*folded[:2], live]))) < 1e-5
    more = random_pair(adapters, "more", seed=50)
    adapters.fold(more)
    assert off(training(adapters.model), training(unfolded(base, adapters, [*folded[:2], more, live]))) < 1e-5


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_recomputed_activations_have_the_same_mask(family: str) -> None:
    _, adapters = opened(family)
    scores = training(adapters.model)
    plain = gradients(adapters, scores)
    checkpoint_activations(adapters.model, True)
    again = training(adapters.model)
    assert off(again, scores) < 1e-6
    found = gradients(adapters, again)
    assert all(off(found[name], gradient) < 1e-5 for name, gradient in plain.items())


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_in_bf16_each_layer_answers_as_unfolded_within_its_rounding(base_dtype: torch.dtype) -> None:
    """Layer by layer, from the very inputs and what the mask left of them, in fp64."""
    base = base_model("llama").to(base_dtype)
    weights = {name: module.weight.double() for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    adapters = adapters_of(base, "llama", dropout=P, dropout_past=True, compute=torch.bfloat16)
    for number in range(3):
        adapters.fold(random_pair(adapters, f"s{number}", seed=number, size=0.3))
    adapters.begin("now")
    adapters.show(random_pair(adapters, "now", seed=9))
    seen: dict[str, dict[str, Tensor]] = {target: {} for target in adapters.layers}
    for target, layer in adapters.layers.items():
        take = seen[target]
        layer.lora_dropout["default"].register_forward_hook(lambda _, __, out, take=take: take.update(left=out))
        layer.register_forward_hook(lambda _, x, out, take=take: take.update(x=x[0], out=out))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        training(adapters.model)
    for target, found in seen.items():
        x, left = found["x"].double(), found["left"].double()
        assert (left == 0).any()

        def made(of_past: Tensor, target: str = target, x: Tensor = x, left: Tensor = left) -> Tensor:
            y = x @ weights[target].T
            for pair in adapters.folded:
                y = y + pair.scale * of_past @ pair.A[target].double().T @ pair.B[target].double().T
            live = adapters.pair()
            return y + live.scale * left @ live.A[target].double().T @ live.B[target].double().T

        assert found["out"].dtype == torch.bfloat16
        assert off(found["out"], made(left)) < 0.01 < 0.1 < off(found["out"], made(x))
