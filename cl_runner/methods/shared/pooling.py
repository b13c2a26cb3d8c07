"""The embeddings of a row's prompt as one vector: of its own tokens, however wide the batch was padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch


def mean_embedding(stage: Stage, batch: Batch) -> Tensor:
    """The mean over each row's source, (b, d) fp32."""
    embedded, source = stage.embeddings(batch)
    return (embedded * source[..., None]).sum(1) / source.sum(1, keepdim=True)


def largest_embedding(stage: Stage, batch: Batch) -> Tensor:
    """Of each dimension the largest value over each row's source, (b, d) fp32."""
    embedded, source = stage.embeddings(batch)
    return embedded.masked_fill(~source[..., None], -float("inf")).amax(1)


def largest_embeddings(stage: Stage, sources: Sequence[Sequence[int]]) -> Tensor:
    """The same of prompts that are no batch's, (N, d): each read by itself."""
    import torch

    return torch.cat([largest_embedding(stage, _alone(source, stage.device)) for source in sources])


def _alone(source: Sequence[int], device: torch.device) -> Batch:
    import torch

    from cl_runner.models.batch import Batch

    ids = torch.tensor([[*source]], device=device)
    none = ids.new_zeros(1, 0)
    return Batch(ids, torch.ones_like(ids), none, none.float())
