"""Memory that does not suffice: a step is done again in halves, on all ranks, and the numbers are those of halves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import OutOfMemory, out_of_memory
from cl_runner.methods.protocol import Method
from cl_runner.models.batch import Batch, Example
from cl_runner.training import loop
from cl_runner.training.fitting import answers_do_not_fit
from cl_runner.training.loop import train_stage
from cl_runner.training.stage import StageRun
from cl_runner.training.step_files import read, write_own, write_shared
from cl_runner.training.step_state import StepState
from tests.breadth import in_turn, narrowed
from tests.command_line import NANO, call
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room, rows_of
from tests.narrow import NARROW
from tests.stages import open_stage, some_rows, tiny_config, tiny_room, train

both = pytest.mark.parametrize("ranks", [1, 2])
SETTINGS = {"training__global_batch": 8, "training__micro_batch": 4, "adapter__dropout": 0.2}


class Small(Method):
    """A machine with room for ``most`` rows at a time, from step ``since`` on; on the last rank alone."""

    most, since = 2, 0

    def loss(self, stage: Any, batch: Batch) -> Tensor:
        found = super().loss(stage, batch)  # the activations are there by then
        full = stage.progress.step >= self.since and batch.size > self.most
        if full and stage.rank == stage.ranks - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return found


class Backward(Small):
    """The same, found in the backward."""

    def loss(self, stage: Any, batch: Batch) -> Tensor:
        found: Tensor = Method.loss(self, stage, batch)
        if batch.size > self.most and stage.rank == stage.ranks - 1:
            found.register_hook(_no_room)
        return found


def _no_room(_: Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


class Large(Method):
    pass


def trained(
    place: Place, method: type[Method], steps: int = 3, **settings: Any
) -> tuple[dict[str, Tensor], list[Any], Any]:
    config = tiny_config(**{**SETTINGS, **settings})
    stage = open_stage(tiny_room(method(method.Config()), config, place), config)
    found = train(stage, some_rows(8 * (steps - 1) + 3))
    steps_of = [row for row in found.rows if "loss" in row]
    return found.parameters, [{k: row[k] for k in ("loss", "gradient_norm")} for row in steps_of], stage.fit.about()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(("ranks", "method"), in_turn([2, 1], [Small, Backward]))
def test_a_step_that_does_not_fit_is_done_again_in_halves_to_the_bit(ranks: int, method: type[Method]) -> None:
    halved = on_ranks(ranks, trained, method, training__auto_batch=True)
    small = on_ranks(ranks, trained, Large, training__micro_batch=2)
    whole = on_ranks(ranks, trained, Large)
    for mine, wanted, larger in zip(halved, small, whole, strict=True):
        assert same(mine[0], wanted[0]) and mine[1] == wanted[1]
        assert mine[2] == {"micro_batches": {"1": 2}} and wanted[2] == {}
        torch.testing.assert_close(mine[0], larger[0], rtol=1e-3, atol=1e-4)  # and the same numbers as without


@pytest.mark.parametrize(("ranks", "again"), in_turn([1, 2], [False, True]))
def test_where_all_fits_the_setting_changes_no_bit(ranks: int, again: bool) -> None:
    with_it = on_ranks(ranks, trained, Large, training__auto_batch=True, training__activation_checkpointing=again)
    without = on_ranks(ranks, trained, Large, training__activation_checkpointing=again)
    assert all(same(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(with_it, without, strict=True))


def test_nothing_of_the_step_is_held_while_the_engine_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error's frames have whole gradients in them, for which there may be no room beside two engines' states."""
    halved, held = loop._halved, []

    def looked(*of: Any) -> Any:
        held.append(sys.exc_info()[0])
        return halved(*of)

    monkeypatch.setattr(loop, "_halved", looked)
    on_ranks(1, trained, Small, training__auto_batch=True)
    assert held == [None]


class Later(Small):
    most, since = 1, 1


def test_it_halves_as_often_as_it_takes_and_keeps_what_steps_before_did() -> None:
    parameters, rows, about = on_ranks(1, trained, Later, training__auto_batch=True)[0]
    wanted, usual, _ = on_ranks(1, trained, Large)[0]
    assert about == {"micro_batches": {"2": 1}}
    assert rows[0] == usual[0]  # the first step was fine
    torch.testing.assert_close(parameters, wanted, rtol=1e-3, atol=1e-4)


