"""`list runs`: which runs, in which order, how they stand, and in what their settings differ."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cl_runner.errors import UserError
from cl_runner.runs.listing import listing
from tests.command_line import call
from tests.commands.test_errors import refused
from tests.run_folders import RunFolder

# Of each run: the answers of its stages, as how many of two rows are right of each task.
SCORES = {
    "best": [(2,), (2, 2), (2, 2, 2)],  # AA 100, forgetting 0
    "worst": [(2,), (0, 2), (0, 0, 2)],  # AA 33.3, forgetting 100
    "middle": [(2,), (1, 2), (1, 2, 2)],  # AA 83.3, forgetting 25
    "begun": [(1,)],  # AA 50, nothing to forget
    "new": [],
}
TASKS = ["dbpedia", "amazon", "agnews"]
MADE: list[dict[str, Any]] = [
    {"name": "middle", "method": "olora", "seed": 2, "sets": ["training.lr=3e-3"]},
    {"name": "worst", "method": "seqlora", "seed": 1, "sets": ["training.lr=1e-2"]},
    {"name": "new", "method": "olora", "seed": 3,
     "sets": ["training.lr=3e-3", "method.lambda1=2", "output.log_every=7"]},
    {"name": "best", "method": "seqlora", "seed": 2, "sets": ["training.lr=1e-2", "adapter.r=8"]},
    {"name": "begun", "method": "olora", "seed": 1, "order": "name: two\ntasks: [dbpedia, amazon]",
     "sets": ["training.lr=3e-3", "tasks.amazon.training.epochs=2"]},
]  # fmt: skip
NEWEST = [made["name"] for made in reversed(MADE)]


def make(root: Path, **given: Any) -> RunFolder:
    run = RunFolder(root, **given)
    for stage in SCORES.get(run.name, []):
        run.commit(
            {
                task: [("Film", "Film" if i < right else "x") for i in range(2)]
                for task, right in zip(TASKS, stage, strict=False)
            }
        )
    return run


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("list")
    for i, given in enumerate(MADE):
        run = make(cwd / "runs", **given)
        if run.name == "begun":
            run.dir.set_status("failed")
        if run.name == "new":
            run.dir.set_status("running", pid=1)
        for file in ("run.json", "status.json"):
            if (run.path / file).exists():
                os.utime(run.path / file, (1_700_000_000 + i, 1_700_000_000 + i))
    return cwd


def names(cwd: Path, *flags: str) -> list[str]:
    return [run["name"] for run in call("list", "runs", *flags, "--json", cwd=cwd).json["runs"]]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ((), NEWEST),
        (("--method", "olora"), ["begun", "new", "middle"]),
        (("--method", "olora,seqlora"), NEWEST),
        (("--method", "olora", "--method", "seqlora"), NEWEST),
        (("--order", "two"), ["begun"]),
        (("--order", "three", "--method", " olora , "), ["new", "middle"]),
        (("--state", "done"), ["best", "worst", "middle"]),
        (("--state", "unfinished"), ["begun", "new"]),
        (("--state", "stopped"), ["new"]),
        (("--state", "failed,done"), ["begun", "best", "worst", "middle"]),
        (("--state", "running"), []),
        (("--state", "broken"), []),
        (("--sort", "time"), NEWEST),
        (("--sort", "name"), ["begun", "best", "middle", "new", "worst"]),
        (("--sort", "AA"), ["best", "middle", "begun", "worst", "new"]),
        (("--sort", "aa"), ["best", "middle", "begun", "worst", "new"]),
        (("--sort", "forgetting"), ["best", "middle", "worst", "begun", "new"]),
        (("--sort", "state"), ["best", "worst", "middle", "new", "begun"]),
        (("--sort", "seed,AA"), ["begun", "worst", "best", "middle", "new"]),
        (("--sort", "training.lr", "--sort", "AA"), ["middle", "begun", "new", "best", "worst"]),
        (("--sort", "order,method"), ["new", "middle", "best", "worst", "begun"]),
        (("--sort", "method.lambda1,name"), ["begun", "middle", "new", "best", "worst"]),
        (("--sort", "training.schedule,name"), ["begun", "best", "middle", "new", "worst"]),  # the same in all
        (("--sort", "adapter.r", "--method", "seqlora"), ["best", "worst"]),
    ],
    ids=" ".join,
)
def test_filters_and_order(cwd: Path, flags: tuple[str, ...], wanted: list[str]) -> None:
    assert names(cwd, *flags) == wanted


def test_what_differs_is_of_the_runs_that_are_listed(cwd: Path) -> None:
    def differs(*flags: str) -> dict[str, Any]:
        return {run["name"]: run["differs"] for run in call("list", "runs", *flags, "--json", cwd=cwd).json["runs"]}

    preset = 32  # the rank of the preset for the embedded model
    assert differs() == {
        "begun": {"adapter.r": preset, "method.lambda1": 0.1, "training.lr": 3e-3, "tasks.amazon.training.epochs": 2},
        "best": {"adapter.r": 8, "training.lr": 1e-2},
        "new": {"adapter.r": preset, "method.lambda1": 2.0, "training.lr": 3e-3},
        "worst": {"adapter.r": preset, "training.lr": 1e-2},
        "middle": {"adapter.r": preset, "method.lambda1": 0.1, "training.lr": 3e-3},
    }  # fmt: skip
    assert list(differs()["begun"]) == ["adapter.r", "method.lambda1", "training.lr", "tasks.amazon.training.epochs"]
    assert differs("--order", "three", "--method", "olora") == {
        "new": {"method.lambda1": 2.0},
        "middle": {"method.lambda1": 0.1},
    }
    assert differs("--method", "seqlora") == {"best": {"adapter.r": 8}, "worst": {"adapter.r": preset}}
    assert differs("--order", "two") == {"begun": {}}, "one run differs from no other"


def test_json_is_whole(cwd: Path) -> None:
    [run] = call("list", "runs", "--state", "failed", "--json", cwd=cwd).json["runs"]
    assert run == {
        "name": "begun", "method": "olora", "order": "two", "model": "tiny-t5", "seed": 1, "stage": 1, "stages": 2,
        "step": 0, "state": "failed", "average_accuracy": 50.0, "forgetting": None, "undefined": [], "synthetic": False,
        "chosen": False, "trained_at": "2023-11-14T22:13:24Z", "differs": {},
    }  # fmt: skip
    [worst] = [run for run in call("list", "runs", "--json", cwd=cwd).json["runs"] if run["name"] == "worst"]
    assert worst["average_accuracy"] == pytest.approx(100 / 3) and worst["forgetting"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--method", "olra"), ("--method olra", "no run in runs", "there are olora, seqlora", "did you mean 'olora'")),
        (("--method", "olora,replay"), ("--method replay", "there are olora, seqlora")),
        (("--order", "order1"), ("--order order1", "there are two, three")),
        (("--state", "dnoe"), ("--state dnoe", "done, running, stopped, failed, unfinished, broken", "'done'")),
        (
            ("--sort", "trainig.lr"),
            ("--sort trainig.lr", "time, name", "AA, forgetting", "training.lr", "did you mean"),
        ),
        (("--sort", "size"), ("--sort size", "method.lambda1", "another setting")),
        (("--method", " , "), ("--method", "names nothing")),
    ],
)
def test_what_there_is_not_is_one_line(cwd: Path, flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(call("list", "runs", *flags, cwd=cwd), words)
    refused(call("list", "runs", *flags, "--json", cwd=cwd), words)


@pytest.mark.parametrize("flag", ["--method", "--order", "--state", "--sort"])
def test_flags_go_with_runs_alone(cwd: Path, flag: str) -> None:
    refused(call("list", "methods", flag, "done", cwd=cwd), (flag, "list runs", "list methods"))


def test_no_run_at_all_is_no_error(tmp_path: Path, cwd: Path) -> None:
    assert (
        call("list", "runs", "--method", "olora", "--sort", "x.y", cwd=tmp_path).out
        == "there are no such runs in runs\n"
    )
    assert call("list", "runs", "--sort", "AA", cwd=tmp_path).out == "there are no runs in runs\n"
    assert call("list", "runs", "--state", "running", cwd=cwd).out == "there are no such runs in runs\n"


def test_running_is_what_a_process_holds(tmp_path: Path) -> None:
    """A run that says it is running, and whose process is gone, was stopped."""
    run = make(tmp_path, name="begun")
    run.dir.set_status("running", pid=1)
    assert [one.state for one in listing(tmp_path).runs] == ["stopped"]
    with (run.path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert [one.state for one in listing(tmp_path, states=["unfinished"]).runs] == ["running"]
    assert listing(tmp_path, states=["running"]).runs == []


def test_broken_runs_are_listed_and_go_last(tmp_path: Path) -> None:
    make(tmp_path, name="best", seed=7)
    (make(tmp_path, name="bad").path / "run.json").write_text("{")
    for sort in ("seed", "AA", "method", "training.lr", "state"):
        assert [run.name for run in listing(tmp_path, sort=[sort]).runs] == ["best", "bad"], sort
    assert [run.name for run in listing(tmp_path, states=["broken"]).runs] == ["bad"]
    assert listing(tmp_path, methods=["olora"]).runs[0].name == "best"
    with pytest.raises(UserError, match=r"there are olora$"):
        listing(tmp_path, methods=["-"])


def test_settings_of_an_earlier_version_are_the_defaults_of_today(tmp_path: Path) -> None:
    old = make(tmp_path, name="old")
    lines = old.dir.config_file.read_text().splitlines()
    gone = ("  balanced: ", "  rslora: ", "  dropout_by: ", "  lambda2: ")
    old.dir.config_file.write_text("\n".join(line for line in lines if not line.startswith(gone)) + "\n")
    make(tmp_path, name="now")
    found = listing(tmp_path)
    assert found.differing == ["training.dropout_by"], "which was another then"
    assert {run.name: run.differs for run in found.runs} == {
        "old": {"training.dropout_by": "micro"},
        "now": {"training.dropout_by": "row"},
    }


def test_a_method_that_is_not_here_has_its_settings_all_the_same(tmp_path: Path) -> None:
    for name, lr in (("a", "3e-3"), ("b", "1e-2")):
        run = make(tmp_path, name=name, sets=[f"training.lr={lr}", f"method.lambda1={len(name + lr)}"])
        about = json.loads((run.path / "run.json").read_text())
        (run.path / "run.json").write_text(json.dumps({**about, "method": "somebodys"}))
        file = run.dir.config_file
        file.write_text(file.read_text().replace("name: olora", "name: somebodys"))
    assert {run.name: run.differs for run in listing(tmp_path, methods=["somebodys"]).runs} == {
        "a": {"training.lr": 3e-3},
        "b": {"training.lr": 1e-2},
    }
    file.write_text("model: 3\n")
    assert [run.differs for run in listing(tmp_path, sort=["name"]).runs] == [{}, None]


def test_a_kind_has_its_own_settings_compared_with_its_own(tmp_path: Path) -> None:
    make(tmp_path, name="a", sets=["adapter.kind=oft", "adapter.block_size=8"])
    make(tmp_path, name="b")
    found = listing(tmp_path)
    assert "adapter.block_size" not in found.differing and "adapter.kind" in found.differing


def test_what_two_methods_call_the_same_is_compared_within_each(tmp_path: Path) -> None:
    for method in ("olora", "nlora"):
        make(tmp_path, name=method, method=method, sets=[f"method.lambda1={0.25 if method == 'olora' else 0.5}"])
    assert listing(tmp_path).differing == []
    make(tmp_path, name="third", method="nlora", sets=["method.lambda1=0.75"])
    assert {run.name: run.differs for run in listing(tmp_path, methods=["nlora"]).runs} == {
        "nlora": {"method.lambda1": 0.5},
        "third": {"method.lambda1": 0.75},
    }
