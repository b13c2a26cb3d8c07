"""A training step with and without ``torch.compile`` of the transformer blocks (``dynamic=True``, one graph for all).

Eager steps are measured before and after the compiled ones. What compiling costs once is the first compiled stage's
time over an eager one's; it is paid in every process (less with a warm cache, TORCHINDUCTOR_CACHE_DIR).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from benchmarks import world
from benchmarks.common import median, parser, publish
from benchmarks.penalty import made_world
from benchmarks.shapes import SHAPES
from cl_runner.models.batch import Example
from cl_runner.models.forward import unwrapped


@contextmanager
def compiled_blocks(model: nn.Module) -> Iterator[None]:
    """Every block of the model's stacks compiled, and as it was afterwards."""
    stacks = [m for m in unwrapped(model).modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    # Outermost ones: a T5 block's own layers are a list too, and are compiled with their block.
    inner = {id(m) for stack in stacks for block in stack for m in block.modules()}
    blocks: list[Any] = [block for stack in stacks if id(stack) not in inner for block in stack]
    for block in blocks:
        block.compile(dynamic=True)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # torch has no call for it


def compare(made: world.World, examples: Sequence[Example], position: int, rounds: int) -> list[Mapping[str, Any]]:
    """Median step of O-LoRA each way, the eager one of the turns before and after."""

    def steps() -> list[float]:
        return world.step_seconds(made.stage("olora (absolute)", position), examples)

    steps()  # allocators settle
    eager = [second for _ in range(rounds) for second in steps()]
    with compiled_blocks(made.room.adapters.model):
        started = time.perf_counter()
        steps()
        first = time.perf_counter() - started
        quick = [second for _ in range(rounds) for second in steps()]
    eager += [second for _ in range(rounds) for second in steps()]
    plain, fast = median(eager), median(quick)
    return [
        {
            "eager step ms": 1e3 * plain,
            "compiled step ms": 1e3 * fast,
            "eager ÷ compiled": plain / fast,
            "first compiled stage s": first,
        }
    ]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--shape", choices=("tiny", *SHAPES), default="tiny")
    made.add_argument("--stage", type=int, default=2, help="position in the order (default %(default)s)")
    made.add_argument("--steps", type=int, default=8, help="steps of a turn (default %(default)s)")
    made.add_argument("--rounds", type=int, default=3, help="turns of each way (default %(default)s)")
    made.add_argument("--batch", type=int, default=16, help="rows a step where --shape is not tiny")
    given = made.parse_args()
    of_shape, examples = made_world(given)
    found = compare(of_shape, examples, given.stage, given.rounds)
    publish("compile", given, {f"{given.shape} on {of_shape.device.type}": found})


if __name__ == "__main__":
    main()
