"""Every method on layers of several ranks and scales: by hand, resumed to the bit, and as a run."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cl_runner.adapters.kind import pair_parameters
from cl_runner.atomic import read_json
from cl_runner.engine.process import Place
from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.runs.updates import free_subspace
from cl_runner.training.checkpoint import restore_stage, save_stage
from cl_runner.training.stage import StageRun
from tests.breadth import narrowed
from tests.command_line import NANO, ORDER, STAGES, call
from tests.distributed import on_ranks
from tests.methods.moments import moments_by_hand
from tests.methods.orders import BY_LAYER, ByHand, learn, order_room, rows_of
from tests.methods.steps import THREE, opposed, values
from tests.methods.test_carried import same
from tests.runs.test_updates import spanned

EPOCHS = {"training__epochs": 3}
# Method → its settings; what stands after a space tells variants apart.
METHODS: dict[str, dict[str, Any]] = {
    "seqlora": {}, "seqlora put back": {"reorthogonalise": {"how": "hard", "every": 2}}, "inclora": {}, "pertask": {},
    "olora": {}, "olora paper": {"reference": False, "on": "both"}, "nlora": {}, "nlora factors": {"of": "factors"},
    "sparse-orth": {}, "grassmann": {}, "inflora": {}, "sdlora": {}, "sdlora reuse": {"reuse": 0.9},
    "clora": {"k": 4}, "clora data": {"k": 4, "subspace": "data"}, "pego": {"group": 1},
    "ella": {"lambda1": 30.0}, "jumplora": {"lambda1": 20.0}, "oliera": {"lr": 0.02}, "oa": {},
    "pslora": {"lambda1": 40.0, "a": 8.0}, "ewc-lora": {"lambda1": 3.0, "fisher_samples": 4},
    "gainlora": {}, "gainlora olora": {"branch": "olora"}, "sapt": {"pseudo": 2, "pseudo_tokens": 4},
    "colora": {"rounds": 2}, "colora mean": {"rounds": 2, "fold": "mean"},
    "shared-basis": {}, "shared-basis similarity": {"mixing": "similarity"}, "shared-basis pca": {"pca": 1},
    "replay": {"memory_per_task": 3}, "ewc": {"fisher_samples": 4}, "lwf": {}, "agem": {"memory_per_task": 4},
    "gem": {"memory_per_task": 4}, "ogd": {"vectors": 4}, "migu": {}, "slao": {}, "slora": {}, "merge": {},
    "merge ties": {"how": "ties"}, "merge magmax": {"how": "magmax"}, "treelora": {},
    "doc": {"components": 3}, "gorp": {"k": 4},
    "sure": {"memory_size": 9}, "rkif": {"inner_steps": 1, "outer_steps": 1},
}  # fmt: skip


def opened(place: Place, name: str, **settings: Any) -> tuple[Any, Any]:
    own = {f"method__{key}": value for key, value in METHODS[name].items()}
    return order_room(place, name.split()[0], **{**THREE, **BY_LAYER, **own, "training__epochs": 2, **settings})


def ranks(room: Any) -> dict[str, int]:
    return {target: 3 if target.endswith("v") else 1 if "encoder" in target else 2 for target in room.adapters.past}


def test_the_patterns_of_these_tests_are_what_they_say() -> None:
    room, _ = opened(Place(), "inclora")
    found = {(room.adapters.rank_of(t), room.adapters.scale_of(t)) for t in room.adapters.past}
    assert found == {(1, 8.0), (2, 3.0), (3, 4 / 3)}
    assert {t: room.adapters.rank_of(t) for t in room.adapters.past} == ranks(room)


# Resumed.


def _resumed(place: Place, folder: str, name: str) -> None:
    dropped: dict[str, Any] = {"dropout": 0.2, "adapter__dropout": 0.2}
    straight, config = opened(place, name, **dropped)
    rundir = RunDir(Path(folder))
    for index in range(2):
        own = rows_of(straight.order[index])
        learn(straight, config, index, own)
        room, _ = opened(place, name, **dropped)
        if index:
            restored = StageRun(room, config, index - 1)
            restore_stage(rundir, restored, index - 1)
            restored.close()
        stage = learn(room, config, index, own).stage
        assert room.adapters.live == straight.adapters.live
        ours, theirs = (values(each) if each.adapters.live else {} for each in (room, straight))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert same(room.method.state(), straight.method.state())
        for target, past in room.adapters.past.items():
            assert torch.equal(past.weight, straight.adapters.past[target].weight)
        commit(rundir, index, stage.plan.name, lambda draft: save_stage(draft, stage))  # noqa: B023


# One pair, kept pairs, A that is designed, terms, state by layer.
@pytest.mark.parametrize("name", narrowed(METHODS, ["seqlora", "olora", "inflora", "sdlora", "ewc"]))
def test_two_stages_straight_are_two_stages_restarted(name: str, tmp_path: Path) -> None:
    on_ranks(1, _resumed, str(tmp_path), name)


# By hand.


def _olora(place: Place) -> None:
    room, config = order_room(place, "olora", **EPOCHS, **BY_LAYER, method__lambda2=0.05)
    hand = ByHand(room)
    before: list[dict[str, Tensor]] = []

    def penalty(A: dict[str, Tensor], B: dict[str, Tensor]) -> Tensor:
        """One number at a time, each layer with its own rows."""
        total = torch.zeros(())
        for target in A:
            total = total + 0.05 * (A[target].norm() + (B[target].square().sum() + 1e-24).sqrt())
            for old in before:
                for j, k in product(range(len(old[target])), range(len(A[target]))):
                    total = total + 0.5 * (old[target][j] @ A[target][k]).abs()
        return total

    for index in range(3):
        hand.begin(room, config, index)
        learn(room, config, index)
        hand.train(config, index, rows_of(room.order[index]), penalty=penalty)
        pair = room.adapters.folded[-1]
        assert {t: pair.rank_of(t) for t in pair.A} == {t: len(A) for t, A in pair.A.items()} == ranks(room)
        assert hand.off(pair) < 2e-3
        hand.fold()
        before.append({target: A.clone() for target, A in pair.A.items()})
        for target, past in room.adapters.past.items():
            assert float((past.sum - hand.past[target]).norm() / hand.past[target].norm()) < 2e-3


def test_olora_trains_layers_of_several_ranks_as_by_hand() -> None:
    on_ranks(1, _olora)


def _inflora(place: Place) -> None:
    """Of q and v, which share their input, v has the three leading directions of the moment, q the first of them."""
    room, config = opened(place, "inflora")
    stage = StageRun(room, config, 0)
    own = opposed(0)
    stage.own = own
    room.method.build(stage)
    moments = moments_by_hand(room, "t5", own.examples)
    room.method.begin_task(stage)
    parameters = room.adapters.parameters()
    for target, rank in ranks(room).items():
        A = parameters[f"{target}.lora_A"].detach()
        _, vectors = torch.linalg.eigh(moments[target].double())
        leading = vectors.flip(1)[:, :rank].T / 3**0.5
        signs = (A.double() * leading).sum(1, keepdim=True).sign()
        assert A.shape == leading.shape and float((A - signs * leading).norm() / leading.norm()) < 1e-4
    stage.close()


def test_infloras_shared_directions_go_to_layers_of_several_ranks() -> None:
    on_ranks(1, _inflora)


def _sdlora(place: Place) -> None:
    room, config = opened(place, "sdlora")
    for index in range(2):
        learn(room, config, index)
    for target, rank in ranks(room).items():
        past = room.method.past[target]
        assert past.ranks == [rank, rank] and past.A.shape[0] == past.B.shape[1] == 2 * rank
    stage = StageRun(room, config, 2)
    room.method.build(stage)
    for target, term in stage.terms().items():
        assert float(term.alpha[-1].detach()) == pytest.approx(room.adapters.scale_of(target))
    stage.close()
    sizes = [4 * rank * sum(room.adapters.targets()[target]) for target, rank in ranks(room).items()]
    assert room.method._bytes(config, room.adapters.shapes()) == [sum(sizes)] * 3


def test_sdloras_directions_have_each_layers_rank_and_scale() -> None:
    on_ranks(1, _sdlora)


def _shared_basis(place: Place) -> None:
    room, config = opened(place, "shared-basis")
    for index in range(2):
        learn(room, config, index)
        stage = StageRun(room, config, index + 1)
        room.method.build(stage)
        for target, term in stage.terms().items():
            s, rank = room.adapters.scale_of(target), ranks(room)[target]
            assert term.U.shape[1] == term.B.shape[1] == term.A.shape[0] == rank
            with torch.no_grad():
                term.A.normal_(generator=torch.Generator().manual_seed(0))
                wanted = s * (term.alpha * term.U + term.B) @ term.A
            assert torch.allclose(term.update(), wanted, atol=1e-6)
        stage.close()


def test_shared_bases_have_each_layers_rank_and_scale() -> None:
    on_ranks(1, _shared_basis)


def test_trained_parameters_are_counted_by_layer() -> None:
    room, config = opened(Place(), "ogd")
    trained = sum(parameter.numel() for parameter in room.adapters.parameters().values())
    assert pair_parameters(config.adapter, room.adapters.shapes()) == trained
    alike = copy.deepcopy(config)
    alike.adapter.rank_pattern = {}
    assert pair_parameters(alike.adapter, list(room.adapters.targets().values())) != trained


# As a run.


def test_a_run_says_its_ranks_and_is_answered_again(tmp_path: Path) -> None:
    (tmp_path / "three.yaml").write_text(ORDER)
    words = (
        "--set=adapter.r=8",
        "--set=adapter.rank_pattern={decoder.*: 3, q: 2}",
        "--set=adapter.alpha_pattern={v: 5}",
    )
    result = call("train", "--order", "three.yaml", "--method", "olora", *NANO, *words, "--name", "x", cwd=tmp_path)
    assert result.code == 0, result.err
    run = RunDir(tmp_path / "runs/x")
    pairs = read_json(run.stage_dir(2, STAGES[2]) / "state.json")["pairs"]
    assert [(pair["stage"], pair["rank"]) for pair in pairs] == [(stage, 8) for stage in STAGES]
    for pair in pairs:
        assert set(pair["ranks"].values()) == {2, 3} and set(pair["scales"].values()) == {32 / 3, 5 / 3, 16.0, 5 / 8}
    tensors = load_file(run.stage_dir(2, STAGES[2]) / "adapter/adapter_model.safetensors")
    assert {len(A) for name, A in tensors.items() if "lora_A" in name} == {6, 9, 24}
    assert [free_subspace(run, STAGES[: i + 1]) for i in range(3)] == pytest.approx(spanned(run.path))
    for stage in "123":
        again = call("eval", "x", "--stage", stage, "--json", cwd=tmp_path)
        assert again.code == 0 and not any(again.json["differing_rows"].values()), again.err
