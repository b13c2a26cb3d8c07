"""Some rows of a source, by lot."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cl_runner.methods.protocol import Source


def drawn(source: Source, size: int | None, generator: torch.Generator) -> Source:
    """``size`` rows (all, where it has fewer, or of None), in their order, from a CPU generator alone."""
    import torch

    return source.take(sorted(torch.randperm(len(source.examples), generator=generator).tolist()[:size]))
