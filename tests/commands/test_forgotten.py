"""``cl-runner forgotten``: what it prints for people and machines, of a real run and of folders written by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import STAGES, call, environment, tree
from tests.conftest import Finished
from tests.made_runs import ANIMALS, COLOURS, SIGNS, SUMS, make_run, said


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Two runs of the same rows; ``better`` forgets one colour less, and has one more task, of another metric."""
    names = ["colours", "animals", "signs"]
    stages = [(name, [name]) for name in names]
    first = [
        {"colours": said("red red green", "red red green")},
        {"colours": said("red red green", "cat red dog"), "animals": said("cat", "cat")},
        {
            "colours": said("red red green", "stop red stop"),
            "animals": said("cat", "cat"),
            "signs": said("stop", "stop"),
        },
    ]
    make_run(tmp_path / "runs/worse", [COLOURS, ANIMALS, SIGNS], stages, first)
    second = [{**rows, "sums": said("a", "b")} for rows in first]
    second[2]["colours"] = said("red red green", "red red stop")
    tasks = [SUMS, COLOURS, ANIMALS, SIGNS]
    stages = [("colours", ["colours", "sums"]), *stages[1:]]
    make_run(tmp_path / "runs/better", tasks, stages, second, synthetic=True, chosen=True)
    return tmp_path


def test_json(here: Path) -> None:
    before = tree(here)
    found = call("forgotten", "worse", "--json", cwd=here)
    assert (found.code, found.err) == (0, "")
    numbers = {"right": 3, "forgotten": 2, "came_back": 0, "lost_again": 0}
    labels = [{"source": "later", "label_of": ["signs"], "rows": 2}]
    none = {"forgotten": 0, "came_back": 0, "lost_again": 0, "by_labels": [], "by_stage": [], "forgotten_rows": []}
    row = {"now": "stop", "source": "later", "label_of": ["signs"], "lost_at": 2, "came_back_at": []}
    assert found.json == {
        "run": "runs/worse",
        "synthetic": False,
        "chosen": False,
        "stage": 3,
        "stages": ["colours", "animals", "signs"],
        "tasks": [
            {
                "task": "colours",
                "learned_at": 1,
                "rows": 3,
                **numbers,
                "by_labels": labels,
                "by_stage": [{"stage": 2, "rows": 2}],
                "forgotten_rows": [
                    {"id": "test/0", "gold": "red", **row, "lost_again_at": []},
                    {"id": "test/2", "gold": "green", **row, "lost_again_at": []},
                ],
            },
            {"task": "animals", "learned_at": 2, "rows": 1, "right": 1, **none},
            {"task": "signs", "learned_at": 3, "rows": 1, "right": 1, **none},
        ],
        "total": {**numbers, "right": 5, "by_labels": labels, "by_stage": [{"stage": 2, "rows": 2}]},
        "skipped": {},
        "to_come": [],
        "notes": [],
    }
    one = call("forgotten", "worse", "--task", "colours", "--stage", "2", "--json", cwd=here).json
    assert [task["task"] for task in one["tasks"]] == ["colours"] and one["stage"] == 2
    assert [row["now"] for row in one["tasks"][0]["forgotten_rows"]] == ["cat", "dog"]
    assert tree(here) == before


def test_table(here: Path) -> None:
    shown = call("forgotten", "worse", cwd=here)
    assert (shown.code, shown.err) == (0, "")
    assert "colours: 2 of 3 right after stage 1 are forgotten\n" in shown.out
    assert "animals: 0 of 1 right after stage 2 are forgotten\n" in shown.out
    assert "signs: 1 of 1 rows right after stage 3; no stage since\n" in shown.out
    assert [line.split() for line in shown.out.splitlines() if line.startswith("test/")] == [
        ["test/0", "red", "stop", "signs", "2"],
        ["test/2", "green", "stop", "signs", "2"],
    ]
    better = call("forgotten", "better", cwd=here).out
    assert "synthetic data · eval.mode choose" in better
    assert "sums is left out: by the metric rouge-l an answer is not right or wrong\n" in better
    newest = call("forgotten", "--task", "animals", cwd=here)
    assert newest.err.startswith("the newest run: runs/")


