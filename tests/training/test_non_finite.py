"""Steps whose loss or gradient is not finite: named and ended, or left out to the bit; a healthy one knows nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cl_runner.config.schema import Section
from cl_runner.engine.process import Place
from cl_runner.engine.zero import Engine
from cl_runner.errors import TrainingError
from cl_runner.methods.protocol import Method
from cl_runner.models.batch import Batch
from cl_runner.training.health import Explosion
from cl_runner.training.loop import train_stage
from cl_runner.training.sampling import BatchPlan
from tests.breadth import narrowed, paired
from tests.command_line import NANO, call
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.stages import distance, open_stage, some_rows, tiny_config, tiny_room, widths
from tests.training.test_loop import FULL, ROWS, naive, settings

Values = dict[str, Tensor]
BAD = 2  # the step, from 1, of those below


class Plain(Method):
    def bad(self, stage: Any) -> bool:
        return bool(stage.progress.step == BAD - 1)


class Loss(Plain):
    """In the last micro-batch of the last rank alone."""

    def loss(self, stage: Any, batch: Batch) -> Tensor:
        found = super().loss(stage, batch)
        self.seen = getattr(self, "seen", 0) + 1
        last = stage.rank == stage.ranks - 1 and self.seen % (4 // 2 // stage.ranks) == 0
        return found * math.inf if self.bad(stage) and last else found


class Unreached(Plain):
    """A loss that is not finite, by what no gradient comes from."""

    def loss(self, stage: Any, batch: Batch) -> Tensor:
        return super().loss(stage, batch) + (math.nan if self.bad(stage) else 0.0)


class Gradient(Plain):
    """Of a finite loss: the root of 0."""

    def loss(self, stage: Any, batch: Batch) -> Tensor:
        found = super().loss(stage, batch)
        if self.bad(stage) and stage.rank == 0:
            found = found + (0.0 * next(iter(stage.parameters().values())).sum()).abs().sqrt()
        return found


class Penalty(Plain):
    def penalty(self, stage: Any) -> Tensor:
        total: Tensor = sum(p.square().sum() for p in stage.parameters().values())  # type: ignore[assignment]
        return total * (math.nan if self.bad(stage) else 0.0)


class Edit(Plain):
    def edit_gradients(self, stage: Any, gradients: Values) -> Values | None:
        return {name: value * math.nan for name, value in gradients.items()} if self.bad(stage) else None


class EditFirst(Edit):
    edits_before_clip = True


class Whole(Plain):
    """Its own rule, plain SGD, which makes something of a finite gradient that is not."""

    def parameter_groups(self, stage: Any) -> Any:
        from cl_runner.engine.optim import ParameterGroup

        return [ParameterGroup(stage.parameters(), "whole")]

    def whole_step(self, stage: Any, name: str, gradient: Tensor, lr: float) -> Tensor:
        return -lr * gradient * (math.inf if self.bad(stage) else 1.0)


ALL: dict[str, tuple[type[Plain], str]] = {
    "loss": (Loss, "loss"),
    "unreached": (Unreached, "loss"),
    "gradient": (Gradient, "gradient"),
    "penalty": (Penalty, "penalty"),
    "edit": (Edit, "gradient as"),
    "edit first": (EditFirst, "gradient"),
    "whole": (Whole, "gradient as"),
}


def on_both(methods: Iterable[str]) -> pytest.MarkDecorator:
    """On one process and on two; in ``make test`` on two what one rank sees alone, and what all do."""
    rows = [(method, ranks) for method in methods for ranks in (1, 2)]
    return pytest.mark.parametrize(
        ("method", "ranks"), paired(rows, [row for row in rows if row[1] == 1 or row[0] in ("loss", "edit")])
    )


def run(place: Place, method: str, **training: Any) -> dict[str, Any]:
    """A stage of three steps; what it left, and what it said."""
    config = settings(**training)
    made = ALL[method][0](Section()) if method in ALL else Plain(Section())
    room = tiny_room(made, config, place)
    stage = open_stage(room, config)
    rows: list[dict[str, Any]] = []
    said: list[str] = []
    values: list[Values] = []
    moments: list[Any] = []

    def between(_: Any) -> None:
        values.append({name: p.detach().clone() for name, p in stage.adapters.parameters().items()})
        name = next(iter(values[-1]))
        found = stage.moments(name)
        moments.append(found and {key: value.clone() for key, value in found.items()})

    error = ""
    trained = None
    try:
        trained = train_stage(
            stage, some_rows(ROWS), log=rows.append, tick=lambda *_: None, warn=said.append, between=between
        )
    except TrainingError as stopped:
        error = str(stopped)
    after = {name: p.detach().clone() for name, p in stage.adapters.parameters().items()}
    stage.close()
    skipped, told = (trained.skipped, trained.said) if trained else (None, [])
    return {"rows": rows, "said": said, "values": values, "moments": moments, "after": after, "error": error,
            "skipped": skipped, "told": told}  # fmt: skip


def bad_rows() -> list[list[int]]:
    """The rows of the bad step, by micro-batch."""
    plan = BatchPlan.make(ROWS, settings().training, 1)
    rows = list(plan.step_rows(42, 0, widths(some_rows(ROWS).examples)))[BAD - 1]
    return [rows[:2], rows[2:]]


@on_both(ALL)
def test_stop_names_the_step_and_its_rows(ranks: int, method: str) -> None:
    micro = bad_rows()
    culprits = micro[1] if method == "loss" else [*micro[0], *micro[1]]
    named = ", ".join(f"train/{row}" for row in culprits)
    for found in on_ranks(ranks, run, method):
        assert found["error"].startswith(f"step {BAD}: the {ALL[method][1]}")
        assert f"is not finite; rows: one {named}; " in found["error"]
        assert found["error"].endswith("--set training.non_finite=skip")
        # It ends with the parameters of the last good step.
        assert len(found["values"]) == BAD - 1
        assert all(torch.equal(found["after"][name], value) for name, value in found["values"][-1].items())


@on_both(ALL)
def test_skip_leaves_parameters_and_moments_as_they_were(ranks: int, method: str) -> None:
    for found in on_ranks(ranks, run, method, non_finite="skip"):
        assert found["error"] == "" and found["skipped"] == 1
        first, second, third = found["values"]
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert all(not torch.equal(second[name], third[name]) for name in first)
        assert all(value.isfinite().all() for value in found["after"].values())
        if method != "whole":
            assert all(torch.equal(found["moments"][0][key], found["moments"][1][key]) for key in found["moments"][0])
        [line] = found["said"]
        assert line.startswith(f"warning: step {BAD}: the {ALL[method][1]}") and "and the step was left out; " in line
        assert found["told"][-1].startswith("warning: 1 of 3 steps left out")
        [row] = [row for row in found["rows"] if "not_finite" in row]
        assert row["step"] == BAD and row["rows"]
        assert [row["step"] for row in found["rows"] if "loss" in row] == [1, 2, 3]
        json.dumps([row for row in found["rows"] if row.get("step") == 3], allow_nan=False)


@on_both(["loss", "unreached", "gradient", "edit", "edit first"])
def test_what_is_left_out_is_as_if_the_step_had_not_been(ranks: int, method: str) -> None:
    """Against torch's AdamW in a plain loop that takes no second step."""
    values, _, _ = naive(settings(**FULL), without=BAD - 1)
    other, _, _ = naive(settings(**FULL))
    for found in on_ranks(ranks, run, method, **{**FULL, "non_finite": "skip"}):
        assert distance(found["after"], values) < 1e-3
        assert distance(found["after"], other) > 1e-2


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
@pytest.mark.parametrize("method", ["edit", "loss"])
def test_rules_of_other_kinds_are_left_out_too(optimizer: str, method: str) -> None:
    """Muon's momentum as well: the third step is that of a run whose second has no gradient to take."""
    [found] = on_ranks(1, run, method, optimizer=optimizer, non_finite="skip")
    first, second, third = found["values"]
    assert all(torch.equal(first[name], second[name]) and third[name].isfinite().all() for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in first) and found["skipped"] == 1


