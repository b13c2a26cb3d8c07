"""Full fine-tuning: every step against plain torch on all weights, resumed to the bit, each task's own model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.engine.process import Place
from cl_runner.methods.protocol import Source
from cl_runner.models.model_folder import read_model, save_model
from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.tasks.task import Row, Task
from cl_runner.training import evaluation as scoring
from cl_runner.training.checkpoint import committed, restore_stage, save_stage
from cl_runner.training.sampling import BatchPlan
from cl_runner.training.stage import StageRun
from tests.adapters.families import FAMILIES, base_model
from tests.breadth import narrowed
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room, rows_of
from tests.stages import Kind, distance, naive_loss, tiny_model, widths

LR = 2e-3
OPTIONS: dict[str, Any] = {"training__lr": LR, "training__epochs": 2}
FULL: dict[str, dict[str, Any]] = {
    "seqft": {},
    "replay": {"method__train": "full", "method__memory_per_task": 3},
    "ewc": {"method__train": "full", "method__lambda1": 1e4, "method__fisher_samples": 4},
    "migu": {"method__train": "full"},
    "pertask": {"method__train": "full"},
    "mtl": {"method__train": "full"},
}

Values = dict[str, Tensor]


def opened(place: Place, name: str, **settings: Any) -> tuple[Any, Any]:
    return order_room(place, name, **{**OPTIONS, **FULL[name], **settings})


def values(room: Any) -> Values:
    return {name: p.detach().clone() for name, p in room.adapters.parameters().items()}


def equal(a: Values, b: Values) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def by_hand(kind: Kind, config: Any, stages: Sequence[tuple[int | str, Source]], ewc: float = 0.0) -> Values:
    """A loop over all parameters of the model as transformers names them, with AdamW new at every stage.

    ``ewc`` is λ: the Fisher information of each stage, a mean over its examples one by one, holds what came after.
    """
    model = tiny_model(kind).requires_grad_(True)
    parameters = dict(model.named_parameters())
    held: list[tuple[Values, Values]] = []  # F, θ*
    for stage, own in stages:
        optimizer = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.0)
        plan = BatchPlan.make(len(own.examples), config.training, 1)
        for rows in plan.step_rows(config.seed, stage, widths(own.examples), len(set(own.tasks)) > 1):
            optimizer.zero_grad()
            loss = naive_loss(model, kind, [own.examples[i] for i in rows])
            for F, best in held:
                loss = loss + ewc / 2 * sum((F[n] * (p - best[n]) ** 2).sum() for n, p in parameters.items())
            loss.backward()
            optimizer.step()
        if ewc:
            each = [naive_loss(model, kind, [example]) * len(example.target) for example in own.examples]
            found = [torch.autograd.grad(one, list(parameters.values())) for one in each]
            squares = [torch.stack([g.square() for g in of_one]).mean(0) for of_one in zip(*found, strict=True)]
            best = {n: p.detach().clone() for n, p in parameters.items()}
            held.append((dict(zip(parameters, squares, strict=True)), best))
    return {name: p.detach() for name, p in parameters.items()}


def _seqft(place: Place, kind: Kind) -> list[Values]:
    room, config = opened(place, "seqft", kind=kind)
    return [learn(room, config, index).parameters for index in range(2)]


@pytest.mark.parametrize(("kind", "ranks"), [("t5", 1), ("t5", 2), ("llama", 1)])
def test_seqft_is_plain_fine_tuning(kind: Kind, ranks: int) -> None:
    """Embeddings and norms train; T5's head is its embedding, and there once."""
    room, config = opened(Place(), "seqft", kind=kind)
    stages = [(index, rows_of(room.order[index])) for index in range(2)]
    first, second = by_hand(kind, config, stages[:1]), by_hand(kind, config, stages)
    start = dict(tiny_model(kind).named_parameters())
    assert ("lm_head.weight" in first) == (kind == "llama")
    assert not any(torch.equal(first[name], start[name]) for name in start)
    for found in on_ranks(ranks, _seqft, kind):
        assert distance(found[0], first) < 1e-3 and distance(found[1], second) < 1e-3
        assert distance(found[1], first) > 1e-2


