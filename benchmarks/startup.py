"""How long one waits: `cl-runner --help`, and `cl-runner train` up to its first optimizer step (its first log line)."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import ROOT, median, parser, publish, seconds_of, spread, take_turns

LIMIT = 300.0


def show_help() -> float:
    """Seconds of ``cl-runner --help``."""
    call = [sys.executable, "-m", "cl_runner", "--help"]
    return seconds_of(lambda: subprocess.run(call, cwd=ROOT, check=True, stdout=subprocess.DEVNULL))


def first_step() -> float:
    """Seconds from the start of ``cl-runner train`` to the line of its first step; the run is stopped then."""
    with tempfile.TemporaryDirectory(prefix="cl-runner-bench-") as scratch:
        log = Path(scratch, "run", "log.jsonl")
        arguments = ["train", "--order", "order1", "--method", "olora", "--preset", "tiny", "--data", "synthetic"]
        more = ["--set", "output.log_every=1", "--output-dir", scratch, "--name", "run"]
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "cl_runner", *arguments, *more],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not (log.exists() and log.stat().st_size):
                if process.poll() is not None or time.perf_counter() - started > LIMIT:
                    raise SystemExit(f"no first step; exit code {process.poll()}")
                time.sleep(0.01)
            return time.perf_counter() - started
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=3, help="turns of each (default %(default)s)")
    given = made.parse_args()
    found = take_turns({"cl-runner --help": show_help, "cl-runner train to its first step": first_step}, given.rounds)
    rows = [{"what": what, "median s": median(all_), "range": spread(all_)} for what, all_ in found.items()]
    publish("startup", given, {"Seconds from the start of the process, tiny preset on order 1": rows})


if __name__ == "__main__":
    main()