def _first_left_out(place: Place, method: str) -> list[tuple[float, float]]:
    """Of each ΔW after the one step that is taken, behind one that is left out: its size, and that of Adam's first."""
    own: dict[str, Any] = {"gorp": {"full": ["q", "v"]}, "coso": {"rank": 3, "sketch": 4}}[method]
    settings = {f"method__{key}": value for key, value in {**own, "lr": 0.01}.items()}
    batch = {"training__global_batch": 6, "training__micro_batch": 6, "training__epochs": 2}
    room, config = order_room(place, method, **batch, **settings, training__non_finite="skip", training__clip=0.0)
    real: Any = room.method.loss
    bad: Any = lambda stage, batch: real(stage, batch) * (math.inf if stage.progress.step == 0 else 1.0)  # noqa: E731
    room.method.loss = bad  # type: ignore[method-assign]
    outcome = learn(room, config, 0)
    assert outcome.trained.skipped == 1
    found = []
    for delta in outcome.parameters.values():
        size = torch.linalg.svdvals(delta)
        if method == "gorp":  # ± lr along each pair of singular vectors
            found.append((float(size[0]), 0.01))
        else:  # ± lr at each place of Q's coordinates
            found.append((float(delta.norm()), 0.01 * (3 * delta.shape[1]) ** 0.5))
    return found