def _mtl(place: Place) -> None:
    room, config = opened(place, "mtl")
    found = learn(room, config, 0).parameters
    assert distance(found, by_hand("t5", config, [(0, rows_of(room.order[0]))])) < 1e-3


def test_mtl_trains_all_weights_on_the_union() -> None:
    on_ranks(1, _mtl)


def _ewc(place: Place) -> None:
    room, config = opened(place, "ewc", method__fisher_samples=None)
    stages = [(index, rows_of(room.order[index])) for index in range(2)]
    for index in range(2):
        learn(room, config, index)
    assert distance(values(room), by_hand("t5", config, stages, ewc=1e4)) < 1e-3
    assert distance(values(room), by_hand("t5", config, stages)) > 1e-2


def test_ewc_holds_all_weights() -> None:
    on_ranks(1, _ewc)


def answered(plan: Any) -> dict[str, scoring.TestSet]:
    """The stage's own rows, to be answered."""
    own = rows_of(plan)
    task = Task(name=plan.name, kind="SC", instruction="Say.", metric="accuracy", labels=["x"])
    rows = [Row(f"{plan.name}/{i}", "text", "x") for i in range(len(own.examples))]
    return {plan.name: scoring.TestSet(task, rows, own.examples)}


def _pertask(place: Place, folder: str) -> None:
    room, config = opened(place, "pertask", training__lr=5e-3, training__epochs=6)
    base = values(room)
    rundir = RunDir(Path(folder))
    own = []
    for index in range(3):
        stage = learn(room, config, index).stage
        own.append(values(room))
        commit(rundir, index, stage.plan.name, partial(save_stage, stage=stage))
        if index != 1:  # what nobody said is on disk waits in memory
            committed(rundir, stage)
    kept = room.adapters.kept
    assert [bool(kept[name].tensors) for name in "abc"] == [False, True, False]
    stage = StageRun(room, config, 2)
    tests = {name: test for plan in room.order for name, test in answered(plan).items()}
    together = {one.task: [row["output"] for row in one.predictions] for one in scoring.evaluate(stage, tests)}
    assert equal(values(room), own[2]) and room.adapters.live == "c"
    alone, wrong = [], []
    for index, name in enumerate("abc"):
        for stored, answers in ((own[index], alone), (own[index - 1], wrong)):
            for parameter, value in zip(room.adapters.parameters().values(), stored.values(), strict=True):
                parameter.data.copy_(value)
            answers.append(stage.answer(tests[name].examples, name))
    assert [together[name] for name in "abc"] == alone
    assert all(one != other for one, other in zip(alone, wrong, strict=True))  # another model would say something else
    room.adapters.show(None)
    assert equal(values(room), base)  # what a task not yet learned is answered with
    stage.close()


def test_pertask_begins_at_the_base_and_answers_each_task_with_its_own_model(tmp_path: Path) -> None:
    on_ranks(1, _pertask, str(tmp_path))


def _pertask_first_steps(place: Place) -> None:
    room, config = opened(place, "pertask")
    for index in range(2):
        found = learn(room, config, index).parameters
        plan = room.order[index]
        assert distance(found, by_hand("t5", config, [(plan.name, rows_of(plan))])) < 1e-3


def test_pertask_trains_each_task_from_the_base() -> None:
    on_ranks(1, _pertask_first_steps)


