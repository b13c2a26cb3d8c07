"""What fits into memory. Under ``training.auto_batch`` a step, or a batch of answers, that does not is done in halves.

A step is done again from its beginning, by all ranks: the gradient of each micro-batch is taken apart from the engine,
ranks agree whether all of them could, and only then is it handed on. So nobody waits in a collective for one that is
out of memory, and nothing of a step that did not fit is kept.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from cl_runner.config.schema import RunConfig
from cl_runner.errors import OUT_OF_MEMORY, OutOfMemory, beginning, out_of_memory

if TYPE_CHECKING:
    from cl_runner.training.stage import StageRun

Result = TypeVar("Result")
HALVES = "training.auto_batch=true"  # what ``--set`` takes, for the same numbers


class DoesNotFit(Exception):
    """Memory does not suffice for a step's micro-batches, here or on another rank. The same on every rank."""


class Fit:
    """The sizes that were found to fit in one stage; where nothing is found they are the settings'.

    micro_batches: step (from 1) → what a device takes at once from it on, of steps that were done again.
    eval_tokens: of a batch of answers, padding included.
    """

    def __init__(self) -> None:
        self.micro_batches: dict[int, int] = {}
        self.eval_tokens: int | None = None

    @property
    def micro_batch(self) -> int | None:
        """The last one; None: the setting's."""
        return list(self.micro_batches.values())[-1] if self.micro_batches else None

    def about(self) -> dict[str, Any]:
        """What ``metrics.json`` says of it; nothing where all fitted as the settings have it."""
        found: dict[str, Any] = self.state() if self.micro_batches else {}
        return {**found, **({"eval_batch_tokens": self.eval_tokens} if self.eval_tokens else {})}

    def state(self) -> dict[str, Any]:
        """Between two steps, as JSON has it."""
        return {"micro_batches": {str(step): size for step, size in self.micro_batches.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of ``state``."""
        self.micro_batches = {int(step): size for step, size in state["micro_batches"].items()}

    def answered(
        self,
        numbers: Sequence[int],
        width: int,
        work: Callable[[Sequence[int]], Sequence[Result]],
        config: RunConfig,
        whole: bool = False,
    ) -> list[Result]:
        """What ``work`` makes of a batch, in one piece or in as many as fit.

        numbers: of its rows. width: tokens of the longest. whole: it has to be one, as what is drawn for a batch
        depends on it.

        Raises:
            OutOfMemory: of one row, or where batches may not be halved.
        """
        rows = max(1, self.eval_tokens // width) if self.eval_tokens and not whole else len(numbers)
        found: list[Result] = []
        while len(found) < len(numbers):
            part = numbers[len(found) : len(found) + rows]
            made, why = attempt(partial(work, part))
            if made is not None:
                found += made
                continue
            if whole or len(part) == 1 or not config.training.auto_batch:
                raise answers_do_not_fit(config, len(part), width, why, whole)
            rows = len(part) // 2
            self.eval_tokens = rows * width
        return found


def attempt(work: Callable[[], Result]) -> tuple[Result | None, str]:
    """What ``work`` makes; or, where memory does not suffice, None and why. Then all that it held is freed."""
    try:
        return work(), ""
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        why = beginning(error)
    # Out here the error is gone, and with it the frames that held tensors.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, why


class _Given(torch.autograd.Function):
    """Nothing, whose gradient is what was taken elsewhere."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.gradients)


def taken_apart(stage: StageRun, compute: Callable[[], tuple[Result, Tensor]]) -> tuple[Result, Tensor]:
    """What ``compute`` gives beside a scalar, and in the scalar's place one that has its gradient and no graph.

    *Collective*: ``compute`` itself must not be.

    Raises:
        DoesNotFit: on every rank, where it does not on one of them.
    """
    assert stage.engine is not None
    parameters = list(stage.engine.parameters.values())

    def work() -> tuple[Result, list[Tensor | None] | None]:
        found, scalar = compute()
        if not scalar.requires_grad:
            return found, None
        return found, list(torch.autograd.grad(scalar, parameters, allow_unused=True))

    made, why = attempt(work)
    if bool(stage.sum(torch.tensor(float(made is None), device=stage.device))):
        raise DoesNotFit(why or "on another process")
    assert made is not None
    found, gradients = made
    reached = [(p, g) for p, g in zip(parameters, gradients or [], strict=gradients is not None) if g is not None]
    if not reached:
        return found, torch.zeros((), device=stage.device)
    given: Tensor = _Given.apply([g for _, g in reached], *(p for p, _ in reached))  # type: ignore[no-untyped-call]
    return found, given


def may_halve(config: RunConfig) -> bool:
    """Whether a smaller micro-batch would give the same numbers."""
    training = config.training
    return "micro" not in (training.loss_mean, training.penalty_at, training.dropout_by)


def step_does_not_fit(stage: StageRun, rows: int, why: str) -> OutOfMemory:
    """What to lower where a step's micro-batch of so many rows does not fit."""
    config = stage.config
    said = f"{OUT_OF_MEMORY} in step {stage.step + 1}, whose micro-batches have {rows} row{'s' * (rows > 1)}"
    smaller = [f"data.max_source ({config.data.max_source})"]
    if not config.training.activation_checkpointing:
        smaller.append("or set training.activation_checkpointing=true")
    if rows == 1:
        return OutOfMemory(f"{said}: lower {' '.join(smaller)} ({why})")
    # What is halved already has run out elsewhere: in the optimizer, or in what the method does between steps.
    if config.training.auto_batch or not may_halve(config):
        return OutOfMemory(f"{said}: lower training.micro_batch, {' '.join(smaller)} ({why})")
    lower = f"lower training.micro_batch, or let {HALVES} do it, with the same numbers"
    return OutOfMemory(f"{said}: {lower} ({why})", HALVES)


def answers_do_not_fit(config: RunConfig, rows: int, width: int, why: str, whole: bool = False) -> OutOfMemory:
    """What to lower where so many rows of that width cannot be answered at once; a ``whole`` batch is never halved."""
    said = f"{OUT_OF_MEMORY} over a batch of {rows} answer{'s' * (rows > 1)} to up to {width} tokens each"
    if rows == 1:
        return OutOfMemory(f"{said}: lower data.max_source ({config.data.max_source}) ({why})")
    lower = f"{said}: lower eval.batch_tokens (a batch has {rows * width})"
    if whole or config.training.auto_batch or not may_halve(config):
        return OutOfMemory(f"{lower} ({why})")
    return OutOfMemory(f"{lower}, or let {HALVES} do it ({why})", HALVES)
