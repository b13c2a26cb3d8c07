"""A factor of PEFT's LoRA layer that is made of other things, for kinds that PEFT has not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cl_runner.adapters.kind import NAME
from cl_runner.imports import light_imports


class Composed(nn.Module):
    """Stands where ``lora_A`` or ``lora_B`` has its linear layer; ``weight`` is the factor, in the graph."""

    @property
    def weight(self) -> Tensor:
        """The factor as the forward uses it, fp32."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class Scaled(Composed):
    """``diag(vector) factor``; the factor may be other layers' too."""

    def __init__(self, factor: nn.Parameter) -> None:
        super().__init__()
        self.factor = factor
        self.vector = nn.Parameter(torch.ones(len(factor), device=factor.device))

    @property
    def weight(self) -> Tensor:
        return self.vector[:, None] * self.factor


class Mixed(Composed):
    """``mixer basis``, the basis a frozen buffer."""

    basis: Tensor

    def __init__(self, rank: int, n: int, device: torch.device) -> None:
        super().__init__()
        self.mixer = nn.Parameter(torch.zeros(rank, rank, device=device))
        self.register_buffer("basis", torch.zeros(rank, n, device=device))

    @property
    def weight(self) -> Tensor:
        return self.mixer @ self.basis


class Fixed(Composed):
    """A frozen factor."""

    basis: Tensor

    def __init__(self, m: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("basis", torch.zeros(m, rank, device=device))

    @property
    def weight(self) -> Tensor:
        return self.basis


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and layer of every LoRA layer, its own factors frozen: they are to be replaced."""
    with light_imports():
        from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            for factor in (layer.lora_A[NAME], layer.lora_B[NAME]):
                factor.requires_grad_(False)
            yield name, layer
