"""What a tracker is told of a run: steps over all stages, scores as by hand, what comes again where it does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cl_runner.trackers.feeding import feed
from cl_runner.trackers.protocol import Entry, Tracked, Tracker
from tests.run_folders import RunFolder

Told = list[tuple[int, str, dict[str, float]]]


class Kept(Tracker):
    """Keeps what it is told."""

    def __init__(self, goes_on: bool = False) -> None:
        self.goes_on = goes_on
        self.told: list[Entry] = []
        self.ended: list[str] = []

    def start(self, run: Tracked) -> bool:
        self.run = run
        return self.goes_on

    def log(self, entries: Sequence[Entry]) -> None:
        assert entries
        self.told += entries

    def end(self, state: str) -> None:
        self.ended.append(state)

    @property
    def entries(self) -> Told:
        return [(each.step, each.stage, dict(each.values)) for each in self.told]


def a_run(tmp_path: Path, **later: Any) -> RunFolder:
    run = RunFolder(tmp_path / "runs", "mine", sets=["training.lr=0.25"])
    (run.path / "environment.json").write_text(json.dumps({"started": "then", "later": [], **later}))
    return run


def write(run: RunFolder, *rows: dict[str, Any]) -> None:
    with (run.path / "log.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def row(stage: str, step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "step": step, "steps": 9, "loss": loss, "time": 10.0 * step, "penalty": None, **more}


def answers(right: int) -> list[tuple[str, str]]:
    return [("Film", "Film" if i < right else "x") for i in range(4)]


def first_stage(run: RunFolder) -> Told:
    write(run, row("dbpedia", 2, 3.0, note="word", flag=True, ratio=[1]), row("dbpedia", 5, None, lr=0.5))
    run.commit({"dbpedia": answers(3)})
    scores = {"score/dbpedia": 75.0, "average_accuracy": 75.0}
    return [(2, "dbpedia", {"train/loss": 3.0}), (5, "dbpedia", {"train/lr": 0.5}), (5, "dbpedia", scores)]


def second_stage(run: RunFolder) -> Told:
    probe = {"stage": "amazon", "step": 2, "steps": 9, "probe": {"dbpedia": 50.0, "amazon": None}, "probe_rows": {}}
    write(run, row("amazon", 2, 2.0), probe, row("amazon", 4, 1.0))
    run.commit({"dbpedia": answers(1), "amazon": answers(2)})
    scores = {"score/dbpedia": 25.0, "score/amazon": 50.0, "average_accuracy": 37.5, "forgetting": 50.0}
    return [
        (7, "amazon", {"train/loss": 2.0}), (7, "amazon", {"probe/dbpedia": 50.0}), (9, "amazon", {"train/loss": 1.0}),
        (9, "amazon", scores),
    ]  # fmt: skip


def test_all_of_it_in_its_order_as_it_comes(tmp_path: Path) -> None:
    run, tracker, wanted, said = a_run(tmp_path), Kept(), [], []
    tracker.where = lambda: "here"  # type: ignore[method-assign]
    looks = iter(
        [
            lambda: wanted.extend(first_stage(run)),
            lambda: None,
            lambda: wanted.extend(second_stage(run)),
            lambda: write(run, row("agnews", 1, 0.5)),
        ]
    )

    def ended() -> bool:
        assert tracker.entries == wanted
        look = next(looks, None)
        if look is None:
            run.dir.set_status("failed")
            write(run, row("agnews", 3, 0.25))
            return True
        look()
        if len(wanted) == 7 and (run.path / "log.jsonl").read_text().count("agnews"):
            wanted.append((10, "agnews", {"train/loss": 0.5}))
        return False

    feed(run.dir, tracker, 0, ended, said.append)
    assert tracker.entries == [*wanted, (12, "agnews", {"train/loss": 0.25})], "what was written last comes too"
    assert (tracker.ended, said) == (["failed"], ["here"])
    assert [each.time for each in tracker.told[:3]] == [20.0, 50.0, 50.0]
    assert (tracker.run.name, tracker.run.resumed, tracker.run.steps) == ("mine", False, 0)
    assert tracker.run.settings["training.lr"] == 0.25 and tracker.run.settings["method.name"] == "olora"
    assert tracker.run.about == {
        "order": "three",
        "method": "olora",
        "model": "tiny-t5",
        "seed": 42,
        "synthetic": False,
    }
    assert tracker.run.folder == run.path.absolute()


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_run_that_goes_on(tmp_path: Path, goes_on: bool) -> None:
    """A tracker that has the first stage is told what follows, one that has nothing all of it."""
    run, tracker = a_run(tmp_path, later=[{}]), Kept(goes_on)
    first = first_stage(run)
    second: Told = []

    def ended() -> bool:
        second.extend(second_stage(run))
        return True

    feed(run.dir, tracker, 1, ended, lambda text: None)
    assert (tracker.run.resumed, tracker.run.steps) == (True, 5)
    assert tracker.entries == [*([] if goes_on else first), *second]


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_stage_that_goes_on_in_its_middle(tmp_path: Path, goes_on: bool) -> None:
    """What an earlier process has told of it stays; its scores are new, whenever they came."""
    run, tracker = a_run(tmp_path, later=[{}]), Kept(goes_on)
    all_of_it = [*first_stage(run), *second_stage(run)]
    feed(run.dir, tracker, 1, lambda: True, lambda text: None, step=2)
    assert tracker.run.steps == 7
    assert tracker.entries == all_of_it[5 if goes_on else 0 :]
    last = Kept(goes_on=True)
    feed(run.dir, last, 1, lambda: True, lambda text: None, step=4)
    assert last.entries == all_of_it[-1:]


@pytest.mark.parametrize(("status", "said"), [("done", "done"), ("failed", "failed"), ("stopped", "stopped"),
                                              ("running", "stopped"), (None, "stopped")])  # fmt: skip
def test_how_it_ended(tmp_path: Path, status: str | None, said: str) -> None:
    run, tracker = a_run(tmp_path), Kept()
    if status:
        run.dir.set_status(status)
    feed(run.dir, tracker, 0, lambda: True, lambda text: None)
    assert tracker.ended == [said] and tracker.told == []


def test_a_new_run_of_an_old_name_is_another(tmp_path: Path) -> None:
    trackers = [Kept(), Kept(), Kept()]
    for tracker, started in zip(trackers, ("then", "then", "now"), strict=True):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        feed(a_run(folder, started=started).dir, tracker, 0, lambda: True, lambda text: None)
    ids = [tracker.run.id for tracker in trackers]
    assert ids[0] == ids[1] != ids[2] and all(each.startswith("mine-") for each in ids)
