"""Scoring by verification beside plain decoding: eval.mode=verify and eval.mode=generate, in turns.

One pass over the gold labels proves most right answers right; the rest is decoded. In fp32 both modes must answer every
row alike, and the script fails if they do not. In bf16 two ways of computing the same scores may round apart: there it
counts the rows whose answers differ, and among them those that were called right and that plain decoding contradicts.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from benchmarks.common import median, parser, publish, spread, take_turns
from benchmarks.world import World, step_seconds, synchronise, tiny, tiny_rows
from cl_runner.tasks import benchmark
from cl_runner.tasks.synthetic import sample
from cl_runner.training.evaluation import Scored, TestSet, evaluate
from cl_runner.training.stage import StageRun, commit_update


def trained(world: World, train: int) -> StageRun:
    """A stage that has learned dbpedia and folded it, ready to answer."""
    stage = world.stage("inclora", 1)
    step_seconds(stage, tiny_rows(world, train, "dbpedia"))
    world.room.adapters.train(False)
    commit_update(world.room.method, stage)
    return StageRun(world.room, stage.config, 0, evaluating=True)


def answer(stage: StageRun, tests: dict[str, TestSet], mode: Any) -> tuple[float, list[Scored]]:
    """Seconds, and what was answered."""
    stage.config.eval.mode = mode
    started = time.perf_counter()
    scored = evaluate(stage, tests)
    synchronise(stage.device)
    return time.perf_counter() - started, scored


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--train", type=int, default=800, help="rows to learn first (default %(default)s)")
    made.add_argument("--epochs", type=int, default=3, help="passes over them (default %(default)s)")
    made.add_argument("--test", type=int, default=200, help="rows a task to answer (default %(default)s)")
    made.add_argument("--rounds", type=int, default=3, help="turns of each mode (default %(default)s)")
    made.add_argument(
        "--tasks", default="dbpedia,agnews", help="tasks to answer, one of them unseen (default %(default)s)"
    )
    given = made.parse_args()
    answers: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    for precision in ("fp32", "bf16"):
        world = tiny(2, precision=precision, epochs=given.epochs)
        stage = trained(world, given.train)
        tests = {
            task: TestSet(
                benchmark.get(task), sample(task, "test", given.test), tiny_rows(world, given.test, task, "test")
            )
            for task in given.tasks.split(",")
        }
        for mode in ("verify", "generate"):
            answer(stage, tests, mode)  # the first batch pays for kernels and caches
        ways = {mode: partial(answer, stage, tests, mode) for mode in ("verify", "generate")}
        found = take_turns(ways, given.rounds)
        for number, task in enumerate(tests):
            one = {mode: found[mode][0][1][number] for mode in ways}
            pairs = list(zip(one["verify"].predictions, one["generate"].predictions, strict=True))
            differing = sum(a["output"] != b["output"] for a, b in pairs)
            contradicted = sum(a["correct"] and a["output"] != b["output"] for a, b in pairs)
            if precision == "fp32" and differing:
                raise SystemExit(f"{task}: {differing} of {len(pairs)} answers differ between the two modes in fp32")
            answers.append(
                {
                    "precision": precision,
                    "task": task,
                    "rows": len(pairs),
                    "right %": one["generate"].score,
                    "differing": differing,
                    "right by verify, contradicted by decoding": contradicted,
                }
            )
        seconds = {mode: [run[0] for run in runs] for mode, runs in found.items()}
        ratios = [b / a for a, b in zip(seconds["verify"], seconds["generate"], strict=True)]
        times.append(
            {
                "precision": precision,
                "rows": len(tests) * given.test,
                "verify s": median(seconds["verify"]),
                "generate s": median(seconds["generate"]),
                "generate ÷ verify": median(ratios),
                "range": spread(ratios),
            }
        )
        stage.close()
    where = "tiny-t5 on the CPU, synthetic rows"
    publish("evaluation", given, {f"{where}: seconds": times, f"{where}: answers": answers})


if __name__ == "__main__":
    main()
