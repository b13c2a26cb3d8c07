"""What a method, or an option beside it, cannot do with these settings or shapes, refused before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec

from cl_runner.adapters.kind import Kind, Need, lacking
from cl_runner.config.schema import AdapterConfig, RunConfig
from cl_runner.errors import UserError
from cl_runner.methods import METHODS, make_method
from cl_runner.methods.protocol import Method, StagePlan
from cl_runner.methods.shared.limits import refuse_too_large
from cl_runner.registry import KINDS
from cl_runner.training.options import check_options


def unused_settings(config: RunConfig, plans: Sequence[StagePlan]) -> list[str]:
    """A line for each setting of a task that no stage can follow."""
    found = []
    for task, changes in config.tasks.items():
        if any(plan.tasks == (task,) for plan in plans):
            continue
        keys = [key for key in changes if not key.startswith("data.")]
        found += [f"tasks.{task}.{key} is not used: {task} trains together with others" for key in keys]
    return found


def stage_config(config: RunConfig, index: int, plan: StagePlan) -> RunConfig:
    """The config of a stage: what is set for its task (where it trains one) and for its position."""
    return config.at(index + 1, plan.tasks[0] if len(plan.tasks) == 1 else None)


def fitting_kind(config: RunConfig, method: Method) -> Kind:
    """The adapter kind that trains. Raises UserError where it does not offer what the method needs.

    A penalty on factors that a kind lacks, or freezes, would be silently nothing.
    """
    name = method.kind(config)
    asked = config.adapter.kind
    if asked != AdapterConfig().kind and asked != name:
        raise UserError(f"adapter.kind: {asked}, and {method.name} trains {KINDS.get(name).title}; leave it out")
    kind = KINDS.get(name)
    missing = lacking(kind, needs(method))
    if asked == "full" and not method.full and not missing:
        raise UserError(f"adapter.kind: full is what method.train=full chooses; set that for {method.name}")
    if missing:
        others = [other for other, found in KINDS.usable() if not lacking(found, needs(method))]
        raise UserError(
            f"adapter.kind: {method.name} needs {' and '.join(missing)}, which {name} does not offer; "
            f"{', '.join(others) or 'no kind there is'} would do"
        )
    return kind(config.adapter)


def check_quantized(config: RunConfig, method: Method, kind: Kind) -> None:
    """Refuse a base in 4 bits (``model.quantize``) where it cannot be. Raises UserError."""
    how = config.model.quantize
    if how is None:
        if config.adapter.init == "loftq":
            raise UserError("adapter.init=loftq begins from what 4 bits lost: set model.quantize=nf4, or leave it out")
        return
    if method.full:
        raise UserError(
            f"model.quantize: {method.name} trains all weights, and what trains is fp32; leave model.quantize out"
        )
    if not kind.quantized:
        others = [name for name, found in KINDS.usable() if found.quantized and not lacking(found, needs(method))]
        would = ", ".join(others)
        raise UserError(f"adapter.kind: {kind.name} stands beside no base in 4 bits (model.quantize); {would} would")
    if config.adapter.borrows:
        raise UserError(
            f"adapter.init={config.adapter.init} takes a part of the weight, and a base in 4 bits (model.quantize) "
            "gives none; leave one out"
        )
    if config.model.dtype != "auto":
        raise UserError(
            f"model.dtype {config.model.dtype}: model.quantize={how} says what the base is kept in; set it to auto"
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(f'model.quantize={how} needs bitsandbytes: pip install "cl-runner[qlora]"')


def needs(method: Method) -> tuple[Need, ...]:
    """What a method needs of a kind, and the factors that it has put back every few steps."""
    again = None if method.full else method.reorthogonalise  # which is refused in its own words
    on: tuple[Need, ...] = () if again is None else (("A",), ("B",)) if again.on == "both" else ((again.on,),)
    on = (("pair",), *on) if on else ()
    return tuple(dict.fromkeys([*method.needs, *on]))


def compatibility() -> list[dict[str, str]]:
    """Every method, with its defaults, on every kind: ``yes``, or what the kind lacks."""
    rows, kinds = [], list(KINDS.usable())
    for name, found in METHODS.usable():
        wanted = needs(found(found.Config()))
        gaps = {kind: lacking(offering, wanted) for kind, offering in kinds}
        rows.append({"method": name, **{kind: f"no: {', '.join(gap)}" if gap else "yes" for kind, gap in gaps.items()}})
    return rows


def check_method(
    config: RunConfig,
    stages: Sequence[StagePlan],
    shapes: Sequence[tuple[int, int]] | None = None,
    trained: int | None = None,
    targets: Sequence[str] | None = None,
) -> None:
    """Let method and options, as each stage sets them, refuse what cannot work. Raises UserError.

    shapes, trained, targets: of the layers, how many numbers train, and the layers' names, once they are known.
    """
    order = list(dict.fromkeys(task for plan in stages for task in plan.tasks))
    for index, plan in enumerate(stages):
        of_stage = stage_config(config, index, plan)
        method = make_method(of_stage)
        method.plan(order)
        method.trained, method.targets = trained, targets
        check_options(of_stage, method, shapes)
        _check_patterns(of_stage, method)
        _check_probe(of_stage, method)
        if of_stage.adapter.dropout_past and method.past_as in ("matrix", "other"):
            raise UserError(
                f"adapter.dropout_past: {method.name} does not keep what earlier stages learned as folded pairs; set "
                "it to false"
            )
        if trained is not None and method.has_rank:
            numbers = f"adapter.r: {trained:,} numbers that train, with their gradients,"
            refuse_too_large(numbers, 8e-9 * trained, math.inf, "set a smaller rank")
        method.check(of_stage, shapes)


def _check_probe(config: RunConfig, method: Method) -> None:
    """Refuse a probe that would not show what evaluation will, or limits without one. Raises UserError."""
    asked = config.eval
    limits = {key: at for key in ("probe_warn", "probe_stop") if (at := getattr(asked, key)) is not None}
    if asked.probe_every is None:
        for key in limits:
            raise UserError(f"eval.{key}: there is no probe; set eval.probe_every, or leave it out")
    elif method.answers_later:
        raise UserError(f"eval.probe_every: {method.name} {method.answers_later}; leave it out")
    if len(limits) == 2 and limits["probe_stop"] < limits["probe_warn"]:
        raise UserError(
            f"eval.probe_stop: {limits['probe_stop']:g} is less than eval.probe_warn {limits['probe_warn']:g}, which "
            "would never warn; set it higher, or leave one out"
        )


def _check_patterns(config: RunConfig, method: Method) -> None:
    """Refuse ranks by layer where nothing has a rank, or where it is chosen. Raises UserError."""
    for setting in config.adapter.patterns:
        if not method.has_rank:
            raise UserError(f"adapter.{setting}: {method.name} trains no LoRA pair; leave it out")
        if config.adapter.r == "auto":
            raise UserError(f"adapter.{setting}: adapter.r=auto chooses one rank for all layers; set a number")
