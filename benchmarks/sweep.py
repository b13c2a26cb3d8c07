"""A sweep with and without the stages that its runs share: 4 λ of O-LoRA × orders 1 and 2, which begin alike.

Both ways in turns, each in a folder of its own, runs one after the other. Then every adapter, state and answer of the
two is compared, byte by byte: a stage that was taken over is the one that would have been trained.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import median, parser, publish, run_process, spread, take_turns


def sweep(folder: Path, reuse: bool, train: int, test: int) -> dict[str, Any]:
    """Run it; how long it took, and the stages trained and taken over."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    base = {
        "presets": ["tiny"], "data.source": "synthetic", "method": "olora", "output.html": False,
        "data.max_train": train, "data.max_test": test, "output.reuse": reuse, "output.dir": str(folder / "runs"),
    }  # fmt: skip
    grid = {"order": ["order1", "order2"], "method.lambda1": [0.02, 0.1, 0.5, 2.5]}
    file = folder / "sweep.yaml"
    file.write_text(json.dumps({"base": base, "grid": grid, "seeds": [1], "engine": {"slots": 1}}))
    finished = run_process(["-m", "cl_runner", "sweep", str(file), "--json"], folder / "log")
    stages = list((folder / "runs").glob("*/stages/*/DONE"))
    taken = sum(
        len(json.loads(about.read_text()).get("reuses", {}).get("stages", []))
        for about in (folder / "runs").glob("*/run.json")
    )
    return {"wall": finished.seconds, "trained": len(stages) - taken, "taken": taken}


def differing(one: Path, other: Path) -> tuple[int, int]:
    """Files of committed stages that differ, and how many were compared; not those that say how long it took."""
    files = [file for file in sorted(one.glob("runs/*/stages/**/*")) if file.is_file()]
    files = [file for file in files if file.name not in ("metrics.json", "DONE")]
    return sum(file.read_bytes() != (other / file.relative_to(one)).read_bytes() for file in files), len(files)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=1, help="how often each way runs (default %(default)s)")
    made.add_argument("--train", type=int, default=200, help="train rows a task (default %(default)s)")
    made.add_argument("--test", type=int, default=40, help="test rows a task (default %(default)s)")
    given = made.parse_args()
    with tempfile.TemporaryDirectory(prefix="cl-runner-bench-") as scratch:
        folders = {"shared": Path(scratch, "shared"), "each alone": Path(scratch, "alone")}

        def way(name: str) -> Callable[[], dict[str, Any]]:
            return lambda: sweep(folders[name], name == "shared", given.train, given.test)

        found = take_turns({name: way(name) for name in folders}, given.rounds)
        other, compared = differing(*folders.values())
    rows = [
        {
            "way": name,
            "stages trained": runs[0]["trained"],
            "taken over": runs[0]["taken"],
            "wall s": median([one["wall"] for one in runs]),
            "range": spread([one["wall"] for one in runs]),
            "wall × shared": median([a["wall"] / b["wall"] for a, b in zip(runs, found["shared"], strict=True)]),
            "files that differ": f"{other} of {compared}",
        }
        for name, runs in found.items()
    ]
    publish("sweep", given, {"4 λ × orders 1 and 2 under olora, tiny-t5, synthetic data": rows})


if __name__ == "__main__":
    main()
