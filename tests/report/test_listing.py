"""How a list of runs looks: what differs beside each run, what all have said once, in the width there is."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from cl_runner.report.listing import Listed, Listing
from tests.report.test_tables import shown

RANKS, RATES, SEEDS = (4, 8, 16, 32), (1e-4, 3e-4, 1e-3), (1, 2, 3, 4, 5)


def a_run(name: str = "", **given: Any) -> Listed:
    values: dict[str, Any] = {
        "method": "olora", "order": "order1", "model": "t5-large", "seed": 1, "stage": 4, "stages": 4,
        "state": "done", "average_accuracy": 61.25, "forgetting": 4.5, "trained_at": "2030-01-01T00:00:00Z",
        "differs": {}, "named": True,
    }  # fmt: skip
    values |= given
    return Listed(name=name or f"order1-{values['method']}-t5-large-s{values['seed']}-3fa91c", **values)


def sweep() -> Listing:
    runs = [
        a_run(f"order1-olora-t5-large-s{seed}-{i:06x}", seed=seed, average_accuracy=60 + i / 4, synthetic=True,
              differs={"adapter.r": r, "training.lr": lr})
        for i, (r, lr, seed) in enumerate(itertools.product(RANKS, RATES, SEEDS))
    ]  # fmt: skip
    return Listing("runs", ["adapter.r", "training.lr"], runs)


def cells(text: str, first: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [first])


def test_a_few_runs_have_a_column_for_what_differs_and_one_line_for_what_does_not() -> None:
    runs = [
        a_run("a", seed=1, differs={"adapter.r": 8}),
        a_run("b", seed=2, differs={"adapter.r": 16}, state="failed", stage=2),
    ]
    lines = shown(Listing("runs", ["adapter.r"], runs)).splitlines()
    assert lines[0] == "2 runs in runs · order1 · olora · t5-large"
    assert lines[1].split() == ["adapter."]
    assert lines[2].split() == ["name", "seed", "r", "state", "AA", "forgetting"]
    assert lines[1].index("adapter.") == lines[2].index("r  ", lines[2].index("seed"))
    assert lines[3].split() == ["a", "1", "8", "done", "61.25", "4.50"]
    assert lines[4].split() == ["b", "2", "16", "failed", "2/4", "61.25", "4.50"]
    assert len(lines) == 5
    assert "·" not in shown(Listing("runs", [], runs), encoding="ascii")


def test_sixty_runs_at_eighty_columns_each_stand_below_what_is_theirs() -> None:
    text = shown(sweep())
    assert max(map(len, text.splitlines())) <= 80
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[0] == "60 runs in runs · order1 · olora · t5-large · synthetic data"
    above, found = "", {}
    for line in lines[2:]:
        if line.startswith("  "):
            found[line.split()[0]] = above
            assert line.endswith("4.50  synthetic"), "beside the number"
        else:
            above = line
    assert found == {
        run.name: f"adapter.r {run.differs['adapter.r']}, training.lr {run.differs['training.lr']:g}".replace(
            "1e-04", "0.0001"
        )
        for run in sweep().runs
        if run.differs
    }
    assert len(lines) == 2 + 60 + len(RANKS) * len(RATES), (
        "runs of the same settings that follow each other share a line"
    )


def test_wide_enough_all_of_it_is_columns() -> None:
    lines = shown(sweep(), width=120).splitlines()
    assert len(lines) == 3 + 60
    last = sweep().runs[-1]
    assert lines[-1].split() == [last.name, "5", "32", "0.001", "done", "74.75", "4.50", "synthetic"]


def test_columns_that_names_say_give_way_first() -> None:
    runs = [replace(run, synthetic=False) for run in sweep().runs]
    text = shown(Listing("runs", ["adapter.r", "training.lr"], runs), width=78)
    assert cells(text, "name") == ["name", "r", "lr", "state", "AA", "forgetting"]
    unnamed = [replace(runs[0], named=False), *runs[1:]]
    text = shown(Listing("runs", ["adapter.r", "training.lr"], unnamed), width=78)
    assert "seed 2, adapter.r 4, training.lr 0.0001" in text, "said above the run, where its name does not"


def test_what_most_have_is_said_once_and_what_some_lack_by_name() -> None:
    keys = [f"training.{name}" for name in ("epochs", "clip", "warmup", "schedule", "weight_decay", "length_window")]
    most = {**dict.fromkeys(keys, 1), "tasks.a.training.lr": 2, "method.lambda1": 0.5}
    runs = [a_run(f"{'x' * 30}{i}", differs=dict(most)) for i in range(5)]
    runs[3] = replace(runs[3], differs={**most, "training.clip": 0})
    runs[4] = replace(runs[4], differs=dict.fromkeys(keys, 1))
    text = shown(Listing("runs", list(most), runs))
    assert " ".join(text.split("  name")[0].split("\n", 1)[1].split()) == "most have " + ", ".join(
        f"{k} {v}" for k, v in most.items()
    )
    body = text.split("forgetting\n")[1].splitlines()
    assert body[0] == "as most"
    assert body[4] == "training.clip 0"
    assert body[6] == "no tasks.a.training.lr", "a method's setting that another has not is no news"
    assert len(body) == 8


def test_settings_that_cannot_be_read_and_broken_runs() -> None:
    runs = [a_run("a", differs={"adapter.r": 8}), a_run("b", differs={"adapter.r": 4}), a_run("c", differs=None),
            Listed(name="d", state="broken", trained_at="")]  # fmt: skip
    text = shown(Listing("runs", ["adapter.r"], runs))
    assert cells(text, "c") == ["c", "?", "done", "61.25", "4.50"]
    assert cells(text, "d") == ["d", "broken", "-", "-"]
    assert text.startswith("4 runs in runs · order1 · olora · t5-large · seed 1\n")
    narrow = shown(Listing("runs", ["adapter.r"], runs), width=40).splitlines()
    assert narrow[narrow.index("settings that cannot be read") + 1].split()[0] == "c"


@pytest.mark.parametrize("width", [30, 44, 60, 80, 100, 200])
def test_every_width_has_every_run_and_score(width: int) -> None:
    runs = [*sweep().runs[:5], a_run("order6-" + "long" * 9, average_accuracy=12.5, undefined=("amazon",), chosen=True)]
    text = shown(Listing("runs", ["adapter.r", "training.lr"], runs), width=width)
    folded = text.replace("\n", "").replace(" ", "")
    for run in runs:
        assert run.name in folded and f"{run.average_accuracy:.2f}" in folded
    assert "withoutamazon" in folded and "choose" in folded
    if width >= 60:
        assert max(map(len, text.splitlines())) <= width


def test_no_score_has_no_mark() -> None:
    assert a_run(average_accuracy=None, forgetting=None, synthetic=True).scores == ["-", "-", ""]
    assert a_run(forgetting=None, synthetic=True, chosen=True).scores == ["61.25", "-", "synthetic, choose"]
