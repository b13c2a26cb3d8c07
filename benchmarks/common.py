"""What the parts share: taking turns, processes with their time and memory, the machine in a line, tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
K = TypeVar("K")

ROOT = Path(__file__).resolve().parents[1]


def take_turns(ways: Mapping[K, Callable[[], T]], rounds: int) -> dict[K, list[T]]:
    """The results of every way, round by round: a, b, c, a, b, c, …

    A machine gets warmer, or somebody else comes to share it: taking turns, that hits all ways alike.
    """
    found: dict[K, list[T]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            found[name].append(call())
    return found


def seconds_of(call: Callable[[], object]) -> float:
    """Wall seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def median(values: Sequence[float]) -> float:
    """The median; nan of nothing."""
    return statistics.median(values) if values else float("nan")


def spread(values: Sequence[float]) -> str:
    """``lowest to highest`` of a few measurements."""
    return f"{min(values):.3g} to {max(values):.3g}" if values else ""


@dataclass(frozen=True)
class Finished:
    """A process that has ended: its wall seconds from start to end, the peak memory of it or of a child of its."""

    seconds: float
    peak_mb: float


def run_process(arguments: Sequence[str], log: Path, cwd: Path = ROOT, **env: str) -> Finished:
    """Run ``python ARGUMENTS`` to its end, output to ``log``; raises RuntimeError with the log's end if it fails.

    ``env``: what it finds in its environment beside ours.
    """
    started = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=cwd, env={**os.environ, **env}, stdout=out, stderr=subprocess.STDOUT
        )
        # wait4 knows the peak of this very child (of the largest in its family); RUSAGE_CHILDREN that of all so far.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise RuntimeError(f"{' '.join(arguments)}: exit code {process.returncode}\n{tail}")
    return Finished(seconds, usage.ru_maxrss / 1024)


def resident_mb() -> float:
    """Resident memory of this process now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def machine() -> str:
    """The machine in a line: what a number is worth without it is nothing."""
    import torch

    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    parts = [
        model,
        f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads",
        f"load {os.getloadavg()[0]:.1f} at the end",
        f"torch {torch.__version__}",
        datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    ]
    if torch.cuda.is_available():
        parts.insert(0, torch.cuda.get_device_name(0))
    return "; ".join(parts)


Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table; columns are the keys of the rows, in the order in which they turn up."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every part has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="append the results to FILE, one JSON object a line")
    return made


def publish(part: str, arguments: argparse.Namespace, tables: Mapping[str, Sequence[Row]]) -> None:
    """Print the tables of a part with the machine's line, and append them to ``--json``."""
    where = machine()
    print(f"\n## {part}\n\n{where}")
    for title, rows in tables.items():
        print(f"\n{title}\n\n{table(rows)}", flush=True)
    if arguments.json:
        given = {key: value for key, value in vars(arguments).items() if key != "json"}
        entry = {"part": part, "machine": where, "arguments": given, "tables": tables}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        with arguments.json.open("a") as out:
            out.write(json.dumps(entry, default=str) + "\n")
