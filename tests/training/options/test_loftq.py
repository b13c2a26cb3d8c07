"""adapter.init=loftq: the pair is the best of its rank for what 4 bits lost; folded whole, later ones as usual."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_runner.config.schema import ModelConfig, RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.models import base as base_module
from cl_runner.models.base import before_quantising
from cl_runner.training.compatibility import check_method
from cl_runner.training.stage import StageRun
from tests.command_line import NANO, ORDER, call, results
from tests.distributed import on_ranks
from tests.four_bits import need, twins
from tests.methods.orders import learn, order_room
from tests.methods.steps import off
from tests.nano import nano_t5
from tests.stages import Kind, tiny_model

LOFTQ = {"adapter__init": "loftq", "adapter__rank_pattern": {r"v(_proj)?": 4}, "adapter__rslora": True}
WORDS = ("--set", "model.quantize=nf4", "--set", "adapter.init=loftq")


def opened(place: Place, kind: Kind, name: str = "inclora", **more: Any) -> tuple[Any, RunConfig, Any]:
    """A room on a model in 4 bits, and the model as it was."""
    whole = tiny_model(kind, wide=True)
    room, config = order_room(place, name, ("a", "b"), kind, model=twins(kind)[0], **LOFTQ, **more)

    def reread(*_: Any) -> Iterator[tuple[str, Tensor]]:
        return ((target, whole.get_submodule(target).weight.detach()) for target in _[2])

    base_module.before_quantising = reread
    return room, config, whole


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    need()
    monkeypatch.setattr(base_module, "before_quantising", base_module.before_quantising)


def _begun(place: Place, kind: Kind) -> dict[str, Tensor]:
    room, config, whole = opened(place, kind)
    stage = StageRun(room, config, 0)
    room.method.build(stage)
    (option,) = (option for option in stage.options if option.name == "initialise")
    option.begin(stage, stage.own)
    pair, lost, left = stage.adapters.pair(), 0.0, 0.0
    for target, past in room.adapters.past.items():
        r, s = stage.rank_of(target), stage.scale_of(target)
        assert s == 4 / r**0.5
        E = whole.get_submodule(target).weight.detach().double().numpy() - past.base.double().numpy()
        U, sigma, Vh = np.linalg.svd(E, full_matrices=False)
        best = (U[:, :r] * sigma[:r]) @ Vh[:r]
        found = s * pair.B[target].double().numpy() @ pair.A[target].double().numpy()
        assert np.linalg.norm(found - best) < 1e-4 * np.linalg.norm(best)
        lost, left = lost + (sigma**2).sum(), left + (sigma[r:] ** 2).sum()
    said = option.about()["init_residual"]
    if place.rank == 0:
        assert said == pytest.approx({"lost": lost**0.5, "left": left**0.5}, rel=1e-4)
        assert f"(norm {lost**0.5:.3g}) the pairs begin without {(left / lost) ** 0.5:.0%}" in option.said()
    assert option.step_state().json["lost"] == said
    stage.close()
    return {**{f"A {t}": A for t, A in pair.A.items()}, **{f"B {t}": B for t, B in pair.B.items()}}


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_the_best_of_its_rank_on_one_process_and_on_two(kind: Kind) -> None:
    (alone,) = on_ranks(1, _begun, kind)
    first, second = on_ranks(2, _begun, kind)
    assert all(torch.equal(first[name], second[name]) and off(first[name], alone[name]) < 1e-4 for name in alone)


def _stages(place: Place, name: str) -> list[bool]:
    """Whether each of two stages begins from what was lost."""
    room, config, _ = opened(place, "t5", name)
    found = []
    for index in range(2):
        stage = learn(room, config, index).stage
        (option,) = (option for option in stage.options if option.name == "initialise")
        found.append(bool(option.about()))
        if name == "inclora" and index == 0:
            pair = room.adapters.folded[0]
            assert all(off(room.adapters.past[t].sum, pair.update(t)) < 1e-6 for t in pair.A), "folded whole"
    return found


@pytest.mark.parametrize(
    ("name", "begins"), [("inclora", [True, False]), ("seqlora", [True, False]), ("pertask", [True, True])]
)
def test_only_pairs_beside_which_nothing_stands_begin_so(name: str, begins: list[bool]) -> None:
    assert on_ranks(1, _stages, name) == [begins]


def test_the_weights_that_were_quantised_are_read_again() -> None:
    """Of the folder itself, in fp32 as they were, GPT-2's turned the way of all others."""
    config = ModelConfig(name=nano_t5(), quantize="nf4")
    whole = base_module.load_base(config.model_copy(update={"quantize": None}), torch.device("cpu")).model
    targets = [name for name, _ in whole.named_modules() if name.endswith((".q", ".v"))]
    found = dict(before_quantising(config, torch.device("cpu"), targets))
    assert list(found) == targets
    assert all(torch.equal(W, whole.get_submodule(t).weight) for t, W in found.items())


def test_a_run_says_what_was_lost_goes_on_and_is_scored_again(tmp_path: Path) -> None:
    (tmp_path / "three.yaml").write_text(ORDER)
    given = ("train", "--order", "three.yaml", "--method", "olora", *NANO, *WORDS)
    done = call(*given, "--name", "one", cwd=tmp_path)
    assert done.code == 0 and done.err.count("adapter.init=loftq: of what 4 bits lost") == 1, done.err
    first, *later = sorted((tmp_path / "runs/one/stages").glob("*/metrics.json"))
    lost = json.loads(first.read_text())["training"]["init_residual"]
    assert 0 < lost["left"] < lost["lost"]
    assert all("init_residual" not in json.loads(file.read_text())["training"] for file in later)
    before = results(tmp_path / "runs/one")
    for stage in sorted((tmp_path / "runs/one/stages").glob("*"))[1:]:
        for file in sorted(stage.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        stage.rmdir()
    assert call(*given, "--name", "one", cwd=tmp_path).code == 0
    assert results(tmp_path / "runs/one") == before
    again = call("eval", "one", "--json", cwd=tmp_path)
    assert again.code == 0 and not any(again.json["differing_rows"].values()), again.err


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"method": {"name": "grassmann", "stiefel": True}}, "beside a B that is not zero"),
        ({"method": {"name": "inflora"}}, "adapter.init"),
        ({"method": {"name": "coso"}}, "adapter.init"),
        (
            {"adapter": {"init": "loftq", "r": 33}},
            "adapter.init=loftq takes 33 directions of each layer, and one has 32",
        ),
    ],
)
def test_what_it_cannot_go_with_is_one_line(values: dict[str, Any], says: str) -> None:
    config = RunConfig.model_validate({"adapter": {"init": "loftq"}, "model": {"quantize": "nf4"}, **values})
    with pytest.raises(UserError, match=says):
        check_method(config, make_method(config).plan(["a", "b"]), [(32, 48)])


def test_without_4_bits_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "three.yaml").write_text(ORDER)
    found = call("train", "--order", "three.yaml", *NANO, "--set", "adapter.init=loftq", "--dry-run", cwd=tmp_path)
    assert found.code == 2 and "adapter.init=loftq begins from what 4 bits lost: set model.quantize=nf4" in found.err
