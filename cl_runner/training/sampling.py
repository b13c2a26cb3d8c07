"""Which rows a step takes, and what each weighs: from seed, stage and numbers alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cl_runner.config.schema import TrainingConfig


def derived_seed(*parts: object) -> int:
    """A seed from everything that decides it, and from nothing carried along."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic of a stage.

    ``micro_batch`` is what a device really takes at once: the setting, or less where the ranks share a small global
    batch. Micro-batch j of a step holds its rows j·micro … and goes to rank j mod ranks.
    """

    rows: int
    global_batch: int
    micro_batch: int
    ranks: int
    accumulation: int
    epochs: int
    length_window: int

    @classmethod
    def make(cls, rows: int, training: TrainingConfig, ranks: int, most: int | None = None) -> BatchPlan:
        """The plan for so many rows on so many ranks; ``most``: a smaller micro-batch than the setting, that fits."""
        micro = min(most or training.micro_batch, math.ceil(training.global_batch / ranks))
        accumulation = math.ceil(training.global_batch / (micro * ranks))
        return cls(rows, training.global_batch, micro, ranks, accumulation, training.epochs, training.length_window)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last may be short."""
        return math.ceil(self.rows / self.global_batch)

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.steps_per_epoch * self.epochs

    def step_rows(
        self, seed: int, stage: int | str, lengths: Sequence[int], mixed: bool = False
    ) -> Iterator[list[int]]:
        """The rows of every step: each epoch a new order, from seed, stage, epoch and lengths alone.

        A step's rows are of about equal length: the rows of ``length_window`` steps drawn at random are dealt to these
        by length, and the epoch's steps come in random order. The last step of an epoch may be short; its rows are
        drawn like those of a plain shuffle. ``mixed`` (rows of several tasks, whose lengths tell them apart): every
        step's rows are drawn so, and only sorted.

        Args:
            seed: the run's.
            stage: its place from 0, or its name (``StageRun.drawn_by``).
            lengths: tokens of each row.
            mixed: whether the rows are of several tasks.
        """

        import torch

        size = self.global_batch
        whole = self.rows // size  # full steps of an epoch
        window = 1 if mixed else self.length_window
        for epoch in range(self.epochs):
            generator = torch.Generator().manual_seed(derived_seed(seed, stage, "rows", epoch))
            rows = torch.randperm(self.rows, generator=generator).tolist()
            if self.length_window > 1:
                ends = [*range(0, whole * size, window * size), whole * size, self.rows]
                windows = [rows[start:end] for start, end in pairwise(ends)]
                rows = [row for found in windows for row in sorted(found, key=lengths.__getitem__)]
            order = list(range(whole))
            if window > 1:  # a window's steps come shortest first
                order = torch.randperm(whole, generator=generator).tolist()
            for step in order + [whole] * (whole * size < self.rows):
                yield rows[step * size : (step + 1) * size]

    def micro_batches(self, rows: Sequence[int], rank: int) -> Iterator[tuple[int, list[int]]]:
        """(global number, rows) of this rank's micro-batches of a step; rows may be empty, the count never varies."""
        for slot in range(self.accumulation):
            number = slot * self.ranks + rank
            yield number, list(rows[number * self.micro_batch : (number + 1) * self.micro_batch])


class StepWeights:
    """The weight of each row's label tokens in the loss of a step.

    Micro-batch losses are added over the accumulation and averaged over ranks; with these weights the result is the
    mean over the label tokens of the global batch, on any number of ranks (``loss_mean: micro``: the mean over
    micro-batches of each one's mean, as the reference has it).
    """

    def __init__(self, plan: BatchPlan, mean: str, tokens: Sequence[int], shares: Sequence[float]) -> None:
        self.plan, self.mean, self.tokens, self.shares = plan, mean, tokens, shares

    def of(self, step_rows: Sequence[int], rows: Sequence[int]) -> list[float]:
        """Weights of ``rows``, one micro-batch of the step's rows."""
        if self.mean == "global":
            total = sum(self.tokens[i] for i in step_rows)
        else:
            total = sum(self.tokens[i] for i in rows) * math.ceil(len(step_rows) / self.plan.micro_batch)
        return [self.shares[i] * self.plan.ranks / max(total, 1) for i in rows]
