"""LoRA pairs that share their output basis with other tasks, and tasks' updates weighed row by row, as live terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear

from cl_runner.adapters.terms import Term, as_computed


class Mixture(Term):
    """``h = Σ_i w_i B_i A_i x`` of finished tasks, constants; w is each row's ``condition["mix"]`` (b, T), else 1.

    ``update`` and ``factors`` are the plain sum, or, while ``asked`` holds weights (T), what those add up to.

    Args:
        A, B: each task's factors, (r, n) and (m, r), the scale in B.
    """

    A: Tensor  # (R, n)
    B: Tensor  # (m, R)
    owner: Tensor  # (R), the number of each row's task
    asked: Tensor | None = None

    def __init__(self, A: Sequence[Tensor], B: Sequence[Tensor]) -> None:
        super().__init__()
        self.register_buffer("A", torch.cat([*A]))
        self.register_buffer("B", torch.cat([*B], 1))
        self.register_buffer("owner", torch.tensor([i for i, rows in enumerate(A) for _ in rows]))

    def forward(self, x: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        inner = linear(as_computed(x), self.A)
        if "mix" in condition:
            inner = inner * condition["mix"][:, self.owner][:, None].to(inner.dtype)
        return linear(inner, self.B)

    def update(self) -> Tensor:
        A, B = self.factors()
        return B @ A

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B if self.asked is None else self.B * self.asked.to(self.B)[self.owner]


class SharedBasis(Term):
    """``ΔW = s (α U A + B A)``, or in blocks ``s (α U A₁ + B A₂)``; U (m, r) is the shared basis.

    Args:
        A: (r, n), or the two blocks one under the other (2r, n); or S (r, c) where there is a dictionary.
        m, scale: rows of ΔW, and s.
        basis: U; None where the task has no share in it.
        dictionary: C (c, n), shared like U: ``A = S C``.
        shared_trains: whether U and C are parameters, else constants.
        own: whether there is a B (m, r), from zero.
        mixing: whether α is a parameter, from 1.
        mask: (m, n), which entries of ``α U A`` count.
        past: finished tasks' updates beside it.
        p: dropout on the input while training.
    """

    U: Tensor | None
    C: Tensor | None
    mask: Tensor | None

    def __init__(
        self,
        A: Tensor,
        m: int,
        scale: float,
        *,
        basis: Tensor | None = None,
        dictionary: Tensor | None = None,
        shared_trains: bool = True,
        own: bool = True,
        mixing: bool = False,
        mask: Tensor | None = None,
        past: Mixture | None = None,
        p: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale, self.p, self.past = scale, p, past
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(A.new_zeros(m, len(A) if basis is None else basis.shape[1])) if own else None
        self.alpha = nn.Parameter(torch.ones(1)) if mixing else None  # (1): DeepSpeed takes no scalar
        for name, shared in (("U", basis), ("C", dictionary)):
            if shared is not None and shared_trains:
                setattr(self, name, nn.Parameter(shared.clone(memory_format=torch.contiguous_format)))
            else:
                self.register_buffer(name, shared)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        wet = as_computed(functional.dropout(x, self.p, self.training))
        if self.mask is None:
            A, B = self.pair()
            out = linear(linear(wet, A), B)
        else:
            out = linear(wet, self.own())
        return out if self.past is None else out + self.past(x, condition)

    def rows(self) -> Tensor:
        """A: (r, n), or of two blocks (2r, n)."""
        return self.A if self.C is None else self.A @ self.C

    def shared(self) -> Tensor | None:
        """α U (m, r)."""
        return self.U if self.U is None or self.alpha is None else self.alpha * self.U

    def pair(self) -> tuple[Tensor, Tensor]:
        """A, and B with s in it, of the task's own update where no mask is on it."""
        A = self.rows()
        parts = [part for part in (self.shared(), self.B) if part is not None]
        if len(A) == sum(part.shape[1] for part in parts):
            return A, self.scale * torch.cat(parts, 1)  # two blocks, or one part alone
        return A, self.scale * (parts[0] + parts[1])

    def own(self) -> Tensor:
        """ΔW (m, n) of the task alone."""
        U, A = self.shared(), self.rows()
        if self.mask is None or U is None:
            A, B = self.pair()
            return B @ A
        r = U.shape[1]
        total = self.mask * (U @ A[:r])
        return self.scale * (total if self.B is None else total + self.B @ A[-r:])

    def update(self) -> Tensor:
        return self.own() if self.past is None else self.own() + self.past.update()

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if self.mask is not None:
            return None
        A, B = self.pair()
        if self.past is None:
            return A, B
        return torch.cat([A, self.past.A]), torch.cat([B, self.past.B], 1)
