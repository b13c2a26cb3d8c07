"""The study script: cells over seeds as a table, and a figure that is drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from runpy import run_path

STUDY = Path(__file__).parents[2] / "scripts" / "study.py"


def line(r: int, seed: int, forgetting: float) -> str:
    report = {
        "synthetic": True,
        "average_accuracy": 50.0,
        "learning_accuracy": 60.0 + seed,
        "forgetting": forgetting,
        "parameters": [{"stored_by_formula": 1000 * r}, {"stored_by_formula": 1}],
        "seconds": {"train": 10.0 * seed},
    }
    return json.dumps({"cell": f"order1 olora adapter.r={r} training.epochs=1 seed {seed}", "report": report})


def test_table_and_figure(tmp_path: Path) -> None:
    file = tmp_path / "found.jsonl"
    file.write_text("\n".join([line(2, 1, 10.0), line(8, 1, 20.0), line(2, 2, 14.0)]) + "\n")
    words = [sys.executable, str(STUDY), str(file), "--figure", str(tmp_path / "f.png")]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        "| adapter.r | AA (synthetic) | learned (synthetic) | forgetting (synthetic) | stored | train s | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| 2 | 50.0 ± 0.0 | 61.5 ± 0.7 | 12.0 ± 2.8 | 2.0 | 15 | 2 |",
        "| 8 | 50.0 | 61.0 | 20.0 | 8.0 | 10 | 1 |",
    ]
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_lines_of_a_figure_by_several_settings() -> None:
    found = run_path(str(STUDY))["cells"]([line(2, 1, 10.0), line(8, 1, 20.0)])
    assert [cell.line("adapter.r") for cell in found] == ["r 2", "r 8"]
    assert [cell.line("adapter.r,training.epochs") for cell in found] == ["r 2, epochs 1", "r 8, epochs 1"]
