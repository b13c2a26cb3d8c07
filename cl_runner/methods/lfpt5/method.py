"""LFPT5: one soft prompt that answers tasks and also writes examples of them, to rehearse later (arXiv 2110.07298)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.lfpt5.settings import Settings
from cl_runner.methods.lfpt5.writing import longest, write
from cl_runner.methods.protocol import Source, State
from cl_runner.methods.shared.distillation import divergence
from cl_runner.methods.shared.frame import WRITING, Frame
from cl_runner.methods.shared.memory import Memory
from cl_runner.methods.shared.prompting import Prompting

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch


class LFPT5(Prompting):
    """For tasks with a set of labels, whose rows are label and text.

    Published for few-shot tasks on a T5 adapted to language modelling, with a special token that asks for an example.
    Here a task brings thousands of rows, each of which is also to be written, so that an epoch has twice as many; what
    asks for an example is what all inputs of the task begin with, and no token is added to the vocabulary. The prompt
    stands before the input (the official one behind). Each loss is the mean over its tokens of the stage's rows, in
    expectation, and the KL, of the answers to what was written alone, a mean over the label tokens of all answers
    (officially a sum over positions, padding too). The official code writes as many examples again for validation, of
    which there is none here. Published with Adafactor, for which AdamW stands here, and weight decay 1e-5.
    """

    class Config(Settings):
        """Settings of LFPT5."""

    name = "lfpt5"
    title = "LFPT5: one soft prompt that also writes examples of past tasks, to rehearse them"
    equation = (
        "[P; x];  (1 − λ) (CE(y | x) + λ_lm · CE(x, y | task)) + λ · KL(p_old ‖ p_new)  "
        "at the answers to what it wrote of past tasks"
    )
    paper = "2110.07298 (LFPT5)"
    carried = "prompt; what the inputs of each task share, and its labels; the last written examples"
    growth = "a few hundred token ids a task"
    revision = 2  # 1: the KL at what is to be written too; the first task without the factor 1 − λ

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.frames: dict[str, Frame] = {}
        self.written = Memory()  # of past tasks, by the prompt as the stage began
        self.share: dict[str, dict[str, int]] = {}  # of each past task: examples drawn, well-formed, used
        self.old: Tensor | None = None

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        super().check(config, shapes)
        if config.data.chat_template:
            raise UserError(
                "data.chat_template: lfpt5 writes text and label in one go, but a turn ends between them; set it to "
                "false"
            )

    def prefix_tokens(self, stages: int) -> int:
        return int(self.config.length)

    def begin_with(self, stage: Stage) -> dict[str, Tensor]:
        return {"prompt": stage.vocabulary_rows(self.config.length, stage.rng("prompt"))}

    def condition(self, stage: Stage, batch: Batch, task: str | None) -> dict[str, Tensor] | None:
        own = stage.all_parameters()
        if not own:
            return None  # the untouched base is asked
        return {"prefix": own["prompt"].expand(batch.size, -1, -1)}

    def begin_task(self, stage: Stage) -> None:
        self.old = stage.all_parameters()["prompt"].detach().clone()
        self.written, self.share = Memory(), {}
        for task, frame in self.frames.items():
            self.written.tasks[task], self.share[task] = write(stage, self.config, frame)

    def training_data(self, stage: Stage, own: Source) -> list[Source]:
        for task in stage.plan.tasks:
            rows = zip(own.examples, own.tasks, strict=True)
            self.frames[task] = Frame.of([example for example, name in rows if name == task])
        past = self.written.source()
        examples, tasks = [*own.examples, *past.examples], [*own.tasks, *past.tasks]
        most = {task: longest(stage, self.config, frame) for task, frame in self.frames.items()}
        pairs = zip(examples, tasks, strict=True)
        writing = [self.frames[task].to_write(example, most[task]) for example, task in pairs]
        # Each loss is to be a mean over its own tokens; a step divides by those of both.
        answer, write = (sum(len(example.target) for example in rows) for rows in (examples, writing))
        both = answer + write
        weight = self.config.lambda_lm * both / write
        return [Source(examples, tasks, both / answer), Source(writing, [WRITING] * len(writing), weight)]

    def loss(self, stage: Stage, batch: Batch) -> Tensor:
        from cl_runner.models.forward import token_loss

        now, weight = stage.forward(batch), self.config.lambda_kl
        losses = (1 - weight) * token_loss(now, batch.labels)  # at the first task too, as in the official code
        if weight and any(self.written.tasks.values()):
            losses = losses + weight * self._moved(stage, batch, now)
        total: Tensor = (losses * batch.token_weights).sum()
        return total

    def _moved(self, stage: Stage, batch: Batch, now: Tensor) -> Tensor:
        """KL(p_old ‖ p_new) (b, t) at the answers to what was written of past tasks, 0 elsewhere."""
        import torch

        assert self.old is not None
        past = [task in self.written.tasks for task in batch.tasks]
        before = now.detach()
        if any(past):  # the graph is the same without: it is of what is now
            condition = {"prefix": self.old.to(stage.device).expand(batch.size, -1, -1)}
            with torch.no_grad(), stage.without_dropout():
                before = stage.forward(replace(batch, condition=condition))
        return divergence(before, now, 1.0) * torch.tensor(past, device=now.device)[:, None]

    def end_task(self, stage: Stage) -> None:
        super().end_task(stage)
        self.old = None  # the next stage begins with what this one ended with
        stage.answer_with(self.held["prompt"])

    def state(self) -> State:
        written = self.written.state()
        frames = [[task, asdict(frame)] for task, frame in self.frames.items()]  # in the order of the tasks
        about: dict[str, Any] = {"frames": frames, "pseudo": self.share}
        trained = super().state()
        return State({**trained.tensors, **written.tensors}, {**trained.json, **written.json, **about})

    def load_state(self, state: State) -> None:
        super().load_state(state)
        self.frames = {task: Frame(**frame) for task, frame in state.json["frames"]}
        self.written, self.share = Memory.load(state), state.json["pseudo"]

    def step_state(self) -> State:
        assert self.old is not None, "no stage has begun"
        written = self.written.state()
        return State({"old": self.old, **written.tensors}, {"pseudo": self.share, **written.json})

    def load_step_state(self, stage: Stage, state: State) -> None:
        self.old = state.tensors["old"]
        self.written, self.share = Memory.load(state), state.json["pseudo"]