class Nothing(Small):
    most = 0


@pytest.mark.parametrize(
    ("method", "settings", "told", "without"),
    [
        (Small, {}, "step 1, whose micro-batches have 4 rows: lower training.micro_batch, or let", True),
        (Small, {"training__loss_mean": "micro"}, "4 rows: lower training.micro_batch, data.max_source (512)", False),
        (Nothing, {"training__auto_batch": True}, "have 1 row: lower data.max_source (512) or set training.act", False),
    ],
)
def test_what_to_lower_is_said_where_it_cannot_go_on(
    method: type[Method], settings: dict[str, Any], told: str, without: bool
) -> None:
    with pytest.raises(OutOfMemory) as error:
        on_ranks(1, trained, method, **settings)
    assert told in str(error.value) and bool(error.value.without) == without


class Elsewhere(Method):
    """A machine whose memory ends where the step is taken."""

    def after_step(self, stage: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_what_is_on_already_is_not_advised() -> None:
    for auto in (False, True):
        with pytest.raises(OutOfMemory) as error:
            on_ranks(1, trained, Elsewhere, training__auto_batch=auto)
        assert "lower training.micro_batch" in str(error.value) and bool(error.value.without) is not auto


# --- every method that keeps something of a step while it is computed


def again(place: Place, name: str, auto: bool) -> dict[str, Tensor]:
    """The second stage of an order, in which micro-batches of more than one row do not fit."""
    room, config = order_room(place, name, training__micro_batch=1, training__epochs=2)
    learn(room, config, 0)
    if auto:
        training = config.training.model_copy(update={"micro_batch": 2, "auto_batch": True})
        config = config.model_copy(update={"training": training})
    stage = StageRun(room, config, min(1, len(room.order) - 1))
    room.method.build(stage)
    plain = room.method.loss

    def loss(stage: Any, batch: Batch) -> Tensor:
        found = plain(stage, batch)
        if batch.size > 1 and auto:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    room.method.loss = loss  # type: ignore[method-assign]
    train_stage(stage, rows_of(stage.plan), log=lambda _: None, tick=lambda *_: None)
    assert bool(stage.fit.micro_batches) == auto
    stage.close()
    return {name: p.detach().clone() for name, p in room.adapters.parameters().items()}


LEAVE_MUCH = ["migu", "lwf", "treelora"]  # sizes of activations, a teacher's answers, means over an epoch


@pytest.mark.parametrize("name", narrowed([*LEAVE_MUCH, "olora", "colora", "doc", "sapt"], LEAVE_MUCH))
def test_a_method_takes_back_what_a_step_left_in_it(name: str) -> None:
    assert same(on_ranks(1, again, name, True)[0], on_ranks(1, again, name, False)[0])


# --- a stage that is left after it was halved


def left(place: Place, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The end of a stage that was halved at its second step, and of one that goes on from its files after that."""

    def stage_of(method: type[Method]) -> StageRun:
        config = tiny_config(**SETTINGS, training__auto_batch=True)
        return open_stage(tiny_room(method(method.Config()), config, place), config)

    def end(stage: StageRun, state: StepState | None, between: Callable[..., None]) -> dict[str, Tensor]:
        train_stage(stage, some_rows(32), log=lambda _: None, tick=lambda *_: None, state=state, between=between)
        stage.close()
        return {name: p.detach().clone() for name, p in stage.adapters.parameters().items()}

    first = stage_of(Later)

    def keep(take: Callable[[], StepState]) -> None:
        if first.step == 2:
            write_shared(folder, state := take())
            write_own(folder, state, 0)

    whole = end(first, None, keep)
    second = stage_of(Large)  # it would fit here: the stage goes on as it was all the same
    rest = end(second, read(folder, 2, 0), lambda _: None)
    assert second.fit.micro_batches == {2: 1}
    return whole, rest


def test_a_checkpoint_has_the_micro_batch_that_was_found_to_fit(tmp_path: Path) -> None:
    whole, rest = on_ranks(1, left, tmp_path)[0]
    assert same(whole, rest)


# --- answers


def answered(place: Place, auto: bool, most: int) -> tuple[list[str], int | None]:
    config = tiny_config(training__auto_batch=auto)
    stage = open_stage(tiny_room(Large(Large.Config()), config, place), config)
    plain = stage.prompts

    def prompts(examples: list[Example], task: str | None) -> Batch:
        if len(examples) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(examples, task)

    stage.prompts = prompts  # type: ignore[method-assign, assignment]
    found = stage.answer(some_rows(20).examples)
    stage.close()
    return found, stage.fit.eval_tokens


@both
def test_a_batch_of_answers_is_halved_and_the_answers_are_the_same(ranks: int) -> None:
    usual = on_ranks(ranks, answered, False, 100)
    assert [found for found, _ in on_ranks(ranks, answered, True, 2)] == [found for found, _ in usual]
    assert usual[0][1] is None and on_ranks(ranks, answered, True, 2)[0][1] is not None


def test_answers_that_do_not_fit_say_what_to_lower() -> None:
    with pytest.raises(OutOfMemory, match=r"answers to up to \d+ tokens each: lower eval.batch_tokens"):
        on_ranks(1, answered, False, 2)
    with pytest.raises(OutOfMemory, match=r"of 1 answer to up to \d+ tokens each: lower data.max_source"):
        on_ranks(1, answered, True, 0)


def test_what_cannot_be_halved_is_not_advised_to() -> None:
    for whole in (False, True):
        error = answers_do_not_fit(RunConfig(), 4, 100, "no room", whole)
        assert "lower eval.batch_tokens (a batch has 400)" in str(error) and bool(error.without) is not whole


# --- the command


def test_a_run_says_what_to_lower_and_goes_on_in_halves(tmp_path: Path) -> None:
    (tmp_path / "narrow.py").write_text(NARROW)
    (tmp_path / "two.yaml").write_text("name: two\ntasks: [dbpedia, amazon]\n")
    run = ("train", "--order", "two.yaml", *NANO, "--plugin", "narrow.py", "--method", "narrow")
    failed = call(*run, cwd=tmp_path)
    assert failed.code == 2
    assert "failed in stage 1 (dbpedia): out of memory in step 1" in failed.err
    assert failed.err.splitlines()[-1].endswith("--set training.auto_batch=true")
    again = call(*run, "--set", "training.auto_batch=true", "--json", cwd=tmp_path)
    assert again.code == 0, again.err
    assert "out of memory at step 1: again, and on, with micro-batches of 1 for 2" in again.err
    [folder] = (tmp_path / "runs").iterdir()  # the same run
    training = json.loads((folder / "stages" / "02-amazon" / "metrics.json").read_text())["training"]
    assert (training["micro_batch"], training["accumulation"]) == (1, 4)
    assert training["micro_batches"] == {"1": 1}
    whole = call(*run, "--name", "small", "--set", "training.micro_batch=1", "--json", cwd=tmp_path)
    adapters = [
        (tmp_path / "runs" / name / "stages" / "02-amazon" / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in (folder.name, "small")
    ]
    assert whole.code == 0 and adapters[0] == adapters[1]


@pytest.mark.parametrize("name", ["loss_mean", "penalty_at", "dropout_by"])
def test_what_a_micro_batch_decides_is_not_halved(name: str, tmp_path: Path) -> None:
    sets = ("--set", "training.auto_batch=true", "--set", f"training.{name}=micro")
    refused = call("train", "--order", "order1", *NANO, *sets, "--dry-run", cwd=tmp_path)
    assert refused.code == 2
    assert f"auto_batch cannot halve what decides numbers ({name}: micro)" in refused.line


def test_what_counts_as_out_of_memory() -> None:
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert RunConfig().training.auto_batch is False


def test_a_run_says_what_fitted_of_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StageRun.prompts

    def prompts(stage: StageRun, examples: list[Example], task: str | None) -> Batch:
        if len(examples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(stage, examples, task)

    monkeypatch.setattr(StageRun, "prompts", prompts)
    (tmp_path / "one.yaml").write_text("name: one\ntasks: [dbpedia]\n")
    asked = (*NANO, "--set", "training.auto_batch=true", "--order", "one.yaml", "--method", "inclora", "--name", "one")
    told = call("train", *asked, cwd=tmp_path)
    assert told.code == 0, told.err
    trained = json.loads((tmp_path / "runs/one/stages/01-dbpedia/metrics.json").read_text())["training"]
    assert trained["eval_batch_tokens"] > 0 and f"batches of {trained['eval_batch_tokens']} tokens" in told.err
