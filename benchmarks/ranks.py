"""No time: the same run on 1, 2 and 4 processes and with three micro-batches, and how far its numbers lie apart.

    python -m benchmarks.ranks                       # tiny-t5, dropout 0.1
    python -m benchmarks.ranks --model tiny-llama --set training.dropout_by=micro
    python -m benchmarks.ranks --set training.optimizer=sgd --set training.lr=0.1

Of every run beside the first: the norm of the difference of the updates that the adapters hold after each stage, as a
share of the norm, and the largest difference in the accuracy matrix, in points. The last row is the first run on two
threads, which add up in another order: what rounding alone does. AdamW divides small gradients by their own size and
makes a percent of it; SGD leaves it as small as it is.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.common import parser, publish, run_process
from cl_runner.runs.folder import RunDir
from cl_runner.runs.results import read_matrix

RANKS, MICRO = (1, 2, 4), (16, 8, 4)
STAGES = ("01-amazon", "02-agnews")


def updates(run: Path, stage: str) -> torch.Tensor:
    """Every B A of a stage's folder as one vector, in fp64."""
    tensors = load_file(run / "stages" / stage / "adapter" / "adapter_model.safetensors")
    keys = sorted(key for key in tensors if "lora_A" in key)
    products = [tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double() for key in keys]
    return torch.cat([product.flatten() for product in products])


def trained(
    folder: Path, name: str, ranks: int, given: argparse.Namespace, sets: list[str], threads: int = 1
) -> RunDir:
    """A run of the order in ``folder``, ``threads`` a process."""
    asked = ["--order", str(folder / "order.yaml"), "--method", given.method, *(f"--set={each}" for each in sets)]
    where = ["--gpus", str(ranks), "--output-dir", str(folder), "--name", name]
    log = folder / f"{name}.log"
    run_process(["-m", "cl_runner", "train", *asked, *where], log, OMP_NUM_THREADS=str(threads))
    return RunDir(folder / name)


def apart(run: RunDir, first: RunDir) -> dict[str, float]:
    """How far a run's numbers lie from the first one's."""
    found = {}
    for number, stage in enumerate(STAGES, 1):
        wanted = updates(first.path, stage)
        found[f"stage {number}"] = float((updates(run.path, stage) - wanted).norm() / wanted.norm())
    pairs = zip(chain(*read_matrix(run).values), chain(*read_matrix(first).values), strict=True)
    found["points"] = max(abs(a - b) for a, b in pairs if a is not None and b is not None)
    return found


def main() -> None:
    """Run it."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="tiny-t5")
    arguments.add_argument("--method", default="olora")
    arguments.add_argument("--rows", type=int, default=64, help="of each task")
    arguments.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting")
    given = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "order.yaml").write_text("name: ranks\ntasks: [amazon, agnews]\n")
        sets = [
            f"model.name={given.model}", f"data.max_train={given.rows}", "data.max_test=40", "training.epochs=1",
            "training.global_batch=16", "adapter.dropout=0.1", *given.set,
        ]  # fmt: skip
        first: RunDir | None = None
        for ranks, micro, threads in [*((ranks, micro, 1) for ranks in RANKS for micro in MICRO), (1, MICRO[0], 2)]:
            name, micro_batch = f"x{ranks}-{micro}-{threads}", f"training.micro_batch={micro}"
            run = trained(folder, name, ranks, given, [*sets, micro_batch], threads)
            first = first or run
            row = {"ranks": ranks, "micro-batch": micro, "threads": threads, **apart(run, first)}
            rows.append(row)
            print(row, flush=True)
    publish("ranks", given, {"differences from the first run": rows})


if __name__ == "__main__":
    main()
