"""What a run computes in: as its settings say, or, where they leave it to the processor, as was decided once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel

from cl_runner.adapters.targets import is_linear, shape_of
from cl_runner.engine import zero as engine
from cl_runner.engine.precision import AUTO, Compute, Shape, decide
from cl_runner.engine.process import Place
from cl_runner.models.base import Base
from cl_runner.models.batch import Example
from cl_runner.models.token_cache import lengths
from cl_runner.training.plan import Plan


def computing(plan: Plan, place: Place, base: Base, rows: Sequence[Example]) -> Compute:
    """What the forwards compute in. *Collective*: rank 0's word where it was measured.

    Under ``auto`` a GPU computes in bf16, and a CPU in what the run was begun with (``Plan.computes``). A new run asks
    the clock; what is only evaluated never does.

    Args:
        base: without adapters.
        rows: what will be trained on.
    """
    precision = plan.config.training.precision
    if precision != "auto" or place.device == "cuda":
        return Compute(precision != "fp32")
    found = None
    if place.rank == 0:
        if plan.computes == "bf16":
            found = Compute(True, kept=True, said=f"computes in bf16, as the run began ({AUTO})")
        elif plan.computes == "fp32" or plan.only is not None:
            found = Compute(False)
        else:
            found = decide(_shapes(plan, base.model), _tokens(plan, place, rows, base.encoder_decoder))
    decided: Compute = engine.broadcast_object(place, found)
    return decided


def _shapes(plan: Plan, model: PreTrainedModel) -> list[Shape]:
    """Of the layers that get adapters; of all, where what trains is something else. The head is not among them."""
    if shapes := plan.kind.shapes(model):
        return shapes
    head = model.get_output_embeddings()
    return [shape_of(module) for module in model.modules() if is_linear(module) and module is not head]


def _tokens(plan: Plan, place: Place, rows: Sequence[Example], encoder_decoder: bool) -> int:
    """Of a micro-batch with rows of the usual length."""
    sources, targets = lengths(rows)
    usual = float(np.median(sources if encoder_decoder else sources + targets))
    return round(usual * plan.batches(place.ranks)[0].micro_batch)
