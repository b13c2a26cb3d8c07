"""The table of faults, of the rows that they wrote: ``python -m tests.faults.table faults/*.jsonl``."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cl_runner.atomic import read_jsonl

# Phase → what a process is at.
WORDS = {
    "start": "reading, loading, folding, or between two others",
    "create": "making the run's folder",
    "training": "in a step",
    "checkpoint": "writing a checkpoint",
    "evaluation": "in an evaluation",
    "commit": "committing a stage",
    "clearing": "removing checkpoints after a commit",
    "results": "writing the results",
    "report": "writing the page",
    "end": "printing what came out",
}
KILLS = "tests.faults.kills"


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Fault, how often it was tried, what was lost. A run that was killed several times is as many tries."""
    tried: Counter[tuple[str, str]] = Counter()
    lost: Counter[tuple[str, str]] = Counter()
    for row in rows:
        if "kills" in row:
            for phase, _ in row["kills"]:
                key = (f"`kill -9` at a random instant: {WORDS[phase]}", KILLS)
                tried[key] += 1
                lost[key] += bool(row["differs"])
        else:
            key = (row["fault"], Path(row["by"]).name)
            tried[key] += row["tried"]
            lost[key] += row["failed"]
    lines = ["| fault | tried | lost | by |", "|---|---:|---|---|"]
    for fault, by in sorted(tried):
        what = f"in {lost[fault, by]}" if lost[fault, by] else "nothing"
        lines.append(f"| {fault} | {tried[fault, by]} | {what} | `{by}` |")
    return "\n".join(lines)


def main(files: Sequence[str]) -> None:
    """Print it, and how many kills there were of how many cases."""
    rows = [row for file in files for row in read_jsonl(Path(file))]
    print(table(rows))
    kills = [row for row in rows if "kills" in row]
    if kills:
        cases, number = {row["case"] for row in kills}, sum(len(row["kills"]) for row in kills)
        print(f"\n{number} kills at random instants in {len(kills)} runs of {len(cases)} methods, kinds and options")


if __name__ == "__main__":
    main(sys.argv[1:])
