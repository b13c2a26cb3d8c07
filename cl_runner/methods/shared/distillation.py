"""How far answers have moved from those of an earlier model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def divergence(before: Tensor, now: Tensor, temperature: float) -> Tensor:
    """KL(p_before ‖ p_now) (b, t) in fp32 of logits (b, t, V), p = softmax(logits / temperature)."""
    old, new = ((scores.float() / temperature).log_softmax(-1) for scores in (before, now))
    return (old.exp() * (old - new)).sum(-1)
