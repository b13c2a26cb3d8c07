"""Processes that would not compute the same are told so, on every rank alike, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.training import agreement
from tests.distributed import on_ranks
from tests.stages import tiny_model

SPLIT = {"fingerprint": "f"}
IDENTITY: dict[str, Any] = {
    "model": {"config": "c", "commit": None},
    "stages": [["a", "a"]],
    "data": {"a": {"train": SPLIT, "test": SPLIT}},
    "micro_batches": [2],
}


@dataclass(frozen=True)
class Other:
    """What is otherwise on rank 1."""

    settings: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    elsewhere: bool = False


def said(place: Place, folder: Path, other: Other) -> str:
    config, identity, versions = RunConfig(), dict(IDENTITY), agreement.versions
    try:
        if place.rank == 1:
            config = RunConfig.model_validate({**config.model_dump(), **other.settings})
            identity |= other.identity
            agreement.versions = lambda: {**versions(), **other.versions}  # type: ignore[assignment]
            if other.elsewhere:  # the same path leads to another disk
                agreement._holds = lambda file, word: not file.exists()  # type: ignore[assignment]
        agreement.refuse_apart(place, folder / "runs" / "mine", config, identity)
    except UserError as error:
        return str(error)
    finally:
        agreement.versions = versions
        agreement._holds = HOLDS
    return ""


HOLDS = agreement._holds


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (Other(), ""),
        # Where files lie may be each machine's own.
        (Other({"data": {"dir": "/elsewhere"}, "output": {"dir": "x"}}), ""),
        (Other({"seed": 7, "training": {"lr": 0.5}}), "other settings than process 0 (seed, training.lr); start all"),
        (Other(versions={"torch": "1.0"}), "other versions than process 0: torch 1.0, not "),
        (
            Other(identity={"model": {"config": "d", "commit": None}}),
            "the base model is not what process 0 has (config",
        ),
        (
            Other(identity={"data": {"a": {"train": SPLIT, "test": {"fingerprint": "g"}}}}),
            "other test data of a than process 0 has",
        ),
        (Other(identity={"micro_batches": [1]}), "other micro batches than process 0; start all with the same command"),
        (Other(elsewhere=True), "does not see what process 0 on "),
    ],
)
def test_who_is_otherwise_is_named(other: Other, says: str, tmp_path: Path) -> None:
    first, second = on_ranks(2, said, tmp_path, other)
    assert first == second
    assert says in first
    assert not says or first.startswith("process 1 on ")
    assert bool(first) == bool(says)
    assert not list(tmp_path.iterdir()), "nothing is left"


def base_said(place: Place, where: int) -> str:
    model = tiny_model("llama")
    if place.rank == 1 and where >= 0:
        list(model.parameters())[where].data.flatten()[-1] += 1
    try:
        agreement.refuse_other_base(place, model)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("where", [-1, 0, 3])
def test_another_base_is_told_by_its_weights(where: int) -> None:
    first, second = on_ranks(2, base_said, where)
    assert first == second
    assert ("loaded other weights than process 0" in first) == (where >= 0)


def test_one_process_agrees_with_itself(tmp_path: Path) -> None:
    assert on_ranks(1, said, tmp_path, Other()) == [""]
