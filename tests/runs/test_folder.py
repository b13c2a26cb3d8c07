"""The run folder: all of a stage or nothing, one writer at a time, and a disk that may be full."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cl_runner.atomic import append_jsonl, read_json, read_jsonl, sha256, write_json, write_text
from cl_runner.errors import UserError
from cl_runner.runs import folder as module
from cl_runner.runs.commit import clear_drafts, commit
from cl_runner.runs.folder import RunDir
from cl_runner.runs.process import Process
from tests.command_line import ORDER, SMALL, STAGES, call, results, tree
from tests.commands.test_errors import refused
from tests.conftest import Finished


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "a/file")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "runs" / "x")
    made.create("seed: 1\n", "name: x\n", {"stages": []})
    return made


def fill(folder: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_bytes(b"w")
    (folder / "state.json").write_text("{}")


def test_commit_is_all_or_nothing(run: RunDir) -> None:
    def fails(folder: Path) -> None:
        fill(folder)
        assert run.committed(["a"]) == 0
        full()

    before = tree(run.path)
    with pytest.raises(OSError, match="No space"):
        commit(run, 0, "a", fails)
    assert tree(run.path) == before, "what was written is gone: its room is wanted"
    stage = commit(run, 0, "a", fill)
    assert stage == run.path / "stages" / "01-a"
    assert run.committed(["a", "b"]) == 1
    hashes = read_json(stage / "DONE")["sha256"]
    assert hashes == {
        "adapter/weights": sha256(stage / "adapter" / "weights"),
        "state.json": sha256(stage / "state.json"),
    }
    assert hashes["adapter/weights"] == "50e721e49c013f00c62cf59f2163542a9d8df02464efeb615d31051b0fddc326"


def test_what_is_committed_is_read_by_whom_the_umask_lets(run: RunDir) -> None:
    def closed(folder: Path) -> None:
        fill(folder)
        (folder / "adapter" / "weights").chmod(0o600)  # as safetensors leaves a file

    before = os.umask(0o027)
    try:
        stage = commit(run, 0, "a", closed)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in stage.rglob("*") if file.is_file()} == {"0o640"}


def test_commit_replaces_what_was_never_whole_and_nothing_else(run: RunDir) -> None:
    half = run.stage_dir(0, "a")
    half.mkdir()
    (half / "state.json").write_text("half")
    commit(run, 0, "a", fill)
    assert (half / "state.json").read_text() == "{}"
    before = tree(run.path)
    with pytest.raises(OSError, match="not empty"):
        commit(run, 0, "a", lambda folder: (folder / "other").touch())
    assert tree(run.path) == before


def test_a_gap_is_refused(run: RunDir) -> None:
    for index, name in enumerate("abc"):
        commit(run, index, name, fill)
    run.refuse_gaps(list("abcd"))
    shutil.rmtree(run.stage_dir(1, "b"))
    with pytest.raises(UserError, match=r"damaged: stage 3 \(c\) is there and stage 2 \(b\) is not"):
        run.refuse_gaps(list("abcd"))


def test_create_leaves_nothing_behind_where_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", full)
        with pytest.raises(UserError, match=r"cannot write the run folder .*: No space left on device"):
            RunDir(tmp_path / "a" / "b" / "x").create("", "", {})
    assert tree(tmp_path) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run folder"):
        RunDir(tmp_path / "file" / "x").create("", "", {})
    (tmp_path / "x").mkdir()
    RunDir(tmp_path / "x").create("", "", {})  # an empty folder is taken
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "mine").write_text("")
    with pytest.raises(UserError, match="cannot write the run folder"):
        RunDir(tmp_path / "y").create("", "", {})
    assert [path.name for path in (tmp_path / "y").iterdir()] == ["mine"]


def test_create_leaves_a_run_that_was_quicker(run: RunDir) -> None:
    before = tree(run.path.parent)
    run.create("seed: 2\n", "name: y\n", {"stages": [1]})
    assert tree(run.path.parent) == before


def test_what_a_killed_maker_left_is_removed(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next process that trains the run; what a living one, or one of another machine, makes there stays."""
    made: list[str] = []
    mkdtemp = module.tempfile.mkdtemp
    monkeypatch.setattr(module.tempfile, "mkdtemp", lambda **named: made.append(mkdtemp(**named)) or made[-1])
    monkeypatch.setattr(module.shutil, "rmtree", lambda *_, **__: None)
    for process in (Process.here(), replace(Process.here(), host="other"), replace(Process.here(), started=1)):
        monkeypatch.setattr(Process, "here", lambda process=process: process)
        run.create("", "", {})
    monkeypatch.undo()
    drafts = [Path(name) for name in made]
    assert [draft.exists() for draft in drafts] == [True, True, True]
    clear_drafts(run)
    assert [draft.exists() for draft in drafts] == [True, True, False]


