"""Forgotten rows against a matrix of right and wrong that is read by hand."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cl_runner.metrics.exact_match import Comparison, Rule
from cl_runner.metrics.forgotten import (
    Answer,
    Forgetting,
    LabelSet,
    LabelSets,
    Whose,
    by_labels,
    by_stage,
    counts,
    differ,
    follow,
)

NOTHING = LabelSets()


def label_set(task: str, *labels: str, rule: Rule = "normalised") -> LabelSet:
    return LabelSet(task, labels, Comparison(rule))


def followed(rows: dict[str, str], first: int = 1, sets: LabelSets = NOTHING) -> Forgetting:
    """Rows by id, each a letter a stage: ``r`` right, ``w`` wrong."""
    length = len(next(iter(rows.values())))
    stages = {
        first + k: [Answer(row, "gold", f"said at {first + k}", turns[k] == "r") for row, turns in rows.items()]
        for k in range(length)
    }
    return follow("one", stages, sets)


def test_each_way_that_a_row_can_go() -> None:
    found = followed(
        {
            "kept": "rrrr",
            "lost": "rrww",
            "twice": "rwrw",
            "back": "rwwr",
            "never": "wwww",
            "late": "wrrw",
            "end": "rrrw",
        },
        first=2,
    )
    assert (found.task, found.learned, found.rows) == ("one", 2, 7)
    assert found.right == ("kept", "lost", "twice", "back", "end")
    assert [(row.id, row.lost, row.returned) for row in found.forgotten] == [
        ("lost", (4,), ()),
        ("twice", (3, 5), (4,)),
        ("end", (5,), ()),
    ]
    assert found.returned == 1
    assert {row.now for row in found.forgotten} == {"said at 5"}, "what is said after the last stage"
    assert by_stage(found.forgotten) == [(3, 1), (4, 1), (5, 1)]
    one = counts([found])
    assert {key: one[key] for key in ("right", "forgotten", "came_back", "lost_again")} == {
        "right": 5, "forgotten": 3, "came_back": 1, "lost_again": 1,
    }  # fmt: skip


def naive(turns: str) -> tuple[list[int], list[int]]:
    """The stages at which a row went from right to wrong and from wrong to right, by neighbours."""
    steps = [(k + 1, turns[k - 1] + turns[k]) for k in range(1, len(turns))]
    return [k for k, step in steps if step == "rw"], [k for k, step in steps if step == "wr"]


@pytest.mark.parametrize("stages", [1, 2, 3, 6, 9])
def test_many_rows_against_the_naive_reading(stages: int) -> None:
    dice = random.Random(stages)
    rows = {f"test/{k}": "".join(dice.choice("rw") for _ in range(stages)) for k in range(300)}
    found = followed(rows)
    right = [row for row, turns in rows.items() if turns[0] == "r"]
    assert list(found.right) == right
    wanted = {row: naive(rows[row]) for row in right if rows[row][-1] == "w"}
    assert {row.id: (list(row.lost), list(row.returned)) for row in found.forgotten} == wanted
    assert found.returned == sum("w" in rows[row] and rows[row][-1] == "r" for row in right)
    if stages == 1:
        assert found.forgotten == () and found.returned == 0


def test_a_stage_with_other_rows_is_no_stage_of_the_task() -> None:
    rows = [Answer("test/0", "a", "a", True), Answer("test/1", "a", "a", True)]
    other = Answer("test/2", "a", "a", True)
    for later in ([rows[0]], [rows[0], other], [*rows, other], [rows[0], rows[0], rows[1]]):
        with pytest.raises(ValueError, match="stage 2 has other rows of one than stage 1"):
            follow("one", {1: rows, 2: later}, NOTHING)


SETS = LabelSets(
    label_set("one", "red", "green"),
    (label_set("two", "Green", "stop"), label_set("three", "stop", "cat")),
    (label_set("before", "cat", "old", "red"),),
)


@pytest.mark.parametrize(
    ("answer", "whose"),
    [
        ("red", Whose("own", ("one",))),  # the task before has it too, and does not count beside its own
        ("RED.", Whose("own", ("one",))),
        ("green", Whose("several", ("one", "two"))),
        ("stop", Whose("several", ("two", "three"))),
        ("cat", Whose("later", ("three",))),
        ("old", Whose("earlier", ("before",))),
        ("dog", Whose("none")),
        ("red green", Whose("none")),
        ("", Whose("none")),
    ],
)
def test_whose_label_an_answer_is(answer: str, whose: Whose) -> None:
    assert SETS.whose(answer) == whose


def test_of_free_text_no_label_is_its_own() -> None:
    sets = replace(SETS, own=None)
    assert sets.whose("green") == Whose("later", ("two",))
    assert sets.whose("red") == Whose("earlier", ("before",))


def test_each_set_compares_as_its_task_does() -> None:
    exact, loose = label_set("exact", "Red", rule="label"), label_set("loose", "Red")
    numbers, several = label_set("numbers", "1", "2", rule="number"), label_set("several", "a", "b", rule="set")
    held = {
        answer: [each.task for each in (exact, loose, numbers, several) if each.holds(answer)]
        for answer in ("Red", " Red ", "red!", "2.0", "two", "b, a", "b", "a, c", "", ",")
    }
    assert held == {
        "Red": ["exact", "loose"], " Red ": ["exact", "loose"], "red!": ["loose"], "2.0": ["numbers"], "two": [],
        "b, a": ["several"], "b": ["several"], "a, c": [], "": [], ",": [],
    }  # fmt: skip


def test_sources_are_counted() -> None:
    answers = ["red", "stop", "cat", "stop", "dog", "cat", "cat"]
    first = [Answer(str(k), "green", "green", True) for k in range(7)]
    now = [Answer(str(k), "green", said, False) for k, said in enumerate(answers)]
    found = follow("one", {1: first, 2: first, 3: now}, SETS)
    assert by_labels(found.forgotten) == [
        (Whose("later", ("three",)), 3),
        (Whose("several", ("two", "three")), 2),
        (Whose("own", ("one",)), 1),
        (Whose("none"), 1),
    ]
    both = counts([found, found])
    assert both["by_labels"][0] == {"source": "later", "label_of": ["three"], "rows": 6}
    assert both["by_stage"] == [{"stage": 3, "rows": 14}]
    assert (both["right"], both["forgotten"]) == (14, 14)
    assert found.to_json() == {"task": "one", "learned_at": 1, "rows": 7, **counts([found])}
    assert found.forgotten[0].to_json() == {
        "id": "0", "gold": "green", "now": "red", "source": "own", "label_of": ["one"], "lost_at": 3,
        "came_back_at": [], "lost_again_at": [],
    }  # fmt: skip


def test_two_runs_against_each_other() -> None:
    dice = random.Random(0)
    mine, theirs = ({str(k): "".join(dice.choice("rw") for _ in range(4)) for k in range(200)} for _ in range(2))
    found = differ(followed(mine), followed(theirs))
    both = [row for row in mine if mine[row][0] == theirs[row][0] == "r"]
    ends = {row: mine[row][-1] + theirs[row][-1] for row in both}
    assert found.right == len(both)
    assert [row.id for row in found.kept] == [row for row in both if ends[row] == "rw"]
    assert [row.id for row in found.lost] == [row for row in both if ends[row] == "wr"]
    for rows, run in ((found.kept, theirs), (found.lost, mine)):
        assert rows and all((list(row.lost), list(row.returned)) == naive(run[row.id]) for row in rows), "the loser's"
    assert (found.both_keep, found.both_forget) == tuple(list(ends.values()).count(end) for end in ("rr", "ww"))
    back = differ(followed(theirs), followed(mine))
    assert (back.kept, back.lost) == (found.lost, found.kept)
    said = found.to_json()
    assert (said["run_keeps"], said["against_keeps"]) == (len(found.kept), len(found.lost))
    assert said["run_keeps_rows"] == [row.to_json() for row in found.kept]
