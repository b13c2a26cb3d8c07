"""A whole task order on the CPU, from the start of the process to its end, three ways in turns:

reference style   a process a task, past pairs in every forward, plain decoding (reference_style.py)
plain PEFT        PEFT and the transformers Trainer in one process (plain_peft.py)
cl-runner         `cl-runner train`

The same model (the embedded tiny-t5, or `--model FOLDER`), rows, cut, batch size, epochs and O-LoRA settings. The mean
exact match after the last stage is printed for each: a faster way that learned less would be no faster way.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import Finished, median, parser, publish, run_process, spread, take_turns
from benchmarks.job import Job, add_arguments

Measured = dict[str, float]


def measured(finished: Finished, result: dict[str, Any]) -> Measured:
    scores = result["scores"]
    return {
        "wall": finished.seconds,
        "train": result["train"],
        "evaluate": result["evaluate"],
        "AA": sum(scores.values()) / len(scores),
        "peak MB": finished.peak_mb,
    }


def by_script(module: str, job: Job, folder: Path, *more: str) -> Measured:
    """A way that is a script of ours."""
    arguments = ["-m", f"benchmarks.{module}", *job.as_arguments(), "--out", str(folder), *more]
    folder.mkdir()
    finished = run_process(arguments, folder / "log")
    return measured(finished, json.loads((folder / "result.json").read_text()))


def by_cl_runner(job: Job, folder: Path, also: Sequence[str] = ()) -> Measured:
    """The package itself; ``also``: settings of its own."""
    folder.mkdir()
    sets = [*(f"{key}={value}" for key, value in job.sets.items()), *also]
    finished = run_process(
        [
            *("-m", "cl_runner", "train", "--order", job.order, "--seed", str(job.seed)),
            *(part for name in job.presets for part in ("--preset", name)),
            *(part for each in sets for part in ("--set", each)),
            *("--output-dir", str(folder), "--name", "run"),
        ],
        folder / "log",
    )
    stages = [json.loads(f.read_text()) for f in sorted(folder.glob("run/stages/*/metrics.json"))]
    total = {key: sum(stage["seconds"][key] for stage in stages) for key in ("train", "evaluate")}
    return measured(finished, {"scores": stages[-1]["scores"], **total})


def ways(job: Job, scratch: Path, given: argparse.Namespace) -> dict[str, Callable[[], Measured]]:
    """Each way as a call; every call gets a folder and a seed of its own, the same seeds for all ways."""
    made: dict[str, Callable[[Job, Path], Measured]] = {
        "reference style": lambda job, to: by_script("reference_style", job, to, "--pad", given.pad),
        "plain PEFT": partial(by_script, "plain_peft"),
        "cl-runner": by_cl_runner,
    }
    if given.ours_only:
        made = {"cl-runner": by_cl_runner}
    made |= {f"cl-runner, {settings}": partial(by_cl_runner, also=settings.split()) for settings in given.also}

    def call(way: Callable[[Job, Path], Measured]) -> Callable[[], Measured]:
        counter = iter(range(1000))

        def once() -> Measured:
            number = next(counter)
            folder = Path(tempfile.mkdtemp(dir=scratch))
            try:
                return way(replace(job, seed=job.seed + number), folder / "way")
            finally:
                shutil.rmtree(folder)

        return once

    return {name: call(way) for name, way in made.items()}


def main() -> None:
    made = parser(__doc__)
    add_arguments(made)
    made.add_argument("--rounds", type=int, default=3, help="how often each way runs (default %(default)s)")
    made.add_argument("--pad", choices=("longest", "max"), default="longest", help="of the reference style")
    made.add_argument("--ours-only", action="store_true", help="leave out the other two ways")
    made.add_argument(
        "--also", action="append", default=[], metavar="'KEY=VALUE …'",
        help="one way more: cl-runner with these settings; may be given again",
    )  # fmt: skip
    given = made.parse_args()
    job = Job.given(given)
    with tempfile.TemporaryDirectory(prefix="cl-runner-bench-") as scratch:
        if job.data_dir is None:
            job = replace(job, data_dir=f"{scratch}/rows")
            job.write_rows(Path(scratch, "rows"))
        found = take_turns(ways(job, Path(scratch), given), given.rounds)
    ours = found["cl-runner"]
    rows = [
        {
            "way": name,
            "wall s": median([one["wall"] for one in runs]),
            "range": spread([one["wall"] for one in runs]),
            "training s": median([one["train"] for one in runs]),
            "evaluation s": median([one["evaluate"] for one in runs]),
            "the rest s": median([one["wall"] - one["train"] - one["evaluate"] for one in runs]),
            **{
                f"{label} × ours": median([a[key] / b[key] for a, b in zip(runs, ours, strict=True)])
                for label, key in (("wall", "wall"), ("training", "train"), ("evaluation", "evaluate"))
            },
            "AA": median([one["AA"] for one in runs]),
            "AA range": spread([one["AA"] for one in runs]),
            "peak MB": median([one["peak MB"] for one in runs]),
        }
        for name, runs in found.items()
    ]
    kind = "the benchmark's files" if given.data_dir else "synthetic data"
    title = f"{given.order} end to end on {job.config.model.name}, median of {given.rounds}, exact match on {kind}"
    publish("order", given, {title: rows})


if __name__ == "__main__":
    main()
