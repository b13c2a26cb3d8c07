"""Kinds beside a base that is bf16, or computes in it: no worse than the base itself, and no small update is lost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapters.families import base_model, logits, off, with_updates
from tests.adapters.tuners import CASES, READS_WEIGHT, SETTINGS, begun, moved, opened
from tests.breadth import in_turn


def low(model: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return logits(model)


@pytest.mark.parametrize(
    ("kind", "family", "dtype"),
    in_turn(CASES, [torch.float32, torch.bfloat16]),
    ids=lambda value: {torch.float32: "fp32 base", torch.bfloat16: "bf16 base"}.get(value),
)
def test_answers_in_bf16_are_as_near_as_the_bases_own(kind: str, family: str, dtype: torch.dtype) -> None:
    """Live and folded, at the first stage and beside a past, against all updates in an fp64 weight."""
    base = base_model(family, layers=1).to(dtype)
    own = off(low(base), logits(copy.deepcopy(base).double()))
    assert 0.002 < own < 0.01
    adapters = opened(kind, base, family, compute=torch.bfloat16)
    updates: list[dict[str, Tensor]] = []
    for stage in range(2):
        moved(begun(adapters, f"s{stage}", stage), stage, size=0.1)
        updates.append(adapters.live_update())
        wanted = logits(with_updates(base, updates))
        assert off(low(adapters.model), wanted) < 3 * own
        assert off(logits(adapters.model), wanted) < 3 * own  # without autocast
        adapters.fold_live()
        assert off(low(adapters.model), wanted) < 3 * own


@pytest.mark.parametrize("kind", SETTINGS)
def test_past_updates_a_thousandth_of_the_weight_stay(kind: str) -> None:
    """Weights that the layer itself reads are fp32 with the past in them; beside others the past stands apart."""
    base = base_model("t5", layers=1).to(torch.bfloat16)
    adapters = opened(kind, base, compute=torch.bfloat16)
    for past in adapters.past.values():
        assert past.weight.dtype == (torch.float32 if kind in READS_WEIGHT else torch.bfloat16)
    total: dict[str, Tensor] = {}
    for stage in range(2):
        moved(begun(adapters, f"s{stage}", stage), stage, size=0.0 if kind == "lora-xs" else 3e-3)
        update = adapters.live_update()
        total = {t: delta + total.get(t, 0.0) for t, delta in update.items()}
        adapters.fold_live()
    for target, past in adapters.past.items():
        assert past.sum is not None and off(past.sum, total[target]) < 1e-6
        assert off(past.applied(), total[target]) < 0.01
        assert total[target].norm() < 0.05 * past.base.float().norm()
        assert (past.beside is None) == (kind in READS_WEIGHT)
        assert torch.equal(past.base.to(torch.bfloat16), base.get_submodule(target).weight)
