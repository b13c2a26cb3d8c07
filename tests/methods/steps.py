"""What a method does at every step, and the same steps by hand: transformers' own loss of the whole global batch at
once, torch's own AdamW, nothing of ours but the model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cl_runner.engine.process import Place
from cl_runner.methods.protocol import Source
from cl_runner.models.batch import Example
from cl_runner.training.stage import Room
from tests.methods.orders import order_room
from tests.stages import END, VOCABULARY, Kind, naive_loss

Values = dict[str, Tensor]
# All rows in every step, in three micro-batches: whatever their order, a step is known.
LR, STEPS = 0.1, 4
THREE = {"training__global_batch": 6, "training__micro_batch": 2, "training__epochs": STEPS, "training__lr": LR}


def opposed(index: int, rows: int = 6) -> Source:
    """The same inputs at every stage, other labels: what is learned at one stage hurts the ones before."""
    dice = random.Random(0)
    sources = [[dice.randrange(30, VOCABULARY) for _ in range(dice.randint(2, 6))] + [END] for _ in range(rows)]
    examples = [Example(source, labels(index)[i % 3]) for i, source in enumerate(sources)]
    return Source(examples, ["abc"[index]] * rows)


def labels(index: int) -> list[list[int]]:
    """The three labels of a stage's rows."""
    first = 10 + 4 * index
    return [[first, END], [first + 1, first + 2, END], [first + 3, END]]


@dataclass
class Step:
    """Parameters before, gradients as the method was given them and as it left them, parameters after."""

    before: Values
    given: Values
    edited: Values
    after: Values = field(default_factory=dict)

    @property
    def change(self) -> Tensor:
        return vector(self.after).double() - vector(self.before).double()


def watch(room: Room) -> list[Step]:
    """Every step that the room's method takes part in from now on."""
    method: Any = room.method
    edit, after, steps = method.edit_gradients, method.after_step, []

    def spy_edit(stage: Any, gradients: Values) -> Values | None:
        before, given = values(room), {name: g.clone() for name, g in gradients.items()}
        edited = edit(stage, gradients)
        steps.append(Step(before, given, {**given, **{n: g.clone() for n, g in (edited or {}).items()}}))
        return edited

    def spy_after(stage: Any) -> None:
        after(stage)
        steps[-1].after = values(room)

    method.edit_gradients, method.after_step = spy_edit, spy_after
    return steps


def values(room: Room) -> Values:
    return {name: p.detach().clone() for name, p in room.adapters.parameters().items()}


def put(room: Room, new: Values) -> None:
    """Parameters set for good, and asking for gradients."""
    for name, parameter in room.adapters.parameters().items():
        parameter.data.copy_(new[name])
        parameter.requires_grad_(True)


def vector(parts: Values) -> Tensor:
    return torch.cat([part.flatten() for part in parts.values()])


def gradient(room: Room, score: Tensor) -> Tensor:
    """Of a number, as a vector (n) in fp64."""
    found = torch.autograd.grad(score, list(room.adapters.parameters().values()))
    return torch.cat([g.flatten() for g in found]).double()


def mean_loss_gradient(room: Room, kind: Kind, at: Values, examples: Sequence[Example]) -> Tensor:
    put(room, at)
    return gradient(room, naive_loss(room.adapters.model, kind, examples))


def label_logits(model: Any, kind: Kind, example: Example) -> Tensor:
    """(t, V) of one example alone, without padding."""
    if kind == "t5":
        made = model(
            input_ids=torch.tensor([example.source]), decoder_input_ids=torch.tensor([[0, *example.target[:-1]]])
        )
        return made.logits[0]
    made = model(input_ids=torch.tensor([example.source + example.target[:-1]]))
    return made.logits[0, len(example.source) - 1 :]


def by_hand(
    kind: Kind,
    start: Values,
    examples: Sequence[Example],
    steps: int,
    extra: Callable[[Any, Values], Tensor] = lambda model, parameters: torch.zeros(()),
) -> Values:
    """Parameters after so many steps on all examples; ``extra`` is added to the loss."""
    room, _ = order_room(Place(), "seqlora", kind=kind)
    put(room, start)
    parameters = room.adapters.parameters()
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=LR, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model = room.adapters.model
        (naive_loss(model, kind, examples) + extra(model, parameters)).backward()
        optimizer.step()
    return values(room)


def stepped(steps: Sequence[Step]) -> list[Values]:
    """Parameters after each step, as torch's AdamW makes them of the edited gradients."""
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in steps[0].before.items()}
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=LR, weight_decay=0.0)
    found = []
    for step in steps:
        for name, parameter in parameters.items():
            parameter.grad = step.edited[name].clone()
        optimizer.step()
        found.append({name: p.detach().clone() for name, p in parameters.items()})
    return found


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-12))
