"""`verify`: a whole run holds; whatever is done to a file of it is found and named; nothing is written."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cl_runner.atomic import json_text, sha256
from cl_runner.metrics.scores import METRICS
from cl_runner.runs import checkpoints
from cl_runner.runs.commit import remove
from cl_runner.runs.folder import RunDir, seals
from cl_runner.runs.verifying import verify_folder
from tests.breadth import narrowed
from tests.command_line import STAGES, call, environment, times, tree
from tests.conftest import Finished
from tests.run_folders import RunFolder, same_plain

STAGE = "stages/02-amazon"
OF_STAGE = ("DONE", "state.json", "metrics.json", "predictions.jsonl", "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors")  # fmt: skip
KNOWN = [*(f"{STAGE}/{name}" for name in OF_STAGE), "run.json", "run.yaml", "order.yaml", "matrix.csv", "metrics.json"]
GOES_ON = ["environment.json", "status.json", "log.jsonl"]  # no hashes are kept of these


@pytest.fixture
def run(finished: Finished, tmp_path: Path) -> Iterator[RunDir]:
    """A finished run of three stages, to be damaged."""
    yield RunDir(Path(shutil.copytree(finished.run, tmp_path / "runs" / "mine", symlinks=True)))


def differs(run: RunDir) -> list[str]:
    """All that the folder alone tells to be wrong, each with what it is of."""
    return [f"{check.of}: {line}" for check in verify_folder(run).checks for line in check.differs]


def named(run: RunDir, file: str) -> str:
    """The lines of differences; the file, and of a stage's file the stage, have to be among them."""
    lines = differs(run)
    of, name = ("2 amazon: ", file.removeprefix(f"{STAGE}/")) if file.startswith(STAGE) else ("run: ", file)
    assert any(line.startswith(of) and name in line for line in lines), (file, lines)
    return "\n".join(lines)


def reseal(run: RunDir, stage: str = STAGE) -> None:
    """As somebody would who wants an edit to pass: the hashes are those of the files as they are."""
    done = run.path / stage / "DONE"
    values = json.loads(done.read_text())
    values["sha256"] = {name: sha256(done.parent / name) for name in values["sha256"]}
    done.write_text(json_text(values))


def edit(file: Path, change: Callable[[Any], None]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json_text(values))


def test_a_whole_run_holds_and_nothing_is_written(run: RunDir) -> None:
    cwd = run.path.parents[1]
    before = tree(cwd), times(cwd)
    found = call("verify", "--json", cwd=cwd)
    assert (found.code, found.err) == (0, "the newest run: runs/mine\n")
    told = found.json
    assert told["run"] == "runs/mine" and told["holds"] is True
    checks = {(check["of"], check["part"]): check for check in told["checks"]}
    assert all(check["differs"] == [] and check["wrong"] == 0 for check in told["checks"])
    titles = [f"{index + 1} {name}" for index, name in enumerate(STAGES)]
    assert list(checks) == [
        ("run", "files"), ("run", "data"), ("run", "model"), ("run", "scores"),
        *((title, part) for title in titles for part in ("files", "scores")),
    ]  # fmt: skip
    for index, title in enumerate(titles):
        files = [path for path in (run.stage_dir(index, STAGES[index])).rglob("*") if path.is_file()]
        assert checks[title, "files"]["checked"] == len(files)
        assert checks[title, "scores"]["checked"] == index + 1
    assert (checks["run", "data"]["checked"], checks["run", "model"]["checked"]) == (6, 1)
    shown = call("verify", "mine", cwd=cwd)
    assert shown.code == 0 and "all that was checked holds" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    assert (tree(cwd), times(cwd)) == before


def test_torch_is_not_imported(run: RunDir) -> None:
    program = "import sys; from cl_runner.cli import outcome; sys.exit(outcome(['verify']) or 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=run.path.parents[1], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# The list of hashes itself, what is in it, weights, and files of the whole run.
BITS = [f"{STAGE}/DONE", f"{STAGE}/state.json", f"{STAGE}/adapter/adapter_model.safetensors", "run.json", "order.yaml"]


@pytest.mark.parametrize("file", narrowed(KNOWN, BITS))
def test_a_flipped_bit_is_found(run: RunDir, file: str) -> None:
    path, dice = run.path / file, random.Random(file)
    whole = path.read_bytes()
    for at in {0, len(whole) - 1, *(dice.randrange(len(whole)) for _ in range(20))}:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << dice.randrange(8)
        path.write_bytes(flipped)
        named(run, file)
    path.write_bytes(whole)
    assert differs(run) == []


