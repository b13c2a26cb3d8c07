"""MIGU's rows against the sizes of what each layer puts out, one example at a time."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cl_runner.place import Place
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import STEPS, THREE, Values, label_logits, off, opposed, put, stepped, vector, watch
from tests.stages import Kind, some_rows


def sizes_by_hand(room: Any, kind: Kind, at: Values, examples: Any) -> dict[str, NDArray[np.float64]]:
    """Parameter → mean |output| of each of its rows over all tokens; no padding anywhere."""
    put(room, at)
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    hooks = []
    for target, layer in room.adapters.layers.items():
        note = lambda name: lambda _, given, out: seen[name].append(out.detach()[0].double().abs())  # noqa: E731
        hooks.append(layer.register_forward_hook(note(f"{target}.lora_B")))
        hooks.append(layer.lora_A["default"].register_forward_hook(note(f"{target}.lora_A")))
    for example in examples:
        label_logits(room.adapters.model, kind, example)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows).mean(0).numpy() for name, rows in seen.items()}


def _rows(place: Place, kind: Kind, quantile: float) -> None:
    room, config = order_room(place, "migu", kind=kind, adapter__r=5, **THREE, method__quantile=quantile)
    probe, _ = order_room(place, "seqlora", kind=kind, adapter__r=5)
    steps = watch(room)
    sources = [opposed(0), some_rows(6, seed=1), some_rows(6, seed=2)]  # inputs that differ
    for index in range(3):
        learn(room, config, index, sources[index])
    assert all(torch.equal(vector(step.edited), vector(step.given)) for step in steps[:STEPS])  # the first task
    masks = set()
    for number, step in enumerate(steps[STEPS:], STEPS):
        sizes = sizes_by_hand(probe, kind, step.before, sources[number // STEPS].examples)
        assert sorted(sizes) == sorted(step.given)
        for name, size in sizes.items():
            learn_these = torch.from_numpy(size > np.quantile(size, quantile))
            assert int(learn_these.sum()) == {"B": {32: 10, 16: 5}, "A": {5: 2}}[name[-1]][len(size)]
            assert torch.equal(step.edited[name], step.given[name] * learn_these[:, None]), (number, name)
            masks.add((name, tuple(learn_these.tolist())))
    assert len(masks) > len(sizes)  # they change with the inputs
    second = steps[STEPS : 2 * STEPS]
    for step, wanted in zip(second, stepped(second), strict=True):
        assert off(vector(step.after), vector(wanted)) < 1e-4
    assert not room.method.state().tensors


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_rows_that_learn_at_accumulation_3(kind: Kind) -> None:
    on_ranks(1, _rows, kind, 0.7)
