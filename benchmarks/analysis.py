"""`cl-runner analyze` of as many adapters as an order has tasks: seconds and peak memory of the whole command.

Random LoRA pairs, written as plain PEFT folders; the shape is T5-large's with q and v of every attention adapted. Set
OMP_NUM_THREADS for another number of threads than the machine has.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.common import parser, publish, run_process


def adapter(folder: Path, seed: int, layers: int, width: int, rank: int) -> None:
    """A random pair for each layer, as PEFT would have saved it: entries as large as a stage's training leaves them."""
    dice = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        prefix = f"base_model.model.block.{layer // 2}.attention.{'qv'[layer % 2]}.lora_"
        tensors[f"{prefix}A.weight"] = torch.randn(rank, width, generator=dice) * width**-0.5
        tensors[f"{prefix}B.weight"] = torch.randn(width, rank, generator=dice) * 1e-2
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": "random", "r": rank, "lora_alpha": 4 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def measured(given: argparse.Namespace, room: Path) -> Sequence[Mapping[str, Any]]:
    """A row for each round."""
    folders = [room / f"task{task + 1}" for task in range(given.tasks)]
    for seed, folder in enumerate(folders):
        adapter(folder, seed, given.layers, given.width, given.rank)
    rows = []
    for _ in range(given.rounds):
        done = run_process(["-m", "cl_runner", "analyze", *map(str, folders), "--json"], room / "log")
        rows.append({"adapters": given.tasks, "layers": given.layers, "s": done.seconds, "peak MB": done.peak_mb})
    return rows


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--tasks", type=int, default=15, help="adapters (default %(default)s)")
    made.add_argument("--layers", type=int, default=144, help="target layers (default %(default)s)")
    made.add_argument("--width", type=int, default=1024, help="m and n of each (default %(default)s)")
    made.add_argument("--rank", type=int, default=8, help="r (default %(default)s)")
    made.add_argument("--rounds", type=int, default=1, help="how often (default %(default)s)")
    given = made.parse_args()
    with tempfile.TemporaryDirectory() as room:
        rows = measured(given, Path(room))
    publish("analysis", given, {f"{given.width} × {given.width}, r {given.rank}": rows})


if __name__ == "__main__":
    main()
