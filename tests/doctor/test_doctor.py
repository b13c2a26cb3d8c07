"""``cl-runner doctor`` in environments that are really broken: each culprit is named, and nothing takes it down."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from cl_runner.doctor import child, places
from cl_runner.doctor.asking import Answer, asked
from cl_runner.doctor.devices import _threads, devices, limit, ops, talking
from cl_runner.doctor.finding import Finding, as_text, ready
from cl_runner.doctor.hub import hub, unreached
from cl_runner.doctor.known import EXTRAS, NEEDED, known_versions, plain
from cl_runner.doctor.packages import extras, modules, packages
from tests.command_line import Result, call, environment, finish, start, tree, variables
from tests.packages import install

REPO = Path(__file__).parents[2]
FAR = {"HF_HUB_OFFLINE": "1"}


@contextmanager
def served(code: int) -> Iterator[tuple[str, list[str]]]:
    """A hub on 127.0.0.1 that answers everything so: its address, and what it was asked."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            seen.append(self.path)
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def found(result: Result) -> dict[str, dict[str, Any]]:
    return {each["what"]: each for each in result.json["findings"]}


def broken(cwd: Path, site: Path | str, *words: str, **env: str) -> Result:
    """``cl-runner`` where a folder hides installed packages."""
    path = os.pathsep.join([str(site), str(REPO)])
    return finish(start(*words, cwd=cwd, env=environment(PYTHONPATH=path, **FAR, **env)))


def hiding(site: Path, **modules: str) -> Path:
    """A folder of packages, each of which does this when it is imported."""
    for name, text in modules.items():
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text(text)
    return site


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Result, list[str], Path]]:
    """Here, with a hub that answers and a token."""
    cwd = tmp_path_factory.mktemp("healthy")
    with served(404) as (address, seen), variables(HF_ENDPOINT=address, HF_TOKEN="hf_" + "x" * 30, HF_HUB_OFFLINE=""):
        yield call("doctor", "--json", cwd=cwd), seen, cwd


def test_here_all_that_a_run_needs_is_there(healthy: tuple[Result, list[str], Path]) -> None:
    result, seen, cwd = healthy
    lines = found(result)
    assert result.code == 0 and result.json["ready"] is True and result.err == ""
    for package in NEEDED:
        assert lines[package.name]["state"] == "ok" and re.match(r"\d", lines[package.name]["said"]), package
    assert lines["gloo"] == {**lines["gloo"], "state": "ok", "said": "brings up a group"}
    assert "none is needed" in lines["compiled ops"]["said"]
    assert lines["hub"]["state"] == "ok" and seen == ["/"]
    assert lines["token"]["said"] == "there is one" and "hf_x" not in result.out
    assert tree(cwd) == {}


def test_each_line_that_is_not_fine_says_what_it_costs_and_what_to_do(
    healthy: tuple[Result, list[str], Path],
) -> None:
    for each in healthy[0].json["findings"]:
        assert (each["state"] == "ok") == (not each["costs"]) == (not each["do"]), each
    one = Finding("G", "it", "wrong", "said", "costs much", "do this", needed=True)
    text = as_text([Finding("G", "fine", "ok", "x"), one])
    assert text.splitlines() == [
        "G", "  ok      fine  x", "  wrong   it    said", "                costs much; do this",
        "not ready: nothing trains here as long as this is so: it",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise ImportError('libcudart.so.12: cannot open')", "cannot be imported: libcudart.so.12: cannot open"),
        ("import os; os.kill(os.getpid(), 4)", "cannot be imported: its process was ended by SIGILL"),
    ],
)
def test_a_broken_torch_is_the_one_culprit(tmp_path: Path, text: str, said: str) -> None:
    result = broken(tmp_path, hiding(tmp_path / "site", torch=text), "doctor", "--json")
    lines = found(result)
    assert result.code == 2 and result.err == ""
    assert lines["torch"]["state"] == "wrong" and lines["torch"]["said"].endswith(said)
    assert [name for name, each in lines.items() if each["needed"]] == ["torch"]
    assert "as it needs torch" in lines["peft"]["said"] and lines["datasets"]["state"] == "ok"
    assert "torch cannot be imported" in lines["GPU"]["said"]


