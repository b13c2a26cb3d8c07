"""SuRe: replay of what surprised the model most (arXiv 2511.22367)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.protocol import PairSettings, Source, State
from cl_runner.methods.shared.memory import WithMemory, by_task, drawn_at_step, memory_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Example


class SuRe(WithMemory):
    """Which rows are kept is by surprise alone, not by lot or by label; those of a step are drawn by lot.

    The paper's second part, a slow copy that answers, is the option. Assumptions: a task's rows are replayed from the
    next task on, whenever they were scored; rows of the memory have no dropout, as in agem and gem.
    """

    class Config(PairSettings):
        """Settings of SuRe."""

        memory_size: int = Field(
            500, ge=1, description="N: examples kept of all tasks together, floor(N / t) of each (published; 100 does)."
        )
        score: Literal["before", "after"] = Field(
            "before", description="When a task's rows are scored: before it is trained on (public code), or after."
        )
        of: Literal["sequence", "labels"] = Field(
            "sequence",
            description="Whose mean loss per token is the surprise: prompt and label (published), or the label; of an "
            "encoder-decoder always the label (ours).",
        )
        every: int = Field(
            2,
            ge=1,
            description="f: every so many steps replay (public code; 1: all), of past tasks' rows alone and without "
            "their dropout (ours).",
        )
        memory_batch: int | None = Field(
            None, ge=1, description="Examples of the memory in such a step; null: half a global batch (public code)."
        )

    name = "sure"
    title = "SuRe: one LoRA, with a memory of the rows that surprised it most"
    equation = (
        "every f-th step (L_new + L_replay) / 2, else L_new;  memory: of each of t tasks the floor(N / t) rows of "
        "largest −1/n Σ log p(token)"
    )
    paper = "2511.22367 (SuRe)"
    carried = "A, B; examples of past tasks as token ids"
    growth = "constant: memory_size examples of all tasks; every f-th step costs memory_batch more rows"
    forms = (
        "rows are kept by surprise alone, not by lot or label; the paper's dual learner is this with "
        "options.slow_copy={beta: 0.995, next: both}: that both copies go on to the next stage is an assumption"
    )
    edits_before_clip = True  # a step is clipped by the gradient of its whole loss

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.scores: Tensor | None = None  # of the stage's own rows (n), from its beginning on
        self._said = ""

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        if self.config.memory_size < self.stages:
            raise UserError(
                f"method.memory_size: {self.config.memory_size} examples are less than one of each of {self.stages} "
                f"tasks; set {self.stages} or more"
            )

    def begin_task(self, stage: Stage) -> None:
        self.scores = self._scores(stage) if self.config.score == "before" else None

    def _scores(self, stage: Stage) -> Tensor:
        return surprise(stage, stage.own_rows().examples, self.config.of)

    def edit_gradients(self, stage: Stage, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if not self.memory.tasks or (stage.progress.step + 1) % self.config.every:
            return None
        size = self.config.memory_batch or max(1, stage.config.training.global_batch // 2)
        replayed = memory_gradient(self, stage, drawn_at_step(self.memory.source(), size, stage))
        return {name: (gradient + replayed[name]) / 2 for name, gradient in gradients.items()}

    def end_task(self, stage: Stage) -> None:
        scores = (self._scores(stage) if self.scores is None else self.scores).tolist()
        own, self.scores = stage.own_rows(), None
        never = bool(self.memory.tasks) and stage.progress.steps < self.config.every
        rows = by_task(own)
        quota = self.config.memory_size // len({*self.memory.tasks, *rows})
        for task, examples in self.memory.tasks.items():
            self.memory.tasks[task] = examples[:quota]  # they lie from the largest surprise down
        kept: list[float] = []
        for task, numbers in rows.items():
            chosen = sorted(numbers, key=scores.__getitem__, reverse=True)[:quota]
            self.memory.hold(task, [own.examples[row] for row in chosen])
            kept += [scores[row] for row in chosen]
        self._said = (
            f"memory: {quota} a task at most; mean surprise {_mean(kept):.3g} of the {len(kept)} rows kept of this "
            f"stage's {len(scores)}, of all of these {_mean(scores):.3g}"
        )
        if never:
            few = f"warning: nothing is replayed in a stage of {stage.progress.steps} steps"
            self._said = f"{few}; set method.every smaller than {self.config.every}; {self._said}"

    def said(self, stage: Stage) -> str:
        return self._said

    def step_state(self) -> State:
        return State({} if self.scores is None else {"scores": self.scores})

    def load_step_state(self, stage: Stage, state: State) -> None:
        self.scores = state.tensors.get("scores")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def surprise(stage: Stage, examples: Sequence[Example], of: Literal["sequence", "labels"]) -> Tensor:
    """The mean loss per token of each example (n), on the CPU, the same on every rank. *Collective*.

    ``sequence``: of prompt and label, but for the first token, which nothing predicts; of a decoder alone.
    """
    import torch

    from cl_runner.models.forward import token_loss

    total = torch.zeros(len(examples), device=stage.device)
    if of == "sequence" and not stage.encoder_decoder:
        examples = [e._replace(source=e.source[:1], target=[*e.source[1:], *e.target]) for e in examples]
    # A batch knows the tasks of its rows: here these are their numbers. The longest first: next to no padding.
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].source) - len(examples[i].target))
    rows = Source([examples[i] for i in order], list(map(str, order)))
    with torch.no_grad(), stage.without_dropout():
        for batch in stage.batches(rows):
            counts = batch.token_weights != 0
            found = token_loss(stage.forward(batch), batch.labels).sum(1) / counts.sum(1).clamp(min=1)
            for task, score, real in zip(batch.tasks, found, counts.any(1), strict=True):
                total[int(task)] += score * real  # a rank without rows is given the first one once more
    return stage.sum(total).cpu()
