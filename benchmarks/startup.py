"""How long one waits: `cl-runner --help`, `list methods`, and `cl-runner train` up to its first optimizer step.

The first step is the first line of the log; seconds of the wall and of the processor, which on a shared machine is the
steadier one. `--beside CHECKOUT` has another checkout take turns with this one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import ROOT, median, parser, publish, spread, take_turns

LIMIT = 300.0
TICKS = os.sysconf("SC_CLK_TCK")
TRAIN = ["--method", "olora", "--preset", "tiny", "--data", "synthetic", "--set", "output.log_every=1"]


class Waited(NamedTuple):
    """Seconds from the start of a process, of the wall and of the processor."""

    wall: float
    processor: float


def shown(checkout: Path, *arguments: str) -> Waited:
    """Of a command that only says something."""
    started = time.perf_counter()
    process = subprocess.Popen(command(*arguments), cwd=checkout, env=environment(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"cl-runner {' '.join(arguments)}: exit code {process.returncode}")
    return Waited(time.perf_counter() - started, usage.ru_utime + usage.ru_stime)


def first_step(checkout: Path, *more: str) -> Waited:
    """Of ``cl-runner train`` up to the line of its first step; the run is stopped then. Its rows were never encoded."""
    with tempfile.TemporaryDirectory(prefix="cl-runner-bench-") as scratch:
        log = Path(scratch, "run", "log.jsonl")
        arguments = ["train", *TRAIN, *more, "--output-dir", scratch, "--name", "run"]
        started = time.perf_counter()
        process = subprocess.Popen(
            command(*arguments),
            cwd=checkout,
            env=environment() | {"CL_RUNNER_CACHE": scratch},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not (log.exists() and log.stat().st_size):
                if process.poll() is not None or time.perf_counter() - started > LIMIT:
                    raise SystemExit(f"no first step; exit code {process.poll()}")
                time.sleep(0.01)
            return Waited(time.perf_counter() - started, processor_seconds(process.pid))
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def processor_seconds(pid: int) -> float:
    """Of a process that runs, all its threads together."""
    behind_the_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(behind_the_name[11]) + int(behind_the_name[12])) / TICKS


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cl_runner", *arguments]


def environment() -> dict[str, str]:
    """Compiled modules are kept, as those of an installed package are."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=3, help="turns of each (default %(default)s)")
    made.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another checkout, in the same turns")
    given = made.parse_args()
    checkouts: Mapping[str, Path] = {"this": ROOT} if given.beside is None else {"this": ROOT, "beside": given.beside}
    with tempfile.TemporaryDirectory(prefix="cl-runner-bench-") as scratch:
        small = Path(scratch, "two.yaml")
        small.write_text("tasks: [agnews, amazon]\n")
        few = ["--set", "data.max_train=4", "--set", "data.max_test=2", "--set", "training.epochs=1"]
        ways = {
            "--help": (shown, "--help"),
            "list methods": (shown, "list", "methods"),
            "train, order 1": (first_step, "--order", "order1"),
            "train, two tasks of four rows": (first_step, "--order", str(small), *few),
        }
        turns = {
            (what, name): partial(call, checkout, *arguments)
            for what, (call, *arguments) in ways.items()
            for name, checkout in checkouts.items()
        }
        for turn in turns.values():  # what is read and compiled once is so now
            turn()
        found = take_turns(turns, given.rounds)
    rows = [
        {
            "what": what,
            **({"checkout": name} if given.beside else {}),
            **{f"{kind} s": median([getattr(one, kind) for one in waited]) for kind in Waited._fields},
            "wall, range": spread([one.wall for one in waited]),
            "processor, range": spread([one.processor for one in waited]),
        }
        for (what, name), waited in found.items()
    ]
    publish("startup", given, {"Seconds from the start of the process, tiny preset": rows})


if __name__ == "__main__":
    main()
