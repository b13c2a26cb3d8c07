"""What padding costs, and what a head does: rows padded, laid end to end, behind their head, and both, in turns.

    python -m benchmarks.packing --model FOLDER --data-dir FOLDER --tasks QQP,agnews

For each task: the share of padding in the micro-batches that a stage is dealt (rows of about one length stand
together), and seconds of forward and backward of the same rows, adapters as in a run, four ways: padded; packed into
one row, where a mask keeps each row to itself; behind the head's keys and values; packed behind the head. The losses
have to agree. For decoder-only models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import median, parser, publish, seconds_of, take_turns
from benchmarks.job import add_model_arguments
from benchmarks.world import prepared
from cl_runner.engine import zero as engine
from cl_runner.models.batch import Batch
from cl_runner.models.forward import logits, token_loss
from cl_runner.models.heads import logits_behind_head, logits_in_one_row
from cl_runner.training.prepare import open_stage
from cl_runner.training.sampling import BatchPlan
from cl_runner.training.stage import StageRun

AGREE = 1e-4  # relative, of two ways' losses


def dealt(stage: StageRun, examples: Sequence[Any]) -> list[Batch]:
    """The micro-batches of a stage, as it is dealt them."""
    config = stage.config
    stage.sharing.learn(examples, [stage.plan.name] * len(examples))
    plan = BatchPlan.make(len(examples), config.training, 1)
    lengths = [len(example.source) + len(example.target) for example in examples]
    return [
        stage.padded([examples[i] for i in mine], [1.0] * len(mine), [stage.plan.name] * len(mine))
        for rows in plan.step_rows(config.seed, stage.index, lengths)
        for _, mine in plan.micro_batches(rows, 0)
    ]


def padding(batches: Sequence[Batch]) -> float:
    """The share of input positions that hold no token."""
    return 1 - sum(int(b.attention_mask.sum()) for b in batches) / sum(b.input_ids.numel() for b in batches)


def in_one_row(batch: Batch) -> int:
    """Tokens of a head and of its rows behind it."""
    return sum(batch.lengths) - (batch.size - 1) * min(batch.heads)


def padded(model: Any, batch: Batch) -> Tensor:
    """The sum of the label tokens' losses, rows padded."""
    return token_loss(logits(model, batch), batch.labels).sum()


def packed(model: Any, batch: Batch) -> Tensor:
    """The same of rows that lie end to end in one; a token looks at those of its own row, and back."""
    return token_loss(logits_in_one_row(model, batch, 0, lambda _: None), batch.labels).sum()


def behind_head(model: Any, batch: Batch) -> Tensor:
    """The same behind the keys and values of the rows' head."""
    return token_loss(logits_behind_head(model, batch, min(batch.heads), lambda _: None), batch.labels).sum()


def packed_behind_head(model: Any, batch: Batch) -> Tensor:
    """The same of rows that lie end to end behind their head."""
    return token_loss(logits_in_one_row(model, batch, min(batch.heads), lambda _: None), batch.labels).sum()


WAYS: dict[str, Callable[[Any, Batch], Tensor]] = {
    "padded": padded, "packed": packed, "behind head": behind_head, "packed behind head": packed_behind_head,
}  # fmt: skip


def main() -> None:
    """Run it."""
    import tempfile

    arguments = parser(__doc__)
    add_model_arguments(arguments)
    arguments.add_argument("--tasks", default="dbpedia,amazon,agnews")
    arguments.add_argument("--rows", type=int, default=64, help="of each task")
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    torch.manual_seed(0)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        sets = ["data.balanced=true", "adapter.r=8", "training.share_prefix=off", "method.name=inclora"]
        plan, room, tokens = prepared(given, given.tasks, sets, Path(folder))
        for index, planned in enumerate(plan.stages):
            room.adapters.restore([], {}, None)
            stage = open_stage(room, plan.config, index)
            room.method.build(stage)
            batches, model = dealt(stage, tokens.source(planned).examples), room.adapters.model

            def losses(way: str, batches: list[Batch] = batches, model: Any = model) -> list[float]:
                losses = []
                for batch in batches:
                    loss = WAYS[way](model, batch)
                    loss.backward()  # type: ignore[no-untyped-call]
                    losses.append(float(loss.detach()))
                return losses

            wanted = torch.tensor(losses("padded"))
            for way in WAYS:
                assert torch.allclose(torch.tensor(losses(way)), wanted, rtol=AGREE), way
            ways = {way: partial(seconds_of, partial(losses, way)) for way in WAYS}
            seconds = {way: median(times) for way, times in take_turns(ways, given.rounds).items()}
            row: dict[str, Any] = {"task": planned.name, "padding %": round(100 * padding(batches), 1)}
            row["tokens in one row"] = round(sum(map(in_one_row, batches)) / len(batches))
            row["padded s"] = seconds["padded"]
            row |= {f"{way} : padded": seconds[way] / seconds["padded"] for way in list(WAYS)[1:]}
            found.append(row)
            print(row, flush=True)
            stage.close()
        engine.stop()
    publish("packing", given, {"seconds of forward and backward, and how many times as long": found})


if __name__ == "__main__":
    main()
