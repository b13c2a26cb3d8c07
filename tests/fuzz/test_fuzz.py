"""Some hundred cases of the fuzzer in every run of the tests, and what it found in longer ones, each by its name."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st

from cl_runner.config.schema import ModelConfig
from cl_runner.config.yamlfile import parse, parse_value
from cl_runner.errors import UserError
from cl_runner.models.locate import check, locate
from cl_runner.settings.layers import from_sets
from cl_runner.terminal.escapes import shown
from cl_runner.terminal.masking import masked
from tests.command_line import call
from tests.fuzz import inputs, oracle
from tests.fuzz.__main__ import _missing, run_case, shares, table
from tests.fuzz.surfaces import SURFACES
from tests.security.room import room_in

CASES = 20  # of each surface


@pytest.mark.parametrize("surface", SURFACES)
def test_cases(surface: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    room = tmp_path.resolve()
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    for name, place in {"HOME": "home", "CL_RUNNER_CACHE": "cache"}.items():
        monkeypatch.setenv(name, str(room / place))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    oracle.hook()
    found = [run_case(surface, number, 99, room) for number in range(CASES)]
    assert [row for row in found if row["faults"]] == []


def test_the_same_seed_makes_the_same_case(tmp_path: Path) -> None:
    for surface, make in SURFACES.items():
        made = []
        for place in ("one", "two"):
            folder = tmp_path / place / surface.replace(" ", "-")
            folder.mkdir(parents=True)
            case = make(folder, random.Random(f"0/{surface}/3"))
            files = {
                path.name: os.lstat(path).st_size
                for path in folder.rglob("*")
                if not path.is_symlink() and path.is_file()
            }
            made.append((case.arguments, case.about, files))
        assert made[0] == made[1]


def test_the_oracle_sees_what_is_wrong(tmp_path: Path) -> None:
    """A fuzzer that finds nothing has to be able to."""
    room = tmp_path.resolve() / "room"
    folder, beside = room / "case", tmp_path.resolve() / "beside"
    for each in (folder, room / "outside", beside):
        each.mkdir(parents=True)
    oracle.hook()

    def does(function: Any) -> str:
        return " ".join(oracle.faults(oracle.Case("", function=function), folder, room)[0])

    assert does(lambda: None) == ""
    assert "raised ValueError" in does(lambda: int("x"))
    assert "wrote" in does(lambda: (beside / "x").write_text("x"))
    assert "wrote outside" in does(lambda: (room / "outside/x").write_text("x"))
    assert "wrote x" in does(lambda: (folder / "x").write_text("x"))
    assert "socket.connect" in does(lambda: __import__("socket").create_connection(("127.0.0.1", 1), 1))
    assert "subprocess.Popen" in does(lambda: __import__("subprocess").run(["true"], check=True))


def test_counts_are_told_by_surface() -> None:
    assert sum(shares(20_000).values()) == 20_000
    rows: list[dict[str, object]] = [
        {"surface": "sets", "code": 2, "faults": []},
        {"surface": "sets", "code": 1, "faults": ["x"]},
    ]
    there = [{"surface": "sets", "number": number} for number in (0, 1, 5)]
    missing = [part for part in _missing(20_000, there) if part[0] == "sets"]
    assert missing == [("sets", 2, 5), ("sets", 6, 606), ("sets", 606, 1206), ("sets", 1206, shares(20_000)["sets"])]
    assert "| sets | 2 | 0 | 1 | 1 | 1 |" in table(rows) and "| all | 2 |" in table(rows)


@pytest.mark.parametrize("read", [parse, parse_value])
def test_any_text_as_yaml_and_as_a_value(read: Callable[[str, str], Any]) -> None:
    @how(max_examples=100)
    @given(st.text())
    def check(text: str) -> None:
        try:
            read(text, "x")
        except UserError as error:
            assert "\n" not in str(error)

    check()


@how(max_examples=100)
@given(st.lists(st.text(), max_size=3))
def test_any_text_as_a_setting(words: list[str]) -> None:
    try:
        from_sets(words)
    except UserError as error:
        assert "\n" not in str(error)


@how(max_examples=150)
@given(st.text())
def test_any_text_is_shown_and_masked(text: str) -> None:
    assert not oracle.STEERING.search(shown(text)) and shown(shown(text)) == shown(text)
    assert masked(masked(text)) == masked(text)


# What it found, each as it was found.


def test_a_run_that_names_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = room_in(tmp_path, monkeypatch)
    (room.run / "run.yaml").write_text("{}\n")
    for command, codes in (("eval", (2,)), ("verify", (1,))):
        assert room.faults(command, "runs/x", codes=codes) == []


def test_a_run_that_does_not_say_what_it_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = room_in(tmp_path, monkeypatch)
    file = room.run / "run.json"
    about = json.loads(file.read_text())
    for key in ("identity", "tasks"):
        file.write_text(json.dumps({name: value for name, value in about.items() if name != key}))
        assert room.faults("eval", "runs/x", codes=(2,)) == []


def test_weights_of_a_run_that_are_broken_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = room_in(tmp_path, monkeypatch)
    file = room.run / "stages/02-colours/adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F\x0132', 1))
    room.seal()
    assert room.faults("compare", "runs/x", "--json") == []


def test_a_name_of_a_model_longer_than_names_may_be(tmp_path: Path) -> None:
    result = call("config", "show", "--order", "order1", "--set", f"model.name={'9' * 5000}x", cwd=tmp_path)
    assert result.code in (0, 2) and "Traceback" not in result.err
    result = call("train", "--dry-run", "--order", "order1", "--data", "synthetic", "--model", "9" * 5000, cwd=tmp_path)
    assert result.code == 2 and result.line


def test_a_name_of_a_run_longer_than_names_may_be(tmp_path: Path) -> None:
    for command in ("verify", "report", "eval", "analyze", "compare", "watch"):
        result = call(command, "a" * 5000, cwd=tmp_path)
        assert result.code == 2 and result.line
    result = call("analyze", "a" * 5000, "b" * 5000, cwd=tmp_path)
    assert result.code == 2 and "nothing to analyse" in result.line


def test_a_models_architecture_that_is_no_list(tmp_path: Path) -> None:
    inputs.write(inputs.model_folder(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": 5}))
    assert check(locate(ModelConfig(name=str(tmp_path)))).encoder_decoder


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("run.json", lambda data: data["metrics"].pop("dbpedia")),
        ("stages/02-colours/metrics.json", lambda data: data.update(parameters={"trained": 5})),
    ],
)
def test_a_key_that_only_a_table_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, change: Callable[[Any], Any]
) -> None:
    room = room_in(tmp_path, monkeypatch)
    room.edit(file, lambda data: change(data) and None)
    for command in (("report", "runs/x"), ("watch", "runs/x", "--once"), ("report", "runs/x", "--markdown")):
        assert room.faults(*command) == []


def test_a_folder_in_the_place_of_weights_and_a_log_of_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = room_in(tmp_path, monkeypatch)
    log = room.run / "log.jsonl"
    for line in (b"0.5\n", b'{"stage": "dbpedia", "step": 1, "memory_mb": "much"}\n'):
        log.write_bytes(line)
        assert room.faults("compare", "runs/x", "--latex", codes=(0, 2)) == []
    weights = room.run / "stages/02-colours/adapter/adapter_model.safetensors"
    weights.unlink()
    weights.mkdir()
    room.seal()
    assert room.faults("compare", "runs/x", "--json") == []


def test_ten_gigabytes_of_answers_are_not_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = room_in(tmp_path, monkeypatch)
    os.truncate(room.run / "stages/02-colours/predictions.jsonl", 10 * 2**30)
    for command in ("rescore", "forgotten"):
        assert "predictions.jsonl: is larger than 2048 MiB" in room.call(command, "runs/x").line


def test_a_run_without_a_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = room_in(tmp_path, monkeypatch)
    room.edit("run.json", lambda data: data["identity"].pop("model") and None)
    assert room.faults("analyze", "runs/x", codes=(0, 2), may_write=("runs/x/analysis.json",)) == []
