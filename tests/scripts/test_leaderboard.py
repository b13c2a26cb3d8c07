"""The leaderboard: methods over seeds, best first, fronts of those that compare; of results and of run folders."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

from tests.commands.test_compare import train

SCRIPT = Path(__file__).parents[2] / "scripts" / "leaderboard.py"


def line(method: str, seed: int, AA: float, seconds: float, megabytes: float, settings: str = "") -> str:
    report = {
        "method": method, "order": "order1", "model": "some/tiny-t5", "synthetic": True, "finished": True, "seed": seed,
        "average_accuracy": AA, "learning_accuracy": 90.0, "forgetting": None if method == "mtl" else 10.0,
        "seconds": {"train": seconds}, "megabytes": megabytes,
    }  # fmt: skip
    cell = " ".join(filter(None, ("order1", method, settings, f"seed {seed}")))
    return json.dumps({"cell": cell, "report": report})


def said(*words: str | Path) -> str:
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True, check=True)
    return done.stdout


def test_a_page_of_a_file_of_results(tmp_path: Path) -> None:
    file, page = tmp_path / "found.jsonl", tmp_path / "docs" / "leaderboard.md"
    page.parent.mkdir()
    lines = [
        line("seqlora", 1, 40.0, 10, 1.0), line("seqlora", 2, 44.0, 14, 1.0), line("ella", 1, 60.0, 20, 4.0),
        line("inflora", 1, 55.0, 30, 3.0), line("olora", 1, 50.0, 25, 5.0), line("mtl", 1, 95.0, 5, 0.5),
        line("replay", 1, 90.0, 40, 2.0), line("pertask", 1, 91.0, 9, 2.0), line("sure", 1, 89.0, 9, 0.9),
    ]  # fmt: skip
    file.write_text("\n".join(lines) + "\n")
    said(file, "--page", page)
    text = page.read_text()
    assert "## order1, tiny-t5, synthetic data" in text
    assert [row for row in text.splitlines() if row.startswith("| ") and "AA" not in row] == [
        "| `mtl`‡ | 95.0 | 90.0 | – | 5 | 0.50 | 1 |",
        "| `pertask`† | 91.0 | 90.0 | 10.0 | 9 | 2.00 | 1 |",
        "| `replay`§ | 90.0 | 90.0 | 10.0 | 40 | 2.00 | 1 |",
        "| `sure`§ | 89.0 | 90.0 | 10.0 | 9 | 0.90 | 1 |",
        "| **`ella`** | 60.0 | 90.0 | 10.0 | 20 | **4.00** | 1 |",
        "| `inflora` | 55.0 | 90.0 | 10.0 | 30 | **3.00** | 1 |",
        "| `olora` | 50.0 | 90.0 | 10.0 | 25 | 5.00 | 1 |",
        "| **`seqlora`** | 42.0 ± 2.8 | 90.0 ± 0.0 | 10.0 ± 0.0 | 12 | **1.00** | 2 |",
    ]
    [picture] = (page.parent / "figures").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG") and f"(figures/{picture.name})" in text


def test_the_best_setting_of_each_method(tmp_path: Path) -> None:
    file = tmp_path / "found.jsonl"
    tried = [(1.0, 50.0), (10.0, 55.0), (100.0, 52.0)]
    lines = [line("ella", 1, AA, 1, 1, f"method.lambda1={weight}") for weight, AA in tried]
    file.write_text("\n".join([*lines, line("inclora", 1, 40.0, 1, 1)]) + "\n")
    assert said(file, "--chosen").splitlines() == [
        "ella method.lambda1=10.0\t# of 3: method.lambda1=10.0: 55.0, method.lambda1=100.0: 52.0, "
        "method.lambda1=1.0: 50.0",
        "inclora\t# of 1: as it is: 40.0",
    ]


def test_the_best_settings_of_the_best_methods(tmp_path: Path) -> None:
    tuned, file = tmp_path / "tuned.jsonl", tmp_path / "found.jsonl"
    muon = "training.optimizer=muon training.lr=3e-3"
    settings = [("ella", "a.b=1"), ("olora", "a.b=2"), ("inclora", muon), ("inclora", "a.b=3"), ("replay", "a.b=4")]
    tuned.write_text("\n".join(line(method, 1, 50.0, 1, 1, own) for method, own in settings) + "\n")
    lines = [line("replay", 1, 90.0, 1, 1), line("inclora", 1, 60.0, 1, 1, muon), line("ella", 1, 55.0, 1, 1, "a.b=1"),
             line("inclora", 1, 40.0, 1, 1)]  # fmt: skip
    file.write_text("\n".join(lines) + "\n")
    found = [row.split("\t")[0] for row in said(tuned, "--chosen", file, "--best", "2").splitlines()]
    assert found == [f"inclora {muon}", "ella a.b=1"]


def test_run_folders_are_read_too(tmp_path: Path) -> None:
    runs = [train(tmp_path / "runs", f"three-{m}-s{s}", {"olora": 0.6, "seqlora": 0.4}[m], s, method=m)
            for m in ("seqlora", "olora") for s in (1, 2)]  # fmt: skip
    rows = [row for row in said(tmp_path / "runs").splitlines() if row.startswith("| ") and "AA" not in row]
    assert len(runs) == 4 and len(rows) == 2 and all(row.endswith("| 2 |") for row in rows)
    means = [float(row.split("|")[2].split("±")[0]) for row in rows]
    assert means == sorted(means, reverse=True) and 30 < statistics.fmean(means) < 70
