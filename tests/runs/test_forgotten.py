"""What a run has forgotten, read from its folder: which stages, which label sets, which tasks; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cl_runner.errors import UserError
from cl_runner.runs.folder import RunDir
from cl_runner.runs.forgotten import RunForgetting, forgotten_counts, read_difference, read_forgotten
from tests.made_runs import ANIMALS, COLOURS, SIGNS, SUMS, TAGS, TALK, make_run, said, seal

THREE = [("colours", ["colours"]), ("animals", ["animals"]), ("signs", ["signs"])]
RGRG, CD = "red green red green", "cat dog"


def lost(found: RunForgetting) -> dict[str, list[tuple[Any, ...]]]:
    """Task → (id, what is said now, kind of source, tasks, stages of its turns) of each forgotten row."""
    return {
        task.task: [
            (row.id, row.now, row.whose.kind, row.whose.tasks, row.lost, row.returned) for row in task.forgotten
        ]
        for task in found.tasks
    }


def three(path: Path) -> RunDir:
    """Colours are lost at stage 2 and 3, one of them twice; of the animals one. A label of signs is a colour too."""
    return make_run(
        path,
        [COLOURS, ANIMALS, SIGNS],
        THREE,
        [
            {"colours": said(RGRG, "red green red red")},
            {"colours": said(RGRG, "cat green dog green"), "animals": said(CD, "cat dog")},
            {
                "colours": said(RGRG, "Red stop green green"),
                "animals": said(CD, "Cat stop"),
                "signs": said("stop stop", "stop green"),
            },
        ],
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return three(tmp_path / "one")


def test_all_tasks(run: RunDir) -> None:
    found = read_forgotten(run)
    assert found.stages == ("colours", "animals", "signs")
    assert lost(found) == {
        "colours": [
            # Under metric exact Red is not red; test/3 was never learned.
            ("test/0", "Red", "none", (), (2,), ()),
            ("test/1", "stop", "later", ("signs",), (3,), ()),
            ("test/2", "green", "several", ("colours", "signs"), (2,), ()),
        ],
        "animals": [("test/1", "stop", "later", ("signs",), (3,), ())],
        "signs": [],
    }
    assert [(task.task, task.learned, task.rows, len(task.right)) for task in found.tasks] == [
        ("colours", 1, 4, 3), ("animals", 2, 2, 2), ("signs", 3, 2, 1),
    ]  # fmt: skip
    assert (found.skipped, found.to_come, found.notes) == ({}, (), ())
    assert list(lost(read_forgotten(run, task="animals"))) == ["animals"]


def test_after_an_earlier_stage(run: RunDir) -> None:
    found = read_forgotten(run, stage=2)
    assert lost(found) == {
        "colours": [
            ("test/0", "cat", "later", ("animals",), (2,), ()),
            ("test/2", "dog", "later", ("animals",), (2,), ()),
        ],
        "animals": [],
    }
    assert (found.stages, found.to_come) == (("colours", "animals"), ("signs",))
    assert read_forgotten(run, stage=2, task="colours").to_come == ()


def test_an_unfinished_run_is_looked_at_as_far_as_it_is(run: RunDir) -> None:
    whole = read_forgotten(run, stage=2)
    (run.stage_dir(2, "signs") / "DONE").unlink()
    assert lost(read_forgotten(run)) == lost(whole)
    assert read_forgotten(run).to_come == ("signs",)
    shutil.rmtree(run.stage_dir(1, "animals"))
    first = read_forgotten(run)
    assert lost(first) == {"colours": []} and first.to_come == ("animals", "signs")
    shutil.rmtree(run.stage_dir(0, "colours"))
    assert forgotten_counts(run) is None
    with pytest.raises(UserError, match="no finished stage yet"):
        read_forgotten(run)


def test_a_row_that_came_back(tmp_path: Path) -> None:
    turns = ["red red", "stop stop", "red red", "stop red"]
    answers = [{"colours": said("red red", turn)} for turn in turns]
    stages = [("colours", ["colours"]), *((f"more-{k}", ["signs"]) for k in range(3))]
    for stage in answers[1:]:
        stage["signs"] = said("stop", "stop")
    found = read_forgotten(make_run(tmp_path / "back", [COLOURS, SIGNS], stages, answers))
    assert lost(found)["colours"] == [("test/0", "stop", "later", ("signs",), (2, 4), (3,))]
    colours, signs = found.tasks
    assert (colours.returned, signs.learned) == (1, 4), "signs count from the last of their three stages"
    [row] = found.to_json()["tasks"][0]["forgotten_rows"]
    assert (row["lost_at"], row["came_back_at"], row["lost_again_at"]) == (2, [3], [4])
    total = found.counts()["total"]
    assert (total["forgotten"], total["came_back"], total["lost_again"]) == (1, 1, 1)


def test_stages_of_several_tasks(tmp_path: Path) -> None:
    """All at once nothing can be forgotten; what was trained together is no later task."""
    rows = {"colours": said("red", "cat"), "animals": said(CD, CD)}
    union = make_run(tmp_path / "mtl", [COLOURS, ANIMALS], [("mtl", ["colours", "animals"])], [rows])
    assert [(task.learned, task.forgotten) for task in read_forgotten(union).tasks] == [(1, ()), (1, ())]
    right = {"colours": said("red red", "red red"), "animals": said(CD, CD)}
    then = {"colours": said("red red", "cat green"), "animals": said(CD, "red stop"), "signs": said("stop", "stop")}
    rounds = [("first", ["colours", "animals"]), ("second", ["signs"])]
    found = read_forgotten(make_run(tmp_path / "rounds", [COLOURS, ANIMALS, SIGNS], rounds, [right, then]))
    assert lost(found) == {
        "colours": [
            ("test/0", "cat", "earlier", ("animals",), (2,), ()),
            ("test/1", "green", "several", ("colours", "signs"), (2,), ()),
        ],
        "animals": [
            ("test/0", "red", "earlier", ("colours",), (2,), ()),
            ("test/1", "stop", "later", ("signs",), (2,), ()),
        ],
        "signs": [],
    }


def test_answers_to_tasks_still_to_come_do_not_count(tmp_path: Path) -> None:
    """``eval.future``: animals were all right before they were trained."""
    answers = [
        {"colours": said("red", "red"), "animals": said(CD, CD)},
        {"colours": said("red", "dog"), "animals": said(CD, "cat cat")},
    ]
    run = make_run(tmp_path / "future", [COLOURS, ANIMALS], THREE[:2], answers)
    found = read_forgotten(run)
    assert lost(found) == {"colours": [("test/0", "dog", "later", ("animals",), (2,), ())], "animals": []}
    assert read_forgotten(run, stage=1).to_come == ("animals",)


def test_tasks_without_right_and_wrong_are_left_out_or_refused(tmp_path: Path) -> None:
    tasks = [SUMS, TAGS, TALK, COLOURS]
    names = ["sums", "tags", "talk", "colours"]
    rows = {"sums": said("a", "b"), "tags": said("red", "blue"), "talk": said("yes no", "yes no")}
    answers = [{name: rows[name] for name in names[: k + 1]} for k in range(3)]
    answers.append({**rows, "talk": said("yes no", "red -"), "colours": said("green", "green")})
    run = make_run(tmp_path / "mixed", tasks, [(name, [name]) for name in names], answers)
    found = read_forgotten(run)
    assert lost(found) == {
        # Of free text there is no own label; the sets of a task whose own answers are not looked at count all the same.
        "talk": [
            ("test/0", "red", "later", ("colours",), (4,), ()),
            ("test/1", "", "none", (), (4,), ()),
        ],
        "colours": [],
    }
    assert list(found.skipped) == ["sums", "tags"]
    assert found.skipped["sums"] == "by the metric rouge-l an answer is not right or wrong"
    with pytest.raises(UserError, match="--task tags: by the metric labels-f1 an answer is not right or wrong"):
        read_forgotten(run, task="tags")
    alone = make_run(tmp_path / "alone", [SUMS], [("sums", ["sums"])], answers[:1])
    assert read_forgotten(alone).counts()["total"]["right"] == 0 and read_forgotten(alone).skipped


def test_a_run_of_before_the_order_was_kept(run: RunDir) -> None:
    """Own tasks' labels are not known then; those of the benchmark are, if they are still the same."""
    run.order_file.unlink()
    found = read_forgotten(run)
    assert found.notes == ("the labels of colours, animals, signs are not known: the run is of an earlier version",)
    assert {row.whose.kind for task in found.tasks for row in task.forgotten} == {"none"}
    assert [len(task.forgotten) for task in found.tasks] == [3, 1, 0]


