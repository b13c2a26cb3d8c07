"""Second moments of the inputs of target layers, seen one example at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.methods.steps import label_logits
from tests.stages import Kind


def moments_by_hand(room: Any, kind: Kind, examples: Any) -> dict[str, Tensor]:
    """Target → mean of x xᵀ (n, n) over all tokens, each example alone; no padding anywhere. fp64."""
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
    rows = {target: torch.cat(parts) for target, parts in seen.items()}
    return {target: x.T @ x / len(x) for target, x in rows.items()}
