"""What is refused before the start: what is too large for the machine, with its size; how a pair cannot begin."""

from __future__ import annotations

from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import here, memory
from cl_runner.errors import UserError


def size(of_bytes: float) -> str:
    """How large, as users are told: ``472 MB``, ``6.63 GB``; three digits, in units of 10⁶ or 10⁹ bytes."""
    unit, scale = ("MB", 1e6) if of_bytes < 999.5e6 else ("GB", 1e9)
    value = of_bytes / scale
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def refuse_borrowing(config: RunConfig, why: str) -> None:
    """Refuse a pair that begins with a part of the weight, whose B A is no update. Raises UserError saying why."""
    if config.adapter.borrows:
        raise UserError(
            f"adapter.init={config.adapter.init}: the pair begins with a part of the weight, and {why}; leave it out"
        )


def refuse_by_task(config: RunConfig, *keys: str) -> None:
    """Refuse settings of the method that single tasks or positions change. Raises UserError, naming the first."""
    for changes in (*config.stages.values(), *config.tasks.values()):
        for key in keys:
            if f"method.{key}" in changes:
                raise UserError(f"method.{key}: the same for all tasks; set it once")


def refuse_falling(first: float, last: float) -> None:
    """Refuse ``method.threshold`` of the first task over ``method.last_threshold``. Raises UserError."""
    if last < first:
        raise UserError(
            f"method.last_threshold: {last:g} is below method.threshold {first:g}; what is kept from later tasks "
            "cannot shrink"
        )


def refuse_too_large(what: str, gigabytes: float, max_gb: float, instead: str) -> None:
    """Refuse what takes more than ``method.max_gb``, or than there is memory where the model computes.

    Args:
        what: the setting that decides it, and what it is of.
        gigabytes: its size, 10⁹ bytes.
        instead: what to do.

    Raises:
        UserError: it is too large.
    """
    take = f"{what} take {size(gigabytes * 1e9)}"
    if gigabytes > max_gb:
        raise UserError(f"{take}, over method.max_gb {max_gb:g}; {instead}, or set a larger max_gb")
    whose, room = memory(here().device)
    if gigabytes * 1e9 > room:
        raise UserError(f"{take}, and {whose} has {size(room)} of memory; {instead}")
