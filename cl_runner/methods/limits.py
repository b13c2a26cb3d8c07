"""What is too large for the machine is refused before the start, with its size."""

from __future__ import annotations

from cl_runner.errors import UserError
from cl_runner.place import here, memory


def refuse_too_large(what: str, gigabytes: float, max_gb: float, instead: str) -> None:
    """Refuse what takes more than ``method.max_gb``, or than there is memory where the model computes.

    Args:
        what: the setting that decides it, and what it is of.
        gigabytes: its size, 10⁹ bytes.
        instead: what to do.

    Raises:
        UserError: it is too large.
    """
    take = f"{what} take {gigabytes:.3g} GB"
    if gigabytes > max_gb:
        raise UserError(f"{take}, over method.max_gb {max_gb:g}; {instead}, or set a larger max_gb")
    whose, room = memory(here().device)
    if gigabytes * 1e9 > room:
        raise UserError(f"{take}, and {whose} has {room / 1e9:.3g} GB of memory; {instead}")
