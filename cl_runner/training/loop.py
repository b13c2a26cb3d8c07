"""One stage's training: the batch arithmetic, the loop over optimizer steps, and what is logged.

One step reads: options before it, micro-batches (condition, loss, backward), the penalty on the last one, clip, edit
(first edit, then clip where a method says so), whole steps, engine step, after_step, options after it, log, probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial

import torch
from torch import Tensor

from cl_runner.engine.optim import WHOLE, Muon, ParameterGroup
from cl_runner.engine.replicated import engine_for
from cl_runner.engine.zero import Engine
from cl_runner.errors import beginning, out_of_memory
from cl_runner.methods.protocol import Source, overrides
from cl_runner.models.batch import Batch, Example
from cl_runner.models.forward import checkpoint_activations
from cl_runner.models.token_cache import Joined, lengths
from cl_runner.training.fitting import DoesNotFit, step_does_not_fit, taken_apart
from cl_runner.training.health import PenaltyWatch
from cl_runner.training.non_finite import NonFinite
from cl_runner.training.prefetch import prefetched
from cl_runner.training.probe import Probe
from cl_runner.training.sampling import BatchPlan, StepWeights, derived_seed
from cl_runner.training.schedule import learning_rate
from cl_runner.training.stage import StageRun
from cl_runner.training.step_log import HookTime, LogRow, Meter, Trained
from cl_runner.training.step_state import StepState, put, put_beginning, take

AHEAD = 2  # micro-batches that may wait, padded, for the device


Padded = tuple[Batch, list[str]]  # a micro-batch on the CPU, and its rows' tasks
Choose = Callable[[BatchPlan, list[list[int]], Sequence[Example], Sequence[str]], list[list[int]]]
Computed = tuple[Batch, Tensor, Tensor | None]  # on the device; its loss, and the penalty at a step's last one
Forward = Callable[[Callable[[], Tensor]], Tensor]


def train_stage(
    stage: StageRun,
    own: Source,
    *,
    log: Callable[[LogRow], None],
    tick: Callable[[int, float | None, float | None], None],
    warn: Callable[[str], None] = lambda _: None,
    state: StepState | None = None,
    between: Callable[[Callable[[], StepState]], bool | None] = lambda _: None,
    probe: Probe | None = None,
    choose: Choose = lambda _, steps, *__: steps,
) -> Trained:
    """Train one stage; the adapters hold the result.

    Args:
        stage: built by its method.
        own: the stage's own rows.
        log: takes a row of ``log.jsonl`` (rank 0 writes it).
        tick: called before the first step and after every one with steps done, loss and examples/s (those two at
            logged steps).
        warn: takes a line for the user, while it trains.
        state: of this stage, taken between two of its steps: it is entered there, and the rest is to the bit that of a
            stage that was never left.
        between: called after every step, on every rank, with what takes the state (a collective). True: enough steps.
        probe: asked between steps, as it is due; it changes nothing here.
        choose: takes the plan, the rows of all steps, examples and tasks of the mix; gives the steps that are taken.

    Raises:
        TrainingError: a loss or gradient that is not finite, where ``training.non_finite`` is ``stop``.
        OutOfMemory: a step does not fit into memory, and ``training.auto_batch`` is off, or has nothing left to halve.
        LimitReached: the probe has found an old task lower than the user lets it be.
    """
    method, training = stage.room.method, stage.config.training
    stage.own = own
    stage.sharing.learn(own.examples, own.tasks)
    hooks, muon = HookTime(), Muon()
    stage.adapters.model.eval()  # fresh layers are not, restored ones neither
    _seed(stage, "begin")
    _begin(stage, own, state, hooks)  # before there is an engine: what trains, and in what shape, may still be decided
    with hooks:
        sources = method.training_data(stage, own)
    examples = Joined([source.examples for source in sources])
    tasks = [task for source in sources for task in source.tasks]
    faults = NonFinite(
        stage, [id_ for source in sources for id_ in source.ids or [""] * len(source.tasks)], tasks, warn
    )
    shares = [source.weight for source in sources for _ in source.tasks]
    for source in sources:
        if source is not own:
            stage.sharing.learn(source.examples, source.tasks)
    plan = BatchPlan.make(len(examples), training, stage.ranks, stage.fit.micro_batch)
    inputs, labels = lengths(examples)
    weights = StepWeights(plan, training.loss_mean, labels.tolist(), shares)
    steps = list(plan.step_rows(stage.config.seed, stage.drawn_by, (inputs + labels).tolist(), len(set(tasks)) > 1))
    stage.steps, stage.step = plan.steps, 0
    steps = choose(plan, steps, examples, tasks)
    engine = stage.engine = _engine(stage, plan, method.parameter_groups(stage))
    stage.one_more = partial(_one_more, stage, muon)
    meter = Meter(stage, log, tick, hooks, warn)
    scales = {group.lr_scale for group in engine.groups}
    scale = scales.pop() if len(scales) == 1 else 1.0  # of the rate in the log: training.lr, where groups differ
    try:
        by_row = training.dropout_by == "row"
        again = stage.dropout.again if by_row else None
        checkpoint_activations(stage.adapters.model, training.activation_checkpointing, again)
        stage.adapters.model.train()
        if state is not None:
            put(stage, engine, muon, meter, state, probe)
        if probe and state is None:
            probe.look(meter)
        tick(stage.step, None, None)  # the clock of steps begins here: what a method did before was none
        while stage.step < len(steps):
            dropout = stage.dropout.installed() if by_row else nullcontext()
            to_come, why = steps[stage.step :], ""
            try:
                with dropout, closing(_padded(stage, plan, weights, to_come, examples, tasks)) as batches:
                    for rows in to_come:
                        lr = learning_rate(training, stage.step, plan.steps)
                        engine.set_lr(lr)
                        _before_step(stage, hooks)
                        loss, penalty, norm, batch, losses = _gradients(stage, plan, rows, batches, hooks, meter)
                        taken = _step(stage, norm, lr, muon, hooks)
                        stage.step += 1
                        if taken:
                            _after_step(stage, batch, hooks, meter)
                        else:
                            meter.leave_step_out(faults.met(plan, rows, losses, penalty, norm))
                        meter.step(len(rows), loss, penalty, lr * scale, norm)
                        if probe:
                            probe.look(meter)
                        if between(partial(take, stage, engine, muon, meter, probe)):
                            steps = steps[: stage.step]
                            break
            except DoesNotFit as error:
                why = str(error)
            if why:  # out here the error is gone, and with it the frames that held the step's gradients
                plan, engine = _halved(stage, plan, why, meter)
        stage.adapters.model.eval()
        _seed(stage, "end")
        with hooks:
            for option in stage.options:
                option.end(stage)
            method.end_task(stage)
        return meter.trained(plan, engine.skipped)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or stage.engine is None or stage.step == len(steps):
            raise
        raise step_does_not_fit(stage, plan.micro_batch, beginning(error)) from error
    finally:
        if stage.engine is not None:
            stage.engine.destroy()
            stage.engine = stage.one_more = None


def _engine(stage: StageRun, plan: BatchPlan, groups: Sequence[ParameterGroup]) -> Engine:
    """Fresh, with the plan's batch arithmetic."""
    return engine_for(stage.config.training)(
        stage.room.root,
        groups,
        stage.config.training,
        stage.room.place,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
    )


