"""OGD: after every whole step, under AdamW, nothing lies on a prediction gradient of a past task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.config.schema import ModelConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods.ogd.directions import extend, project
from cl_runner.models.base import load_base
from cl_runner.models.batch import Example
from cl_runner.training.compatibility import check_method
from tests.breadth import wide
from tests.command_line import call
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room, rows_of
from tests.methods.steps import (
    STEPS,
    THREE,
    gradient,
    label_logits,
    labels,
    mean_loss_gradient,
    off,
    opposed,
    put,
    stepped,
    values,
    vector,
    watch,
)  # fmt: skip
from tests.stages import Kind, some_rows


def score_gradients(room: Any, kind: Kind, index: int, variant: str) -> list[list[Tensor]]:
    """Of each example of a task: ∇f_j for the true label, for all three, or their mean; each (n), fp64."""

    def of(source: list[int], target: list[int]) -> Tensor:
        scores = label_logits(room.adapters.model, kind, Example(source, target))
        return gradient(room, sum(scores[at, token] for at, token in enumerate(target)))  # type: ignore[arg-type]

    found = []
    for example in opposed(index).examples:
        each = [of(example.source, t) for t in ([example.target] if variant == "gtl" else labels(index))]
        found.append([torch.stack(each).mean(0)] if variant == "ave" else each)
    return found


def share(basis: Tensor, v: Tensor) -> float:
    """How much of a vector lies outside of the rows' span."""
    q, _ = torch.linalg.qr(basis.double().T)
    return float((v - q @ (q.T @ v)).norm() / v.norm())


def on(change: Tensor, directions: Sequence[Tensor]) -> float:
    return max(float((change @ v).abs() / (change.norm() * v.norm())) for v in directions)


def _steps(place: Place, kind: Kind, variant: str, vectors: int) -> None:
    room, config = order_room(
        place, "ogd", kind=kind, **THREE, training__weight_decay=0.1, method__variant=variant, method__vectors=vectors
    )  # fmt: skip
    probe, _ = order_room(place, "seqlora", kind=kind)
    past: list[Tensor] = []
    violated = 0.0
    for index in range(3):
        steps = watch(room)
        learn(room, config, index, opposed(index))
        assert len(steps) == STEPS
        for step, plain in zip(steps, stepped(steps), strict=True):
            mean = mean_loss_gradient(probe, kind, step.before, opposed(index).examples)
            assert off(vector(step.given), mean) < 1e-3
            if past:
                assert on(step.change, past) < 1e-5
                assert on(step.change, list(room.method.basis[: 6 * index].double())) < 1e-5
                assert on(vector(step.edited).double(), past) < 1e-5
                assert float(step.change.norm()) > 0.05  # and yet it moves
                violated = max(violated, on((vector(plain) - vector(steps[0].before)).double(), past))

        # What is kept of the stage: six directions at its end.
        put(probe, values(room))
        each = score_gradients(probe, kind, index, variant)
        basis = room.method.basis
        assert basis.shape == (6 * (index + 1), sum(p.numel() for p in values(room).values()))
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-5, rtol=0)
        inside = [vs for vs in each if all(share(basis, v) < 1e-3 for v in vs)]
        assert len(inside) == (2 if variant == "all" else 6)
        past += [v for vs in inside for v in vs]
    assert violated > 1e-2  # projected gradients alone would not have done: Adam leaves the subspace


@pytest.mark.parametrize(
    ("kind", "variant"), [pytest.param("t5", "gtl", marks=wide), ("llama", "gtl"), ("t5", "all"), ("t5", "ave")]
)
def test_steps_have_no_part_on_a_stored_direction(kind: Kind, variant: str) -> None:
    on_ranks(1, _steps, kind, variant, 6)


