"""Live terms: what a method trains in the place of a LoRA pair, ``h = W x + term(x)`` at every target layer.

W carries all past updates, as beside a pair. A method makes one term for each target in ``build`` and hands them to
``Adapters.begin_terms``; how they are carried over is the method's own (``Method.state``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cl_runner.adapters.pairs import Pair


class Term(nn.Module):
    """What is added to one target layer's output. Its parameters may train and are fp32; what is frozen are buffers."""

    def forward(self, x: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The addition (b, t, m) to the output for the layer's input (b, t, n).

        ``condition`` has the method's own rows (b, …) of the batch (``Method.condition``). The graph has to be the
        same whatever is in it: multiply by a mask, never branch.
        """
        raise NotImplementedError

    def update(self) -> Tensor:
        """ΔW (m, n) fp32, in the graph of the parameters: the one matrix that answers as the term does."""
        raise NotImplementedError

    def own(self) -> Tensor:
        """ΔW (m, n) of the stage alone, where ``update`` has in it what earlier stages left."""
        return self.update()

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A (R, n) and B (m, R) with ``ΔW = B A``, where the term has them; None where ΔW has full rank."""
        return None


@dataclass(frozen=True, eq=False)
class Terms:
    """The live terms of a stage: one for each target, and parameters that belong to no layer alone.

    ``pair``: of the targets without a term, where a LoRA pair trains beside the terms.
    """

    stage: str
    of: dict[str, Term]
    shared: dict[str, nn.Parameter] = field(default_factory=dict)
    pair: Pair | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → parameter: the shared ones, then ``<target>.<name>``. One that several layers hold is there once."""
        found = dict(self.shared)
        seen = {id(parameter) for parameter in found.values()}
        for target, term in self.of.items():
            for name, parameter in term.named_parameters():
                if id(parameter) not in seen:
                    found[f"{target}.{name}"] = parameter
                    seen.add(id(parameter))
        return found


def as_computed(x: Tensor) -> Tensor:
    """An input as a product with fp32 parameters takes it: autocast sees to that by itself, else fp32."""
    return x if torch.is_autocast_enabled(x.device.type) else x.float()