def test_labels_of_the_benchmark_are_known_from_its_name(tmp_path: Path) -> None:
    answers = [
        {"agnews": said("Sports World", "sports World")},
        {"agnews": said("Sports World", "Bad very."), "amazon": said("Good", "Good")},
    ]
    run = make_run(tmp_path / "old", ["agnews", "amazon"], [("agnews", ["agnews"]), ("amazon", ["amazon"])], answers)
    assert [row.id for row in read_forgotten(run).tasks[0].forgotten] == ["test/0", "test/1"]
    about = json.loads((run.path / "run.json").read_text())
    run.order_file.unlink()
    del about["identity"]["scoring"], about["metrics"]
    (run.path / "run.json").write_text(json.dumps(about))
    old = read_forgotten(run)
    assert [(row.now, row.whose.kind) for row in old.tasks[0].forgotten] == [("Bad", "none"), ("very.", "none")]
    file = run.stage_dir(1, "amazon") / "predictions.jsonl"
    file.write_text(file.read_text().replace('"Bad"', '"VERY negative."'))
    seal(file.parent)
    assert read_forgotten(run).tasks[0].forgotten[0].whose.tasks == ("amazon",), "normalised, as all was then"
    about["identity"]["definitions"]["amazon"] = "another"
    (run.path / "run.json").write_text(json.dumps(about))
    changed = read_forgotten(run)
    assert changed.notes == ("the labels of amazon are not known: the run is of an earlier version",)
    assert changed.tasks[0].forgotten[0].whose.kind == "none"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"task": "colour"}, ("colour is no task of the run", "did you mean 'colours'")),
        ({"task": "x"}, ("x is no task", "it has colours, animals, signs")),
        ({"task": "signs", "stage": 2}, ("--task signs", "has not learned it by stage 2")),
        ({"stage": 0}, ("--stage 0", "stages 1 to 3")),
        ({"stage": 4}, ("--stage 4", "stages 1 to 3")),
    ],
)
def test_refusals(run: RunDir, given: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refused:
        read_forgotten(run, **given)
    assert all(word in str(refused.value) for word in words), refused.value


def test_broken_folders_are_refused_and_a_report_says_nothing(run: RunDir) -> None:
    file = run.stage_dir(1, "animals") / "predictions.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for text, why in (
        ("".join(lines[1:]), "other rows of colours"),
        ("".join(lines[:4]), "no answers of animals"),
        ("".join([*lines, lines[0]]), "other rows of colours"),
        (lines[0].replace("correct", "corect") + "".join(lines[1:]), "correct"),
        ("{", "broken JSON"),
        ("[]\n", "must be a JSON object"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match="is not what was committed"):
            read_forgotten(run)
        seal(file.parent)
        with pytest.raises(UserError, match=why):
            read_forgotten(run)
        assert forgotten_counts(run) is None
    file.unlink()
    with pytest.raises(UserError, match=r"predictions\.jsonl is missing"):
        read_forgotten(run)


# Two runs.


def other(path: Path, colours: str = "red green stop green", **about: Any) -> RunDir:
    """The same rows in another order of tasks, on two stages."""
    stages = [("animals", ["animals"]), ("colours", ["colours"]), ("signs", ["signs"])]
    answers = [
        {"animals": said(CD, "cat stop")},
        {"animals": said(CD, "cat cat"), "colours": said(RGRG, RGRG)},
        {"animals": said(CD, "red dog"), "colours": said(RGRG, colours), "signs": said("stop stop", "stop stop")},
    ]
    return make_run(path, [ANIMALS, COLOURS, SIGNS], stages, answers, **about)


def test_two_runs(run: RunDir, tmp_path: Path) -> None:
    """Colours: of 0, 1, 2, right in both when learned, one forgets all and the other the last."""
    found = read_difference(run, other(tmp_path / "two"))
    assert [task.task for task in found.tasks] == ["colours", "animals", "signs"]
    colours, animals, signs = found.tasks
    assert (colours.right, colours.both_keep, colours.both_forget) == (3, 0, 1)
    assert colours.kept == () and [row.id for row in colours.lost] == ["test/0", "test/1"]
    assert animals.right == 1 and [(row.id, row.now, row.whose.kind) for row in animals.kept] == [
        ("test/0", "red", "later")
    ]
    assert (signs.right, signs.both_keep) == (1, 1)
    said = found.to_json()
    assert said["total"] == {"right_in_both": 5, "both_keep": 1, "both_forget": 1, "run_keeps": 1, "against_keeps": 2}
    assert (said["stages"], said["against_stages"]) == (
        ["colours", "animals", "signs"], ["animals", "colours", "signs"],
    )  # fmt: skip
    one = read_difference(run, RunDir(tmp_path / "two"), task="animals")
    assert one.tasks == (animals,)


def test_two_runs_after_a_stage_of_each(run: RunDir, tmp_path: Path) -> None:
    found = read_difference(run, other(tmp_path / "two"), stage=2)
    assert [(task.task, len(task.lost)) for task in found.tasks] == [("colours", 2), ("animals", 0)]
    first = read_forgotten(run, stage=1).tasks, read_forgotten(RunDir(tmp_path / "two"), stage=1).tasks
    assert [[task.task for task in tasks] for tasks in first] == [["colours"], ["animals"]]
    with pytest.raises(UserError, match="have no task in common that both have learned"):
        read_difference(run, RunDir(tmp_path / "two"), stage=1)


def test_two_runs_that_nothing_can_be_said_of(run: RunDir, tmp_path: Path) -> None:
    elsewhere = make_run(tmp_path / "talk", [TALK], [("talk", ["talk"])], [{"talk": said("a", "a")}])
    with pytest.raises(UserError, match="have no task in common that both have learned"):
        read_difference(run, elsewhere)
    with pytest.raises(UserError, match=r"--task: animals is no task of the run .*talk; it has talk"):
        read_difference(run, elsewhere, task="animals")
    rows = [{"colours": said("red red green green", "red red green green")}]
    others = make_run(tmp_path / "rows", [COLOURS], THREE[:1], rows)
    with pytest.raises(UserError, match="has other test rows of colours than"):
        read_difference(run, others)
    assert read_difference(run, run).to_json()["total"]["run_keeps"] == 0
    normalised = COLOURS.replace("exact", "normalised")
    rows = [{"colours": said(RGRG, "red green red red")}]
    with pytest.raises(UserError, match=r"scores colours by the rule 'label', .* by 'normalised'"):
        read_difference(run, make_run(tmp_path / "rule", [normalised], THREE[:1], rows))
    unjudged = COLOURS.replace("exact", "labels-f1")
    partly = read_difference(run, make_run(tmp_path / "unjudged", [unjudged], THREE[:1], rows))
    assert partly.tasks == () and list(partly.skipped) == ["colours"]
