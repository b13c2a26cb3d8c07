"""Examples of past tasks, kept as token ids: the memory of replay, GEM, A-GEM and others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, zip_longest
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.protocol import Method, PairSettings, Source, State
from cl_runner.methods.shared.rows import drawn
from cl_runner.methods.shared.sequential import Sequential

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Example

How = Literal["reservoir", "class"]


@dataclass
class Memory:
    """Task → examples, in the order the tasks were learned."""

    tasks: dict[str, list[Example]] = field(default_factory=dict)

    def keep(self, source: Source, per_task: int, how: How, generator: torch.Generator) -> None:
        """Remember ``per_task`` examples of every task of a source (all, where it has fewer)."""
        for task, rows in by_task(source).items():
            chosen = choose([tuple(source.examples[row].target) for row in rows], per_task, how, generator)
            self.hold(task, [source.examples[rows[i]] for i in chosen])

    def hold(self, task: str, examples: Iterable[Example]) -> None:
        """Remember these examples of a task, in this order."""
        from cl_runner.models.batch import Example

        self.tasks[task] = [Example([*e.source], [*e.target]) for e in examples]

    def source(self, tasks: Iterable[str] | None = None) -> Source:
        """What is remembered (of ``tasks``), task after task."""
        pairs = [(e, task) for task in (self.tasks if tasks is None else tasks) for e in self.tasks[task]]
        return Source([e for e, _ in pairs], [task for _, task in pairs])

    def state(self) -> State:
        """Token ids as flat int32 with the row ends in int64: no text."""
        if not self.tasks:
            return State()
        import torch

        examples = self.source().examples
        parts = {"source": [e.source for e in examples], "target": [e.target for e in examples]}
        tensors: dict[str, Tensor] = {}
        for name, rows in parts.items():
            tensors[f"memory.{name}"] = torch.tensor([i for row in rows for i in row], dtype=torch.int32)
            tensors[f"memory.{name}_ends"] = torch.tensor(list(accumulate(map(len, rows))), dtype=torch.int64)
        return State(tensors, {"memory": [[task, len(rows)] for task, rows in self.tasks.items()]})

    @classmethod
    def load(cls, state: State) -> Memory:
        """The memory that ``state`` says."""
        from cl_runner.models.batch import Example

        made = cls()
        if "memory" in state.json:
            parts = [_rows(state.tensors, f"memory.{name}") for name in ("source", "target")]
            examples = [Example(source, target) for source, target in zip(*parts, strict=True)]
            counts = [0, *accumulate(count for _, count in state.json["memory"])]
            for (task, _), (start, end) in zip(state.json["memory"], pairwise(counts), strict=True):
                made.tasks[task] = examples[start:end]
        return made


def _rows(tensors: dict[str, Tensor], name: str) -> list[list[int]]:
    ids, ends = tensors[name].tolist(), tensors[f"{name}_ends"].tolist()
    return [ids[start:end] for start, end in pairwise([0, *ends])]


def by_task(source: Source) -> dict[str, list[int]]:
    """The rows of each task of a source, by number, without those that only fill a batch."""
    found: dict[str, list[int]] = {task: [] for task in source.tasks}
    for row, (example, task) in enumerate(zip(source.examples, source.tasks, strict=True)):
        if example.weight:
            found[task].append(row)
    return found


def choose(labels: Sequence[tuple[int, ...]], size: int, how: How, generator: torch.Generator) -> list[int]:
    """``size`` of the rows that have these labels, in the order of the rows.

    ``reservoir``: every row as likely as any other, as one pass with a reservoir gives. ``class``: as many of each
    label as of any other, as far as there are rows; what is left over goes to labels by lot.
    """
    import torch

    shuffled = torch.randperm(len(labels), generator=generator).tolist()
    if how == "class":
        by_label: dict[tuple[int, ...], list[int]] = {}
        for row in shuffled:
            by_label.setdefault(labels[row], []).append(row)
        shuffled = [row for turn in zip_longest(*by_label.values()) for row in turn if row is not None]
    return sorted(shuffled[:size])


def drawn_at_step(source: Source, size: int, stage: Stage) -> Source:
    """``size`` rows of a source (all, where it has fewer), from seed, stage and step alone."""
    return drawn(source, size, stage.rng(f"memory/{stage.progress.step}"))


def memory_gradient(method: Method, stage: Stage, source: Source) -> dict[str, Tensor]:
    """Gradient of the mean loss per label token of a source, by name; the same on every rank. *Collective*."""
    (found,) = stage.gradient(lambda batch: method.loss(stage, batch), stage.batches(source.by_length()))
    return found


class WithMemory(Sequential):
    """One pair for all tasks, and a memory of past ones, whose rows the method itself chooses."""

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.memory = Memory()

    def state(self) -> State:
        return self.memory.state()

    def load_state(self, state: State) -> None:
        self.memory = Memory.load(state)


class Remembering(WithMemory):
    """One pair for all tasks, and a memory that grows by some examples of each: what its methods share."""

    class Config(PairSettings):
        """Settings of the memory."""

        memory_per_task: int = Field(256, ge=0, description="Examples kept of each task.")
        how: How = Field("reservoir", description="Which: reservoir (each as likely), or class (as many per label).")

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        if not self.config.memory_per_task:
            raise UserError(f"method.memory_per_task: {self.name} needs a memory; set 1 or more, or use seqlora")

    def end_task(self, stage: Stage) -> None:
        self.memory.keep(stage.own_rows(), self.config.memory_per_task, self.config.how, stage.rng("memory"))
