"""A run folder of somebody else: read by every command, it leads nowhere, hangs nothing, runs and fetches nothing."""

from __future__ import annotations

import os
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError
from cl_runner.models.locate import check, locate
from cl_runner.offline import cache_alone, nothing_is_fetched
from cl_runner.runs.folder import RunDir
from tests.security.room import READERS, Room, room_in


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Room:
    return room_in(tmp_path, monkeypatch)


@pytest.mark.parametrize("file", ["run.json", "run.yaml", "log.jsonl", "stages/02-colours/metrics.json", "stages"])
def test_a_link_out_of_a_run_is_not_followed(room: Room, file: str) -> None:
    path = room.run / file
    kept = room.outside / "theirs"
    path.rename(kept)  # what it leads to is as good as the run's own, and not in it
    path.symlink_to(kept)
    for command, *flags in READERS:
        result = room.call(command, "runs/x", *flags)
        assert result.code == 2 and "symlink" in result.line, (command, result)
    assert "broken" in room.call("list", "runs").out


@pytest.mark.parametrize(
    "file", ["run.json", "log.jsonl", "run.log", "status.json", "stages/01-dbpedia/metrics.json", ".lock"]
)
@pytest.mark.parametrize("thing", ["pipe", "zero"])
def test_a_pipe_or_a_device_is_not_waited_for(room: Room, file: str, thing: str) -> None:
    path = room.run / file
    path.unlink(missing_ok=True)
    if thing == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    for command in (("report", "runs/x"), ("watch", "runs/x", "--once"), ("verify", "runs/x"), ("list", "runs")):
        codes = {"verify": (0, 1, 2), "list": (0,)}.get(command[0], (2,))
        assert room.faults(*command, codes=codes) == []


@pytest.mark.parametrize(
    "file", ["run.json", "run.yaml", "stages/01-dbpedia/metrics.json", "log.jsonl", "stages/01-dbpedia/DONE"]
)
def test_ten_gigabytes_are_refused_unread(room: Room, file: str) -> None:
    os.truncate(room.run / file, 10 * 2**30)
    for command in (("report", "runs/x"), ("eval", "runs/x"), ("verify", "runs/x"), ("list", "runs")):
        codes = {
            "verify": (1,),
            "list": (0,),
            "report": (0,) if file.endswith(("run.yaml", "log.jsonl", "DONE")) else (2,),
        }.get(command[0], (2,))
        assert room.faults(*command, codes=codes) == []


def test_a_plugin_that_a_run_names_is_not_run(room: Room) -> None:
    (room.case / "evil.py").write_text(f"open({str(room.outside / 'ran')!r}, 'w')")
    with (room.run / "run.yaml").open("a") as file:
        file.write("plugins: [evil.py]\n")
    text = (room.run / "run.yaml").read_text().replace("plugins: []\n", "", 1)
    (room.run / "run.yaml").write_text(text)
    for command in ("eval", "verify"):
        assert room.faults(command, "runs/x", codes=(1, 2)) == []
    assert "are run only if you say so" in room.call("eval", "runs/x").line
    assert not (room.outside / "ran").exists()


def test_that_a_run_trusts_code_of_its_model_is_no_reason_to_run_it(room: Room) -> None:
    text = (room.run / "run.yaml").read_text()
    (room.run / "run.yaml").write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    line = room.call("eval", "runs/x").line
    assert "run.yaml:" in line and "is run only if you say so" in line and "--trust-remote-code" in line
    said = room.call("eval", "runs/x", "--trust-remote-code")
    assert said.code == 2 and "no file" in said.line, "the next thing that is wrong with it"


