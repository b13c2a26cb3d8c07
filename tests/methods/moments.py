"""What target layers read, seen one example at a time: second moments, and means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.methods.steps import label_logits
from tests.stages import Kind


def moments_by_hand(room: Any, kind: Kind, examples: Any) -> dict[str, Tensor]:
    """Target → mean of x xᵀ (n, n) over all tokens, each example alone; no padding anywhere. fp64."""
    return {target: x.T @ x / len(x) for target, x in _inputs(room, kind, examples).items()}


def mean_inputs(room: Any, kind: Kind, examples: Any) -> dict[str, Tensor]:
    """Target → mean of x (n) over all tokens, each example alone. fp64."""
    return {target: x.mean(0) for target, x in _inputs(room, kind, examples).items()}


def _inputs(room: Any, kind: Kind, examples: Any) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {target: [] for target in room.adapters.layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, target=target: seen[target].append(given[0][0].double()))
        for target, layer in room.adapters.layers.items()
    ]
    room.adapters.model.eval()
    with torch.no_grad():
        for example in examples:
            label_logits(room.adapters.model, kind, example)
    for hook in hooks:
        hook.remove()
    return {target: torch.cat(parts) for target, parts in seen.items()}