@pytest.mark.parametrize("file", narrowed(["DONE", "run.json", "metrics.json", "matrix.csv"], ["DONE", "run.json"]))
def test_a_flipped_bit_is_one_line_and_exit_code_1(run: RunDir, file: str) -> None:
    path = run.path / STAGE / file if file == "DONE" else run.path / file
    whole, dice = path.read_bytes(), random.Random(file)
    for at in (1, *(dice.randrange(len(whole)) for _ in range(4))):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        found = call("verify", "mine", cwd=run.path.parents[1])
        assert (found.code, found.err) == (1, "") and file in found.out, found


@pytest.mark.parametrize("file", [*KNOWN, *GOES_ON])
def test_a_missing_file_is_found(run: RunDir, file: str) -> None:
    (run.path / file).unlink()
    assert "is missing" in named(run, file) or "No such file" in named(run, file)
    found = call("verify", "mine", cwd=run.path.parents[1])
    assert (found.code, found.err) == (1, "")


@pytest.mark.parametrize("file", [*KNOWN, *GOES_ON])
def test_a_cut_file_is_found(run: RunDir, file: str) -> None:
    path = run.path / file
    whole = path.read_bytes()
    for length in (0, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        named(run, file)


@pytest.mark.parametrize("file", [*KNOWN, *GOES_ON])
def test_a_symlink_is_found_though_it_holds_the_same(run: RunDir, file: str) -> None:
    path, away = run.path / file, run.path.parent / "away"
    path.rename(away)
    path.symlink_to(away)
    assert f"{Path(file).name} is a symlink to {away}" in named(run, file)


def test_a_folder_that_is_a_symlink_is_found(run: RunDir) -> None:
    for folder in (f"{STAGE}/adapter", STAGE):
        path, away = run.path / folder, run.path.parent / "away"
        path.rename(away)
        path.symlink_to(away)
        assert f"{path.name} is a symlink to {away}" in "\n".join(differs(run))
        path.unlink()
        away.rename(path)


def test_what_was_added_is_found(run: RunDir) -> None:
    (run.path / STAGE / "adapter" / "more.bin").write_bytes(b"")
    (run.path / "stages" / "notes").mkdir()
    (run.path / "stages" / ".03-agnews.draft").mkdir()  # an interrupted commit leaves such, and nobody reads it
    (run.path / "thoughts.txt").write_text("mine")
    assert differs(run) == [
        "run: stages/notes is none of the run's stages",
        "2 amazon: adapter/more.bin is not of the stage (by DONE)",
    ]
    assert verify_folder(run).said == ["thoughts.txt: in the run's folder, and none of its files"]


def test_what_is_kept_of_a_stage_that_is_not_over_is_the_runs(run: RunDir) -> None:
    kept = checkpoints.place(run, 1, STAGES[1], 120)
    kept.mkdir(parents=True)
    found = verify_folder(run)
    assert found.said == [] and not any(check.differs for check in found.checks)


def test_swapped_stages_are_found(run: RunDir) -> None:
    first, second, away = run.path / "stages/01-dbpedia", run.path / STAGE, run.path / "stages/away"
    first.rename(away)
    second.rename(first)
    away.rename(second)
    lines = differs(run)
    assert "1 dbpedia: state.json is of stage 'amazon', not 'dbpedia'" in lines
    assert "2 amazon: state.json is of stage 'dbpedia', not 'amazon'" in lines
    [_, *after, _] = [line.split(",") for line in (run.path / "matrix.csv").read_text().splitlines()]
    told = any(line.startswith("run: matrix.csv: dbpedia after dbpedia is") for line in lines)
    assert told == (after[0][1] != after[1][1])  # what a random model scores is for the processor's rounding to say


def test_a_stage_of_another_run_is_found_by_those_that_stand_on_it(run: RunDir) -> None:
    """Of the same name, whole in itself, and with other numbers."""
    file = run.path / "stages/01-dbpedia/adapter/adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    reseal(run, "stages/01-dbpedia")
    lines = [line for line in differs(run) if line.startswith("3 agnews: state.json: ../01-dbpedia/adapter")]
    assert len(lines) == 1 and lines[0].endswith("is not the file that the stage was committed with")


def test_a_stage_that_is_gone_is_found(run: RunDir) -> None:
    shutil.rmtree(run.path / "stages/03-agnews")
    lines = differs(run)
    assert "run: stages/03-agnews is not there, and status.json says that the run is done" in lines
    assert any("matrix.csv" in line for line in lines)
    shutil.rmtree(run.path / "stages/01-dbpedia")
    assert "run: stages/01-dbpedia is not there, and stage 2 is" in differs(run)


# --- edits whose hashes were made to fit


def lines_of(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / STAGE / "predictions.jsonl").read_text().splitlines()]


