"""Tensors by name as one vector, and back: what methods that see the whole gradient calculate with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def flat(values: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """One fp32 vector (n) of the values of ``names``, in that order; part of their graph."""
    import torch

    return torch.cat([values[name].flatten().float() for name in names])


def unflat(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a vector (n) by name, in the order and the shapes of ``like``."""
    import torch

    parts = torch.split(vector, [value.numel() for value in like.values()])
    return {name: part.view(value.shape) for part, (name, value) in zip(parts, like.items(), strict=True)}