def _resumed(place: Place, folder: str, name: str) -> None:
    dropped: dict[str, Any] = {"dropout": 0.2, "tasks": "abc"}
    straight, config = opened(place, name, **dropped)
    rundir = RunDir(Path(folder))
    for index in range(len(straight.order)):
        learn(straight, config, index)
        room, _ = opened(place, name, **dropped)
        if index:
            restored = StageRun(room, config, index - 1)
            restore_stage(rundir, restored, index - 1)
            restored.close()
        stage = learn(room, config, index).stage
        assert equal(values(room), values(straight))
        ours, theirs = room.method.state(), straight.method.state()
        assert ours.json == theirs.json and equal(ours.tensors, theirs.tensors)
        assert list(room.adapters.kept) == list(straight.adapters.kept)
        commit(rundir, index, stage.plan.name, partial(save_stage, stage=stage))


@pytest.mark.parametrize("name", narrowed(["seqft", "replay", "ewc", "migu", "pertask"], ["seqft", "ewc", "pertask"]))
def test_each_stage_goes_on_from_the_one_on_disk_to_the_bit(name: str, tmp_path: Path) -> None:
    on_ranks(1, _resumed, str(tmp_path), name)


def _two_ranks(place: Place, name: str) -> Values:
    room, config = opened(place, name, tasks="ab")
    for index in range(2):
        learn(room, config, index)
    return values(room)


@pytest.mark.parametrize("name", narrowed(["replay", "ewc"], ["ewc"]))
def test_the_same_on_two_ranks(name: str) -> None:
    [alone] = on_ranks(1, _two_ranks, name)
    for found in on_ranks(2, _two_ranks, name):
        assert distance(found, alone) < 1e-3


def _checkpointed(place: Place) -> None:
    plain, config = opened(place, "seqft", dropout=0.2)
    again, sparing = opened(place, "seqft", dropout=0.2, training__activation_checkpointing=True)
    learn(plain, config, 0)
    learn(again, sparing, 0)
    assert equal(values(plain), values(again))


def test_activations_computed_again_are_the_same() -> None:
    on_ranks(1, _checkpointed)


def _sizes(place: Place, folder: str) -> None:
    room, config = opened(place, "ewc")
    parameters = sum(p.numel() for p in room.adapters.parameters().values())
    stage = learn(room, config, 0).stage
    (Path(folder) / "draft").mkdir()
    sizes = save_stage(Path(folder) / "draft", stage)
    assert sizes["model"] == pytest.approx(4 * parameters / 2**20, rel=0.1)
    assert sizes["method"] == pytest.approx(8 * parameters / 2**20, rel=0.1)
    assert room.method.state_bytes((), parameters, 2) == 8 * parameters


def test_ewc_carries_two_vectors_of_all_weights(tmp_path: Path) -> None:
    on_ranks(1, _sizes, str(tmp_path))


def _bf16(place: Place) -> tuple[Values, Values, list[str]]:
    room, config = opened(place, "seqft", bf16=True)
    before = values(room)
    found = learn(room, config, 0).parameters
    return before, found, sorted({str(p.dtype) for p in found.values()})


def test_what_trains_is_fp32_where_bf16_computes() -> None:
    [(before, found, dtypes)] = on_ranks(1, _bf16)
    assert dtypes == ["torch.float32"]
    plain = on_ranks(1, _seqft, "t5")[0][0]
    assert not equal(found, plain) and distance(found, plain) < 0.2
    # Steps far under what bf16 resolves are not lost.
    moved = torch.cat([(found[n] - before[n]).flatten().abs() for n in found])
    assert float((moved > 0).float().mean()) > 0.9


@pytest.mark.parametrize("family", [*FAMILIES, "t5 with a head of its own"])
def test_a_model_folder_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    model = base_model(family.split()[0])
    if "own" in family:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1.0)
        from cl_runner.models.base import _keep_own_head

        _keep_own_head(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_model(tmp_path / "model", model)
    for parameter in model.parameters():
        parameter.data.zero_()
    found = read_model(tmp_path / "model", model)
    assert equal(found, before) and [*tmp_path.glob("model/*.safetensors")] == [tmp_path / "model/model.safetensors"]