def rewrite(run: RunDir, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (run.path / STAGE / "predictions.jsonl").write_text(text)
    reseal(run)


def test_an_edited_answer_shows_in_score_and_matrix(run: RunDir) -> None:
    rows = lines_of(run)
    wrong = next(row for row in rows if not row["correct"])
    wrong.update(output=wrong["gold"], correct=True)
    rewrite(run, rows)
    task = wrong["task"]
    of = [row["correct"] for row in rows if row["task"] == task]
    now, then = 100 * sum(of) / len(of), 100 * (sum(of) - 1) / len(of)
    lines = differs(run)
    assert f"2 amazon: metrics.json: {task} is {then!r}, its answers give {now!r}" in lines
    assert f"run: matrix.csv: {task} after amazon is {then:.4f}, by the answers {now:.4f}" in lines
    column = STAGES.index(task)
    assert f"run: metrics.json: matrix.values.1.{column} is {then!r}, by the answers {now!r}" in lines


def test_an_answer_said_to_be_right_is_found(run: RunDir) -> None:
    rows = lines_of(run)
    rows[1]["correct"] = not rows[1]["correct"]
    rewrite(run, rows)
    said = "'correct' is not what answer and gold give"
    assert differs(run) == [f"2 amazon: predictions.jsonl: {rows[1]['task']} {rows[1]['id']}: {said}"]


def test_other_golds_and_other_rows_are_found(run: RunDir) -> None:
    rows = lines_of(run)
    own = [row for row in rows if row["task"] == "dbpedia"]
    rewrite(run, [row if row is not own[2] else {**row, "gold": "Nothing", "correct": False} for row in rows])
    assert any(
        f"the gold of dbpedia {own[2]['id']} is 'Nothing', after 1 dbpedia '{own[2]['gold']}'" in line
        for line in differs(run)
    )
    rewrite(run, [row for row in rows if row is not own[2]])
    assert "2 amazon: metrics.json: 4 rows of dbpedia, and predictions.jsonl has 3" in differs(run)
    rewrite(run, [*rows, own[0]])
    assert "2 amazon: predictions.jsonl: a row of dbpedia is there twice" in differs(run)


def test_an_edited_score_is_found(run: RunDir) -> None:
    was = json.loads((run.path / STAGE / "metrics.json").read_text())["scores"]["amazon"]
    edit(run.path / STAGE / "metrics.json", lambda values: values["scores"].update(amazon=99.5))
    reseal(run)
    assert differs(run) == [f"2 amazon: metrics.json: amazon is 99.5, its answers give {was!r}"]


def test_an_edited_cell_of_the_matrix_is_found(run: RunDir) -> None:
    file = run.path / "matrix.csv"
    header, *rows = [line.split(",") for line in file.read_text().splitlines()]
    rows[2][1], was = "77.7700", rows[2][1]
    file.write_text("\n".join(",".join(row) for row in [header, *rows]) + "\n")
    assert differs(run) == [f"run: matrix.csv: dbpedia after agnews is 77.7700, by the answers {was}"]


def test_an_edited_measure_is_found_and_so_is_one_too_many(run: RunDir) -> None:
    was = json.loads((run.path / "metrics.json").read_text())["average_accuracy"]
    edit(run.path / "metrics.json", lambda values: values.update(average_accuracy=was + 1e-9, better=3))
    assert differs(run) == [
        f"run: metrics.json: average_accuracy is {was + 1e-9!r}, by the answers {was!r}",
        "run: metrics.json: better is nothing that a run writes",
    ]


def test_an_edited_setting_is_found(run: RunDir) -> None:
    file = run.path / "run.yaml"
    text = file.read_text()
    assert "lr: 0.01" in text
    file.write_text(text.replace("lr: 0.01", "lr: 0.02"))
    assert differs(run) == ["run: run.yaml is not what the run began with (its hash in run.json)"]


def test_an_edited_loss_is_found(run: RunDir) -> None:
    edit(run.path / STAGE / "metrics.json", lambda values: values["training"].update(loss=0.1))
    reseal(run)
    assert [line.partition(" is ")[0] for line in differs(run)] == ["run: log.jsonl: the last loss of stage 2 (amazon)"]


# --- data, base model, the model asked again


def test_drift_of_data_and_model_is_named_key_by_key(run: RunDir) -> None:
    def other(about: dict[str, Any]) -> None:
        about["identity"]["data"]["amazon"]["test"].update(fingerprint="0" * 64, rows=5)
        about["identity"]["model"]["files"] = "1" * 64
        about["sha256"] = seals(run.path, about)

    about = json.loads((run.path / "run.json").read_text())
    prints, files = about["identity"]["data"]["amazon"]["test"]["fingerprint"], about["identity"]["model"]["files"]
    edit(run.path / "run.json", other)
    assert differs(run) == []
    found = call("verify", "mine", "--json", cwd=run.path.parents[1])
    assert found.code == 1
    assert [line for check in found.json["checks"] for line in check["differs"]] == [
        f"data.amazon.test: rows 5 → 4, fingerprint 000000000000… → {prints[:12]}…",
        f"model.files: 111111111111… → {files[:12]}…",
    ]


def test_what_is_not_at_hand_is_said(run: RunDir) -> None:
    found = call("verify", "mine", "--model", "nowhere/at/all/here", cwd=run.path.parents[1])
    assert (found.code, found.err) == (0, "")
    assert "not checked:" in found.out and "base model" in found.out


def test_a_model_asked_again_answers_as_committed(run: RunDir) -> None:
    cwd = run.path.parents[1]
    before = tree(cwd)
    found = call("verify", "mine", "--again", "--stage", "2", "--json", cwd=cwd)
    assert found.code == 0, found
    [asked] = [check for check in found.json["checks"] if check["part"] == "asked again"]
    assert asked == {"of": "2 amazon", "part": "asked again", "checked": 8, "wrong": 0, "differs": [], "unchecked": []}
    assert tree(cwd) == before
    file = run.path / STAGE / "adapter/adapter_model.safetensors"
    save_file({name: 3 * tensor for name, tensor in load_file(file).items()}, file)
    damaged = call("verify", "mine", "--again", "--stage", "2", cwd=cwd)
    assert damaged.code == 1 and "answers of the model: the stage is damaged" in " ".join(damaged.out.split())
    reseal(run)
    other = call("verify", "mine", "--again", "--stage", "2", "--json", cwd=cwd)
    assert other.code == 1
    [asked] = [check for check in other.json["checks"] if check["part"] == "asked again"]
    assert asked["wrong"] > 0 and "answers differ" in asked["differs"][0]


# --- other runs


def test_a_removed_model_is_no_fault(run: RunDir) -> None:
    remove(run, 0, "dbpedia", ("adapter",))
    checks = {(check.of, check.part): check for check in verify_folder(run).checks}
    assert differs(run) == []
    assert checks["1 dbpedia", "files"].unchecked == ["2 files that the run has removed (output.keep_stages)"]


def test_stages_and_runs_that_are_not_there(run: RunDir) -> None:
    cwd = run.path.parents[1]
    assert call("verify", "mine", "--stage", "4", cwd=cwd).code == 2
    assert call("verify", "nope", cwd=cwd).line.startswith("cl-runner: there is no run 'nope'")
    assert call("verify", cwd=cwd.parent).code == 2


def test_without_run_json_the_stages_hashes_are_checked(run: RunDir) -> None:
    (run.path / "run.json").unlink()
    (run.path / STAGE / "state.json").write_text("{}")
    assert differs(run) == [
        "run: run.json is missing",
        "02-amazon: state.json is not what was committed (its hash in DONE)",
    ]


def test_a_run_of_an_earlier_version_holds_and_says_what_it_lacks(run: RunDir) -> None:
    edit(run.path / "run.json", lambda about: about.pop("sha256"))
    edit(run.path / "metrics.json", lambda values: values.pop("learning_accuracy"))
    assert differs(run) == []
    assert "kept no hashes" in verify_folder(run).checks[0].unchecked[0]


OWN = """tasks:
  - {name: topic, kind: TC, labels: [a, b, c], metric: f1, source: {train: x.csv, test: x.csv}}
  - {name: words, kind: QA, metric: rouge-l, source: {train: x.csv, test: x.csv}}
  - {name: size, kind: QA, metric: pearson, source: {train: x.csv, test: x.csv}}
"""
ROWS = {
    "topic": [("a", "a"), ("b", "b"), ("c", "a"), ("c", "c")],
    "words": [("the red house", "the house"), ("yes", "no")],
    "size": [("1", "1.5"), ("2", "2"), ("3", "7")],
}
SCORES = {"topic": 100 * (2 / 3 + 1 + 2 / 3) / 3, "words": 40.0, "size": 100 * 5.5 / 37**0.5}


def test_each_task_is_scored_by_its_own_metric(tmp_path: Path) -> None:
    assert {"f1", "rouge-l", "pearson"} <= set(METRICS)
    run = RunFolder(tmp_path / "runs", "own", OWN, right=lambda output, gold: same_plain(output, gold))
    run.commit({"topic": ROWS["topic"]}, scores={"topic": 50.0})
    run.commit({task: ROWS[task] for task in ("topic", "words")}, scores={"topic": 50.0, "words": 50.0})
    run.commit(ROWS, scores=dict.fromkeys(ROWS, 50.0))
    given = [line for line in differs(run.dir) if "its answers give" in line and line.startswith("3 size")]
    assert len(given) == 3
    for line, task in zip(given, ROWS, strict=True):
        assert f"metrics.json: {task} is 50.0, " in line
        assert float(line.rpartition(" ")[2]) == pytest.approx(SCORES[task], rel=1e-12)
