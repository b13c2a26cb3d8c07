"""One stage's training: the batch arithmetic, the loop over optimizer steps, and what is logged.

One step reads: micro-batches (condition, loss, backward), the penalty on the last one, clip, edit (first edit, then
clip where a method says so), whole steps, engine step, after_step, log.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cl_runner.config import TrainingConfig
from cl_runner.engine import Engine
from cl_runner.errors import TrainingError
from cl_runner.health import PenaltyWatch
from cl_runner.methods.base import Source, overrides
from cl_runner.models.batch import Batch, Example
from cl_runner.models.forward import checkpoint_activations
from cl_runner.models.tokens import Joined, lengths
from cl_runner.optim import WHOLE, Muon
from cl_runner.plan import BatchPlan, derived_seed
from cl_runner.prefetch import prefetched
from cl_runner.rank import choose_rank
from cl_runner.reorthogonalise import due, reorthogonalise
from cl_runner.stage import StageRun

AHEAD = 2  # micro-batches that may wait, padded, for the device


def learning_rate(training: TrainingConfig, step: int, steps: int) -> float:
    """The rate of step ``step`` (from 0) of ``steps``: linear warm-up, then the schedule down to 0."""
    # Whole steps; 0.07 of 100 is 7 of them, though 0.07 · 100 > 7.
    warmup = math.ceil(training.warmup * steps - 1e-9 if training.warmup < 1 else training.warmup)
    if step < warmup:
        return training.lr * (step + 1) / warmup
    if training.schedule == "constant":
        return training.lr
    share = (step - warmup) / max(steps - warmup, 1)
    if training.schedule == "linear":
        return training.lr * (1.0 - share)
    return training.lr * 0.5 * (1.0 + math.cos(math.pi * share))


class StepWeights:
    """The weight of each row's label tokens in the loss of a step.

    Micro-batch losses are added over the accumulation and averaged over ranks; with these weights the result is the
    mean over the label tokens of the global batch, on any number of ranks (``loss_mean: micro``: the mean over
    micro-batches of each one's mean, as the reference has it).
    """

    def __init__(self, plan: BatchPlan, mean: str, tokens: Sequence[int], shares: Sequence[float]) -> None:
        self.plan, self.mean, self.tokens, self.shares = plan, mean, tokens, shares

    def of(self, step_rows: Sequence[int], rows: Sequence[int]) -> list[float]:
        """Weights of ``rows``, one micro-batch of the step's rows."""
        if self.mean == "global":
            total = sum(self.tokens[i] for i in step_rows)
        else:
            total = sum(self.tokens[i] for i in rows) * math.ceil(len(step_rows) / self.plan.micro_batch)
        return [self.shares[i] * self.plan.ranks / max(total, 1) for i in rows]


@dataclass
class Trained:
    """What a stage's training reports."""

    steps: int
    examples: int
    seconds: float
    loss: float | None
    penalty: float | None
    skipped: int
    plan: BatchPlan
    hook_seconds: float  # of the method's own hooks, those before and after the steps too
    watch: PenaltyWatch
    rank: int | None  # chosen for the stage's pair


LogRow = dict[str, Any]
Padded = tuple[Batch, list[str]]  # a micro-batch on the CPU, and its rows' tasks


def train_stage(
    stage: StageRun,
    own: Source,
    *,
    log: Callable[[LogRow], None],
    tick: Callable[[int, float | None, float | None], None],
) -> Trained:
    """Train one stage; the adapters hold the result.

    Args:
        stage: built by its method.
        own: the stage's own rows.
        log: takes a row of ``log.jsonl`` (rank 0 writes it).
        tick: called after every step with steps done, loss and examples/s (those two at logged steps).

    Raises:
        TrainingError: a gradient that is not finite.
    """
    method, training = stage.room.method, stage.config.training
    stage.own = own
    hooks, muon = HookTime(), Muon()
    stage.adapters.model.eval()  # fresh layers are not, restored ones neither
    _seed(stage, "begin")
    rank = None
    if stage.config.adapter.r == "auto" and method.any_rank and not method.full:
        rank = choose_rank(stage, own)
    with hooks:
        method.begin_task(stage)  # before there is an engine: it may still decide what trains, and in what shape
        sources = method.training_data(stage, own)
    examples = Joined([source.examples for source in sources])
    tasks = [task for source in sources for task in source.tasks]
    shares = [source.weight for source in sources for _ in source.tasks]
    plan = BatchPlan.make(len(examples), training, stage.ranks)
    inputs, labels = lengths(examples)
    weights = StepWeights(plan, training.loss_mean, labels.tolist(), shares)
    steps = list(plan.step_rows(stage.config.seed, stage.index, (inputs + labels).tolist(), len(set(tasks)) > 1))
    stage.steps, stage.step = plan.steps, 0
    engine = Engine(
        stage.room.root,
        method.parameter_groups(stage),
        training,
        stage.room.place,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
    )
    stage.engine = engine
    meter = Meter(stage, log, tick)
    watch = meter.watch
    scales = {group.lr_scale for group in engine.groups}
    scale = scales.pop() if len(scales) == 1 else 1.0  # of the rate in the log: training.lr, where groups differ
    try:
        checkpoint_activations(stage.adapters.model, training.activation_checkpointing)
        stage.adapters.model.train()
        with closing(_padded(stage, plan, weights, steps, examples, tasks)) as batches:
            for rows in steps:
                lr = learning_rate(training, stage.step, plan.steps)
                engine.set_lr(lr)
                looking = watch if meter.due(stage.step + 1) else None
                loss, penalty, batch = _micro_batches(stage, plan, rows, batches, hooks, looking)
                if watch.waits:
                    watch.compare(engine.whole_gradients())
                if method.edits_before_clip:
                    _edit(stage, hooks)
                norm = engine.clip()
                if not math.isfinite(norm):
                    raise TrainingError(
                        f"stage {stage.index + 1} ({stage.plan.name}), step {stage.step + 1}: the gradient is not "
                        "finite; try a lower training.lr"
                    )
                gradients = {} if method.edits_before_clip else _edit(stage, hooks)
                _whole_steps(stage, gradients, lr, muon, hooks)
                engine.step()
                stage.step += 1
                with hooks:
                    method.after_step(stage)
                again = method.reorthogonalise
                if again is not None and due(again, stage.step):
                    with hooks:
                        meter.reorthogonalised(again.how, reorthogonalise(stage, again, batch))
                meter.step(len(rows), loss, penalty, lr * scale, norm)
        stage.adapters.model.eval()
        _seed(stage, "end")
        with hooks:
            method.end_task(stage)
        return meter.trained(plan, engine.skipped, hooks.seconds, rank)
    finally:
        stage.engine = None
        engine.destroy()


def _padded(
    stage: StageRun,
    plan: BatchPlan,
    weights: StepWeights,
    steps: Sequence[Sequence[int]],
    examples: Sequence[Example],
    tasks: Sequence[str],
) -> Generator[Padded, None, None]:
    """This rank's micro-batches of all steps, padded in the background while the device computes."""

    def pad(of_step: tuple[Sequence[int], Sequence[int]]) -> Padded:
        step_rows, mine = of_step
        # A rank without rows takes the step's first row at weight zero, so that graphs stay alike.
        rows, row_weights = (mine, weights.of(step_rows, mine)) if mine else ([step_rows[0]], [0.0])
        return stage.padded([examples[i] for i in rows], row_weights), [tasks[i] for i in rows]

    micro_batches = ((rows, mine) for rows in steps for _, mine in plan.micro_batches(rows, stage.rank))
    # A thread begins on the first GPU; page-locked memory would open that one in every process.
    begin = partial(torch.cuda.set_device, stage.device) if stage.device.type == "cuda" else None
    return prefetched(pad, micro_batches, AHEAD, begin)


def _micro_batches(
    stage: StageRun,
    plan: BatchPlan,
    rows: Sequence[int],
    batches: Iterator[Padded],
    hooks: HookTime,
    watch: PenaltyWatch | None,
) -> tuple[Tensor, Tensor | None, Batch]:
    """Forward and backward of a step's micro-batches; this rank's task loss, the penalty, and the last micro-batch."""
    method, engine = stage.room.method, stage.engine
    assert engine is not None
    total = torch.zeros((), device=stage.device)
    penalty: Tensor | None = None
    for slot, (number, _) in enumerate(plan.micro_batches(rows, stage.rank)):
        _seed(stage, "forward", stage.step, number)
        batch = stage.ready(*next(batches))
        loss = engine.forward(lambda batch=batch: method.loss(stage, batch))  # type: ignore[misc]
        # Not the last forward's alone: a rank may have had no rows for that one.
        stage.task_loss = total = total + loss.detach()
        last = slot == plan.accumulation - 1
        if last:
            with hooks:
                penalty = method.penalty(stage)
            if penalty is not None and stage.config.training.penalty_at == "micro":
                penalty = plan.accumulation * penalty  # its gradient is the same at each of them
            if watch is not None:
                watch.see(penalty, engine.parameters)
        engine.backward(loss if penalty is None else loss + penalty)
        if not last:
            engine.next_micro_batch()
    return total, None if penalty is None else penalty.detach(), batch


def _seed(stage: StageRun, *of: object) -> None:
    """Draw anew, from what decides it alone: the same on any number of ranks, and after a restart."""
    torch.manual_seed(derived_seed(stage.config.seed, stage.index, *of))


def _edit(stage: StageRun, hooks: HookTime) -> dict[str, Tensor]:
    """The method's edits of whole gradients; all of them as they are then, or nothing where it edits none."""
    method, engine = stage.room.method, stage.engine
    assert engine is not None
    if not overrides(method, "edit_gradients"):
        return {}
    with hooks:
        gradients = engine.whole_gradients()
        changed = method.edit_gradients(stage, gradients)
        if changed:
            engine.set_whole_gradients(changed)
            gradients.update(changed)
    return gradients


def _whole_steps(stage: StageRun, gradients: dict[str, Tensor], lr: float, muon: Muon, hooks: HookTime) -> None:
    """The updates by rules that take whole gradients: those given, where they are at hand."""
    method, engine = stage.room.method, stage.engine
    assert engine is not None
    if engine.whole:
        gradients = gradients or engine.whole_gradients(engine.whole)
    updates: dict[str, Tensor] = {}
    for group in engine.groups:
        rate = lr * group.lr_scale
        for name, parameter in group.parameters.items() if group.rule in WHOLE else ():
            if group.rule == "muon":
                updates[name] = muon.update(name, parameter, gradients[name], rate, group.weight_decay)
            else:
                with hooks:
                    updates[name] = method.whole_step(stage, name, gradients[name], rate)
    if updates:
        engine.write({name: engine.parameters[name].detach() + update for name, update in updates.items()})


class HookTime:
    """Wall time in a method's own hooks; on a GPU, to launch their work and where they wait for it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._started


class Meter:
    """Rows of ``log.jsonl`` and the pace of a stage.

    Reading a loss off the device waits for it, so it is done at logged steps only.
    """

    def __init__(self, stage: StageRun, log: Callable[[LogRow], None], tick: Callable[..., None]) -> None:
        self.stage, self.log, self.tick = stage, log, tick
        self.started = self.last = time.perf_counter()
        self.examples = self.since = 0
        self.loss: float | None = None
        self.penalty: float | None = None
        self.watch = PenaltyWatch()

    def due(self, step: int) -> bool:
        """Whether step ``step`` (from 1) is logged."""
        return step % self.stage.config.output.log_every == 0 or step == self.stage.steps

    def step(self, examples: int, loss: Tensor, penalty: Tensor | None, lr: float, norm: float) -> None:
        """Count one optimizer step, and log it if it is due."""
        stage = self.stage
        self.examples += examples
        self.since += examples
        if not self.due(stage.step):
            self.tick(stage.step, None, None)
            return
        self.loss = float(stage.mean(loss))
        self.penalty = None if penalty is None else float(penalty)
        now = time.perf_counter()
        pace = self.since / max(now - self.last, 1e-9)
        self.last, self.since = now, 0
        row: LogRow = {
            "stage": stage.plan.name,
            "step": stage.step,
            "steps": stage.steps,
            "loss": self.loss,
            "penalty": self.penalty,
            "penalty_gradient_ratio": self.watch.ratio,
            "lr": lr,
            "gradient_norm": norm,
            "examples_per_second": round(pace, 2),
            "memory_mb": memory_mb(stage.device),
            **stage.room.method.logged(stage),
        }
        self.log(row)
        self.tick(stage.step, self.loss, pace)

    def reorthogonalised(self, how: str, losses: tuple[float, float]) -> None:
        """A row of its own: the loss before and after."""
        stage, (before, after) = self.stage, losses
        row = {"stage": stage.plan.name, "step": stage.step, "steps": stage.steps, "reorthogonalised": how}
        self.log({**row, "loss_before": before, "loss_after": after})

    def trained(self, plan: BatchPlan, skipped: int, hook_seconds: float, rank: int | None) -> Trained:
        """The stage's summary."""
        return Trained(
            steps=self.stage.step,
            examples=self.examples,
            seconds=time.perf_counter() - self.started,
            loss=self.loss,
            penalty=self.penalty,
            skipped=skipped,
            plan=plan,
            hook_seconds=hook_seconds,
            watch=self.watch,
            rank=rank,
        )


def memory_mb(device: torch.device) -> float:
    """Peak memory so far in MB: of the GPU, or of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
