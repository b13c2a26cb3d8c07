"""CoLoRA with a large task and a small one: does the small one learn as well as by itself, and does round 2 help?

Synthetic rows of dbpedia and agnews (720 and 80) on tiny-t5, two rounds of ``cl-runner train --method colora``; beside
it the small task alone (``pertask``), once for as many epochs as a round has, once for as many rows as it got in both
rounds. Percent exact match, a line for each length of a round.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import parser, publish, run_process
from cl_runner.methods.colora.mathematics import tempered_counts
from cl_runner.methods.colora.method import CoLoRA
from cl_runner.report.comparison.measures import spread

LARGE, SMALL = "dbpedia", "agnews"
ROUNDS = 2


def scores(
    folder: Path, name: str, method: str, order: str, rows: dict[str, int], *sets: str
) -> list[dict[str, float]]:
    """Task → score after each stage of a run."""
    file = folder / f"{name}.yaml"
    file.write_text(order)
    settings = ["adapter.r=8", *(f"tasks.{task}.data.max_train={count}" for task, count in rows.items()), *sets]
    run_process(
        [
            *("-m", "cl_runner", "train", "--order", str(file), "--method", method, "--preset", "tiny"),
            *("--data", "synthetic", "--output-dir", str(folder), "--name", name),
            *(part for text in settings for part in ("--set", text)),
        ],
        folder / f"{name}.log",
    )
    stages = sorted((folder / name / "stages").glob("*/metrics.json"))
    return [json.loads(stage.read_text())["scores"] for stage in stages]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    made.add_argument("--epochs", type=int, nargs="+", default=[1, 3], help="of a round (default %(default)s)")
    made.add_argument("--rows", type=int, nargs=2, default=[720, 80], help="of the large and the small task")
    made.add_argument("--test", type=int, default=200, help="test rows of each (default %(default)s)")
    given = made.parse_args()
    large, small = given.rows
    dealt = tempered_counts(given.rows, CoLoRA.Config().temperature)[1]  # rows of the small task in a round
    lines: list[dict[str, Any]] = []
    for epochs in given.epochs:
        longer = max(1, round(ROUNDS * epochs * dealt / small))
        found: dict[str, list[float]] = {}
        for seed in given.seeds:
            sets = (f"seed={seed}", f"data.max_test={given.test}")
            with tempfile.TemporaryDirectory(prefix="cl-runner-bench-") as scratch:
                both = f"name: both\ntasks: [{LARGE}, {SMALL}]\n"
                rows = {LARGE: large, SMALL: small}
                length = f"training.epochs={epochs}"
                each = scores(Path(scratch), "both", "colora", both, rows, *sets, length, f"method.rounds={ROUNDS}")
                alone = [
                    scores(
                        Path(scratch), f"alone{count}", "pertask", f"name: one\ntasks: [{SMALL}]\n", {SMALL: small},
                        *sets, f"training.epochs={count}",
                    )[-1]
                    for count in (epochs, longer)
                ]  # fmt: skip
            for number, its in enumerate(each, 1):
                found.setdefault(f"mean, round {number}", []).append(statistics.mean(its.values()))
                for task in (LARGE, SMALL):
                    found.setdefault(f"{task}, round {number}", []).append(its[task])
            found.setdefault(f"{SMALL} alone, as long as a round", []).append(alone[0][SMALL])
            found.setdefault(f"{SMALL} alone, as many rows", []).append(alone[1][SMALL])
        lines.append(
            {
                "epochs": epochs,
                "alone": f"{longer} epochs",
                **{key: said.text() for key, v in found.items() if (said := spread(v))},
            }
        )
    publish("imbalance", given, {f"{large} rows of {LARGE}, {small} of {SMALL}, seeds {given.seeds}, synthetic": lines})


if __name__ == "__main__":
    main()