def test_permissions_are_the_users(run: RunDir) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert run.path.stat().st_mode & 0o777 == 0o777 & ~mask


def test_log_rows_of_a_cut_stage_are_taken_out(run: RunDir) -> None:
    file = run.path / "log.jsonl"
    run.keep_log_rows(["a"])
    assert not file.exists()
    rows: list[dict[str, Any]] = [{"stage": "a", "step": 1}, {"stage": "b", "step": 1}]
    append_jsonl(file, rows)
    with file.open("a") as out:
        out.write('{"stage": "a", "st')
    run.keep_log_rows(["a"])
    assert read_jsonl(file) == rows[:1]
    before = file.stat().st_mtime_ns
    run.keep_log_rows(["a", "b"])
    assert file.stat().st_mtime_ns == before


def test_json_lines_hold_no_nan_and_any_text(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    append_jsonl(file, [{"a": float("nan"), "b": float("inf"), "c": 1.5, "d": "half \ud800 é\u2028"}])
    assert json.loads(file.read_text()) == {"a": None, "b": None, "c": 1.5, "d": "half \ud800 é\u2028"}
    assert read_jsonl(file) == [json.loads(file.read_text())]
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "y.json", {"a": float("nan")})


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x"
    write_text(file, "one")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_text(file, "two")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x": "one"}


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_too_small_for_all_stages_is_refused_before_the_first(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "three.yaml").write_text(ORDER)
    before = tree(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 100_000, 100_000))
    result = call("train", "--order", "three.yaml", *SMALL, "--output-dir", "new/runs", cwd=tmp_path)
    refused(result, ("new/runs", "98 KB free", "--output-dir"))
    assert tree(tmp_path) == before
    found = re.search(r"need about ([\d.]+) (KB|MB)", result.err)
    assert found
    needed = float(found[1]) * {"KB": 2**10, "MB": 2**20}[found[2]]
    written = sum(file.stat().st_size for file in (finished.run / "stages").rglob("*") if file.is_file())
    assert 0.8 * written < needed < 1.5 * written


def test_full_disk_in_the_middle(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, exit code 1, committed stages as they were; with room again the same command goes on."""
    (tmp_path / "three.yaml").write_text(ORDER)
    from cl_runner.training import run as running

    save = running.save_stage

    def second_is_full(folder: Path, stage: Any, *more: Any) -> Any:
        done = save(folder, stage, *more)
        return full() if stage.index == 1 else done

    with monkeypatch.context() as patch:
        patch.setattr(running, "save_stage", second_is_full)
        result = call("train", "--order", "three.yaml", *SMALL, cwd=tmp_path)
    assert result.code == 1
    last = result.err.splitlines()[-1]
    assert last.startswith(
        "failed in stage 2 (amazon): the disk of the run folder is full; make room; kept: dbpedia; go"
    )
    assert "Traceback" not in result.err
    run = tmp_path / "runs" / finished.name
    assert (run / "run.log").read_text().splitlines()[-1] == last
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    assert [path.name for path in (run / "stages").iterdir()] == ["01-dbpedia"]
    command = last.split("go on: cl-runner ")[1].split()
    again = call(*command, cwd=tmp_path)
    assert again.code == 0, again.err
    assert results(run) == results(finished.run)
    assert STAGES[0] not in "".join(line for line in again.err.splitlines() if "steps" in line)


def test_a_run_that_trains_can_be_looked_through(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft is moved, a checkpoint removed, while somebody lists what is there."""
    for name in (".01-a.draft", "02-b"):
        (run.stages_dir / name).mkdir()
    scandir = os.scandir

    def late(path: Any) -> Any:
        if Path(path).name == ".01-a.draft":
            (run.stages_dir / ".01-a.draft").rename(run.stages_dir / "01-a")
        return scandir(path)

    monkeypatch.setattr("cl_runner.plain_files.os.scandir", late)
    run.refuse_foreign()
    assert (run.stages_dir / "01-a").is_dir()


@pytest.mark.parametrize("about", [{"from": []}, {"later": [{"packages": []}]}, {"later": [{"from": {"a": 1}}]}])
def test_what_a_run_goes_on_from_is_of_its_type(run: RunDir, about: dict[str, Any]) -> None:
    """It is compared with what there is now, process by process."""
    write_json(run.path / "environment.json", about)
    with pytest.raises(UserError, match="is not as a run writes it"):
        run.environment()
