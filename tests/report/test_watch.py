"""The picture of a run: curves as a naive drawing has them, and a size that fits whatever there is to show."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cl_runner.metrics.accuracy import average_accuracy
from cl_runner.report.curves import BLOCKS, PLAIN, curve
from cl_runner.report.watch import Picture, Seen, order
from tests.breadth import wide
from tests.report.test_tables import a_run, shown

NUMBERS = st.floats(-1e6, 1e6)


def naive(values: list[float], width: int) -> str:
    """Each value into the column that it falls into; the column's mean, in eighths between the least and greatest."""
    columns: list[list[float]] = [[] for _ in range(min(len(values), width))]
    for i, value in enumerate(values):
        column = next(c for c in range(len(columns)) if i < math.floor(len(values) * (c + 1) / len(columns)))
        columns[column].append(value)
    means = [sum(column) / len(column) for column in columns]
    low, high = min(means), max(means)
    return "".join(BLOCKS[round(7 * ((mean - low) / (high - low)))] if high > low else BLOCKS[0] for mean in means)


@given(st.lists(NUMBERS, min_size=1, max_size=50), st.integers(1, 60))
def test_curve_is_the_naive_drawing(values: list[float], width: int) -> None:
    assert curve(values, width) == naive(values, width)
    plain = curve(values, width, ascii_only=True)
    assert plain.isascii() and [PLAIN.index(c) for c in plain] == [BLOCKS.index(c) for c in curve(values, width)]


def test_curve_on_a_scale_and_without_values_or_room() -> None:
    assert curve([0.0, 50.0, 100.0, 200.0, -1.0], 10, scale=(0.0, 100.0)) == "▁▅███"[:2] + "██▁"
    assert curve([], 10) == curve([1.0], 0) == curve([1.0, 2.0], -3) == ""
    assert curve([3.0, 3.0], 10) == "▁▁"


def seen(tasks: int = 4, done: int = 2, **more: Any) -> Seen:
    names = [f"task{k:02d}" for k in range(tasks)]
    given: dict[str, Any] = {
        "summary": a_run(names, done, synthetic=True), "stages": names, "state": "running", "stage": done, "step": 12,
        "steps": 30, "row": {"loss": 0.43, "lr": 1e-3, "gradient_norm": 0.5, "examples_per_second": 8.1,
                             "memory_mb": 1234.5},
        "curves": {"loss": [3.0, 2.0, 1.0, 0.4312], "penalty": [0.1, 0.2]}, "left": 75.0,
        "said": "stage 3 of 4 task02: step 12/30 (40 %), loss 0.4312, 8.1 examples/s, 1 min 15 s left",
    }  # fmt: skip
    return Seen(**{**given, **more})


def on_terminal(picture: Picture, width: int, height: int) -> list[str]:
    """The lines on a terminal of that size."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=height, color_system=None)
    console.print(picture)
    return file.getvalue().split("\n")[:-1]


def test_everything_is_there() -> None:
    text = shown(Picture(seen(probes={"task00": [10.0, 90.0], "task01": [50.0]}, warnings=["stage 2: warning: idle"])))
    lines = text.splitlines()
    assert lines[0].startswith("order1 · olora (reference form) · t5-large · seed 42 · synthetic data")
    assert "✓task00 → ✓task01 → [task02] → task03" in lines
    assert "training: stage 3 of 4 task02, step 12/30 (40 %), 1 min 15 s left" in lines
    assert f"{'loss':<8} {'0.4312':>9} █▅▃▁" in lines
    assert f"{'penalty':<8} {'0.2':>9} ▁█" in lines
    assert "lr 0.001, gradient 0.5, 8.1 examples/s, 1,234 MB" in lines
    assert "probe task00    90.0 % ▂▇" in lines and "probe task01    50.0 % ▅" in lines
    assert re.search(r"^02-task01 +60.25 +61.25 *$", text, re.MULTILINE)
    assert f"AA {average_accuracy(seen().summary.matrix):.2f}, forgetting 0.00 (synthetic)" in lines
    assert "stage 2: warning: idle" in lines
    assert lines[-2].startswith("run.log: stage 3 of 4 task02: step 12/30")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 24), (200, 50), (80, 16)])
@pytest.mark.parametrize(("tasks", "done"), [(1, 0), (4, 4), (15, 14), (50, 31), pytest.param(50, 50, marks=wide)])
def test_it_fits(width: int, height: int, tasks: int, done: int) -> None:
    probes = {f"task{k:02d}": [float(k)] * 9 for k in range(tasks)}
    picture = seen(tasks, done, stage=min(done, tasks - 1), probes=probes, warnings=["warning: " + "word " * 60] * 3)
    for each in (picture, seen(tasks, done, stage=min(done, tasks - 1), state="failed", message="x " * 300)):
        lines = on_terminal(Picture(each), width, height)
        assert max(map(len, lines)) <= width
        assert len(lines) < height, "\n".join(lines)
        assert any(line.startswith(("training: stage", "failed in stage")) for line in lines)
        assert any(line.startswith("loss") for line in lines)


@pytest.mark.parametrize("room", [152, 72, 40])
def test_fifty_stages_fold_around_the_present_one(room: int) -> None:
    line = order(seen(50, 31, stage=31), room)
    assert len(line) <= room
    before, after = re.fullmatch(r"(\d+) done → .*\[task31\].*→ (\d+) more", line).groups()  # type: ignore[union-attr]
    named = re.findall(r"task(\d\d)", line)
    assert int(before) + len(named) + int(after) == 50
    assert [int(name) for name in named] == list(range(int(before), 50 - int(after)))
    assert order(seen(50, 31, stage=31), 12) == "stage 32 of 50"


def test_nothing_but_ascii_where_there_is_nothing_else() -> None:
    text = shown(Picture(seen(probes={"task00": [10.0, 90.0]})), encoding="ascii")
    assert text.isascii() and "?" not in text
    assert "*task00 > *task01 > [task02] > task03" in text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"state": "done", "done": 4, "stage": 3}, "done: all 4 stages"),
        ({"state": "stopped"}, "stopped in stage 3 of 4 task02, step 12/30"),
        (
            {"state": "failed", "message": "the disk is full"},
            "failed in stage 3 of 4 task02, step 12/30: the disk is full",
        ),
        ({"step": 0, "steps": 0, "left": None}, "preparing: stage 3 of 4 task02"),
        ({"step": 30, "left": None}, "evaluating: stage 3 of 4 task02, step 30/30 (100 %)"),
    ],
)
def test_how_it_stands(given: dict[str, Any], said: str) -> None:
    assert said in shown(Picture(seen(**given)), width=120).splitlines()


def test_no_escape_of_a_strangers_reaches_the_terminal() -> None:
    names = ["a\x1b[2Jb", "c"]
    text = shown(Picture(seen(2, 0, stage=0, stages=names, probes={"\x1b]0;x\x07d": [1.0]}, message="\x1b[1m")))
    assert "\x1b" not in text and "[ab] → c" in text
