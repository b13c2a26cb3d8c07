"""What a stage's ``parameters`` say: formulas against what trains, sizes against the files, what is carried by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.methods import make_method
from cl_runner.methods.protocol import Stage
from cl_runner.models.batch import Batch
from cl_runner.registry import KINDS
from cl_runner.training.accounting import parameters
from cl_runner.training.checkpoint import save_stage
from cl_runner.training.options import answering
from cl_runner.training.stage import StageRun, commit_update
from tests.breadth import in_turn
from tests.command_line import NANO, ORDER, STAGES, call
from tests.distributed import on_ranks
from tests.methods.orders import rows_of
from tests.stages import tiny_config, tiny_room, train

# Of layers 32 wide, 48 in the feed-forward blocks, 16 for the keys of LLaMA.
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2}, "dora": {"r": 2}, "vera": {"r": 5}, "vblora": {"r": 2, "vectors": 6, "vector_length": 8},
    "tied-lora": {"r": 2}, "lora-xs": {"r": 3}, "loha": {"r": 2}, "lokr": {"r": 1}, "ia3": {},
    "oft": {"block_size": 8}, "boft": {"block_size": 4}, "hra": {"r": 2}, "randlora": {"r": 5},
    "fourierft": {"frequencies": 20},
}  # fmt: skip
EVERY_LAYER = {"t5": ["q", "v", "wi", "wo"], "llama": ["q_proj", "v_proj", "up_proj", "down_proj"]}


def config_of(method: str, adapter: dict[str, Any], **settings: Any) -> RunConfig:
    own = {key.removeprefix("method__"): settings.pop(key) for key in list(settings) if key.startswith("method__")}
    values = tiny_config(training__global_batch=6, **settings).model_dump()
    return RunConfig.model_validate({**values, "adapter": adapter, "method": {"name": method, **own}})


def told(place: Place, family: Any, config: RunConfig, folder: Path) -> tuple[dict[str, Any], int, int, int]:
    """What a stage says; how many numbers its backward reached; how many its method carries; the rank of its pair."""
    method = make_method(config)
    room = tiny_room(method, config, place, family, order=("a",))
    room.order = tuple(method.plan(("a",)))
    plain = method.loss
    reached: dict[int, int] = {}

    def loss(stage: Stage, batch: Batch) -> Any:
        for p in room.adapters.model.parameters():
            if p.requires_grad and id(p) not in reached:
                reached[id(p)] = 0
                p.register_hook(lambda gradient, p=p: reached.update({id(p): gradient.numel()}))
        return plain(stage, batch)

    method.loss = loss  # type: ignore[method-assign]
    stage = StageRun(room, config, 0)
    method.build(stage)
    counts = train(stage, rows_of(stage.plan)).trained.counts
    room.adapters.train(False)
    held = None
    if (values := answering(stage)) is not None:  # as a run does it
        room.adapters.put(values)
        room.adapters.keep_live()
        held = room.adapters.held(copied=True)
        room.adapters.kept.pop(stage.plan.name)
    commit_update(method, stage)
    folder.mkdir()
    save_stage(folder, stage, held)
    found = parameters(KINDS.get(method.kind(config))(config.adapter), stage, counts, folder)
    carried = sum(tensor.numel() for tensor in method.state().tensors.values())
    return found, sum(reached.values()), carried, room.adapters.rank


def one(family: str, config: RunConfig, folder: Path) -> tuple[dict[str, Any], int, int, int]:
    found: tuple[dict[str, Any], int, int, int]
    [found] = on_ranks(1, told, family, config, folder / "stage")
    return found


def sizes(folder: Path) -> dict[str, dict[str, int]]:
    """Of every part of a folder, read whole: numbers in its tensors, bytes in its files."""
    found = {}
    for part in folder.iterdir():
        files = [file for file in part.rglob("*") if file.is_file()] if part.is_dir() else [part]
        tensors = [load_file(file).values() for file in files if file.suffix == ".safetensors"]
        numbers = sum(t.numel() for each in tensors for t in each)
        found[part.name] = {"numbers": numbers, "bytes": sum(len(file.read_bytes()) for file in files)}
    return found


@pytest.mark.parametrize(("kind", "family"), in_turn(SETTINGS, list(EVERY_LAYER)))
def test_the_formula_is_what_trains(kind: str, family: str, tmp_path: Path) -> None:
    """Beside square and oblong layers; what trains is what the backward reaches, in the whole model."""
    targets = {} if kind == "ia3" else {"target_modules": EVERY_LAYER[family]}
    config = config_of("inclora", {"kind": kind, **SETTINGS[kind], **targets})
    found, reached, carried, _ = one(family, config, tmp_path)
    assert found["trained"] == found["trained_by_formula"] == reached > 0
    assert found["carried"] == carried == 0
    # The bases of LoRA-XS stand still, and are the stage's own.
    assert found["own"] > found["trained"] if kind == "lora-xs" else found["own"] == found["trained"]
    stored = found["stored_by_formula"]
    assert stored < found["trained"] if kind == "vblora" else stored == found["trained"]
    assert found["on_disk"] == sizes(tmp_path / "stage")


@pytest.mark.parametrize("family", EVERY_LAYER)
def test_all_weights_train(family: str, tmp_path: Path) -> None:
    found, reached, carried, _ = one(family, config_of("seqft", {}), tmp_path)
    assert found["trained"] == found["trained_by_formula"] == found["stored_by_formula"] == found["own"] == reached
    assert carried == 0 and found["on_disk"] == sizes(tmp_path / "stage")
    assert found["on_disk"]["model"]["numbers"] == reached, "tied ones once"


@pytest.mark.parametrize("method", ["l2p", "progprompt", "coso", "sdlora"])
def test_what_a_method_makes_itself_has_no_formula(method: str, tmp_path: Path) -> None:
    found, reached, carried, _ = one("t5", config_of(method, {"r": 2}), tmp_path)
    assert found["trained_by_formula"] is None and found["stored_by_formula"] is None
    assert found["trained"] == found["own"] == reached > 0
    assert found["carried"] == carried > 0
    assert found["on_disk"] == sizes(tmp_path / "stage")


def test_a_method_may_freeze_a_factor(tmp_path: Path) -> None:
    """InfLoRA trains B alone: A is the stage's own, too."""
    found, reached, carried, _ = one("t5", config_of("inflora", {"r": 2}), tmp_path)
    assert found["own"] == found["trained_by_formula"] == found["stored_by_formula"] == 2 * found["trained"]
    assert found["trained"] == reached and found["carried"] == carried > 0


