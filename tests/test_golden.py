"""The committed numbers are those of now; and what is said where a dependency's new release changes them."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from tests.golden import FILE, ROW, differences, measured, message


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


@pytest.fixture
def other(golden: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(golden)


def test_the_committed_numbers_are_those_of_now(golden: dict[str, Any]) -> None:
    """Rows, token ids, every step's loss, penalty and gradient, and the accuracy matrix of two models."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("the committed numbers are a CPU's")
    now = measured()
    found = differences(golden, now)
    assert not found, message(golden, now, found)


def test_what_is_committed_says_something(golden: dict[str, Any]) -> None:
    """Something was learned, of it some is not right, and the penalty of the second stage is there."""
    scores = golden["runs"]["tiny-t5"]["scores"]
    assert set(scores) == {"agnews after agnews", "agnews after dbpedia", "dbpedia after dbpedia"}
    assert all(0 < score < 100 for score in scores.values()) and scores["agnews after agnews"] > 50
    t5, llama = (golden["runs"][model] for model in ("tiny-t5", "tiny-llama"))
    assert len(t5["close"]) == 2 * 4 and len(t5["rough"]) == 2 * 12 + 3 * 16, "losses and norms, and the penalty too"
    assert len(llama["close"]) == 2 * 4 + 3 * 4 and not llama["rough"]
    assert {"torch", "transformers", "peft", "deepspeed", "tokenizers", "numpy"} <= set(golden["made_with"]["packages"])


def test_what_rounding_does_passes_and_a_change_does_not(golden: dict[str, Any], other: dict[str, Any]) -> None:
    run = other["runs"]["tiny-t5"]
    for key in run["close"]:
        run["close"][key] *= 1 + 5e-5
    for key in run["rough"]:
        run["rough"][key] *= 1.05
    for key in run["scores"]:
        run["scores"][key] -= ROW
    assert differences(golden, other) == []
    run["close"]["loss of agnews at step 3"] *= 1 + 1e-4
    run["scores"]["agnews after agnews"] -= 1
    run["exact"]["token ids"] = "0" * 64
    run["rough"]["loss of dbpedia at step 3"] *= 1.1
    del run["rough"]["penalty of dbpedia at step 2"]
    assert [line.rpartition(": ")[0] for line in differences(golden, other)] == [
        "tiny-t5: token ids",
        "tiny-t5: loss of agnews at step 3",
        "tiny-t5: loss of dbpedia at step 3",
        "tiny-t5: penalty of dbpedia at step 2",
        "tiny-t5: agnews after agnews",
    ]


def test_the_versions_that_differ_are_named(golden: dict[str, Any], other: dict[str, Any]) -> None:
    torch = golden["made_with"]["packages"]["torch"]
    other["made_with"]["packages"]["torch"] = "9.0"
    other["runs"]["tiny-llama"]["close"] = dict.fromkeys(other["runs"]["tiny-llama"]["close"], 0.0)
    found = differences(golden, other)
    said = message(golden, other, found).splitlines()
    assert said[0] == f"{len(found)} numbers are not those of golden.json:" and len(found) > 6
    assert said[1].startswith("  tiny-llama: loss of agnews at step 1: ") and said[1].endswith(" → 0.0")
    assert said[7] == f"  and {len(found) - 6} more"
    assert said[8] == f"Other than when it was made: torch {torch} → 9.0."
    assert "python -m tests.golden --renew" in said[9]
    other["made_with"]["packages"]["torch"] = torch
    assert "nothing: it is this code that computes otherwise" in message(golden, other, found)
