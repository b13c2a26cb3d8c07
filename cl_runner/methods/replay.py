"""Replay: examples of past tasks mixed into the batches of the new one."""

from __future__ import annotations

from itertools import cycle, islice
from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.methods.protocol import LoraOrFull, Source
from cl_runner.methods.shared.memory import Remembering

if TYPE_CHECKING:
    from cl_runner.methods.protocol import Stage


class Replay(Remembering):
    """Memory and own rows are shuffled together; every label token of the mix weighs the same."""

    class Config(LoraOrFull, Remembering.Config):
        """Settings of replay."""

        memory_per_task: int = Field(
            500, ge=0, description="Examples kept of each task (TRACE, 2310.06762: a tenth of 5,000)."
        )
        replay_ratio: float | None = Field(
            None,
            gt=0,
            description="Memory rows per own row in an epoch, as many of each past task, drawn anew every stage; "
            "default: the whole memory once an epoch, as TRACE.",
        )

    name = "replay"
    title = "Replay: one LoRA, with a memory of past tasks in the batches"
    equation = "loss over D_t ∪ M_1 ∪ … ∪ M_{t−1},  M_i ⊂ D_i"
    paper = "2310.14152 (baseline of O-LoRA); defaults of 2310.06762 (TRACE)"
    carried = "A, B (full: the weights); examples of past tasks as token ids"
    growth = "memory_per_task examples a task"
    since_second = ("replay_ratio",)

    def training_data(self, stage: Stage, own: Source) -> list[Source]:
        past = self.memory.source()
        if past.examples and self.config.replay_ratio is not None:
            past = self._drawn(stage, round(self.config.replay_ratio * len(own.examples)))
        return [own, past] if past.examples else [own]

    def _drawn(self, stage: Stage, rows: int) -> Source:
        """So many rows of the memory, dealt over the past tasks in turn; again from the start where one has too few."""
        import torch

        generator = stage.rng("replay")
        shuffled = {
            task: cycle([examples[i] for i in torch.randperm(len(examples), generator=generator).tolist()])
            for task, examples in self.memory.tasks.items()
            if examples
        }
        names = list(shuffled)
        order = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
        tasks = list(islice(cycle(order), rows))
        return Source([next(shuffled[task]) for task in tasks], tasks)