def test_a_command_that_needs_what_is_broken_sends_to_the_doctor(tmp_path: Path) -> None:
    site = hiding(tmp_path / "site", torch="raise ImportError('undefined symbol: x')")
    words = ("train", "--order", "order1-three", "--preset", "tiny")
    result = broken(tmp_path, site, *words)
    assert (result.code, result.line) == (
        2, "cl-runner: undefined symbol: x (cl-runner doctor says what is missing here)",
    )  # fmt: skip
    site = hiding(tmp_path / "other", typer="raise ImportError('typer is no good')")
    result = broken(tmp_path, site, *words)
    assert (result.code, result.line) == (
        2, "cl-runner: typer is no good; cl-runner doctor says what is missing here",
    )  # fmt: skip


def test_without_any_package_each_one_is_missing(tmp_path: Path) -> None:
    """A Python that has nothing, not even what reads the command line."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "cl_runner", "doctor", "--json"],
        cwd=tmp_path, env=environment(PYTHONPATH=str(REPO), **FAR), capture_output=True, text=True, check=False,
    )  # fmt: skip
    result = Result(done.returncode, done.stdout, done.stderr)
    lines = found(result)
    assert result.code == 2 and result.err == ""
    assert [package.name for package in NEEDED if lines[package.name]["state"] != "missing"] == []
    assert lines["typer"]["do"] == 'pip install "typer"'
    assert all(lines[extra.name]["state"] == "missing" for extra in EXTRAS)


def test_a_broken_bitsandbytes_is_named_since_every_run_imports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "bitsandbytes", {}, "0.50.2")
    hiding(tmp_path, torch="compile = None", bitsandbytes="raise RuntimeError('CUDA Setup failed')", fine="")
    monkeypatch.syspath_prepend(str(tmp_path))
    jobs = [job for job in child.order(modules()) if job in ("torch", "bitsandbytes")]
    assert jobs == ["torch", "bitsandbytes"]
    answers = asked([*jobs, "fine"])
    assert answers["bitsandbytes"].error == "RuntimeError: CUDA Setup failed" and answers["fine"] == Answer("")
    line = next(each for each in extras(answers) if each.what == "qlora")
    assert (line.state, line.needed) == ("wrong", True) and "bitsandbytes 0.50.2 cannot be imported" in line.said


def test_an_import_that_hangs_or_dies_is_told_from_those_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = {"dies": "import os; os.abort()", "leaves": "import sys; sys.exit(3)"}
    hiding(tmp_path, hangs="import time; time.sleep(60)", fine="__version__ = '7'", **ends)
    monkeypatch.syspath_prepend(str(tmp_path))
    answers = asked(["dies", "leaves", "hangs", "fine"], seconds=3)
    assert answers["leaves"].error == "SystemExit: 3"
    assert answers["dies"].error.startswith("its process was ended by SIGABRT")
    assert answers["hangs"].error == "does not end within 3 s"
    assert answers["fine"] == Answer("7")


def test_versions_that_do_not_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "peft", {}, "0.3")
    install(tmp_path, "tiktoken", {}, known_versions()["tiktoken"])
    with (tmp_path / f"tiktoken-{known_versions()['tiktoken']}.dist-info" / "METADATA").open("a") as file:
        file.write("Requires-Dist: regex>=9999\nRequires-Dist: absent-package; extra == 'x'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = {each.what: each for each in packages({package.module: Answer("") for package in NEEDED})}
    assert lines["peft"].state == "wrong" and lines["peft"].said == "0.3, and peft>=0.21 is wanted"
    assert lines["tiktoken"].state == "wrong" and "wants regex>=9999, and there is" in lines["tiktoken"].said
    assert lines["rich"].state == "ok" and ready(list(lines.values()))


def test_another_version_than_was_tested_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "filelock", {}, "99.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = {each.what: each for each in packages({package.module: Answer("") for package in NEEDED})}
    assert lines["filelock"].said == f"99.0 (tested with {known_versions()['filelock']})"


def test_its_tables_are_those_of_the_package() -> None:
    text = (REPO / "pyproject.toml").read_text()
    [block] = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.S | re.M)
    assert {package.name for package in NEEDED} == set(re.findall(r'^  "([\w-]+)', block, re.M))
    [block] = re.findall(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.S | re.M)
    there = {
        name: set(re.findall(r'"([\w-]+)[>"]', listed))
        for name, listed in re.findall(r"^([\w-]+) = \[(.*?)\]", block, re.S | re.M)
    }
    ours = {extra.name: {package.name for package in extra.packages} for extra in EXTRAS}
    assert ours == {name: listed for name, listed in there.items() if name not in ("dev", "docs", "tracking")}
    assert {plain(package.name) for package in NEEDED} <= set(known_versions())


def test_extras_that_are_not_installed(tmp_path: Path) -> None:
    [wandb] = [each for each in extras({}) if each.what == "wandb"]
    if wandb.state == "ok":
        pytest.skip("wandb is installed")
    assert (wandb.state, wandb.needed) == ("missing", False) and wandb.do == 'pip install "cl-runner[wandb]"'


# What torch and the driver say of GPUs that nobody has here.
GPU = {"name": "H100", "free": 70 * 2**30, "memory": 80 * 2**30, "error": ""}
NO_GPU, OLD = {"gpus": 0, "cuda": None}, {"gpus": 1, "cuda": 12040}
SEES_NONE = {"built_for": "12.8", "available": False, "warned": "", "gpus": [], "threads": 1}


@pytest.mark.parametrize(
    ("torch", "driver", "state", "needed", "words"),
    [
        ({}, NO_GPU, "ok", False, "none, and no driver"),
        ({"gpus": [GPU]}, OLD, "ok", False, "H100, 70.0 GB of 80.0 GB free; torch for CUDA 12.8, driver for 12.4"),
        ({"built_for": ""}, OLD, "wrong", True, "for CUDA 12.4, and torch is a build for CPUs"),
        ({"built_for": "13.0"}, OLD, "wrong", True, "built for CUDA 13.0, and the driver runs CUDA 12.4"),
        ({"warned": "Error 803"}, OLD, "wrong", True, "torch (CUDA 12.8) sees no GPU: Error 803"),
        ({}, {"gpus": 2, "cuda": None}, "wrong", True, "sees no GPU: no libcuda"),
        ({"gpus": [{**GPU, "error": "no kernel"}]}, OLD, "wrong", True, "computes nothing: no kernel"),
    ],
)
def test_gpus(
    torch: dict[str, Any], driver: dict[str, Any], state: str, needed: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    answers = {"devices()": Answer({**SEES_NONE, **torch}), "driver()": Answer({"error": "no libcuda", **driver})}
    line = next(devices(answers))
    assert (line.state, line.needed) == (state, needed) and words in line.said, line
    if state == "wrong" and not torch.get("gpus"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert next(devices(answers)).state == "ok"


def test_several_gpus_need_nccl_and_shared_memory(tmp_path: Path) -> None:
    answers = {
        "devices()": Answer({**SEES_NONE, "gpus": [GPU, GPU]}),
        "collectives()": Answer({"nccl": "", "gloo": "no interface"}),
    }
    gloo, nccl, shared = talking(answers, shm=tmp_path / "absent")
    assert (gloo.state, gloo.needed) == ("wrong", False)  # on GPUs it is NCCL that is used
    assert (nccl.state, nccl.needed) == ("missing", True)
    assert (shared.state, shared.needed) == ("missing", False)
    gloo, nccl, shared = talking({"collectives()": Answer({"nccl": "", "gloo": "no interface"})}, shm=tmp_path)
    assert (gloo.state, gloo.needed, nccl.state, shared.state) == ("wrong", True, "ok", "ok")


@pytest.mark.parametrize(
    ("cores", "limited", "asked_for", "threads", "state", "words"),
    [
        (8, None, None, 8, "ok", "8 on 8 cores (OMP_NUM_THREADS is not set)"),
        (8, None, "2", 2, "ok", "2 on 8 cores"),
        (2, None, "16", 16, "wrong", "16 threads on 2 cores"),
        (64, 4.0, None, 64, "wrong", "of which a container may use 4"),
        (8, None, "many", 8, "wrong", "OMP_NUM_THREADS=many is no number"),
        (8, None, "0", 8, "wrong", "is no number from 1"),
        (8, None, "4,2", None, "ok", "4 on 8 cores"),
    ],
)
def test_threads(
    cores: int, limited: float | None, asked_for: str | None, threads: int | None, state: str, words: str
) -> None:
    line = _threads(cores, limited, asked_for, threads)
    assert line.state == state and words in line.said and not line.needed


def test_what_a_container_may_use(tmp_path: Path) -> None:
    assert limit(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert limit(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert limit(tmp_path) == 1.5


def test_a_processor_without_bf16(tmp_path: Path) -> None:
    (tmp_path / "with").write_text("flags : fpu avx512_bf16\n")
    (tmp_path / "without").write_text("flags : fpu avx2\n")
    said = [list(devices({}, tmp_path / name))[-1].said for name in ("with", "without")]
    assert said[0].startswith("the processor has it") and said[1].startswith("the processor has none")


def test_ops_are_never_needed() -> None:
    [line] = ops({"ops()": Answer({"cpu_adam": True, "async_io": False})})
    assert line.state == "ok" and line.said.startswith("none is needed") and "not: async_io" in line.said


@pytest.mark.parametrize(("code", "answers"), [(200, True), (401, True), (404, True), (503, False), (407, False)])
def test_a_hub_that_answers(code: int, answers: bool) -> None:
    with served(code) as (address, seen):
        assert (unreached(address, 5) == "") == answers
        assert seen == ["/"]


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        assert unreached(f"http://127.0.0.1:{silent.getsockname()[1]}", 5) == "Connection refused"
        silent.listen()  # takes the connection, and says nothing
        assert unreached(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.2) == "no answer within 0.2 s"
    assert "unknown url type" in unreached("nonsense", 1)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://me:geheim-geheim@127.0.0.1:1")
    line = next(hub(1))
    assert (line.state, line.needed) == ("missing", False) and "geheim" not in str(line)


def test_a_name_that_is_looked_up_for_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    end = Event()

    def look_up(*_: Any, **__: Any) -> Any:
        end.wait(60)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    try:
        assert unreached("http://some.where", 0.1) == "no answer within 0.2 s"
    finally:
        end.set()


def test_a_hub_is_not_asked_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(200) as (address, seen):
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        line = next(hub(1))
    assert line.state == "ok" and "HF_HUB_OFFLINE=1" in line.said and seen == []


def test_a_token_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert list(hub())[1].said.startswith("none")
    (tmp_path / "token").write_text("hf_" + "y" * 30)
    assert list(hub())[1].said == "there is one"


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    runs = next(places.places(tmp_path / "file" / "runs"))
    assert (runs.state, runs.needed) == ("wrong", True) and "file is no folder" in runs.said
    # Nobody may make files there, root neither.
    runs = next(places.places(Path("/sys/runs")))
    assert (runs.state, runs.needed) == ("wrong", True) and runs.said.startswith("/sys/runs: ")
    assert next(places.places(tmp_path / "a" / "b")).state == "ok" and not (tmp_path / "a").exists()


def test_a_full_disk(tmp_path: Path) -> None:
    words = ["mount", "-t", "tmpfs", "-o", "size=32k", "cl-runner-doctor", str(tmp_path)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        runs = next(places.places(tmp_path / "runs"))
        left = list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert (runs.state, runs.needed) == ("wrong", True) and "the disk is full" in runs.said and left == []


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def nobody(_: int) -> Any:
        raise KeyError

    for name in ("HOME", "CL_RUNNER_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    lines = {each.what: each for each in places.places(Path("/tmp/runs"))}
    for name in ("cl-runner's cache", "hub's cache"):
        assert (lines[name].state, lines[name].needed) == ("missing", False) and lines[name].do.startswith("set ")


def test_no_folder_to_be_in(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    program = "import os; os.rmdir(os.getcwd()); import sys; from cl_runner.__main__ import main; main()"
    process = start(
        "doctor", "--json", cwd=gone, env=environment(PYTHONPATH=str(REPO), **FAR), program=("-S", "-c", program)
    )
    result = finish(process)
    assert result.code == 2 and found(result)["runs"]["state"] == "wrong"
    assert json.loads(result.out)["summary"].startswith("not ready")