@pytest.mark.parametrize("command", ["eval", "verify", "analyze"])
def test_what_reads_a_run_fetches_nothing(room: Room, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module(f"cl_runner.commands.{command}")
    function = {"eval": "evaluate"}.get(command, command)
    seen: list[bool] = []
    monkeypatch.setattr(module, function, lambda *given, **named: seen.append(nothing_is_fetched()))
    room.call(command, "runs/x")
    assert seen == [True] and not nothing_is_fetched()


def test_the_local_cache_alone_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from cl_runner.tasks import benchmark, hub_rows

    def asked(*given: Any, **named: Any) -> None:
        raise AssertionError("the hub was asked")

    for name in ("model_info", "dataset_info"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, asked)
    with cache_alone():
        with pytest.raises(UserError, match="evil/model is not in the local cache, and what a run's folder"):
            check(locate(ModelConfig(name="evil/model")))
        with pytest.raises(UserError, match="is not in the local cache, and what a run's folder names is not fetched"):
            hub_rows.read(benchmark.get("dbpedia"), "test", 1)


def test_hashes_and_references_name_files_of_the_run_alone(room: Room) -> None:
    outside = "../../../../outside/secret.json"
    done = room.run / "stages/01-dbpedia/DONE"
    done.write_text(done.read_text().replace("metrics.json", outside))
    assert f"DONE names '{outside}', which is not in it" in room.call("forgotten", "runs/x").line
    room.seal()
    reference = {"dbpedia": {"file": "../../../outside/secret.json", "sha256": "0" * 64}}
    room.edit("stages/02-colours/state.json", lambda data: {**data, "kept": reference})
    assert (
        "kept.dbpedia.file is not as a run writes it"
        in room.call("analyze", "runs/x").out.replace("\n", " ") + room.call("analyze", "runs/x").err
    )
    room.edit("stages/02-colours/state.json", lambda data: {**data, "kept": {}})
    (room.run / "stages/02-colours/answers.json").write_text('{"dbpedia": "../../adapter"}')
    room.seal()
    assert "is no stage" in room.call("report", "runs/x").line


@pytest.mark.parametrize("name", ["../../outside", "a/b", "..", "", "/etc", "a\0b"])
def test_the_name_of_a_stage_cannot_leave_its_folder(room: Room, name: str) -> None:
    room.edit("run.json", lambda data: data["stages"][0].update(name=name))
    for command, *flags in READERS:
        assert room.faults(command, "runs/x", *flags) == []


def test_to_write_into_a_run_is_not_to_write_where_its_links_lead(room: Room) -> None:
    shutil.copytree(room.run, room.case / "runs/y")
    shutil.rmtree(room.run / "stages")
    (room.run / "checkpoint").symlink_to(room.outside)  # what is kept of a stage is removed when it is committed
    (room.run / "stages").mkdir()
    run = RunDir(room.run)
    with pytest.raises(UserError, match="checkpoint is a symlink"), run.lock():
        pass
    assert (room.outside / "keep/me.txt").read_text() == "mine"


@pytest.mark.parametrize("target", [".report.html.draft", "report.html"])
def test_a_page_is_not_written_through_a_link(room: Room, target: str) -> None:
    (room.run / target).unlink(missing_ok=True)
    (room.run / target).symlink_to(room.outside / "secret.json")
    result = room.call("report", "runs/x", "--html")
    assert "of another" in (room.outside / "secret.json").read_text()
    assert result.code == (2 if target == "report.html" else 0)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("run.json", lambda data: data.update(seed=10**400)),
        ("run.json", lambda data: data.update(tasks="abc")),
        ("run.json", lambda data: data["identity"].update(data=[])),
        ("stages/01-dbpedia/metrics.json", lambda data: data["scores"].update(dbpedia=1e308)),
        ("stages/01-dbpedia/metrics.json", lambda data: data["counts"].update(dbpedia=-1)),
        ("stages/01-dbpedia/metrics.json", lambda data: data.update(seconds={"train": "long"})),
    ],
)  # fmt: skip
def test_what_a_file_holds_is_of_its_type_and_size(room: Room, file: str, change: Any) -> None:
    room.edit(file, change)
    result = room.call("report", "runs/x", "--json")
    assert result.code == 2 and "is not as a run writes it" in result.line


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 100_000])
def test_numbers_that_are_none_and_depths_that_nobody_writes(room: Room, text: str) -> None:
    file = room.run / "stages/01-dbpedia/metrics.json"
    file.write_text('{"scores": {"dbpedia": ' + text + "}}")
    result = room.call("report", "runs/x")
    assert result.code == 2 and "metrics.json: broken JSON" in result.line and len(result.line) < 1100
