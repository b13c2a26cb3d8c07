"""A LoRA update of which only entries over a learned threshold count, as a live term."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear

from cl_runner.adapters.terms import Term, as_computed


def jump(D: Tensor, z: Tensor, width: float) -> Tensor:
    """``J(D) = D·1[|D| > θ]`` (m, n), θ = e^z of z (1).

    By D the gradient is that of the entries kept. By θ, at which J jumps, it is ``−θ/ε · mean(rect((|D| − θ)/ε) ·
    sign(D) · g)``: what the entries within half a ``width`` ε of θ would have brought.
    """
    apply: Any = _Jump.apply
    found: Tensor = apply(D, z, width)
    return found


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, D: Tensor, z: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(D, z)
        ctx.width = width
        return D * (D.abs() > z.exp())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        D, z = ctx.saved_tensors
        (g,) = upstream
        theta, size = z.exp(), D.abs()
        near = ((size - theta) / ctx.width).abs() < 0.5
        by_theta = -theta / ctx.width * (near * D.sign() * g).mean()
        return g * (size > theta), by_theta * theta, None


class Gated(Term):
    """``ΔW = s (p J(B A) + (1 − p) B A)``; A, B and ``z`` train, p goes from 0 to 1 within the stage.

    Args:
        A, B: (r, n) and (m, r) as the stage begins.
        scale: s.
        z: (1), of several layers.
        width: ε of the gradient by the threshold.
        dropout: share of the input that is dropped while training.
    """

    p: Tensor

    def __init__(self, A: Tensor, B: Tensor, scale: float, z: nn.Parameter, width: float, dropout: float) -> None:
        super().__init__()
        self.A, self.B, self.z = nn.Parameter(A), nn.Parameter(B), z
        self.scale, self.width, self.dropout = scale, width, dropout
        self.register_buffer("p", torch.zeros(()))

    def forward(self, x: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        given = functional.dropout(as_computed(x), self.dropout, self.training)
        with torch.autocast(x.device.type, enabled=False):  # a threshold of fp32 entries
            update = self.update()
        return linear(given, update)

    def product(self) -> Tensor:
        """``B A`` (m, n), without s."""
        return self.B @ self.A

    def update(self) -> Tensor:
        D = self.product()
        return self.scale * (self.p * jump(D, self.z, self.width) + (1 - self.p) * D)


def as_many_over(products: Iterable[Tensor], count: int) -> float:
    """The magnitude over which ``count`` entries of all products lie (ties apart); below every entry if they are fewer.

    Between two entries, so that no rounding of it takes one to the other side.
    """
    largest = torch.empty(0)
    for product in products:
        largest = torch.cat([largest.to(product.device), product.detach().abs().flatten()])
        largest = largest.topk(min(count + 1, len(largest))).values
    smallest = float(torch.finfo(torch.float32).tiny)
    if len(largest) <= count:
        return smallest
    return max(float((largest[count - 1].double() * largest[count].double()).sqrt()), smallest)
