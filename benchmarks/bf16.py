"""fp32 and bf16 on a CPU: the same steps of training in turns, and the rows that one model answers otherwise.

    python -m benchmarks.bf16 --model FOLDER --data-dir FOLDER --tasks dbpedia,amazon,agnews

What `training.precision: auto` would choose here is said first. The stage trained last in fp32 answers in both.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import median, parser, publish, seconds_of, spread, take_turns
from benchmarks.job import add_model_arguments
from benchmarks.world import prepared, step_seconds
from cl_runner.engine import zero as engine
from cl_runner.engine.precision import decide, has_bf16
from cl_runner.models.token_cache import Joined
from cl_runner.training.computing import seconds, usual_rows
from cl_runner.training.plan import Plan
from cl_runner.training.prepare import Room, Tokens, open_stage

WAYS = ("bf16", "fp32")


def computes_in(room: Room, way: str) -> None:
    """From here on."""
    room.root = engine.Autocast(room.adapters.model, room.place.torch_device, way == "bf16")


def training(plan: Plan, room: Room, tokens: Tokens, index: int, way: str) -> float:
    """Seconds of a step, the median of a stage's; what it learned stays in the adapters."""
    computes_in(room, way)
    room.adapters.restore([], {}, None)
    stage = open_stage(room, plan.config, index)
    room.method.build(stage)
    return median(step_seconds(stage, tokens.source(stage.plan).examples))


def answers(plan: Plan, room: Room, tokens: Tokens, index: int, way: str) -> tuple[float, list[str]]:
    """Seconds for a task's test rows, and what was answered."""
    computes_in(room, way)
    room.adapters.train(False)
    stage = open_stage(room, plan.config, index, evaluating=True)
    said: list[str] = []
    seconds = seconds_of(lambda: said.extend(stage.answer(tokens.test[plan.stages[index].tasks[0]].examples)))
    stage.close()
    return seconds, said


def main() -> None:
    """Run it."""
    arguments = parser(__doc__)
    add_model_arguments(arguments)
    arguments.add_argument("--tasks", default="dbpedia,amazon,agnews")
    arguments.add_argument("--rows", type=int, default=64, help="of each task, to train and to answer")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting")
    given = arguments.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    more = ["training.precision=fp32", "data.balanced=true", "adapter.r=8", *given.set]
    with tempfile.TemporaryDirectory() as folder:
        plan, room, tokens = prepared(given, given.tasks, more, Path(folder))
        here = "this processor has bf16" if has_bf16() else "this processor has no bf16: it is imitated"
        everything = Joined([each.examples for each in (tokens.source(stage) for stage in plan.stages)])
        batch = usual_rows(everything, room.base, plan.batches(1)[0].micro_batch)
        print(f"{here}; {decide(partial(seconds, room.base, batch)).said}", flush=True)
        for index, stage in enumerate(plan.stages):
            ways = {way: partial(training, plan, room, tokens, index, way) for way in WAYS}
            steps = {way: times[1:] for way, times in take_turns(ways, given.rounds + 1).items()}
            asked = {way: partial(answers, plan, room, tokens, index, way) for way in WAYS}
            found = {way: runs[1:] for way, runs in take_turns(asked, given.rounds + 1).items()}
            ratios = [fp32 / bf16 for bf16, fp32 in zip(steps["bf16"], steps["fp32"], strict=True)]
            said = {way: runs[0][1] for way, runs in found.items()}
            spent = {way: median([one for one, _ in runs]) for way, runs in found.items()}
            rows.append(
                {
                    "task": stage.name,
                    **{f"step {way}, ms": 1e3 * median(steps[way]) for way in WAYS},
                    "fp32 ÷ bf16": median(ratios),
                    "range": spread(ratios),
                    "answers fp32 ÷ bf16": spent["fp32"] / spent["bf16"],
                    "rows": len(said["fp32"]),
                    "differing": sum(a != b for a, b in zip(said["bf16"], said["fp32"], strict=True)),
                }
            )
            print(rows[-1], flush=True)
        engine.stop()
    publish("bf16", given, {"seconds and ratios, fp32 : bf16; answers of one model in both": rows})


if __name__ == "__main__":
    main()
