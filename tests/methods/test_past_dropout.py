"""adapter.dropout_past over whole stages: the same after a restart, the same on two ranks, and what it means where."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.atomic import read_json
from cl_runner.engine.process import Place
from cl_runner.methods import METHODS, make_method, method_class
from cl_runner.models.forward import token_loss
from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.training.checkpoint import restore_stage, save_stage
from cl_runner.training.sampling import BatchPlan, derived_seed
from cl_runner.training.stage import StageRun
from tests.adapters.test_past_dropout import unfolded
from tests.breadth import wide
from tests.command_line import call
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room, rows_of
from tests.methods.steps import off
from tests.stages import tiny_config, tiny_model, widths

DROPPED: dict[str, Any] = {
    "dropout": 0.2, "adapter__dropout": 0.3, "adapter__dropout_past": True, "training__epochs": 2,
}  # fmt: skip
FOLDING = [name for name in METHODS if method_class(name).past_as == "pairs"]
OWN: dict[str, dict[str, Any]] = {
    "olora": {"method__lambda1": 0.05},
    "nlora": {"method__lambda1": 3.0},
    "pego": {"method__group": 2},
}


def opened(place: Place, name: str, **settings: Any) -> tuple[Any, Any]:
    return order_room(place, name, **{**DROPPED, **OWN.get(name, {}), **settings})


# --- a restart, and ranks


def _resumed(place: Place, folder: str, name: str, r: int) -> tuple[Tensor, Tensor, str]:
    straight, config = opened(place, name, adapter__r=r)
    rundir = RunDir(Path(folder))
    for index in range(3):
        learn(straight, config, index)
        room, _ = opened(place, name, adapter__r=r)
        if index:
            restored = StageRun(room, config, index - 1)
            restore_stage(rundir, restored, index - 1)
            restored.close()
        stage = learn(room, config, index).stage
        assert all(torch.equal(room.adapters.past[t].sum, past.sum) for t, past in straight.adapters.past.items())
        commit(rundir, index, stage.plan.name, lambda draft: save_stage(draft, stage))  # noqa: B023
        room.adapters.let_go(room.method.reads_past())
        straight.adapters.let_go(straight.method.reads_past())
    other, _ = opened(place, name, adapter__r=r, adapter__dropout_past=False)
    for index in range(3):
        learn(other, config, index)
    return sums(straight), sums(other), read_json(rundir.stage_dir(2, "c") / "state.json")["own"]


def sums(room: Any) -> Tensor:
    return torch.cat([past.sum.flatten() for past in room.adapters.past.values()])


@pytest.mark.parametrize(("name", "r"), [("olora", 2), pytest.param("nlora", 2, marks=wide), ("inclora", 12)])
def test_restarted_at_every_stage_it_is_the_same_to_the_bit(name: str, r: int, tmp_path: Path) -> None:
    """Also of rank 12, where folders hold whole matrices and no one else would read the factors."""
    ((ours, without, own),) = on_ranks(1, _resumed, str(tmp_path), name, r)
    assert off(ours, without) > 0.01  # and not what it is without
    assert own == ("state" if r == 12 else "adapter")


def _ranks(place: Place) -> dict[str, Tensor]:
    """Five rows in micro-batches of one: of two ranks with three each, one takes a row that does not count."""
    found = {}
    for name in FOLDING:
        room, config = opened(place, name, training__micro_batch=1)
        for index in range(2):
            learn(room, config, index)
        found[name] = sums(room)
    return found


@wide
def test_two_ranks_do_what_one_does() -> None:
    (alone,) = on_ranks(1, _ranks)
    first, second = on_ranks(2, _ranks)
    for name, total in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert off(first[name], total) < 1e-3, name


# --- a step by hand


def _second_stage(place: Place, by: str) -> tuple[float, float, float]:
    """The first loss of the second stage, as it was logged, and of the unfolded pairs with the same masks; without."""
    logged = []
    for dropout_past in (True, False):
        own = {"adapter__dropout_past": dropout_past, "training__dropout_by": by}
        room, config = opened(place, "olora", dropout=0.0, **own)
        learn(room, config, 0)
        logged.append(learn(room, config, 1).losses[0])
    room, config = opened(place, "olora", dropout=0.0, training__dropout_by=by)
    learn(room, config, 0)
    stage = StageRun(room, config, 1)
    room.method.build(stage)
    own = rows_of(stage.plan)
    plan = BatchPlan.make(len(own.examples), config.training, 1)
    model = unfolded(tiny_model("t5"), room.adapters, [*room.adapters.folded, room.adapters.pair()]).train()
    rows = next(iter(plan.step_rows(config.seed, 1, widths(own.examples))))
    total = sum(len(own.examples[row].target) for row in rows)
    loss = torch.zeros(())
    for number, mine in plan.micro_batches(rows, 0):
        batch = stage.make_batch([own.examples[row] for row in mine], ["b"] * len(mine), [1 / total] * len(mine))
        batch = replace(batch, places=number * plan.micro_batch + torch.arange(len(mine)))
        torch.manual_seed(derived_seed(config.seed, 1, "forward", 0, number))
        stage.dropout.draw(derived_seed(config.seed, 1, "dropout", 0))
        stage.dropout.see(batch)
        with stage.dropout.installed() if by == "row" else nullcontext():
            scores = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                decoder_input_ids=batch.decoder_input_ids, use_cache=False,
            ).logits  # fmt: skip
        loss += (token_loss(scores, batch.labels) * batch.token_weights).sum().detach()
    stage.close()
    return logged[0], logged[1], float(loss)


@pytest.mark.parametrize("by", ["row", "micro"])
def test_a_stages_first_loss_is_that_of_the_unfolded_pairs_under_the_same_masks(by: str) -> None:
    ((ours, without, wanted),) = on_ranks(1, _second_stage, by)
    assert ours == pytest.approx(wanted, rel=1e-5) and without != pytest.approx(wanted, rel=1e-4)


# --- every method


def test_what_a_method_says_of_its_past_is_what_it_leaves() -> None:
    (left,) = on_ranks(1, _left)
    for name, (pairs, whole, terms) in left.items():
        wanted = {"pairs": (1, 0, False), "none": (0, 0, False)}.get(method_class(name).past_as)
        assert wanted == (pairs, whole, terms) if wanted else whole or terms, name


def _left(place: Place) -> dict[str, tuple[int, int, bool]]:
    """Of every method with a pair or terms, after a stage: folded pairs, folded matrices, terms at the next stage."""
    found = {}
    for name in METHODS:
        if make_method(config := tiny_config(method__name=name)).kind(config) != "lora":
            continue
        room, config = order_room(place, name, training__epochs=1, **OWN.get(name, {}))
        learn(room, config, 0)
        folded = len(room.adapters.folded), len(room.adapters.dense)
        if len(room.order) > 1:
            if room.order[1].start == "base":
                room.adapters.restore([], room.adapters.kept, None)
                folded = len(room.adapters.folded), len(room.adapters.dense)
            room.method.build(StageRun(room, config, 1))
        else:
            folded = 0, 0
        found[name] = (*folded, room.adapters.terms is not None)
    return found


ASKED = ("train", "--order", "order1", "--dry-run", "--set", "adapter.dropout_past=true")


@pytest.mark.parametrize("name", [name for name in METHODS if method_class(name).past_as == "other"])
def test_a_past_in_another_form_is_refused_before_anything_is_loaded(name: str, tmp_path: Path) -> None:
    refused = call(*ASKED, "--method", name, cwd=tmp_path)
    assert refused.code == 2
    assert refused.line == (
        f"cl-runner: adapter.dropout_past: {name} does not keep what earlier stages learned as folded pairs; set it to "
        "false"
    )


@pytest.mark.parametrize(
    ("name", "more", "why"),
    [
        ("seqlora", (), "seqlora has no past pairs"),
        ("seqft", (), "seqft has no past pairs"),
        ("l2p", (), "l2p has no past pairs"),
        ("mtl", (), "mtl has no past pairs"),
        ("olora", ("--set", "adapter.dropout=0"), "adapter.dropout is 0"),
        ("olora", (), None),
    ],
)
def test_where_it_has_no_effect_that_is_said(name: str, more: tuple[str, ...], why: str | None, tmp_path: Path) -> None:
    planned = call(*ASKED, "--method", name, *more, cwd=tmp_path)
    assert planned.code == 0, planned.err
    said = [line for line in planned.out.splitlines() if "dropout_past" in line]
    assert said == ([f"adapter.dropout_past has no effect: {why}"] if why else [])
