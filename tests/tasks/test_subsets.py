"""Cuts by label: as even as the labels allow, in the file's order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_runner.config.schema import DataConfig
from cl_runner.tasks import benchmark
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.subsets import first_of_each, shares
from cl_runner.tasks.task import Row
from tests.command_line import call

SIZES = st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 30), min_size=1)


@given(SIZES, st.integers(0, 120))
def test_shares_are_as_even_as_can_be(sizes: dict[str, int], total: int) -> None:
    total = min(total, sum(sizes.values()))
    found = shares(sizes, total)
    assert sum(found.values()) == total
    assert all(0 <= found[label] <= sizes[label] for label in sizes)
    fullest = max(found.values())
    for label, share in found.items():
        assert share == sizes[label] or share >= fullest - 1, "who gives less than others has no more to give"


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=40), st.integers(1, 50))
def test_the_first_of_each_label_in_their_order(labels: list[str], total: int) -> None:
    rows = [Row(f"train/{k}", "x", label) for k, label in enumerate(labels)]
    taken = first_of_each(rows, [row.label for row in rows], total)
    assert len(taken) == min(total, len(rows))
    assert taken == [row for row in rows if row in taken]
    wanted = shares(Counter(labels), len(taken))
    for label in set(labels):
        assert [r for r in taken if r.label == label] == [r for r in rows if r.label == label][: wanted[label]]


@pytest.fixture
def sorted_file(tmp_path: Path) -> Path:
    rows = [f"text {k},{label}" for label in ("yes", "no", "maybe") for k in range(20)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (tmp_path / "mine.yaml").write_text(
        "tasks:\n- {name: mine, kind: YN, labels: [yes, no, maybe], source: {train: rows.csv, test: rows.csv}}\n"
    )
    return tmp_path


def test_a_label_without_rows_in_the_cut_is_said(sorted_file: Path) -> None:
    cut = ("--set", "data.max_train=30", "--set", "data.max_test=9")
    said = call("train", "--order", "mine.yaml", "--dry-run", *cut, cwd=sorted_file)
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    how = "data.balanced=true takes of each label"
    assert f"task mine: no train row of maybe among the 30 taken; {how}" in lines
    assert f"task mine: no test row of no, maybe among the 9 taken; {how}" in lines
    even = call("train", "--order", "mine.yaml", "--dry-run", *cut, "--set", "data.balanced=true", cwd=sorted_file)
    assert even.code == 0 and "no train row" not in even.out and "no test row" not in even.out
    task = benchmark.build({
        "name": "mine", "kind": "YN", "labels": ["yes", "no", "maybe"],
        "source": {split: str(sorted_file / "rows.csv") for split in ("train", "test")},
    })  # fmt: skip
    rows = load_rows(task, DataConfig(max_train=30, balanced=True), "train")
    assert [row.text for row in rows.rows] == [f"text {k}" for k in range(10)] * 3 and rows.cut == 30


def test_a_label_without_any_row_is_said_too(sorted_file: Path) -> None:
    order = (sorted_file / "mine.yaml").read_text().replace("maybe]", "maybe, never]")
    (sorted_file / "mine.yaml").write_text(order)
    said = call("train", "--order", "mine.yaml", "--dry-run", cwd=sorted_file)
    assert {"task mine: no train row of never", "task mine: no test row of never"} <= set(said.out.splitlines())
    cut = ("--set", "data.max_train=45", "--set", "data.max_test=9")
    lines = call("train", "--order", "mine.yaml", "--dry-run", *cut, cwd=sorted_file).out.splitlines()
    assert "task mine: no train row of never among the 45 taken" in lines, "no cut has it"
    even = call("train", "--order", "mine.yaml", "--dry-run", *cut, "--set", "data.balanced=true", cwd=sorted_file)
    assert "task mine: no test row of never among the 9 taken" in even.out.splitlines(), "balanced already"


def test_balanced_sets_keep_the_rare_label(tmp_path: Path) -> None:
    """Rows of sets are drawn by their rarest label: of ``a``, ``a, b`` and one ``a, c`` none is lost."""
    rows = ["a"] * 20 + ["a; b"] * 20 + ["a; c"]
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "\n".join(f"t{k},{label}" for k, label in enumerate(rows)) + "\n"
    )
    task = benchmark.build({
        "name": "mine", "kind": "ML", "labels": ["a", "b", "c"], "metric": "labels-f1", "columns": {"separator": ";"},
        "source": {split: str(tmp_path / "rows.csv") for split in ("train", "test")},
    })  # fmt: skip
    taken = load_rows(task, DataConfig(max_train=6, balanced=True), "train")
    assert Counter(row.label for row in taken.rows) == {"a": 2, "a, b": 3, "a, c": 1}
    assert taken.absent == () and load_rows(task, DataConfig(max_train=6), "train").absent == ()
