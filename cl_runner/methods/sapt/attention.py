"""Shared attention: a prompt's query against one key a task, and how far it has moved from what it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, pad, silu

NET = ("W1", "W2", "gain", "bias")  # what makes a query of a pooled prompt


def scores(net: Mapping[str, Tensor], keys: Tensor, pooled: Tensor) -> Tensor:
    """``log a`` (b, T), ``a = softmax(K q / √d)``, q = LayerNorm(SiLU(W2 W1 e)), of e (b, d) and keys K (T, d)."""
    d = pooled.shape[1]
    q = layer_norm(silu(pooled @ net["W1"].mT @ net["W2"].mT), (d,), net["gain"], net["bias"])
    found: Tensor = (q @ keys.mT / d**0.5).log_softmax(1)
    return found


def moved(before: Sequence[float], now: Tensor) -> Tensor:
    """``KL(before ‖ a)``, the mean over prompts, ``now`` being log a (b, T). Later pairs counted for 0."""
    p = now.new_tensor([*before])
    p = pad(p, (0, now.shape[1] - len(p)))
    return torch.xlogy(p, p).sum() - (p * now).sum(1).mean()