def _halved(stage: StageRun, plan: BatchPlan, why: str, meter: Meter) -> tuple[BatchPlan, Engine]:
    """A step did not fit: the plan with half the micro-batch, and an engine that holds what the last one did before it.

    Raises:
        OutOfMemory: there is nothing left to halve.
    """
    assert stage.engine is not None
    before = plan.micro_batch
    if before == 1:
        raise step_does_not_fit(stage, before, why)
    held, counts = stage.engine.state()
    held = {name: tensor.detach().to("cpu", copy=True) for name, tensor in held.items()}
    groups = stage.engine.groups
    stage.engine.destroy()
    stage.engine = None
    plan = BatchPlan.make(plan.rows, stage.config.training, plan.ranks, before // 2)
    engine = stage.engine = _engine(stage, plan, groups)
    engine.load_state(held, counts)
    stage.room.method.take_back(stage)
    stage.fit.micro_batches[stage.step + 1] = plan.micro_batch
    meter.halved(before, plan.micro_batch, why)
    return plan, engine


def _begin(stage: StageRun, own: Source, state: StepState | None, hooks: HookTime) -> None:
    """What options and method make of a stage before its first step, or what they had when it was left."""
    if state is not None:
        put_beginning(stage, state)
        return
    for option in stage.options:
        option.begin(stage, own)
    with hooks:
        stage.room.method.begin_task(stage)


def _step(stage: StageRun, norm: float, lr: float, muon: Muon, hooks: HookTime) -> bool:
    """Edit, whole steps, engine step; whether it was taken. One that has something not finite is left out."""
    assert stage.engine is not None
    if math.isfinite(norm):
        gradients = {} if stage.room.method.edits_before_clip else _edit(stage, hooks)
        if _whole_steps(stage, gradients, lr, muon, hooks):
            return stage.engine.step()
    stage.engine.skip()
    return False


def _one_more(stage: StageRun, muon: Muon, gradients: Mapping[str, Tensor]) -> bool:
    """A step of whole gradients that are given; in the time of the hook that asks for it."""
    engine = stage.engine
    assert engine is not None
    engine.give(gradients)
    if stage.room.method.edits_before_clip:
        _edit(stage, HookTime())
    return _step(stage, engine.clip(), engine.lr, muon, HookTime())


def _before_step(stage: StageRun, hooks: HookTime) -> None:
    with hooks:
        for option in stage.options:
            option.before_step(stage)


def _after_step(stage: StageRun, batch: Batch, hooks: HookTime, meter: Meter) -> None:
    """What method and options make of the step that was taken."""
    with hooks:
        stage.room.method.after_step(stage)
        for option in stage.options:
            if row := option.after_step(stage, batch):
                meter.note(row)


def _gradients(
    stage: StageRun,
    plan: BatchPlan,
    rows: Sequence[int],
    batches: Iterator[Padded],
    hooks: HookTime,
    meter: Meter,
) -> tuple[Tensor, Tensor | None, float, Batch, dict[int, Tensor]]:
    """The whole gradient of a step, clipped; this rank's loss, the penalty, the norm, the last micro-batch, the losses
    of all of them by number."""
    engine, watch = stage.engine, meter.watch
    assert engine is not None
    looking = watch if meter.due(stage.step + 1) else None
    loss, penalty, batch, losses = _micro_batches(stage, plan, rows, batches, hooks, looking)
    if watch.waits:
        watch.compare(engine.whole_gradients(), stage.mean)
    if stage.room.method.edits_before_clip:
        _edit(stage, hooks)
    norm = engine.clip([loss] if penalty is None else [loss, penalty])
    return loss, penalty, norm, batch, losses


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
        return stage.padded([examples[i] for i in rows], row_weights, of := [tasks[i] for i in rows]), of

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
) -> tuple[Tensor, Tensor | None, Batch, dict[int, Tensor]]:
    """Forward and backward of a step's micro-batches; this rank's task loss, the penalty, the last micro-batch, and the
    loss of each by number.

    Raises:
        DoesNotFit: memory does not suffice, and ``training.auto_batch`` is on. Nothing of the step is kept.
    """
    method, engine = stage.room.method, stage.engine
    assert engine is not None
    before = stage.task_loss
    total = torch.zeros((), device=stage.device)
    penalty: Tensor | None = None
    losses: dict[int, Tensor] = {}

    def compute(padded: Padded, number: int, last: bool, forward: Forward) -> tuple[Computed, Tensor]:
        """The micro-batch, its loss and the penalty at the last one, both without graph; what goes backward."""
        batch = stage.ready(*padded, first=number * plan.micro_batch)
        loss = forward(lambda: method.loss(stage, batch))
        stage.task_loss = total + loss.detach()
        if not last:
            return (batch, loss.detach(), None), loss
        with hooks:
            pulls = method.penalty(stage)
        if pulls is not None and stage.config.training.penalty_at == "micro":
            pulls = plan.accumulation * pulls  # its gradient is the same at each of them
        if watch is not None:
            watch.see(pulls, engine.parameters)
        if pulls is None:
            return (batch, loss.detach(), None), loss
        return (batch, loss.detach(), pulls.detach()), loss + pulls

    for slot, (number, _) in enumerate(plan.micro_batches(rows, stage.rank)):
        _seed(stage, "forward", stage.step, number)
        stage.dropout.draw(derived_seed(stage.config.seed, stage.drawn_by, "dropout", stage.step))
        last = slot == plan.accumulation - 1
        computed = partial(compute, next(batches), number, last)
        if stage.config.training.auto_batch:
            try:
                (batch, loss, penalty), whole = taken_apart(stage, partial(computed, stage.apart))
            except DoesNotFit:
                stage.task_loss = before
                raise
            engine.forward(lambda: torch.zeros(()))  # which DeepSpeed counts
        else:
            (batch, loss, penalty), whole = computed(engine.forward)
        # Not the last forward's alone: a rank may have had no rows for that one.
        losses[number] = loss
        total = total + loss
        engine.backward(whole)
        if not last:
            engine.next_micro_batch()
    return total, penalty, batch, losses


def _seed(stage: StageRun, *of: object) -> None:
    """Draw anew, from what decides it alone: the same on any number of ranks, and after a restart.

    As ``torch.manual_seed``, which would seed all kinds of devices, and note the stack down for each that is not there.
    """
    seed = derived_seed(stage.config.seed, stage.drawn_by, *of)
    torch.default_generator.manual_seed(seed)
    if stage.device.type == "cuda":
        torch.cuda.manual_seed(seed)


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


def _whole_steps(stage: StageRun, gradients: dict[str, Tensor], lr: float, muon: Muon, hooks: HookTime) -> bool:
    """The updates by rules that take whole gradients: those given, where they are at hand.

    Whether they could be made: of gradients that the method has edited into something not finite none is, nor are any
    written that it made so itself.
    """
    method, engine = stage.room.method, stage.engine
    assert engine is not None
    if gradients and (engine.whole or engine.offloads) and not _all_finite(gradients.values()):
        return False
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
    if any(group.rule == "whole" for group in engine.groups) and not _all_finite(updates.values()):
        return False
    if updates:
        engine.write({name: engine.parameters[name].detach() + update for name, update in updates.items()})
    return True


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
