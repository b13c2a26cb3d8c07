"""What a run computes in: as its settings say, or, where they leave it to the processor, as was measured once.

Under autocast a weight in fp32 is rounded to bf16 at every forward. Those that nothing trains or folds into are rounded
once instead (``rounded``): the same bits, at half the memory.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cl_runner.adapters.targets import is_linear, shape_of, weight_owners
from cl_runner.engine import zero as engine
from cl_runner.engine.precision import AUTO, Compute, decide, has_bf16
from cl_runner.engine.process import Place
from cl_runner.models.base import Base
from cl_runner.models.batch import Batch, Example, collate
from cl_runner.models.forward import logits, token_loss
from cl_runner.models.token_cache import lengths
from cl_runner.training.plan import Plan

# Weights of a layer worth measuring; smaller ones wait for Python, and embedded models keep their numbers on every CPU.
LARGE = 384 * 384
TOKENS = 256  # of what is measured: no more than a step takes, and enough for weights to be read once for many


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
        elif plan.computes == "fp32" or plan.only is not None or not worth_measuring(base):
            found = Compute(False)
        else:
            batch = usual_rows(rows, base, plan.batches(place.ranks)[0].micro_batch)
            with torch.random.fork_rng(devices=[]):
                found = decide(partial(seconds, base, batch))
    decided: Compute = engine.broadcast_object(place, found)
    return decided


def worth_measuring(base: Base) -> bool:
    """Whether this processor has bf16, and the model layers that are large enough to gain by it.

    Not one in 4 bits: its products are in fp32 unless the settings say otherwise.
    """
    if base.sizes is not None or not has_bf16():
        return False
    model, head = base.model, base.model.get_output_embeddings()
    layers = (module for module in model.modules() if is_linear(module) and module is not head)
    return any(m * n >= LARGE for m, n in map(shape_of, layers))


def usual_rows(rows: Sequence[Example], base: Base, micro_batch: int) -> Batch:
    """Rows of the usual length, as many as a micro-batch has, or as make ``TOKENS`` tokens."""
    sources, targets = lengths(rows)
    tokens = sources + targets
    usual = float(np.median(tokens))
    count = max(1, min(micro_batch, int(TOKENS // max(usual, 1))))
    nearest = np.argsort(np.abs(tokens - usual), kind="stable")[:count]
    return collate([rows[int(row)] for row in nearest], base.layout)


def seconds(base: Base, batch: Batch, bf16: bool) -> tuple[float, float]:
    """Of a step of the frozen base on a batch, forward and backward through all of it, and of a forward alone."""
    with _rounded_meanwhile(base.model) if bf16 else nullcontext():
        return _seconds(base, batch, bf16)


def _seconds(base: Base, batch: Batch, bf16: bool) -> tuple[float, float]:
    root = engine.Autocast(base.model, torch.device("cpu"), bf16)
    embedded: list[Tensor] = []

    def see(_: object, __: object, out: Tensor) -> Tensor:
        embedded.append(out := out.detach().requires_grad_())
        return out

    weight = base.model.get_input_embeddings().weight  # encoder and decoder may each have a module of it
    inputs = [module for module in base.model.modules() if getattr(module, "weight", None) is weight]
    watching = [module.register_forward_hook(see) for module in inputs if isinstance(module, nn.Embedding)]
    try:
        started = time.perf_counter()
        with torch.enable_grad():
            loss = root(lambda: token_loss(logits(base.model, batch), batch.labels).sum())
            torch.autograd.grad(loss, embedded)
        step = time.perf_counter() - started
    finally:
        for hook in watching:
            hook.remove()
    started = time.perf_counter()
    with torch.no_grad():
        root(lambda: logits(base.model, batch))
    return step, time.perf_counter() - started


def rounded(model: PreTrainedModel, but: Collection[str] = ()) -> list[nn.Module]:
    """Round the weights of a frozen model's linear layers to bf16, for forwards under autocast alone; which they were.

    but: names of layers that keep theirs. So do layers that share a weight with an embedding, whose rows are read as
    they are.
    """
    owners = weight_owners(model)
    found = []
    for name, module in model.named_modules():
        if is_linear(module) and name not in but and len(owners[id(module.weight)]) == 1:
            weight: Any = module.weight
            weight.data = weight.data.bfloat16()
            found.append(module)
    return found


@contextmanager
def _rounded_meanwhile(model: PreTrainedModel) -> Iterator[None]:
    """``rounded``, and afterwards as they were."""
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    rounded(model)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = before[name]
