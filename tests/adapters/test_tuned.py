"""A stage of every kind: it begins as the base, answers as what it folds, and trains what it says, beside any past."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.config.schema import TrainingConfig
from cl_runner.engine.optim import by_learning_rate, ordinary_groups
from tests.adapters.families import base_model, logits, off, with_updates
from tests.adapters.tuners import (
    CASES,
    FACTORS,
    MOVES,
    PAIRS,
    SETTINGS,
    begun,
    folded,
    moved,
    opened,
    tuner,
)


def ids(rows: int = 3) -> Tensor:
    return torch.randint(3, 48, (rows, 7), generator=torch.Generator().manual_seed(1))


def loss(model: Any) -> Tensor:
    """Of fixed rows, with every weight of the model in it."""
    rows = ids()
    if model.config.is_encoder_decoder:
        return model(input_ids=rows, labels=rows[:, :4].contiguous()).loss
    return model(input_ids=rows, labels=rows).loss


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_a_stage_begins_as_the_base_or_as_near_as_it_is_published(kind: str, family: str) -> None:
    base = base_model(family, layers=1)
    wanted = logits(base)
    adapters = begun(opened(kind, base, family))
    apart = off(logits(adapters.model), wanted)
    assert 0 < apart < 2e-3 if kind in MOVES else apart < 1e-6
    adapters.show(None)
    assert torch.equal(logits(adapters.model), wanted)
    folded(adapters, "one", seed=1)
    wanted = logits(adapters.model)
    begun(adapters, "two", seed=2)
    assert off(logits(adapters.model), wanted) < (2e-3 if kind in MOVES else 2e-6)
    adapters.show(None)
    assert torch.equal(logits(adapters.model), wanted)


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_what_is_folded_answers_as_it_did_live_beside_any_past(kind: str, family: str) -> None:
    """Kinds that turn or scale the weight, or begin from it, do so with what was folded before in it."""
    base = base_model(family, layers=1)
    adapters = opened(kind, base, family)
    updates: list[dict[str, Tensor]] = []
    for stage in range(3):
        moved(begun(adapters, f"s{stage}", stage), stage)
        live = logits(adapters.model)
        updates.append(adapters.live_update())
        weights = {target: past.whole.clone() for target, past in adapters.past.items()}
        assert off(live, logits(with_updates(base, updates))) < 1e-5
        adapters.fold_live()
        assert off(logits(adapters.model), live) < 1e-5 and adapters.live is None
        for target, past in adapters.past.items():
            assert off(past.whole - weights[target], updates[-1][target]) < 1e-4
    stages = ["s0", "s1", "s2"]
    assert [pair.stage for pair in adapters.folded] == (stages if kind in FACTORS else [])
    assert adapters.dense == ([] if kind in PAIRS else stages)


@pytest.mark.parametrize("kind", ["dora", "ia3", "oft", "boft", "hra"])
def test_what_turns_or_scales_the_weight_learns_something_else_beside_a_past(kind: str) -> None:
    base = base_model("t5", layers=1)
    adapters = opened(kind, base)
    alone = moved(begun(adapters), size=0.2).live_update()
    own = adapters.values().tensors
    adapters.show(None)
    adapters.fold_dense("past", {t: torch.ones(past.base.shape) * 0.1 for t, past in adapters.past.items()})
    begun(adapters, "two")
    adapters.put({name: value for name, value in own.items() if "magnitude" not in name})
    assert min(off(delta, alone[target]) for target, delta in adapters.live_update().items()) > 0.01


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_every_parameter_trains_and_nothing_else(kind: str, family: str) -> None:
    adapters = moved(begun(opened(kind, base_model(family, layers=1), family)), size=0.1)
    loss(adapters.model).backward()
    own = adapters.parameters()
    for name, parameter in own.items():
        assert parameter.dtype == torch.float32 and parameter.requires_grad and parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0 and bool(parameter.grad.isfinite().all()), name
    trained = {id(parameter) for parameter in own.values()}
    assert all(p.grad is None and not p.requires_grad for p in adapters.model.parameters() if id(p) not in trained)
    assert sum(parameter.numel() for parameter in own.values()) == adapters.kind.trained_count(adapters.targets())
    roles = adapters.roles()
    assert {role for _, role in roles.values()} | set(adapters.kind.shared.values()) <= set(adapters.kind.trains)
    assert set(roles) | set(adapters.kind.shared) == set(own)
    for role in {role for _, role in roles.values()}:
        assert adapters.named(role) == {target: name for name, (target, what) in roles.items() if what == role}
    adapters.train(False)
    assert not any(parameter.requires_grad for parameter in adapters.model.parameters())
    adapters.show(None)
    adapters.show(adapters.shown())
    adapters.train(True)
    assert {id(p) for p in adapters.model.parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_forward_with_other_values_leaves_the_parameters_where_they_are(kind: str) -> None:
    """As methods ask what the model answered before: torch swaps the parameters, shared ones at every place."""
    adapters = moved(begun(opened(kind, base_model("t5", layers=1))))
    own, before = adapters.parameters(), logits(adapters.model)
    full = {id(parameter): name for name, parameter in adapters.model.named_parameters()}
    other = {name: parameter.detach() + 0.1 for name, parameter in own.items()}
    rows = {"input_ids": ids(), "decoder_input_ids": ids()[:, :4].flip(1), "use_cache": False}
    named = {full[id(own[name])]: value for name, value in other.items()}
    for _ in range(2):
        with torch.no_grad():
            swapped = torch.func.functional_call(adapters.model, named, (), rows).logits
        assert {id(parameter) for parameter in adapters.model.parameters()} == set(full)
        assert torch.equal(logits(adapters.model), before)
    adapters.put(other)
    assert torch.equal(logits(adapters.model), swapped) and off(swapped, before) > 1e-3


def test_every_role_of_a_kind_is_one_that_trains() -> None:
    """In one kind of layers or another: LoKr's factors are whole or products by their size."""
    for kind in SETTINGS:
        found = set(tuner(kind).roles.values()) | set(tuner(kind).shared.values())
        assert found == set(tuner(kind).trains), kind


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_norm_of_what_a_stage_learned(kind: str) -> None:
    """Of a set that trains on, from where its stage began."""

    def norm(update: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float(delta.double().square().sum()) for delta in update.values()))

    adapters = moved(begun(opened(kind, base_model("t5", layers=1))))
    first = adapters.live_update()
    assert adapters.update_norm() == pytest.approx(norm(first), rel=1e-5)
    adapters.keep_live()
    assert adapters.kept.keys() == {"one"}
    adapters.rename("two")
    assert adapters.live == "two" and adapters.kept == {}
    assert adapters.update_norm() == pytest.approx(0.0, abs=1e-6)
    assert (adapters.start is not None) == (kind in FACTORS)
    moved(adapters, seed=1, size=0.1)
    second = adapters.live_update()
    apart = {target: delta - first[target] for target, delta in second.items()}
    assert adapters.update_norm() == pytest.approx(norm(apart), rel=1e-4)
    if adapters.start is not None and kind != "dora":
        assert all(off(adapters.start.update(target), first[target]) < 1e-5 for target in first)
    begun(adapters, "three")
    assert adapters.start is None and adapters.update_norm() == pytest.approx(norm(adapters.live_update()), abs=1e-6)


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_learning_rate_for_lora_carries_over(kind: str) -> None:
    """Every parameter at the kind's ratio; VB-LoRA's logits at their own, beside that of the bank."""
    adapters = begun(opened(kind, base_model("t5", layers=1), lr_ratio=3.0))
    own = adapters.parameters()
    groups = by_learning_rate(ordinary_groups(own, TrainingConfig(), adapters.model), adapters.learning_rates())
    found = {name: group.lr_scale for group in groups for name in group.parameters}
    assert found == {name: 30.0 if "logits" in name else 3.0 for name in own}
    ratios = {"vera": 10, "vblora": 2.5, "lora-xs": 7, "ia3": 8, "oft": 4, "fourierft": 10}
    assert tuner(kind).config.lr_ratio == ratios.get(kind, 1)