def test_a_rank_that_was_chosen_counts(tmp_path: Path) -> None:
    adapter = {"r": "auto", "max_r": 8, "energy": 0.5}
    found, reached, _, rank = one("t5", config_of("inclora", adapter), tmp_path)
    assert 0 < rank < 8
    assert found["trained"] == found["trained_by_formula"] == found["own"] == reached == rank * 64 * 6


def test_layers_of_their_own_rank_count_as_such(tmp_path: Path) -> None:
    found, reached, *_ = one("t5", config_of("inclora", {"r": 2, "rank_pattern": {"v": 5}}), tmp_path)
    assert found["trained"] == found["trained_by_formula"] == found["stored_by_formula"] == reached == 3 * 64 * (2 + 5)


def test_what_a_pair_has_of_the_weight_is_its_own(tmp_path: Path) -> None:
    """A0 and B0 of PiSSA stand still, and are on disk: as a pair of twice the rank."""
    found, reached, *_ = one("t5", config_of("inclora", {"r": 2, "init": "pissa"}), tmp_path)
    assert found["trained"] == found["trained_by_formula"] == reached == 6 * 64 * 2
    assert found["own"] == found["on_disk"]["adapter"]["numbers"] == 2 * reached


def test_what_goes_on_and_what_is_carried_beside_it(tmp_path: Path) -> None:
    """A slow copy answers: the fast one is in ``next/``. EWC carries two numbers for each that trains."""
    config = config_of("ewc", {"r": 2}, options__slow_copy={"beta": 0.5})
    found, reached, carried, _ = one("t5", config, tmp_path)
    assert set(found["on_disk"]) == {"adapter", "next", "state.json", "state.safetensors"}
    assert found["on_disk"] == sizes(tmp_path / "stage")
    assert found["trained"] == reached and found["carried"] == carried == 2 * reached
    assert found["on_disk"]["adapter"]["numbers"] == found["on_disk"]["next"]["numbers"] == reached


def test_nothing_is_counted_twice_where_it_is_shared(tmp_path: Path) -> None:
    """What several layers have is one parameter: in Tied-LoRA, and as VB-LoRA's bank."""
    config = config_of("inclora", {"kind": "tied-lora", "r": 2})
    found, *_ = one("t5", config, tmp_path)
    layers = 6  # q and v, of encoder, decoder and across
    assert found["trained"] == 2 * 32 + 2 * (2 * 32) + layers * (2 + 32), "one A, one B for q and one for v"


# In whole runs.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("accounting")
    (cwd / "three.yaml").write_text(ORDER)
    words = ("--method", "inflora", *NANO, "--set=adapter.r=8", "--name", "inflora")
    result = call("train", "--order", "three.yaml", *words, cwd=cwd)
    assert result.code == 0, result.err
    assert "stage 1 of 3 dbpedia: 9,216 parameters train\n" in result.err
    assert result.err.count("parameters train\n") == 1, "the same at the other stages"
    return cwd / "runs" / "inflora"


def test_every_stage_says_it_and_the_report_reads_it(run: Path) -> None:
    report = call("report", "inflora", "--json", cwd=run.parent.parent).json
    assert len(report["parameters"]) == 3
    for index, (name, found) in enumerate(zip(STAGES, report["parameters"], strict=True), 1):
        folder = run / "stages" / f"{index:02d}-{name}"
        assert json.loads((folder / "metrics.json").read_text())["parameters"] == found
        results = {"metrics.json", "predictions.jsonl", "DONE"}
        assert found["on_disk"] == {part: size for part, size in sizes(folder).items() if part not in results}
        state = load_file(folder / "state.safetensors")
        assert found["carried"] == sum(t.numel() for key, t in state.items() if key.startswith("method."))
        # Six layers of 192 by 192, rank 8: B alone trains.
        assert (found["trained"], found["trained_by_formula"]) == (6 * 8 * 192, 6 * 8 * 2 * 192)


def test_the_line_below_the_measures(run: Path) -> None:
    cwd = run.parent.parent
    last = sizes(run / "stages" / "03-agnews")
    state = (last["state.json"]["bytes"] + last["state.safetensors"]["bytes"]) / 2**10
    line = "9,216 parameters trained a stage; left on disk: adapter {:.0f} KB, state {:.0f} KB"
    wanted = line.format(last["adapter"]["bytes"] / 2**10, state)
    assert wanted in call("report", "inflora", "--markdown", cwd=cwd).out
    assert wanted in " ".join(call("report", "inflora", cwd=cwd).out.split())
