"""How far fp32 gradients lie from fp64 ones: past pairs folded into the weight, and kept in the forward.

tiny-t5 learns three synthetic tasks with `olora`. On batches of the last one, from the same fp32 parameters, the task
loss's gradient by A and B is taken four ways: as a stage takes it (folded), by hand with every past pair in the forward
as the official code has it (in the forward), the same in fp64, and in fp64 with the folded fp32 weight, which shows
what folding alone rounds away (folding alone). Errors are relative to the norm of the fp64 gradient.

A hidden unit within rounding of zero may fall on the other side of its ReLU than in fp64. That moves a gradient by far
more than rounding does, and whether it happens is chance, in either form: such batches are counted apart.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks import world
from benchmarks.common import median, parser, publish
from cl_runner.adapters.pairs import Pair
from cl_runner.config.schema import ModelConfig
from cl_runner.methods.protocol import Source
from cl_runner.models.base import load_base
from cl_runner.models.batch import IGNORE, Batch, Example
from cl_runner.training.loop import train_stage
from cl_runner.training.stage import StageRun


class InTheForward(nn.Module):
    """``h = W x + s·B_past A_past x + s·B A x``: a layer without bias, past pairs side by side, a live one."""

    def __init__(self, weight: Tensor, past: Sequence[Pair], live: Pair, target: str, dtype: torch.dtype) -> None:
        super().__init__()
        m, n = weight.shape
        self.scale = live.scale
        before = [(p.A[target], p.scale * p.B[target].double()) for p in past] or [
            (weight.new_zeros(0, n), weight.new_zeros(m, 0))
        ]
        self.register_buffer("W", weight.to(dtype))
        self.register_buffer("past_A", torch.cat([A for A, _ in before]).to(dtype))
        self.register_buffer("past_B", torch.cat([B for _, B in before], dim=1).to(dtype))
        self.A = nn.Parameter(live.A[target].to(dtype, copy=True))
        self.B = nn.Parameter(live.B[target].to(dtype, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        past = linear(linear(x, self.past_A), self.past_B)
        return linear(x, self.W) + past + self.scale * linear(linear(x, self.A), self.B)


@dataclass
class Form:
    """A model, and the A and B of its targets, in turn."""

    model: Any
    parameters: list[Tensor]

    def gradient(self, batch: Batch) -> Tensor:
        """Of transformers' own loss, dropout off; all in one vector, fp64."""
        loss = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        return _vector(torch.autograd.grad(loss, self.parameters))


def by_hand(base: Any, weights: dict[str, Tensor], past: Sequence[Pair], live: Pair, dtype: torch.dtype) -> Form:
    """A T5 whose targets have ``weights`` (m, n), and pairs as ``InTheForward``; in fp64 wholly so."""
    model = copy.deepcopy(base).to(dtype)
    parameters: list[Tensor] = []
    for target, weight in weights.items():
        layer = InTheForward(weight, past, live, target, dtype)
        _replace(model, target, layer)
        parameters += [layer.A, layer.B]
    for name, norm in list(model.named_modules()):
        if dtype == torch.float64 and type(norm).__name__ == "T5LayerNorm":  # its variance is fp32, whatever comes in
            exact = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=dtype)
            exact.weight = norm.weight
            _replace(model, name, exact)
    return Form(model.eval(), parameters)


def active(model: Any, batch: Batch) -> list[Tensor]:
    """Which hidden units of each feed-forward block are above zero, at the tokens of a batch."""
    found: list[Tensor] = []
    masks = {True: batch.attention_mask.bool(), False: batch.labels != IGNORE}
    hooks = [
        block.register_forward_hook(
            lambda _, __, out, mask=masks[".encoder." in f".{name}"]: found.append(out[mask] > 0)
        )
        for name, block in model.named_modules()
        if name.endswith(".wi")
    ]
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    for hook in hooks:
        hook.remove()
    return found


@dataclass(frozen=True)
class Errors:
    """Of one batch: relative errors of the gradient, and how many units are on the other side of zero than in fp64."""

    folded: float
    in_the_forward: float
    folding_alone: float
    units_folded: int
    units_in_the_forward: int

    @property
    def ratio(self) -> float:
        return self.folded / self.in_the_forward

    @property
    def plain(self) -> bool:
        """Whether every unit is where it is in fp64, in both forms."""
        return not (self.units_folded or self.units_in_the_forward)


