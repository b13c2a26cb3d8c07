"""``python -m tests.fuzz --cases 20000``: the long mode. What it finds is kept, and it goes on where it was stopped.

Each case is known by seed, surface and number, and made by these alone: ``--only "run folders:17"`` makes one again.
The cases run in a process of their own, which may die of one; the next goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz.surfaces import SHARES, SURFACES

PART = 600  # cases of one process, which takes some seconds to begin


def shares(cases: int) -> dict[str, int]:
    """Surface → how many of the cases are of it."""
    whole = sum(SHARES.get(name, 1) for name in SURFACES)
    found = {name: cases * SHARES.get(name, 1) // whole for name in SURFACES}
    found["command line"] += cases - sum(found.values())
    return found


def run_case(surface: str, number: int, seed: int, room: Path) -> dict[str, object]:
    """One case, made and judged; the room is empty again afterwards."""
    from tests.fuzz import oracle

    folder = room / "case"
    for name in ("case", "outside"):
        shutil.rmtree(room / name, ignore_errors=True)
        (room / name).mkdir(parents=True)
    (room / "outside/secret.json").write_text('{"secret": 1}')
    rng = random.Random(f"{seed}/{surface}/{number}")
    case = SURFACES[surface](folder, rng)
    faults, code = oracle.faults(case, folder, room)
    words = [word if len(word) < 200 else f"{word[:200]}…" for word in case.arguments]
    return {
        "surface": surface,
        "number": number,
        "code": code,
        "faults": faults,
        "arguments": words,
        "about": case.about,
    }


def work(surface: str, first: int, last: int, seed: int) -> None:
    """In a process of its own: say each case before it begins and as it ends, a JSON object a line."""
    from tests.fuzz import oracle

    words = os.fdopen(os.dup(1), "w", buffering=1)
    with tempfile.TemporaryDirectory(prefix="cl-runner-fuzz-") as name:
        room = Path(name).resolve()
        os.environ |= {
            "HOME": str(room / "home"),
            "CL_RUNNER_CACHE": str(room / "cache"),
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(room),
        }
        tempfile.tempdir = str(room)
        oracle.hook()
        for number in range(first, last):
            words.write(json.dumps({"begins": number}) + "\n")
            words.write(json.dumps(run_case(surface, number, seed, room)) + "\n")


def fuzz(cases: int, seed: int, out: Path, workers: int) -> int:
    """All cases that ``out`` does not have yet, in so many processes. Returns how many have faults."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", buffering=1) as kept, ThreadPoolExecutor(workers) as pool:

        def part(surface: str, first: int, last: int) -> None:
            while first < last:
                for row in _process(surface, first, last, seed):
                    kept.write(json.dumps({"seed": seed, **row}) + "\n")
                    if row["faults"]:
                        print(json.dumps(row), flush=True)
                    first = int(str(row["number"])) + 1

        for each in [pool.submit(part, *which) for which in _missing(cases, _rows(out, seed))]:
            each.result()
    rows = _rows(out, seed)
    print(table(rows))
    return sum(bool(row["faults"]) for row in rows)


def _rows(out: Path, seed: int) -> list[dict[str, object]]:
    return [row for row in map(json.loads, out.read_text().splitlines()) if row["seed"] == seed]


def _missing(cases: int, rows: list[dict[str, object]]) -> Iterator[tuple[str, int, int]]:
    """Surface, first number and the one after the last, of the cases that are not there: some hundred at a time."""
    done = {(row["surface"], row["number"]) for row in rows}
    for surface, count in shares(cases).items():
        first = None
        for number in range(count + 1):
            there = number == count or (surface, number) in done
            if first is not None and (there or number - first == PART):
                yield surface, first, number
                first = None
            if first is None and not there:
                first = number


def _process(surface: str, first: int, last: int, seed: int) -> Iterator[dict[str, object]]:
    """The cases of one process, as they end; of one that dies in a case a row that says so."""
    command = [sys.executable, "-m", "tests.fuzz", "--work", surface, str(first), str(last), "--seed", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert process.stdout is not None
    begun = None
    for line in process.stdout:
        row = json.loads(line)
        if "begins" in row:
            begun = row["begins"]
        else:
            begun = None
            yield row
    process.wait()
    if begun is not None or process.returncode:
        number = first if begun is None else begun
        faults = [f"the process died ({process.returncode})"]
        yield {"surface": surface, "number": number, "code": -1, "faults": faults, "arguments": [], "about": ""}


def table(rows: list[dict[str, object]]) -> str:
    """Counts by surface, as Markdown."""
    lines = ["| surface | cases | done (0) | differs (1) | refused (2) | faults |", "|---|--:|--:|--:|--:|--:|"]
    for name in [*SURFACES, "all"]:
        own = [row for row in rows if name in (row["surface"], "all")]
        codes = Counter(row["code"] for row in own)
        faults = sum(bool(row["faults"]) for row in own)
        lines.append(f"| {name} | {len(own):,} | {codes[0]:,} | {codes[1]:,} | {codes[2]:,} | {faults:,} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.fuzz")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz/cases.jsonl"), help="what was found, and where to go on")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--only", metavar="SURFACE:NUMBER", help="this case alone, in this process")
    parser.add_argument("--work", nargs=3, metavar=("SURFACE", "FIRST", "LAST"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work[0], int(given.work[1]), int(given.work[2]), given.seed)
        return 0
    if given.only:
        surface, _, number = given.only.rpartition(":")
        work(surface, int(number), int(number) + 1, given.seed)
        return 0
    return 1 if fuzz(given.cases, given.seed, given.out, given.workers) else 0


if __name__ == "__main__":
    sys.exit(main())
