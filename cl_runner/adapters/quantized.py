"""A base whose linear layers are kept in 4 bits (QLoRA, arXiv 2305.14314): past updates stay beside the weight.

Nothing is folded into a 4-bit weight: its steps are far wider than an update. W0 is dequantised at every product, as
bitsandbytes does it where there are many rows, and stands side by side with what was learned: ``[W0 | s·B] [x; A x]``
while the factors of all past pairs are smaller than their sum, else ``[W0 | ΔW] [x; x]``. One product adds both up in
fp32 and rounds once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cl_runner.adapters.folding import Accumulator, Factors, product, summed
from cl_runner.adapters.targets import is_transposed


def past_updates(layer: nn.Module, compute: torch.dtype | None) -> Accumulator:
    """What holds the past updates of a layer. ``compute``: as ``Accumulator`` has it."""
    return Quantized(layer) if is_quantized(layer) else Accumulator(layer, is_transposed(layer), compute)


def is_quantized(layer: nn.Module) -> bool:
    """Whether a linear layer's weight is in 4 bits."""
    return isinstance(layer, nn.Linear) and type(layer).__name__ == "Linear4bit"


def dequantized(layer: Any) -> Tensor:
    """W0 (m, n) of a layer in 4 bits, in the precision that the base was loaded in; made anew at every call."""
    from bitsandbytes.functional import dequantize_4bit

    found: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return found


class Quantized(Accumulator):
    """The past updates of a layer in 4 bits, beside its weight.

    While nothing was folded, bitsandbytes' own forward answers, with the same W0.
    """

    def __init__(self, layer: Any) -> None:
        self.layer: Any = layer
        self.transposed = layer.source_cls.__name__ == "Conv1D"  # what the layer was, and is to plain PEFT
        self.compute = layer.compute_dtype
        self._sum: Tensor | None = None
        self.lends = False  # nothing can be taken of 4 bits
        self._pairs: list[Factors] = []  # in stage order, in place of the sum while they are smaller; on the CPU
        self.left: Tensor | None = None  # (m, k): s·B of every pair, or ΔW, as computed with
        self.right: Tensor | None = None  # (k, n): A of every pair; None beside ΔW

    @property
    def empty(self) -> bool:
        return self.left is None

    @property
    def base(self) -> Tensor:
        return dequantized(self.layer)

    @property
    def sum(self) -> Tensor | None:
        return self.sum_later()()

    def sum_later(self) -> Callable[[], Tensor | None]:
        total, pairs, device = self._sum, tuple(self._pairs), self.weight.device
        return lambda: summed(pairs, device) if total is None else total

    @property
    def beside(self) -> Tensor | None:
        """The update as it is computed with, (m, n) fp32."""
        if self.left is None:
            return None
        left = self.left.to(self.compute).float()
        return left if self.right is None else left @ self.right.float()

    def applied(self) -> Tensor:
        update = self.beside
        return torch.zeros(self.shape, device=self.weight.device) if update is None else update

    def beside_bytes(self, rank: int, dense: bool) -> int:
        m, n = self.shape
        return 4 * m * n if dense or not self._fits(rank) else self.compute.itemsize * rank * (m + n)

    @torch.no_grad()
    def add_pair(self, factors: Factors) -> None:
        if self._sum is None and self._smaller([*self._pairs, factors]):
            self._stand([*self._pairs, factors])
        else:
            self.add(product(factors, self.weight.device))

    def add_none(self) -> None:
        """The folder has sums from now on, which are read back: then it is one here, too."""
        self.set(self.sum)

    @torch.no_grad()
    def restore(self, total: Tensor | None, pairs: Sequence[Factors], dense: bool) -> None:
        if pairs and not dense and self._smaller(pairs):
            self._stand(pairs)
        else:
            super().restore(total, pairs, dense)

    @torch.no_grad()
    def set(self, total: Tensor | None) -> None:
        self._stand([], total)

    def _smaller(self, pairs: Sequence[Factors]) -> bool:
        return self._fits(sum(len(A) for A, _, _ in pairs))

    def _fits(self, rank: int) -> bool:
        """Whether factors of that rank hold fewer numbers than their product."""
        m, n = self.shape
        return rank * (m + n) < m * n

    def _stand(self, pairs: Sequence[Factors], total: Tensor | None = None) -> None:
        self._pairs, self._sum = list(pairs), total
        self.left, self.right = total, None
        if pairs:
            device = self.weight.device
            self.left = torch.cat([(s * B.to(device)).to(self.compute) for _, B, s in pairs], dim=1)
            self.right = torch.cat([A.to(device, self.compute) for A, _, _ in pairs])
        vars(self.layer).pop("forward", None)
        if self.left is not None:
            self.layer.forward = self._forward

    def _forward(self, x: Tensor) -> Tensor:
        out: Tensor = _SideBySide.apply(x.to(self.compute), self)  # type: ignore[no-untyped-call]
        return out.to(x.dtype)


class _SideBySide(torch.autograd.Function):
    """``[W0 | left] [x; right x] + bias``; W0 is dequantised again for the gradient, not kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, past: Quantized) -> Tensor:
        left, right, bias = past.left, past.right, past.layer.bias
        assert left is not None, "nothing was folded"
        ctx.past, ctx.left, ctx.right = past, left, right
        inner = x if right is None else linear(x, right)
        wide = torch.cat([past.base.to(x.dtype), left.to(x.dtype)], dim=1)
        return linear(torch.cat([x, inner], dim=-1), wide, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        [given] = gradients
        base, left = ctx.past.base.to(given.dtype), ctx.left.to(given.dtype)
        inner, tall = (given, left) if ctx.right is None else (given @ left, ctx.right)
        return torch.cat([given, inner], dim=-1) @ torch.cat([base, tall]), None