def errors(made: world.World, live: Pair, batches: Sequence[Sequence[Example]]) -> list[Errors]:
    """Each batch's, at the stage after ``made.pairs``, whose pair is ``live``."""
    stage = made.stage("olora (absolute)", len(made.pairs) + 1)
    adapters = made.room.adapters
    adapters.show(live)
    adapters.train(True)
    adapters.model.eval()
    base = load_base(ModelConfig(name=made.config.model.name), made.device).model
    plain = {target: base.get_submodule(target).weight.detach() for target in adapters.past}
    summed = {target: layer.weight.detach() for target, layer in adapters.past.items()}
    exact = by_hand(base, plain, made.pairs, live, torch.float64)
    official = by_hand(base, plain, made.pairs, live, torch.float32)
    rounded = by_hand(base, summed, [], live, torch.float64)
    parameters = list(adapters.parameters().values())
    found = []
    for examples in batches:
        tokens = sum(len(example.target) for example in examples)
        batch = stage.make_batch(examples, [stage.plan.name] * len(examples), [1 / tokens] * len(examples))
        ours = _vector(torch.autograd.grad(made.room.method.loss(stage, batch), parameters))
        wanted, units = exact.gradient(batch), active(exact.model, batch)
        off = [
            float((g - wanted).norm() / wanted.norm())
            for g in (ours, official.gradient(batch), rounded.gradient(batch))
        ]
        aside = [
            sum(int((a != b).sum()) for a, b in zip(active(model, batch), units, strict=True))
            for model in (adapters.model, official.model)
        ]
        found.append(Errors(*off, *aside))
    stage.close()
    return found


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers; nan of none."""
    return statistics.geometric_mean(values) if values else float("nan")


def _vector(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten().double() for part in parts])


def _replace(model: Any, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def learned(given: argparse.Namespace) -> tuple[world.World, Pair]:
    """A world whose past has learned all tasks but the last, and the pair that has learned this one."""
    made = world.tiny(len(given.tasks), epochs=given.epochs)
    made.pairs.clear()
    for position, task in enumerate(given.tasks, 1):
        stage: StageRun = made.stage("olora (absolute)", position)
        examples = world.tiny_rows(made, given.train, task)
        train_stage(
            stage, Source(examples, [stage.plan.name] * len(examples)), log=lambda _: None, tick=lambda *_: None
        )
        stage.close()
        made.pairs.append(made.room.adapters.pair())
    return made, made.pairs.pop()


def summary(name: str, found: Sequence[Errors]) -> dict[str, Any]:
    """A line of the table."""
    plain = [one for one in found if one.plain]
    return {
        "live pair": name,
        "batches": len(found),
        "folded": median([one.folded for one in found]),
        "in the forward": median([one.in_the_forward for one in found]),
        "folding alone": median([one.folding_alone for one in found]),
        "folded ÷ in the forward (geometric mean)": geometric_mean([one.ratio for one in found]),
        "least, most": f"{min(one.ratio for one in found):.2g}, {max(one.ratio for one in found):.2g}",
        "a unit aside, folded": sum(one.units_folded > 0 for one in found),
        "in forward": sum(one.units_in_the_forward > 0 for one in found),
        "ratio of the others": geometric_mean([one.ratio for one in plain]),
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--tasks", nargs="+", default=["dbpedia", "amazon", "yahoo"], help="the last one is looked at")
    made.add_argument("--train", type=int, default=400, help="rows of each task (default %(default)s)")
    made.add_argument("--epochs", type=int, default=3, help="of each task (default %(default)s)")
    made.add_argument("--batches", type=int, default=50, help="batches looked at (default %(default)s)")
    made.add_argument("--rows", type=int, default=8, help="rows of one (default %(default)s)")
    given = made.parse_args()
    home, live = learned(given)
    rows = world.tiny_rows(home, given.batches * given.rows, given.tasks[-1])
    batches = [rows[at : at + given.rows] for at in range(0, len(rows), given.rows)]
    # As the stage begins: B = 0.
    fresh = Pair(live.stage, live.rank, live.scale, live.A, {target: 0 * B for target, B in live.B.items()})
    lines = [summary(name, errors(home, pair, batches)) for name, pair in (("trained", live), ("B = 0", fresh))]
    publish("precision", given, {f"{given.tasks}, {given.train} rows, {given.rows} a batch, synthetic": lines})


if __name__ == "__main__":
    main()