def test_a_basis_grows_by_what_is_new() -> None:
    dice = torch.Generator().manual_seed(0)
    first, second = torch.randn(5, 40, generator=dice), torch.randn(4, 40, generator=dice)
    basis = extend(None, first)
    assert basis is not None and len(basis) == 5 and max(share(basis, v.double()) for v in first) < 1e-5
    again = [first[0] * 3, second[0], first[1] + first[2], second[0] + 1e-3 * second[1], torch.zeros(40), second[2]]
    wider = extend(basis, again)
    assert wider is not None and len(wider) == 8 and torch.equal(wider[:5], basis)
    torch.testing.assert_close(wider @ wider.T, torch.eye(8), atol=1e-6, rtol=0)
    assert max(share(wider, v.double()) for v in second[:3]) < 1e-3
    assert extend(None, []) is None and extend(basis, []) is basis and extend(None, [torch.zeros(3)]) is None
    left = project(second[3], wider)
    assert float((wider @ left).abs().max()) < 1e-6 * float(second[3].norm()) < float(left.norm())


def test_too_many_directions_are_refused() -> None:
    def check(shapes: Any, tasks: str = "abc", **own: Any) -> None:
        room, config = order_room(Place(), "ogd", tasks, **{f"method__{name}": value for name, value in own.items()})
        check_method(config, room.order)
        check_method(config, room.order, shapes)

    tiny, large = [(32, 32)] * 12, [(1024, 1024)] * 144  # at rank 2: 1,536 and 589,824 parameters
    check(tiny)
    with pytest.raises(
        UserError, match=r"^method.vectors: 1600 directions \(200 for each of 8 tasks\) of only 1536 trai"
    ):
        check(tiny, "abcdefgh")
    with pytest.raises(
        UserError, match=r"^method.vectors: 1537 directions of only 1536 trained parameters; set fewer$"
    ):
        check(tiny, "a", vectors=1537)
    check(large)
    with pytest.raises(
        UserError, match=r"^method.vectors: 2000 .* 589824 parameters take 4.72 GB, over method.max_gb 4;"
    ):
        check(large, "a", vectors=2000, max_gb=4)
    with pytest.raises(
        UserError, match=r"^method.vectors: 6000 directions \(2000 .* take 14.2 GB, over method.max_gb 8;"
    ):
        check(large, vectors=2000)
    with pytest.raises(UserError, match=r"take 141558 GB, and (this machine|one GPU) has .* GB of memory; set fewer$"):
        check([(1024, 1024)] * 1_440_000, "a", vectors=6000, max_gb=1e6)


@pytest.mark.parametrize("variant", ["gtl", "ave", "all"])
def test_how_much_it_will_carry_is_said_before_the_start(variant: str, tmp_path: Path) -> None:
    arguments = ["train", "--order", "order1", "--method", "ogd", "--data", "synthetic", "--dry-run"]
    rank = ["--set=adapter.r=4", f"--set=method.variant={variant}", "--set=method.vectors=50"]
    model = load_base(ModelConfig(name="tiny-t5"), torch.device("cpu")).model
    pairs = [m for name, m in model.named_modules() if name.endswith((".q", ".v"))]
    parameters = sum(4 * (layer.in_features + layer.out_features) for layer in pairs)
    line = (
        f"carries up to {50 * parameters * 4 / 1e6:.3g} MB a task, {200 * parameters * 4 / 1e6:.3g} MB in all: "
        f"50 directions of {parameters} parameters for each of 4 tasks"
    )
    assert line in call(*arguments, *rank, cwd=tmp_path).out.splitlines()
    assert call(*arguments, *rank, "--json", cwd=tmp_path).json["grows"] == line


def _refused_at_the_start(place: Place) -> None:
    room, config = order_room(place, "ogd", method__vectors=5, method__variant="all")
    with pytest.raises(UserError, match=r"^method.variant: all takes every label .* a has 6 different targets"):
        learn(room, config, 0, some_rows(6, task="a"))
    room, config = order_room(place, "ogd", method__vectors=5)
    learn(room, config, 0, rows_of(room.order[0]))
    assert len(room.method.basis) == 5


def test_what_only_the_rows_tell_is_refused_before_training() -> None:
    on_ranks(1, _refused_at_the_start)
