"""``kill -9`` at random instants of runs of every method, kind and option, counted.

    python -m tests.faults.kills --json kills.jsonl      # until each case has its kills; goes on where it was
    python -m tests.faults.kills --json kills.jsonl --case "kind dora" --round 3

A row of the file is a run: killed up to four times in a row, let go on to its end, and held against the one that nobody
touched. The instants are shares, from seed, case and round, of the time that a run takes; what a process is at by then
depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl_runner.atomic import read_jsonl

FAULT = "kill -9"
IN_A_ROW = 4


def main(words: Sequence[str] | None = None) -> int:
    given = _parse(words)
    os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch
    room = Path(tempfile.mkdtemp(prefix="cl-runner-faults-"))
    os.environ["CL_RUNNER_CACHE"] = str(room / "cache")
    try:
        return _all(given, room)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="what came out, a row a run, appended")
    parser.add_argument("--kills", type=int, default=13, help="of each case")
    parser.add_argument("--case", help="this one alone")
    parser.add_argument("--round", type=int, help="of the case, this one alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    return parser.parse_args(words)


def _all(given: argparse.Namespace, room: Path) -> int:
    from tests.faults import cases
    from tests.faults.warm import warm

    cases.room(room)
    warm(room, cases.train("warm"))
    wanted = [name for name in cases.cases() if given.case in (None, name)]
    if not wanted:
        sys.exit(f"there is no case {given.case!r}: {', '.join(cases.cases())}")
    workers = []
    for job in range(given.jobs):
        pid = os.fork()
        if not pid:
            code = 70
            try:
                code = max([_case(given, room, name) for name in wanted[job :: given.jobs]], default=0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        workers.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers)


def _case(given: argparse.Namespace, room: Path, name: str) -> int:
    """Rounds of a case until it has its kills; 1 where one of them did not come out as it has to."""
    from tests.faults import cases
    from tests.faults.trial import random_kills, whole

    there = _rounds(given.json, name, given.seed)
    counted, bad = sum(len(row["kills"]) for row in there.values()), sum(bool(row["differs"]) for row in there.values())
    if given.round is None and counted >= given.kills:
        return int(bad > 0)
    cwd = room / name.replace(" ", "-")
    cwd.mkdir()
    cases.room(cwd)
    more = cases.cases()[name]
    seconds = whole(cwd, *more)
    numbers = range(10**6) if given.round is None else [given.round]
    for number in numbers:
        if given.round is None and (counted >= given.kills or number in there):
            if counted >= given.kills:
                break
            continue
        trial = random_kills(cwd, f"{given.seed} {name} {number}", IN_A_ROW, seconds, more)
        row = {"fault": FAULT, "case": name, "seed": given.seed, "round": number, "kills": trial.kills,
               "differs": trial.differs, "time": round(time.time())}  # fmt: skip
        with given.json.open("a") as file:
            file.write(json.dumps(row) + "\n")
        counted, bad = counted + len(trial.kills), bad + bool(trial.differs)
        seconds *= 1.05 if len(trial.kills) == IN_A_ROW else 0.8  # the machine's pace may have changed
        if trial.differs:
            print(f"{name}, round {number}: {trial.kills}: {trial.differs}", file=sys.stderr, flush=True)
    print(f"{name}: {counted} kills, {bad} runs that differ", file=sys.stderr, flush=True)
    shutil.rmtree(cwd, ignore_errors=True)
    return int(bad > 0)


def _rounds(file: Path, name: str, seed: int) -> dict[int, dict[str, Any]]:
    rows = read_jsonl(file) if file.exists() else []
    return {
        row["round"]: row for row in rows if (row["fault"], row.get("case"), row.get("seed")) == (FAULT, name, seed)
    }


if __name__ == "__main__":
    sys.exit(main())
