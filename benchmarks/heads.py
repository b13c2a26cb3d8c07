"""A decoder-only model's passes over rows with the heads of prompts shared, and without, in turns.

    python -m benchmarks.heads --model FOLDER --data-dir FOLDER --tasks dbpedia,amazon,agnews

For each task: the same steps of training with `training.share_prefix` auto and off, the same rows answered, and the
second moments of what layers read of them (`inflora`, `adapter.init: eva`), in one process. What the tokens allow is
printed beside what came out.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import median, parser, publish, seconds_of, take_turns
from benchmarks.job import add_model_arguments
from benchmarks.world import prepared, step_seconds
from cl_runner.engine import zero as engine
from cl_runner.methods.shared.moments import input_moments
from cl_runner.models.heads import common_head
from cl_runner.training.plan import Plan
from cl_runner.training.prepare import Room, Tokens, open_stage
from cl_runner.training.stage import StageRun

WAYS = ("auto", "off")


def opened(plan: Plan, room: Room, index: int, how: str) -> StageRun:
    """A stage that is about to train, the first of its kind."""
    config = plan.config.model_copy(deep=True)
    config.training.share_prefix = how  # type: ignore[assignment]
    room.adapters.restore([], {}, None)
    stage = open_stage(room, config, index)
    room.method.build(stage)
    return stage


def training(plan: Plan, room: Room, tokens: Tokens, index: int, how: str) -> float:
    """Seconds of a step, the median of a stage's."""
    stage = opened(plan, room, index, how)
    return median(step_seconds(stage, tokens.source(stage.plan).examples))


def evaluation(plan: Plan, room: Room, tokens: Tokens, index: int, how: str) -> float:
    """Seconds for a task's test rows."""
    config = plan.config.model_copy(deep=True)
    config.training.share_prefix = how  # type: ignore[assignment]
    stage = open_stage(room, config, index, evaluating=True)
    seconds = seconds_of(lambda: stage.answer(tokens.test[plan.stages[index].tasks[0]].examples))
    stage.close()
    return seconds


def moments(plan: Plan, room: Room, tokens: Tokens, index: int, how: str) -> float:
    """Seconds for the second moments of a stage's own rows."""
    stage = opened(plan, room, index, how)
    stage.own = own = tokens.source(stage.plan)
    stage.sharing.learn(own.examples, own.tasks)
    with stage.without_dropout():
        seconds = seconds_of(lambda: input_moments(stage))
    stage.close()
    return seconds


def main() -> None:
    """Run it."""
    import tempfile

    arguments = parser(__doc__)
    add_model_arguments(arguments)
    arguments.add_argument("--tasks", default="dbpedia,amazon,agnews")
    arguments.add_argument("--rows", type=int, default=64, help="of each task, to train and to answer")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting")
    given = arguments.parse_args()
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        plan, room, tokens = prepared(
            given, given.tasks, ["data.balanced=true", "adapter.r=8", *given.set], Path(folder)
        )
        for index, stage in enumerate(plan.stages):
            examples = tokens.source(stage).examples
            head = len(common_head([e.source for e in examples]))
            lengths = [len(e.source) + len(e.target) - 1 for e in examples]
            mean = sum(lengths) / len(lengths)
            row: dict[str, Any] = {"task": stage.name, "head tokens": head, "tokens a row": round(mean, 1)}
            row["tokens allow"] = mean / (mean - head * (1 - 1 / given.micro_batch))
            for what, measure in (("training", training), ("evaluation", evaluation), ("moments", moments)):
                ways = {how: partial(measure, plan, room, tokens, index, how) for how in WAYS}
                found = {how: median(times[1:]) for how, times in take_turns(ways, given.rounds + 1).items()}
                row[f"{what} s"], row[f"{what} ratio"] = found["auto"], found["off"] / found["auto"]
            rows.append(row)
            print(row, flush=True)
        engine.stop()
    publish("heads", given, {"seconds and ratios, off : auto": rows})


if __name__ == "__main__":
    main()
