"""Where the time of an optimizer step goes: the model's forward and backward, DeepSpeed, the method, the rest.

    python -m benchmarks.step                                             # tiny-t5, synthetic rows
    python -m benchmarks.step --model FOLDER --data-dir FOLDER --micro-batch 16

Every part's own time, without that of the parts inside it, as a share of the steps' wall time (the first step is thrown
away). Clocks cost something too: where parts are called often, as on the tiny model, they make them look longer.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.common import parser, publish
from benchmarks.job import add_model_arguments
from benchmarks.world import prepared, random_pair
from cl_runner.engine import zero
from cl_runner.training import loop
from cl_runner.training.plan import Plan
from cl_runner.training.prepare import Room, Tokens, open_stage
from cl_runner.training.sharing import Sharing
from cl_runner.training.stage import StageRun
from cl_runner.training.step_log import Meter


class Clock:
    """Own seconds of each part: what is inside another is not counted for it."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self._open: list[list[Any]] = []  # [name, since]

    def of(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, timed."""

        @wraps(call)
        def timed(*args: Any, **named: Any) -> Any:
            self._switch()
            self._open.append([name, time.perf_counter()])
            try:
                return call(*args, **named)
            finally:
                self._switch()
                self._open.pop()
                if self._open:
                    self._open[-1][1] = time.perf_counter()

        return timed

    def _switch(self) -> None:
        if self._open:
            self.spent[self._open[-1][0]] += time.perf_counter() - self._open[-1][1]


@contextmanager
def clocked(clock: Clock, method: Any) -> Iterator[None]:
    """Inside, the parts of a step are timed."""
    parts: list[tuple[Any, str, str]] = [
        (Sharing, "logits", "model, forward"), (torch.Tensor, "backward", "model, backward"),
        (method, "loss", "loss"), (method, "penalty", "penalty"), (StageRun, "ready", "rows onto the device"),
        (zero.Engine, "forward", "DeepSpeed, forward"), (zero.Engine, "backward", "DeepSpeed, backward"),
        (zero.Engine, "clip", "norm and clipping"), (zero.Engine, "step", "DeepSpeed, step"),
        (torch.optim.AdamW, "step", "AdamW"), (loop, "_seed", "seeds"), (Meter, "step", "log"),
    ]  # fmt: skip
    with ExitStack() as stack:
        for owner, name, label in parts:
            stack.enter_context(patch.object(owner, name, clock.of(label, getattr(owner, name))))
        yield


def profile(plan: Plan, room: Room, tokens: Tokens, index: int) -> list[dict[str, Any]]:
    """A row for each part of the steps of a stage."""
    clock, ends = Clock(), []

    def tick(*_: object) -> None:
        ends.append(time.perf_counter())
        if len(ends) == 1:
            clock.spent.clear()

    if index:
        room.adapters.restore([random_pair(room.adapters, plan.names[0], 1)], {}, None)  # as the first stage left it
    stage = open_stage(room, plan.config, index)
    room.method.build(stage)
    with clocked(clock, type(room.method)):
        loop.train_stage(stage, tokens.source(stage.plan), log=lambda _: None, tick=tick)
    stage.close()
    zero.stop()
    wall, steps = ends[-1] - ends[0], len(ends) - 1
    rows = [(name, seconds) for name, seconds in clock.spent.most_common() if seconds > 1e-4 * wall]
    rows.append(("everything else", wall - sum(seconds for _, seconds in rows)))
    return [{"part": name, "ms a step": 1e3 * s / steps, "share %": 100 * s / wall} for name, s in rows]


def main() -> None:
    """Run it."""
    arguments = parser(__doc__)
    add_model_arguments(arguments)
    arguments.add_argument("--method", default="olora")
    arguments.add_argument("--task", default="agnews")
    arguments.add_argument("--rows", type=int, default=96)
    arguments.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting")
    given = arguments.parse_args()
    more = [f"method.name={given.method}", "data.balanced=true", *given.set]
    with tempfile.TemporaryDirectory() as folder:
        rows = profile(*prepared(given, f"amazon,{given.task}", more, Path(folder)), 1)
    publish("step", given, {"a step of the second task": rows})


if __name__ == "__main__":
    main()
