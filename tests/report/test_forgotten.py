"""The tables of forgotten rows: one line a row, cut where it has to be, and the counts at the end."""

from __future__ import annotations

import pytest

from cl_runner.metrics.accuracy import Matrix
from cl_runner.metrics.forgotten import Difference, Forgetting, Lost, Whose
from cl_runner.report.forgotten import DifferenceTable, ForgottenTable, skipped_lines
from cl_runner.report.tables import RunSummary
from tests.report.test_tables import a_run, cells, shown

STAGES = ["dbpedia", "amazon", "yahoo", "agnews"]
LONG = "Science or Technology, and whatever else there is to be said of it"
ROWS = (
    Lost("test/3", "Educational Institution", "Sports", Whose("several", ("yahoo", "agnews")), (2, 4), (3,)),
    Lost("test/1234", "Film", LONG, Whose("none"), (3,)),
    Lost("test/8", "Film", "Album", Whose("own", ("dbpedia",)), (2,)),
    Lost("test/9", "Film", "Bad", Whose("later", ("amazon",)), (2,)),
    Lost("test/10", "Film", "", Whose("none"), (4,)),
)
DBPEDIA = Forgetting("dbpedia", 1, 20, tuple(map(str, range(12))), ROWS, 2)
AMAZON = Forgetting("amazon", 2, 20, ("0",), (Lost("test/0", "Good", "old", Whose("earlier", ("x",)), (4,)),), 0)
AGNEWS = Forgetting("agnews", 4, 20, ("0", "1"), (), 0)


def table(run: RunSummary, *tasks: Forgetting) -> ForgottenTable:
    return ForgottenTable(run, STAGES, tasks, list(skipped_lines({"sums": "it is so"}, ["later"])))


def test_a_row_is_a_line_of_eighty_columns() -> None:
    text = shown(table(a_run(), DBPEDIA))
    assert max(map(len, text.splitlines())) <= 80
    lines = {line.split()[0]: line.rstrip() for line in text.splitlines() if line.startswith("test/")}
    assert list(lines) == ["test/3", "test/1234", "test/8", "test/9", "test/10"]
    assert lines["test/3"].endswith("  2, back 3, lost 4"), "stages are not cut"
    assert "Educational" in lines["test/3"] and "…" in lines["test/3"]
    assert "Science or T" in lines["test/1234"] and LONG not in text and lines["test/1234"].endswith("3")
    assert lines["test/8"].split() == ["test/8", "Film", "Album", "its", "own", "2"]
    assert lines["test/10"].split() == ["test/10", "Film", '""', "none", "4"]
    wide = shown(table(a_run(), DBPEDIA), width=140)
    assert "Educational Institution" in wide
    assert "yahoo or agnews" in wide


def test_counts() -> None:
    text = shown(table(a_run(), DBPEDIA, AMAZON, AGNEWS))
    assert "dbpedia: 5 of 12 right after stage 1 are forgotten, 2 came back" in text
    assert "amazon: 1 of 1 right after stage 2 is forgotten\n" in text
    assert "agnews: 2 of 20 rows right after stage 4; no stage since" in text
    ends = text[text.index("\ntask ") :]
    assert [cells(ends, task) for task in ("dbpedia", "amazon", "agnews", "all")] == [
        ["12", "5", "2"], ["1", "1", "0"], ["2", "0", "0"], ["15", "6", "2"],
    ]  # fmt: skip
    assert cells(ends, "its") == ["own", "task", "1"]
    assert cells(ends, "one") == ["later", "task", "1", "amazon", "1"]
    assert cells(ends, "several") == ["of", "these", "1", "yahoo", "or", "agnews", "1"]
    assert cells(ends, "earlier") == ["tasks", "only", "1", "x", "1"]
    assert cells(ends, "no") == ["task", "2"]
    assert "lost at stage: 2 amazon 3, 3 yahoo 1, 4 agnews 2" in ends
    assert ends.rstrip().endswith("sums is left out: it is so\nnot learned yet: later")
    alone = shown(table(a_run(), DBPEDIA))
    assert "\ntask " not in alone and "lost at stage: 2 amazon 3, 3 yahoo 1, 4 agnews 1" in alone
    nothing = shown(table(a_run(), AGNEWS))
    assert "said now" not in nothing and "lost at" not in nothing


def test_synthetic_stands_beside_every_count() -> None:
    for real, mark in (((), "(synthetic)"), (("amazon",), "(partly synthetic)")):
        run = a_run(synthetic=True, real=real)
        text = shown(table(run, DBPEDIA, AMAZON, AGNEWS), width=100)
        assert "are forgotten (synthetic), 2 came back" in text
        assert ("is forgotten (synthetic)" in text) == (not real)
        assert "right after stage 4 (synthetic); no" in text
        for head in ("task", "said now is a label of", "lost at stage"):
            assert f"{head} {mark}" in text


def test_what_a_model_says_cannot_move_the_cursor_or_be_read_as_markup() -> None:
    row = Lost("test/0", "[red]a[/red]", "\x1b[2J\nb [bold]", Whose("none"), (2,))
    text = shown(table(a_run(), Forgetting("dbpedia", 1, 1, ("test/0",), (row,), 0)))
    assert "[red]a[/red]" in text
    assert r"\x1b[2J\nb [bold]" in text


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [20, 44, 60, 80, 200])
def test_any_width_can_be_shown(width: int, encoding: str) -> None:
    run = a_run(synthetic=True)
    difference = Difference("dbpedia", 30, ROWS[:2], ROWS[2:], 4, 5)
    for one in (table(run, DBPEDIA, AGNEWS), DifferenceTable((run, run), (STAGES, STAGES), [difference])):
        text = shown(one, width=width, encoding=encoding)
        assert max(map(len, text.splitlines())) <= width
        assert "dbpedia" in text.replace("\n", "")


def test_two_runs() -> None:
    one, other = a_run(name="one"), a_run(name="two", method="seqlora", synthetic=True)
    found = [Difference("dbpedia", 14, ROWS[:2], ROWS[2:], 4, 5), Difference("amazon", 1, (), ROWS[3:4], 0, 0)]
    text = shown(DifferenceTable((one, other), (STAGES, STAGES[:3]), found, ["a note"]))
    lines = text.splitlines()
    assert lines[1].rstrip() == "one after stage 4 (agnews)" and lines[3].rstrip() == "two after stage 3 (yahoo)"
    flat = " ".join(text.split())
    assert (
        "dbpedia: of 14 rows right in both when learned, 4 kept by both, 2 by one alone, 3 by two alone, 5 by neither "
        "(synthetic)"
    ) in flat
    assert "amazon: of 1 row right in both when learned, 0 kept by both, 0 by one alone, 1 by two alone" in flat
    kept, lost = text.index("kept by one, forgotten by two"), text.index("kept by two, forgotten by one")
    assert kept < text.index("test/1234") < lost < text.index("test/8")
    assert text.count("kept by one, forgotten by two") == 1, "none of amazon"
    assert "kept by one alone: 2 rows (synthetic)" in text and "kept by two alone: 4 rows (synthetic)" in text
    assert lines[-1].rstrip() == "a note"


def test_an_empty_matrix_is_no_matter() -> None:
    run = a_run(done=0, matrix=Matrix([], STAGES, []))
    assert "dbpedia: 5 of 12" in shown(table(run, DBPEDIA))