@pytest.mark.parametrize("method", ["gorp", "coso"])
def test_a_methods_own_adam_does_not_count_what_was_left_out(method: str) -> None:
    """Counted, its step would be 0.74 as large; ε takes a little of where gradients are next to nothing."""
    [found] = on_ranks(1, _first_left_out, method)
    assert len(found) > 1 and all(0.8 * wanted < ours < 1.01 * wanted for ours, wanted in found), found


@on_both(["loss", "unreached", "gradient", "edit"])
def test_optimizer_states_in_cpu_memory_are_left_as_they_were(ranks: int, method: str) -> None:
    for found in on_ranks(ranks, run, method, offload_optimizer=True, non_finite="skip"):
        first, second, third = found["values"]
        assert found["skipped"] == 1
        assert all(torch.equal(first[name], second[name]) and third[name].isfinite().all() for name in first)
        assert all(not torch.equal(second[name], third[name]) for name in first)


def blind(place: Place, non_finite: str, looks: bool) -> tuple[list[dict[str, Any]], Values, int]:
    """A healthy stage, with or without the look at its loss; how often the device was waited for."""
    clip = Engine.clip
    count = Waits()
    try:
        if not looks:
            Engine.clip = lambda self, also=(): clip(self)  # type: ignore[method-assign]
        with count:
            found = run(place, "healthy", **{**FULL, "non_finite": non_finite})
    finally:
        Engine.clip = clip  # type: ignore[method-assign]
    for row in found["rows"]:
        row.pop("examples_per_second"), row.pop("memory_mb")
    return found["rows"], found["after"], count.seen


class Waits(TorchDispatchMode):
    """Counts numbers read off tensors, for each of which a GPU would be waited for."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Any = None) -> Any:
        self.seen += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ranks", narrowed([1, 2], [1]))
def test_a_healthy_stage_is_the_same_to_the_bit_and_waits_no_more(ranks: int) -> None:
    for looks, skips, never in zip(
        on_ranks(ranks, blind, "stop", True),
        on_ranks(ranks, blind, "skip", True),
        on_ranks(ranks, blind, "stop", False),
        strict=True,
    ):
        assert looks[0] == skips[0] == never[0]
        for name, value in never[1].items():
            assert torch.equal(looks[1][name], value) and torch.equal(skips[1][name], value)
        assert looks[2] == skips[2] == never[2] > 0


# --- a loss that explodes


def said(*losses: float) -> list[int]:
    """The places of the losses that are said."""
    watch = Explosion()
    return [place for place, loss in enumerate(losses) if watch.see(place + 1, loss)]


def test_a_loss_explodes_over_ten_times_the_median_of_the_first_five() -> None:
    assert said(3, 2, 4, 1, 5, 30.1, 300) == [5]  # once
    assert said(3, 2, 4, 1, 5, 29.9) == []
    assert said(3, 2, 31) == []  # too few to know by
    assert said(3, 2, 4, 31) == [3]
    assert said(1e-3, 1e-3, 1e-3, 0.9) == []  # one hard row of a task that is known
    assert said(1e-3, 1e-3, 1e-3, 1.1) == [3]
    assert said(1, 1, 1, 1, 1, *[9.0] * 20, 11) == [25]  # by the first, not by the last


def test_what_was_seen_is_kept_between_two_steps() -> None:
    watch, again = Explosion(), Explosion()
    for step in range(4):
        watch.see(step, 1.0)
    again.load_state(json.loads(json.dumps(watch.state())))
    line = again.see(9, 12.5)
    assert line == watch.see(9, 12.5)
    assert line is not None and line.startswith("warning: the loss is 12.5 at step 9, and was 1 at first")
    later = Explosion()
    later.load_state(again.state())
    assert later.see(10, 100.0) is None


class Grows(Method):
    def loss(self, stage: Any, batch: Batch) -> Tensor:
        return super().loss(stage, batch) * 100.0 ** max(0, stage.progress.step - 3)


def grows(place: Place) -> tuple[list[str], list[float]]:
    config = tiny_config(training__epochs=2)
    heard: list[str] = []
    rows: list[dict[str, Any]] = []
    stage = open_stage(tiny_room(Grows(Section()), config, place), config)
    train_stage(stage, some_rows(ROWS), log=rows.append, tick=lambda *_: None, warn=heard.append)
    stage.close()
    return heard, [row["loss"] for row in rows]


def test_an_explosion_is_said_once_a_stage() -> None:
    [(heard, losses)] = on_ranks(1, grows)
    first = sorted(losses[:4])
    assert len(losses) == 6
    assert heard == [
        f"warning: the loss is {losses[4]:.4g} at step 5, and was {(first[1] + first[2]) / 2:.4g} at first (median of "
        "4 logged steps); try a lower training.lr"
    ]


# --- the command line

PLUGIN = """
import math
from cl_runner.methods.seqlora import SeqLoRA

