"""Two short runs whose numbers are committed in ``golden.json``, with the versions that they were made with.

    python -m tests.golden             # what is otherwise now
    python -m tests.golden --renew     # the numbers of now become the committed ones

Kept are digits that any CPU computes alike in fp32, where ``scripts/golden.py`` compares bits on one machine. Rows and
token ids are compared exactly, scores within one test row, losses, penalties and gradients within ``CLOSE`` as long as
rounding is all that two CPUs differ by. AdamW makes it grow: after twenty steps at a rate at which something is
learned losses of two CPUs are 2 % apart, and the norm of one step's gradient up to 15. So one run learns, of which the
first steps are compared closely and the others roughly, and one takes small steps, of which all are close.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the numbers are a CPU's

from tests.command_line import call

FILE = Path(__file__).with_name("golden.json")
CLOSE, ROUGH, ROUGH_NORM = 1e-4, 0.1, 0.3  # relative
ROW = 100 / 24  # percent: one test row of data.max_test
SHOWN = 6  # differences that a message names
TASKS = ("agnews", "dbpedia")
SETTINGS = {
    "data.max_train": 64, "data.max_test": 24, "data.balanced": True, "training.epochs": 2, "training.global_batch": 8,
    "training.micro_batch": 8, "training.precision": "fp32", "eval.max_new_tokens": 8, "output.log_every": 1,
    "output.html": False,
}  # fmt: skip
# Of each model what is set beside these, and how many steps are close.
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "tiny-t5": ({}, 4),
    "tiny-llama": ({"data.max_train": 32, "training.epochs": 1, "training.lr": 1e-4, "data.max_source": 96}, 8),
}
SERIES = ("loss", "penalty", "gradient_norm")


def measured() -> dict[str, Any]:
    """The numbers of all runs, and what they are made with."""
    found: dict[str, Any] = {"made_with": {}, "runs": {}}
    with tempfile.TemporaryDirectory() as room:
        (Path(room) / "golden.yaml").write_text(f"name: golden\ntasks: [{', '.join(TASKS)}]\n")
        for model, (own, steady) in RUNS.items():
            sets = [f"--set={key}={json.dumps(value)}" for key, value in {**SETTINGS, **own}.items()]
            flags = ("--method", "olora", "--model", model, "--data", "synthetic", "--name", model)
            ended = call("train", "--order", "golden.yaml", *flags, *sets, cwd=Path(room))
            if ended.code:
                raise SystemExit(ended.err)
            run = Path(room) / "runs" / model
            found["runs"][model] = numbers(run, model, steady)
            environment = json.loads((run / "environment.json").read_text())
            found["made_with"] = {key: environment[key] for key in ("packages", "python", "cpu")}
    return found


def numbers(run: Path, model: str, steady: int) -> dict[str, Any]:
    """What a run read, computed and scored; so many steps of it are close."""
    data = json.loads((run / "run.json").read_text())["identity"]["data"]
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [row for row in logged if "loss" in row]
    lines = [line.split(",") for line in (run / "matrix.csv").read_text().splitlines()]
    cells = {
        f"{task} after {row[0]}": cell for row in lines[1:] for task, cell in zip(lines[0][1:], row[1:], strict=True)
    }
    return {
        "exact": {
            **{f"rows of {task}, {split}": data[task][split]["fingerprint"] for task in TASKS for split in data[task]},
            "token ids": token_ids(model),
        },
        "close": series(steps[:steady]),
        "rough": series(steps[steady:]),
        "scores": {key: float(cell) for key, cell in cells.items() if cell},
    }


def series(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the log says of these steps, by name."""
    named = {f"{key} of {row['stage']} at step {row['step']}": row.get(key) for key in SERIES for row in steps}
    return {name: float(f"{value:.9g}") for name, value in named.items() if value is not None}


def token_ids(model: str) -> str:
    """sha256 of what the model's tokenizer makes of a few prompts."""
    from cl_runner.config.schema import DataConfig, ModelConfig
    from cl_runner.models.base import tokenizer_of
    from cl_runner.tasks import benchmark
    from cl_runner.tasks.check import show

    data = DataConfig(source="synthetic")
    texts = [row["input"] for task in TASKS for row in show(benchmark.get(task), data, 24)]
    ids = tokenizer_of(ModelConfig(name=model), False)[0](texts)["input_ids"]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def differences(golden: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each number that is another, whatever it was made with."""
    return [
        f"{model}: {key}: {_told(then.get(key))} → {_told(here.get(key))}"
        for model in {**golden["runs"], **now["runs"]}
        for part, alike in ALIKE.items()
        for then, here in [[about["runs"].get(model, {}).get(part, {}) for about in (golden, now)]]
        for key in {**then, **here}
        if key not in then or key not in here or not alike(key, then[key], here[key])
    ]


def message(golden: Mapping[str, Any], now: Mapping[str, Any], found: list[str]) -> str:
    """What differs, which versions do, and what to do."""
    then, here = golden["made_with"], now["made_with"]
    every = {**then["packages"], **here["packages"]}
    others = [
        f"{name} {then['packages'].get(name)} → {here['packages'].get(name)}"
        for name in every
        if then["packages"].get(name) != here["packages"].get(name)
    ]
    others += [f"{key} {then[key]} → {here[key]}" for key in ("python", "cpu") if then[key] != here[key]]
    more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    whose = ", ".join(others) or "nothing: it is this code that computes otherwise"
    return (
        f"{len(found)} numbers are not those of {FILE.name}:\n  "
        + "\n  ".join(islice(found, SHOWN))
        + f"{more}\nOther than when it was made: {whose}.\n"
        "Look which it is. If the new numbers are right: python -m tests.golden --renew, and CHANGELOG.md says why."
    )


def _roughly(key: str, then: float, now: float) -> bool:
    return abs(now - then) <= (ROUGH_NORM if key.startswith("gradient_norm") else ROUGH) * abs(then)


ALIKE: dict[str, Callable[[str, Any, Any], bool]] = {
    "exact": lambda key, then, now: then == now,
    "close": lambda key, then, now: abs(now - then) <= CLOSE * abs(then),
    "rough": _roughly,
    "scores": lambda key, then, now: abs(now - then) <= ROW + 1e-3,
}


def _told(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) else str(value)


def main() -> int:
    """Compare, or renew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="the numbers of now become the committed ones")
    renew = parser.parse_args().renew
    now = measured()
    if renew:
        FILE.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n")
        print(f"{FILE.name} has the numbers of now")
        return 0
    golden = json.loads(FILE.read_text())
    found = differences(golden, now)
    print(message(golden, now, found) if found else f"all numbers are those of {FILE.name}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
