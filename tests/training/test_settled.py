"""Answers that no later stage changes are taken over: every file is as if all rows had been asked again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cl_runner import registry
from cl_runner.atomic import read_json
from cl_runner.config.schema import RunConfig
from cl_runner.methods import METHODS, make_method
from cl_runner.training.data import Data
from cl_runner.training.plan import Plan
from cl_runner.training.stage import StageRun
from tests.breadth import wide
from tests.command_line import NANO, ORDER, STAGES, call
from tests.distributed import command_on_ranks

# The same methods, which ask everything at every stage.
ASKING = """
from cl_runner.methods.pertask import PerTask
from cl_runner.methods.progprompt.method import ProgressivePrompts


class AskingPerTask(PerTask):
    name, settled = "asking-pertask", "none"


class AskingPrompts(ProgressivePrompts):
    name, settled = "asking-progprompt", "none"
"""
FUTURE = "--set=eval.future=true"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    registry.forget_plugins()


def words(method: str, *more: str) -> tuple[str, ...]:
    plugin = ("--plugin", "asking.py") if method.startswith("asking") else ()
    return ("train", "--order", "three.yaml", "--method", method, "--name", method, *plugin, *NANO, *more)


def folder(at: Path) -> Path:
    at.mkdir(exist_ok=True)
    (at / "three.yaml").write_text(ORDER)
    (at / "asking.py").write_text(ASKING)
    return at


def trained(cwd: Path, method: str, *more: str) -> Path:
    done = call(*words(method, *more), cwd=cwd)
    assert done.code == 0, done.err
    return cwd / "runs" / method


def said(run: Path) -> dict[str, Any]:
    """All that a run says of answers: text for text, but for how many of them were taken over, and the time."""
    found: dict[str, Any] = {name: (run / name).read_bytes() for name in ("matrix.csv", "metrics.json")}
    for stage in sorted((run / "stages").iterdir()):
        about = read_json(stage / "metrics.json")
        about.pop("settled_rows", None)
        about.pop("seconds", None)
        about.get("parameters", {}).get("on_disk", {}).pop("state.json", None)  # it has the method's name in it
        found[stage.name] = ((stage / "predictions.jsonl").read_bytes(), about)
    return found


def settled(run: Path) -> list[int]:
    return [read_json(stage / "metrics.json").get("settled_rows", 0) for stage in sorted((run / "stages").iterdir())]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str | None]]:
    """Stage and task of each call that answers."""
    calls: list[tuple[int, str | None]] = []
    plain = StageRun.answer

    def answer(self: StageRun, examples: Any, task: str | None = None, *more: Any) -> list[str]:
        calls.append((self.index, task))
        return plain(self, examples, task, *more)

    monkeypatch.setattr(StageRun, "answer", answer)
    return calls


@pytest.mark.parametrize(
    ("method", "more", "taken", "often"),
    [
        pytest.param("pertask", (), [0, 4, 8], 3, marks=wide),
        ("pertask", (FUTURE, "--model", "tiny-llama"), [0, 8, 8, 8], 6),  # the base's answers too
        pytest.param("pertask", (FUTURE, "--set=method.train=full"), [0, 8, 8, 8], 6, marks=wide),
        pytest.param("progprompt", (), [0, 4, 8], 3, marks=wide),
        ("progprompt", (FUTURE,), [0, 0, 4, 8], 9),  # those not learned yet are answered with every new prompt
    ],
    ids=["pertask", "base", "full", "progprompt", "prompts-to-come"],
)
def test_as_if_asked_again(
    tmp_path: Path, asked: list[Any], method: str, more: tuple[str, ...], taken: list[int], often: int
) -> None:
    """Straight through, and gone on with after a stage, whose answers then lie on disk alone."""
    cwd = folder(tmp_path)
    run = trained(cwd, method, *more)
    assert settled(run) == taken
    assert len(asked) == often
    plain = trained(cwd, f"asking-{method}", *more)
    assert not any(settled(plain)) and len(asked) > 2 * often - 1
    assert said(run) == said(plain)
    whole = said(run)
    shutil.rmtree(run / "stages" / "03-agnews")
    asked.clear()
    assert call(*words(method, *more), cwd=cwd).code == 0
    assert said(run) == whole and settled(run) == taken and asked == [(2, "agnews")]
    # What verifies asks.
    asked.clear()
    found = call("eval", str(run), "--json", cwd=cwd).json
    assert not any(found["differing_rows"].values()) and [task for _, task in asked] == STAGES


def test_two_ranks(tmp_path: Path) -> None:
    cwd = folder(tmp_path)
    runs = []
    for method in ("pertask", "asking-pertask"):
        first, second = command_on_ranks(2, *words(method), cwd=cwd)
        assert (first.code, second.code) == (0, 0), first.err + second.err
        runs.append(cwd / "runs" / method)
    assert settled(runs[0]) == [0, 4, 8] and said(runs[0]) == said(runs[1])


def test_answers_that_are_not_what_was_committed(tmp_path: Path) -> None:
    cwd = folder(tmp_path)
    run = trained(cwd, "pertask")
    shutil.rmtree(run / "stages" / "03-agnews")
    file = run / "stages" / "01-dbpedia" / "predictions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "output": "other"}) + "\n" for row in rows))
    done = call(*words("pertask"), cwd=cwd)
    assert done.code == 2
    assert "01-dbpedia is damaged: predictions.jsonl is not what was committed" in done.err


def test_where_a_stage_reads_prompts_in_another_way(tmp_path: Path) -> None:
    def settled_of(**settings: Any) -> list[dict[str, int]]:
        config = RunConfig.model_validate({"method": {"name": "pertask"}, **settings})
        method = make_method(config)
        data = Data(dict.fromkeys("abc"), {}, {}, {})  # type: ignore[arg-type]
        plan = Plan(config, "abc", method, None, tuple(method.plan("abc")), data)  # type: ignore[arg-type]
        return [plan.settled(index) for index in range(3)]

    assert settled_of() == [{}, {"a": 0}, {"a": 0, "b": 1}]
    assert settled_of(eval={"future": True}) == [{"b": -1, "c": -1}, {"a": 0, "c": -1}, {"a": 0, "b": 1}]
    assert settled_of(tasks={"b": {"training.lr": 0.1}}) == settled_of()
    assert settled_of(tasks={"b": {"training.share_prefix": "off"}}) == [{}, {}, {"a": 0}]


def test_who_says_so() -> None:
    found = {name: METHODS.get(name).settled for name in METHODS}
    assert {name: how for name, how in found.items() if how != "none"} == {"pertask": "all", "progprompt": "learned"}
