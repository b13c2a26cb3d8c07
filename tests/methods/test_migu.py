"""MIGU's rows against the sizes of what each layer puts out, one example at a time; and the clip that comes after."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cl_runner.engine.process import Place
from cl_runner.models.batch import Example
from tests.breadth import in_turn, paired, wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import STEPS, THREE, Values, mean_loss_gradient, off, opposed, put, stepped, vector, watch
from tests.stages import Kind, some_rows


def read(model: Any, kind: Kind, example: Example) -> None:
    """One example as a model is handed it in training: source and all of the label, from which it takes the loss."""
    if kind == "t5":
        model(input_ids=torch.tensor([example.source]), labels=torch.tensor([example.target]))
    else:
        model(input_ids=torch.tensor([example.source + example.target]))


def sizes_by_hand(room: Any, kind: Kind, at: Values, examples: Any) -> dict[str, NDArray[np.float64]]:
    """Parameter → mean |output| of each of its rows over all tokens; no padding anywhere."""
    put(room, at)
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    hooks = []
    for target, layer in room.adapters.layers.items():
        note = lambda name: lambda _, given, out: seen[name].append(out.detach()[0].double().abs())  # noqa: E731
        hooks.append(layer.register_forward_hook(note(f"{target}.lora_B")))
        hooks.append(layer.lora_A["default"].register_forward_hook(note(f"{target}.lora_A")))
    for example in examples:
        read(room.adapters.model, kind, example)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows).mean(0).numpy() for name, rows in seen.items()}


def _rows(place: Place, kind: Kind, quantile: float, targets: list[str] | None) -> None:
    adapter = {"adapter__r": 5, "adapter__target_modules": targets}
    room, config = order_room(place, "migu", kind=kind, **adapter, **THREE, method__quantile=quantile)
    probe, _ = order_room(place, "seqlora", kind=kind, **adapter)
    steps = watch(room)
    sources = [opposed(0), some_rows(6, seed=1), some_rows(6, seed=2)]  # inputs that differ
    for index in range(3):
        learn(room, config, index, sources[index])
    assert all(torch.equal(vector(step.edited), vector(step.given)) for step in steps[:STEPS])  # the first task
    masks = set()
    for number, step in enumerate(steps[STEPS:], STEPS):
        sizes = sizes_by_hand(probe, kind, step.before, sources[number // STEPS].examples)
        assert sorted(sizes) == sorted(step.given)
        for name, size in sizes.items():
            learn_these = torch.from_numpy(size > np.quantile(size, quantile))
            assert int(learn_these.sum()) == {"B": {64: 19, 32: 10, 16: 5}, "A": {5: 2}}[name[-1]][len(size)]
            assert torch.equal(step.edited[name], step.given[name] * learn_these[:, None]), (number, name)
            masks.add((name, tuple(learn_these.tolist())))
    assert len(masks) > len(sizes)  # they change with the inputs
    second = steps[STEPS : 2 * STEPS]
    for step, wanted in zip(second, stepped(second), strict=True):
        assert off(vector(step.after), vector(wanted)) < 1e-4
    assert not room.method.state().tensors


@pytest.mark.parametrize(
    ("kind", "targets"), [("t5", None), pytest.param("llama", None, marks=wide), ("llama", ["q_proj", "lm_head"])]
)
def test_rows_that_learn_at_accumulation_3(kind: Kind, targets: list[str] | None) -> None:
    on_ranks(1, _rows, kind, 0.7, targets)


def _clipped(place: Place, kind: Kind, train: str) -> list[tuple[list[float], list[float]]]:
    """Lengths of the second stage's steps, and the norms in its log; at rate 1, without momentum."""
    settings = {**THREE, "training__lr": 1.0, "training__optimizer": "sgd", "training__clip": 0.02}
    room, config = order_room(place, "migu", kind=kind, **settings, method__train=train)
    probe, _ = order_room(place, "seqlora" if train == "lora" else "seqft", kind=kind)
    steps = watch(room)
    sources = [opposed(0), some_rows(6, seed=1)]
    for index in range(2):
        outcome = learn(room, config, index, sources[index])
    for step, norm in zip(steps[STEPS:], outcome.norms, strict=True):
        whole = mean_loss_gradient(probe, kind, step.before, sources[1].examples)  # neither clipped nor masked
        assert off(vector(step.given), whole) < 1e-4
        masked = vector({name: step.given[name] * (edited != 0) for name, edited in step.edited.items()}).double()
        assert masked.norm() < 0.9 * whole.norm() and norm == pytest.approx(float(masked.norm()), rel=1e-5)
        assert off(step.change, -masked * min(1.0, 0.02 / float(masked.norm()))) < 1e-3
    return [(round(float(step.change.norm()), 5), norm > 0.02) for step in steps[STEPS:]]


