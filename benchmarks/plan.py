"""What `cl-runner plan` foresees, and what then comes: time, memory and disk of the same run, as ratios.

Plan and run take turns, each a process of its own. Everything behind `--` is handed to both:

    python -m benchmarks.plan -- --order order1 --method olora --preset tiny --data synthetic

`--processor` has both count the seconds of their processor, on one thread: what else the machine does is not in them.
`--shape t5-large` makes a model folder of that shape with random weights and the embedded model's tokenizer.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import parser, publish

# A process whose clocks are those of its processor.
PROCESSOR = """
import time
time.perf_counter = time.monotonic = time.process_time
from cl_runner.cli import main
main()
"""
USUAL = ["--order", "order1", "--method", "olora", "--preset", "tiny", "--data", "synthetic"]


def shaped(shape: str, folder: Path) -> Path:
    """A model folder of a shape: random weights, in one file, and tiny-t5's tokenizer."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from benchmarks.shapes import SHAPES
    from cl_runner.config.schema import ModelConfig
    from cl_runner.models.base import load_base

    tiny = load_base(ModelConfig(name="tiny-t5"), torch.device("cpu"))
    layout = tiny.layout
    ids = {
        "pad_token_id": layout.pad_id,
        "eos_token_id": layout.eos_id,
        "decoder_start_token_id": layout.decoder_start_id,
    }
    T5ForConditionalGeneration(T5Config(**SHAPES[shape], **ids)).save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


def command(arguments: Sequence[str], log: Path, processor: bool) -> tuple[dict[str, Any], float, float]:
    """The JSON that `cl-runner ARGUMENTS --json` says, its seconds, and the peak of its memory in bytes."""
    started = time.perf_counter()
    program = ["-c", PROCESSOR] if processor else ["-m", "cl_runner"]
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if processor else {})}
    with log.open("a") as said, tempfile.TemporaryFile() as out:
        whole = [sys.executable, *program, *arguments, "--json"]
        process = subprocess.Popen(whole, stdout=out, stderr=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise SystemExit(f"cl-runner {' '.join(arguments)}: exit code {process.returncode}, see {log}")
    seconds = usage.ru_utime + usage.ru_stime if processor else time.perf_counter() - started
    return json.loads(text), seconds, usage.ru_maxrss * 1024


def compared(arguments: Sequence[str], scratch: Path, processor: bool) -> list[dict[str, Any]]:
    """One turn: foreseen, what came, and the one over the other."""
    root, log = scratch / "runs", scratch / "log"
    shutil.rmtree(root, ignore_errors=True)
    shared = [*arguments, "--output-dir", str(root)]
    plan, _, _ = command(["plan", *shared], log, processor)
    loads = [os.getloadavg()[0]]
    _, wall, peak = command(["train", *shared], log, processor)
    loads.append(os.getloadavg()[0])
    [run] = root.iterdir()
    stages = [json.loads(file.read_text()) for file in sorted(run.glob("stages/0[1-9]-*/metrics.json"))]
    spent = {part: sum(stage["seconds"][part] for stage in stages) for part in ("train", "evaluate", "stage")}
    foreseen = {
        part: sum(stage["seconds"][part] for stage in plan["stages"]) for part in ("train", "evaluate", "stage")
    }
    on_disk = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
    print(f"load {loads[0]:.1f} after the plan, {loads[1]:.1f} after the run", file=sys.stderr, flush=True)
    pairs = {
        "training s": (foreseen["train"], spent["train"]),
        "evaluation s": (foreseen["evaluate"], spent["evaluate"]),
        "all stages s": (foreseen["stage"], spent["stage"]),
        "the whole command s": (plan["seconds"]["all"], wall),
        "memory MB": (plan["memory"]["peak"] / 2**20, peak / 2**20),
        "disk MB": (plan["disk"]["bytes"] / 2**20, on_disk / 2**20),
    }
    return [
        {"what": what, "foreseen": before, "came": after, "ratio": before / after}
        for what, (before, after) in pairs.items()
    ]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=1, help="turns (default %(default)s)")
    made.add_argument("--processor", action="store_true", help="seconds of the processor, on one thread")
    made.add_argument("--shape", help="a shape of benchmarks/shapes.py, an encoder-decoder: the model of the run")
    made.add_argument("arguments", nargs="*", help=f"of cl-runner train, behind -- (default {' '.join(USUAL)})")
    given = made.parse_args()
    arguments = given.arguments or USUAL
    with tempfile.TemporaryDirectory(prefix="cl-runner-bench-") as name:
        scratch = Path(name)
        if given.shape:
            arguments = [*arguments, "--model", str(shaped(given.shape, scratch / given.shape))]
        rounds = [compared(arguments, scratch, given.processor) for _ in range(given.rounds)]
    publish("plan", given, {f"Turn {turn + 1}": rows for turn, rows in enumerate(rounds)})


if __name__ == "__main__":
    main()