def test_against(here: Path) -> None:
    found = call("forgotten", "better", "--against", "worse", "--json", cwd=here).json
    assert (found["run"], found["against"], found["synthetic"], found["chosen"]) == (
        "runs/better", "runs/worse", [True, False], [True, False],
    )  # fmt: skip
    [row] = found["tasks"][0]["run_keeps_rows"]
    assert (row["id"], row["now"], row["lost_at"]) == ("test/0", "stop", 2)
    assert found["total"] == {
        "right_in_both": 5, "both_keep": 3, "both_forget": 1, "run_keeps": 1, "against_keeps": 0,
    }  # fmt: skip
    assert [task["task"] for task in found["tasks"]] == ["colours", "animals", "signs"]
    assert found["skipped"] == {}, "the other run has no sums"
    back = call("forgotten", "worse", "--against", "better", "--json", cwd=here).json
    assert back["tasks"][0]["against_keeps_rows"] == [row]
    shown = call("forgotten", "worse", "--against", "better", "--task", "colours", cwd=here).out
    assert "kept by better, forgotten by worse" in shown and "kept by worse, forgotten by better" not in shown
    assert "kept by better alone: 1 row (partly synthetic)\n" in shown
    assert "kept by worse alone: 0 rows (partly synthetic)\n" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("better", "--task", "sums"), ("--task sums", "rouge-l")),
        (("better", "--task", "colour"), ("colour", "did you mean 'colours'")),
        (("better", "--stage", "4"), ("--stage 4", "stages 1 to 3")),
        (("better", "--task", "signs", "--stage", "2"), ("--task signs", "not learned it by stage 2")),
        (("better", "--against", "nope"), ("no run 'nope' in runs",)),
        (("worse", "--against", "better", "--task", "sums"), ("sums is no task of the run runs/worse",)),
        (("worse", "--against", "rows"), ("runs/rows has other test rows of colours than runs/worse",)),
        (("worse", "--against", "none"), ("no task in common",)),
    ],
)
def test_refusals_are_one_line(here: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    make_run(here / "runs/rows", [COLOURS], [("colours", ["colours"])], [{"colours": said("red", "red")}])
    make_run(here / "runs/none", [SUMS], [("sums", ["sums"])], [{"sums": said("a", "a")}])
    result = call("forgotten", *arguments, cwd=here)
    assert result.code == 2
    assert all(word in result.line for word in words), result.line


def test_of_a_run_that_was_trained(finished: Finished) -> None:
    """Against its own predictions, row by row; its report has the counts."""
    said: dict[tuple[str, str], list[bool]] = {}
    for index, stage in enumerate(STAGES, 1):
        for line in (finished.run / f"stages/{index:02d}-{stage}/predictions.jsonl").read_text().splitlines():
            row = json.loads(line)
            said.setdefault((row["task"], row["id"]), []).append(row["correct"])
    found = call("forgotten", finished.name, "--json", cwd=finished.cwd).json
    assert found["synthetic"] is True
    for task in found["tasks"]:
        rows = {row: turns for (name, row), turns in said.items() if name == task["task"]}
        assert (task["rows"], task["right"]) == (4, sum(turns[0] for turns in rows.values()))
        lost = [row for row, turns in rows.items() if turns[0] and not turns[-1]]
        assert [row["id"] for row in task["forgotten_rows"]] == lost
    assert [task["task"] for task in found["tasks"]] == STAGES
    report = call("report", finished.name, "--json", cwd=finished.cwd).json["forgotten"]
    for task in found["tasks"]:
        del task["forgotten_rows"]
    assert report == {key: found[key] for key in ("stage", "stages", "tasks", "total", "skipped", "to_come", "notes")}


def test_nothing_heavy_is_imported(here: Path) -> None:
    program = (
        "import sys; from cl_runner.cli import outcome; code = outcome(['forgotten', 'worse']); "
        "heavy = {'torch', 'transformers', 'deepspeed', 'peft', 'datasets', 'numpy'} & set(sys.modules); "
        "assert not heavy and code == 0, (heavy, code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=here, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "test/0" in done.stdout