@pytest.mark.parametrize(
    ("kind", "train", "ranks"),
    paired(
        [("llama", "lora", 1), ("llama", "full", 1), ("t5", "full", 2), ("llama", "lora", 2)],
        [("llama", "lora", 1), ("t5", "full", 2)],
    ),
)
def test_what_is_masked_is_clipped_afterwards(kind: Kind, train: str, ranks: int) -> None:
    """As in the official code: the clip does not count what is masked, and a step is as long as it allows."""
    for steps in on_ranks(ranks, _clipped, kind, train):
        assert steps == [(0.02, True)] * STEPS


def sizes_in_full(room: Any, kind: Kind, at: Values, examples: Any) -> dict[str, NDArray[np.float64]]:
    """The same of every linear layer's weight; of a head tied to the embedding too."""
    put(room, at)
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    model = room.adapters.model

    def note(name: str) -> Any:
        return lambda _, given, out: seen[f"{name}.weight"].append(out.detach()[0])

    hooks = [
        layer.register_forward_hook(note(name))
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    for example in examples:
        read(model, kind, example)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows).double().abs().mean(0).numpy() for name, rows in seen.items()}


def _in_full(place: Place, kind: Kind) -> None:
    settings = {**THREE, "training__lr": 5e-3}
    room, config = order_room(place, "migu", kind=kind, **settings, method__train="full")
    probe, _ = order_room(place, "seqft", kind=kind)
    steps = watch(room)
    sources = [opposed(0), some_rows(6, seed=1)]
    for index in range(2):
        learn(room, config, index, sources[index])
    assert all(torch.equal(vector(step.edited), vector(step.given)) for step in steps[:STEPS])
    for step in steps[STEPS:]:
        sizes = sizes_in_full(probe, kind, step.before, sources[1].examples)
        masked = 0
        for name, given in step.given.items():
            if name not in sizes:  # embeddings, norms, a tied head: as they were
                assert torch.equal(step.edited[name], given), name
                continue
            size, edge = sizes[name], np.quantile(sizes[name], 0.7)
            clear = torch.from_numpy(abs(size - edge) > 1e-5 * abs(edge))  # no row at the edge but for rounding
            learn_these = torch.from_numpy(size >= edge)
            wanted = given * learn_these[:, None]
            assert torch.equal(step.edited[name][clear], wanted[clear]) and int(clear.sum()) > 0.9 * len(clear), name
            masked += 1
        assert masked == len(sizes) - (kind == "t5") and ("lm_head.weight" in step.given) == (kind == "llama")
        assert not torch.equal(vector(step.after), vector(step.before))


@pytest.mark.parametrize(("kind", "ranks"), in_turn(["t5", "llama"], [1, 2]))
def test_rows_of_all_weights(kind: Kind, ranks: int) -> None:
    on_ranks(ranks, _in_full, kind)


def test_rows_that_stand_upright_are_columns_of_the_weight() -> None:
    """GPT-2's Conv1D has its weight (in, out)."""
    from transformers.pytorch_utils import Conv1D

    from cl_runner.adapters.targets import is_transposed
    from cl_runner.methods.migu import MIGU

    method = MIGU(MIGU.Config(train="full", quantile=0.5))
    method.sizes = {"c.weight": torch.tensor([3.0, 1.0, 2.0]), "l.weight": torch.tensor([1.0, 2.0, 3.0])}
    stage: Any = SimpleNamespace(
        sum=lambda tensor: tensor,
        named={"weight": {"c": "c.weight", "l": "l.weight"}}.get,
        transposed=lambda target: is_transposed({"c": Conv1D(3, 3), "l": torch.nn.Linear(3, 3)}[target]),
    )
    found = method.edit_gradients(stage, {name: torch.ones(3, 3) for name in method.sizes})
    assert found is not None
    assert found["c.weight"].tolist() == [[1.0, 0.0, 1.0]] * 3
    assert found["l.weight"].tolist() == [[0.0] * 3, [1.0] * 3, [1.0] * 3]
