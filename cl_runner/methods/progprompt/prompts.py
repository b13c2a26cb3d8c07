"""Prompts one before the other, and a prompt through a residual MLP."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MLP = {"mlp_in": 800, "mlp_middle": 400}  # widths, as published


def fresh_mlp(d: int, dice: torch.Generator) -> dict[str, Tensor]:
    """Weights and biases of d → 800 → 400 → d by name, uniform within 1/√n, as torch's own linear layers."""
    import torch

    values = {}
    for (n, m), name in zip(pairwise([d, *MLP.values(), d]), [*MLP, "mlp_out"], strict=True):
        values[name] = (torch.rand(m, n, generator=dice) * 2 - 1) * n**-0.5
        values[f"{name}_bias"] = (torch.rand(m, generator=dice) * 2 - 1) * n**-0.5
    return values


def stacked(prompts: Mapping[str, Tensor], task: str | None) -> Tensor:
    """What stands before the input of a task: its prompt and those of the tasks before, newest first, (p, d)."""
    import torch

    names = list(prompts)
    before = names[: names.index(task) + 1] if task is not None and task in prompts else names
    return torch.cat([prompts[name] for name in reversed(before)])


def reparameterised(own: Mapping[str, Tensor]) -> Tensor:
    """The prompt (L, d), and what an MLP adds to it, if there is one."""
    prompt = own["prompt"]
    if "mlp_in" not in own:
        return prompt
    from torch.nn.functional import linear

    hidden = linear(prompt, own["mlp_in"], own["mlp_in_bias"]).relu()
    hidden = linear(hidden, own["mlp_middle"], own["mlp_middle_bias"]).tanh()
    return prompt + linear(hidden, own["mlp_out"], own["mlp_out_bias"])
