"""Does a step cost the same at the end of an order as at its start?

Steps at stages 2, 8 and 15, all methods and positions in turns in one process, the same rows at every stage; peak
memory of a process that stands at that stage alone. With `--curve N`: N stages one after the other as a run trains,
commits, scores and saves them, each method in a process of its own, with the stage's time and a step's, resident memory
and the size of what is saved, as CSV and, if matplotlib is installed, a picture. `--methods` names others than the
usual ones: any whose stages are the tasks. `--model FOLDER` takes another model than the embedded tiny-t5.
"""

from __future__ import annotations

import argparse
import csv
import gc
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import world
from benchmarks.common import median, parser, publish, resident_mb, run_process
from benchmarks.job import Job, add_model_arguments
from cl_runner.methods.protocol import StagePlan
from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.tasks import benchmark
from cl_runner.training.checkpoint import save_stage
from cl_runner.training.evaluation import TestSet, evaluate
from cl_runner.training.stage import StageRun, commit_update

POSITIONS = (2, 8, 15)
TASK = "agnews"  # whose rows every stage is given


def job_of(given: argparse.Namespace, steps: int) -> Job:
    """The model, and the rows of so many steps a stage."""
    model = {name: getattr(given, name) for name in ("model", "data_dir", "micro_batch", "max_source")}
    return Job(train=steps * given.micro_batch, test=16, epochs=1, **model)


def as_arguments(given: argparse.Namespace) -> list[str]:
    """The model, for another process."""
    values = {"micro-batch": given.micro_batch, "max-source": given.max_source}
    values |= {name: value for name, value in (("model", given.model), ("data-dir", given.data_dir)) if value}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def ratios(given: argparse.Namespace) -> list[Mapping[str, Any]]:
    """Step time at each position, and the last over the first."""
    job = job_of(given, given.steps)
    made = world.of(job, POSITIONS[-1])
    examples = job.examples(made.room.base, TASK, "train")
    found = world.steps_in_turns(made, POSITIONS, given.methods, examples, given.rounds)
    rows: list[Mapping[str, Any]] = []
    for method in given.methods:
        row: dict[str, Any] = {"method": method}
        for position in POSITIONS:
            row[f"stage {position}: step ms"] = 1e3 * median(found[method, position])
        first, last = (median(found[method, position]) for position in (POSITIONS[0], POSITIONS[-1]))
        row[f"stage {POSITIONS[-1]} ÷ {POSITIONS[0]}"] = last / first
        rows.append(row)
    return rows


def add_memory(rows: Sequence[Mapping[str, Any]], given: argparse.Namespace, scratch: Path) -> list[Mapping[str, Any]]:
    """Peak memory of a process of its own for every method and position."""
    found: list[Mapping[str, Any]] = []
    for row in rows:
        more = {}
        for position in POSITIONS:
            worker = ["-m", "benchmarks.stages", "--stand-at", str(position), "--method", row["method"]]
            more[f"stage {position}: peak MB"] = run_process([*worker, *as_arguments(given)], scratch / "log").peak_mb
        found.append({**row, **more})
    return found


def stand_at(given: argparse.Namespace) -> None:
    """A few steps at one position, for the memory that they take."""
    job = job_of(given, 4)
    made = world.of(job, given.stand_at)
    world.step_seconds(made.stage(given.method, given.stand_at), job.examples(made.room.base, TASK, "train"))


def curve(given: argparse.Namespace, out: Path) -> None:
    """Train that many stages as a run does; a line of CSV after each."""
    job = job_of(given, given.curve_steps)
    made = world.of(job, 1)
    order = tuple(StagePlan(f"task{i}", (f"task{i}",)) for i in range(1, given.curve + 1))
    made.room.order = order
    examples = job.examples(made.room.base, TASK, "train")
    made.config.training.lr = 1e-4  # two hundred stages of the same rows stay finite; a step costs the same at any rate
    test = TestSet(benchmark.get(TASK), job.rows(TASK, "test"), job.examples(made.room.base, TASK, "test"))
    first = made.stage(given.method, 1)  # sets the method up; it then lives through all stages, as in a run
    config = first.config
    first.close()
    with out.open("w", newline="") as file, tempfile.TemporaryDirectory(prefix="cl-runner-bench-") as scratch:
        run = RunDir(Path(scratch, "run"))
        writer = csv.writer(file)
        writer.writerow(["stage", "stage_s", "step_ms", "resident_mb", "saved_mb"])
        for index in range(given.curve):
            started = time.perf_counter()
            stage = StageRun(made.room, config, index)
            made.room.method.build(stage)
            seconds = world.step_seconds(stage, examples)
            made.room.adapters.train(False)
            commit_update(made.room.method, stage)
            evaluate(stage, {TASK: test})
            committed = commit(run, index, stage.plan.name, partial(save_stage, stage=stage))
            made.room.adapters.let_go(made.room.method.reads_past())
            whole = time.perf_counter() - started
            written = list(committed.rglob("*.safetensors"))
            saved = sum(path.stat().st_size for path in written) / 1e6
            for path in written:  # nobody will read them: room on the disk
                path.unlink()
            gc.collect()
            step = f"{1e3 * median(seconds):.3f}"
            writer.writerow([index + 1, f"{whole:.3f}", step, f"{resident_mb():.1f}", f"{saved:.2f}"])
            file.flush()


