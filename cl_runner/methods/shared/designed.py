"""A designed off the inputs of past tasks, and the memories of these: what InfLoRA is, and others build on."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cl_runner.adapters.kind import rank_at
from cl_runner.config.schema import RunConfig
from cl_runner.errors import UserError
from cl_runner.methods.protocol import State
from cl_runner.methods.shared.limits import refuse_too_large
from cl_runner.methods.shared.moments import input_moments
from cl_runner.methods.shared.tensors import of_rank_0, under, within

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.methods.shared.gpm import Memory

Memories = dict[str, "Memory"]  # by the first of the targets that share an input, or by another name of what is seen


def check_design(config: RunConfig, shapes: Sequence[tuple[int, int]], max_gb: float) -> None:
    """Refuse layers whose moments and bases are too large, or that have fewer inputs than A has rows.

    Raises:
        UserError: as said.
    """
    gigabytes = sum(1.5 * n * n for _, n in shapes) * 8e-9
    of = f"adapter.target_modules: second moments and bases of {len(shapes)} layers"
    refuse_too_large(of, gigabytes, max_gb, "name fewer layers")
    for shape in sorted(shapes, key=lambda shape: shape[1]):
        r, (_, n) = rank_at(config.adapter, shape), shape
        if r > n:
            raise UserError(f"adapter.r: {r} directions of a layer's {n} inputs; set {n} or less")


def design(stage: Stage, memories: Memories) -> None:
    """Write A: the leading directions of what the stage's own rows give each layer, off past ones. *Collective*.

    Targets with the same input share it; one of a smaller rank has the first rows.
    """
    from cl_runner.methods.shared.gpm import designed_rows

    names = stage.named("A")
    for targets, moment in input_moments(stage).items():
        ranks = {target: stage.rank_of(target) for target in targets}
        A = designed_rows(moment, remembered(memories, targets[0], moment), max(ranks.values()))
        A = stage.broadcast(A)  # another library on another rank may turn directions of equal energy
        stage.write({names[target]: A[:rank] for target, rank in ranks.items()})


def take_up_inputs(stage: Stage, memories: Memories, threshold: float) -> None:
    """What the stage's own rows give each layer is in the memories from now on. *Collective*."""
    for targets, moment in input_moments(stage).items():
        take_up(stage, memories, targets[0], moment, threshold)


def take_up(stage: Stage, memories: Memories, name: str, moment: Tensor, threshold: float) -> None:
    """The memory of one thing seen, with its second moment (n, n) in it. *Collective*."""
    from cl_runner.methods.shared.gpm import Memory, updated

    memory = updated(remembered(memories, name, moment), moment, threshold)
    free = bool(stage.broadcast(moment.new_tensor(float(memory.free))))
    # Laid out as it will be read from disk: products of another layout add up in another order.
    memories[name] = Memory(of_rank_0(stage, memory.basis).cpu(), free)


def remembered(memories: Memories, name: str, like: Tensor) -> Memory | None:
    """A memory in the precision of ``like``, and where that is; None before the first task."""
    from cl_runner.methods.shared.gpm import Memory

    found = memories.get(name)
    return None if found is None else Memory(found.basis.to(like), found.free)  # fp32 as runs once wrote it


def free_inputs(stage: Stage, memories: Memories) -> float:
    """The share of input directions that later tasks may use, mean over targets."""
    each = {name: memory.free_share for name, memory in memories.items()}
    return statistics.fmean(each.get(targets[0], 1.0) for targets in stage.input_groups() for _ in targets)


def to_state(memories: Mapping[str, Memory]) -> State:
    """As a method's state holds them."""
    bases = {name: memory.basis for name, memory in memories.items()}
    return State(under("memory", bases), {"free": [name for name, memory in memories.items() if memory.free]})


def of_state(state: State) -> Memories:
    """The inverse of ``to_state``."""
    from cl_runner.methods.shared.gpm import Memory

    bases, free = within("memory", state.tensors), state.json.get("free", [])
    return {name: Memory(basis, name in free) for name, basis in bases.items()}
