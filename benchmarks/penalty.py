"""The penalty's share of an optimizer step at stage 15.

Steps of each method and of `inclora` (the same step without a penalty) are measured in turns, and the penalty's
forward and backward once more by themselves. `share` is the second over the step; `by difference` is the step against
inclora's.

    --shape tiny        the embedded tiny-t5 with its preset (default)
    --shape t5-base     random weights of that shape (t5-large: on a GPU if there is one)
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks import shapes, world
from benchmarks.common import median, parser, publish
from cl_runner.models.batch import Example

PENALISED = ("olora (absolute)", "olora (squared)", "nlora")


def shares(made: world.World, examples: Sequence[Example], position: int, rounds: int) -> list[Mapping[str, Any]]:
    """A row for each method with a penalty."""
    steps = world.steps_in_turns(made, [position], ["inclora", *PENALISED], examples, rounds)
    plain = median(steps["inclora", position])
    rows: list[Mapping[str, Any]] = []
    for method in PENALISED:
        step = median(steps[method, position])
        alone = median(world.penalty_seconds(made, method, position, 10))
        rows.append(
            {
                "method": method,
                "stage": position,
                "step ms": 1e3 * step,
                "without penalty ms": 1e3 * plain,
                "penalty alone ms": 1e3 * alone,
                "share %": 100 * alone / step,
                "by difference %": 100 * (step - plain) / step,
            }
        )
    return rows


def made_world(given: argparse.Namespace) -> tuple[world.World, list[Example]]:
    """The world of a shape, and rows for a few steps."""
    if given.shape == "tiny":
        made = world.tiny(given.stage)
        return made, world.tiny_rows(made, given.steps * made.config.training.global_batch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = shapes.random_world(given.shape, device, given.stage, batch=given.batch, micro=given.batch)
    return made, shapes.rows(made.room.base, ["agnews"], given.steps * given.batch)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--shape", choices=("tiny", *shapes.SHAPES), default="tiny")
    made.add_argument("--stage", type=int, default=15, help="position in the order (default %(default)s)")
    made.add_argument("--steps", type=int, default=8, help="steps of a turn (default %(default)s)")
    made.add_argument("--rounds", type=int, default=3, help="turns of each method (default %(default)s)")
    made.add_argument(
        "--batch", type=int, default=16, help="rows a step where --shape is not tiny (default %(default)s)"
    )
    given = made.parse_args()
    of_shape, examples = made_world(given)
    found = shares(of_shape, examples, given.stage, given.rounds)
    publish("penalty", given, {f"{given.shape} on {of_shape.device.type}, {given.stage - 1} past pairs": found})


if __name__ == "__main__":
    main()