def file_name(method: str) -> str:
    return re.sub(r"\W+", "-", method).strip("-")


def read(file: Path) -> list[dict[str, float]]:
    with file.open(newline="") as lines:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(lines)]


def summary(method: str, rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The first stages beside the last: medians over a tenth of the curve at either end, without the first stage."""
    tenth = max(2, len(rows) // 10)
    ends = rows[1 : 1 + tenth], rows[-tenth:]
    step = [median([row["step_ms"] for row in part]) for part in ends]
    memory = [median([row["resident_mb"] for row in part]) for part in ends]
    whole = [median([row["stage_s"] for row in part]) for part in ends]
    return {
        "method": method,
        "stages": len(rows),
        "first stage s": whole[0],
        "last stage s": whole[1],
        "first step ms": step[0],
        "last step ms": step[1],
        "last ÷ first": step[1] / step[0],
        "first MB": memory[0],
        "last MB": memory[1],
        "MB a stage": (memory[1] - memory[0]) / max(len(rows) - tenth - 1, 1),
        "saved MB, stage 2": rows[1]["saved_mb"],
        "saved MB, last": rows[-1]["saved_mb"],
    }


def draw(curves: Mapping[str, Sequence[Mapping[str, float]]], file: Path) -> str:
    """The picture, if it can be drawn; says what was done."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no picture: matplotlib is not installed"
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for axis, key, label in zip(axes, ("step_ms", "resident_mb"), ("ms a step", "resident MB"), strict=True):
        for method, rows in curves.items():
            axis.plot([row["stage"] for row in rows], [row[key] for row in rows], label=method, linewidth=1)
        axis.set_xlabel("stage")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    return f"drew {file}"


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=8, help="optimizer steps a turn (default %(default)s)")
    made.add_argument("--rounds", type=int, default=3, help="turns of each method and stage (default %(default)s)")
    made.add_argument("--no-memory", action="store_true", help="leave out the processes that tell the peak memory")
    made.add_argument("--curve", type=int, metavar="N", help="also train N stages one after the other")
    made.add_argument("--curve-steps", type=int, default=4, help="optimizer steps a stage of it (default %(default)s)")
    made.add_argument("--curve-only", action="store_true", help="nothing but the curve")
    made.add_argument("--methods", nargs="+", default=list(world.METHODS), help="which (default %(default)s)")
    made.add_argument(
        "--out", type=Path, default=Path("bench"), help="folder for CSV and picture (default %(default)s)"
    )
    add_model_arguments(made)
    made.add_argument("--method", help=argparse.SUPPRESS)
    made.add_argument("--stand-at", type=int, help=argparse.SUPPRESS)
    made.add_argument("--csv", type=Path, help=argparse.SUPPRESS)
    given = made.parse_args()
    if given.stand_at:
        return stand_at(given)
    if given.csv:
        return curve(given, given.csv)
    rows_of = "rows of the benchmark's files" if given.data_dir else "synthetic rows"
    what = f"{given.model or 'tiny-t5'} on the CPU, the same {rows_of} at every stage"
    with tempfile.TemporaryDirectory(prefix="cl-runner-bench-") as scratch:
        if not given.curve_only:
            rows: Sequence[Mapping[str, Any]] = ratios(given)
            rows = rows if given.no_memory else add_memory(rows, given, Path(scratch))
            publish("stages", given, {what: rows})
        if given.curve:
            publish("curve", given, {f"{given.curve} stages one after the other, {what}": curves(given, Path(scratch))})


def curves(given: argparse.Namespace, scratch: Path) -> list[Mapping[str, Any]]:
    """The curve of every method, one process each; CSV and picture into ``--out``."""
    given.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for method in given.methods:
        file = given.out / f"curve-{file_name(method)}.csv"
        worker = ["-m", "benchmarks.stages", "--method", method, "--csv", str(file.absolute())]
        size = ["--curve", str(given.curve), "--curve-steps", str(given.curve_steps)]
        run_process([*worker, *size, *as_arguments(given)], scratch / "log")
        found[method] = read(file)
    print(draw(found, given.out / "curve.png"), file=sys.stderr)
    return [summary(method, rows) for method, rows in found.items()]


if __name__ == "__main__":
    main()