class Cracks(SeqLoRA):
    name = "cracks"

    def loss(self, stage, batch):
        bad = stage.plan.name == "amazon" and stage.progress.step == 1
        return super().loss(stage, batch) * (math.nan if bad else 1.0)
"""


def test_an_update_that_the_last_step_left_without_bounds(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("name: one\ntasks: [dbpedia]\n")
    once = ("--set=data.max_train=4", "--set=method.lr=1e30")  # no later step meets what the first has left
    ended = call("train", "--order", "one.yaml", "--method", "oliera", *NANO, *once, cwd=tmp_path)
    assert ended.code == 1
    last = ended.err.splitlines()[-1]
    assert "what the stage has learned, ‖ΔW‖, is not finite; try a lower learning rate" in last


def test_a_run_ends_with_its_rows_named_and_goes_on_without_the_step(tmp_path: Path) -> None:
    (tmp_path / "cracks.py").write_text(PLUGIN)
    (tmp_path / "two.yaml").write_text("name: two\ntasks: [dbpedia, amazon]\n")
    arguments = ("train", "--order", "two.yaml", "--method", "cracks", "--plugin", "cracks.py", *NANO)
    ended = call(*arguments, cwd=tmp_path)
    assert ended.code == 1
    line = ended.err.splitlines()[-1]
    assert line.startswith("failed in stage 2 (amazon): step 2: the loss is not finite; rows: amazon ")
    assert "kept: dbpedia; go on: cl-runner train" in line
    [run_folder] = (tmp_path / "runs").iterdir()
    assert [path.name for path in sorted((run_folder / "stages").iterdir())] == ["01-dbpedia"]
    rows = line.partition("rows: amazon ")[2].partition(";")[0].split(", ")
    assert len(rows) == 4 and all(row.startswith("train/") for row in rows)
    again = call(*arguments, "--set", "training.non_finite=skip", cwd=tmp_path)
    assert again.code == 0, again.err
    assert [run_folder] == list((tmp_path / "runs").iterdir())
    assert "stage 2 of 2 amazon: warning: step 2: the loss is not finite, and the step was left out" in again.err
    about = json.loads((run_folder / "stages/02-amazon/metrics.json").read_text())["training"]
    assert about["skipped_steps"] == 1 and about["loss"] is None and about["steps"] == 2
    log = [json.loads(text) for text in (run_folder / "log.jsonl").read_text().splitlines()]
    [told] = [row for row in log if "not_finite" in row]
    assert (told["stage"], told["step"], told["not_finite"]) == ("amazon", 2, "loss")
    assert sorted(told["rows"]) == sorted(f"amazon {row}" for row in rows)
    for command in ("verify", "report", "watch"):
        assert call(command, run_folder.name, cwd=tmp_path).code == 0, command
    assert call("report", run_folder.name, "--html", cwd=tmp_path).code == 0
