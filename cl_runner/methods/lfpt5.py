"""LFPT5: one soft prompt that answers tasks and also writes examples of them, to rehearse later (arXiv 2110.07298)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cl_runner.config import Section
from cl_runner.methods.base import Source, State
from cl_runner.methods.lwf import divergence
from cl_runner.methods.memory import Memory
from cl_runner.methods.prompting import Prompting, prompts_of

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.base import Stage
    from cl_runner.models.batch import Batch, Example


MOST = 1000  # examples to draw of a task, however many labels it has
WRITING = ""  # in the place of the task, of a row that is to be written: no task has that name


@dataclass
class Frame:
    """What all inputs of a task share, as token ids: before the text, behind it; and the task's labels.

    The frame's beginning asks for an example; the example is then the text, ``between`` and a label.
    """

    before: list[int]
    after: list[int]
    labels: list[list[int]]
    end: int

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Frame:
        """The frame of a task's examples."""
        sources = [example.source for example in examples]
        before = shared_beginning(sources)
        rests = [source[len(before) :] for source in sources]
        after = shared_beginning([rest[::-1] for rest in rests])[::-1]
        labels = dict.fromkeys(tuple(example.target[:-1]) for example in examples)
        return cls(before, after, [list(label) for label in labels], examples[0].target[-1])

    @property
    def between(self) -> list[int]:
        """What stands between text and label: the end of the frame, without an end token."""
        return self.after[:-1] if self.after[-1:] == [self.end] else self.after

    def text(self, source: Sequence[int]) -> list[int]:
        """An input without its frame."""
        return list(source[len(self.before) : len(source) - len(self.after)])

    def to_write(self, example: Example, most: int) -> Example:
        """What the language-model loss learns of an example: to write it, the text cut for ``most`` tokens in all."""
        rest = [*self.between, *example.target]
        text = self.text(example.source)[: max(most - len(rest), 1)]
        return example._replace(source=self.asking(), target=[*text, *rest])

    def asking(self) -> list[int]:
        """The input that asks for an example: the beginning, for a language model to go on from."""
        return [*self.before, *self.after[len(self.between) :]] or [self.end]

    def parsed(self, ids: Sequence[int]) -> tuple[list[int], list[int]] | None:
        """Text and label of what was written, if it is a text, ``between`` once, and one of the labels."""
        ids, between = list(ids), self.between
        for label in sorted(self.labels, key=len, reverse=True):
            tail = [*between, *label]
            text = ids[: len(ids) - len(tail)]
            if text and ids[len(text) :] == tail:
                twice = between and any(text[i : i + len(between)] == between for i in range(len(text)))
                return None if twice else (text, label)
        return None


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

    class Config(Section):
        """Settings of LFPT5."""

        length: int = Field(300, ge=1, description="Vectors of the prompt (published).")
        lr: float = Field(0.3, gt=0, description="Learning rate, in place of training.lr (ours; 0.5 with Adafactor).")
        lambda_lm: float = Field(
            0.25, gt=0, description="Weight of the language-model loss (published, classification)."
        )
        lambda_kl: float = Field(
            0.01,
            ge=0,
            lt=1,
            description="Weight λ of the KL, 1 − λ being that of the rest, at every task (published, classification).",
        )
        pseudo: int = Field(2, ge=0, description="Pseudo samples of each label of each past task (published).")
        draws: int = Field(8, ge=1, description="Examples the model writes for each one that is wanted (ours).")
        pseudo_tokens: int = Field(128, ge=4, description="Longest example in tokens that the model writes (ours).")
        top_k: int = Field(64, ge=1, description="Tokens among which each one is drawn (published).")
        repetition_penalty: float = Field(2.5, ge=1, description="While examples are drawn (published).")

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

    def prefix_tokens(self, stages: int) -> int:
        return int(self.config.length)

    def begin_with(self, stage: Stage) -> dict[str, Tensor]:
        return {"prompt": prompts_of(stage).of_vocabulary(self.config.length, stage.rng("prompt"))}

    def condition(self, stage: Stage, batch: Batch, task: str | None) -> dict[str, Tensor] | None:
        own = stage.adapters.parameters()
        if not own:
            return None  # the untouched base is asked
        return {"prefix": own["prompt"].expand(batch.size, -1, -1)}

    def begin_task(self, stage: Stage) -> None:
        self.old = stage.adapters.parameters()["prompt"].detach().clone()
        self.written, self.share = Memory(), {}
        for task, frame in self.frames.items():
            self._write(stage, task, frame)

    def _write(self, stage: Stage, task: str, frame: Frame) -> None:
        """Examples of a past task, as many of each label as are wanted and were drawn."""
        from cl_runner.models.batch import Example

        settings = self.config
        asked = [Example(frame.asking(), [])] * min(settings.pseudo * settings.draws * len(frame.labels), MOST)
        most = self._room(stage, frame)
        found = stage.sample(asked, most, settings.top_k, settings.repetition_penalty) if asked else []
        well_formed = [parsed for ids in found if len(ids) < most and (parsed := frame.parsed(ids))]
        used: dict[tuple[int, ...], list[Example]] = {tuple(label): [] for label in frame.labels}
        for text, label in well_formed:
            example = Example([*frame.before, *text, *frame.after], [*label, frame.end])
            of_label = used[tuple(label)]
            fits = len(example.source) <= stage.config.data.max_source
            if fits and len(of_label) < settings.pseudo and example not in of_label:
                of_label.append(example)
        self.written.tasks[task] = [example for of_label in used.values() for example in of_label]
        kept = len(self.written.tasks[task])
        self.share[task] = {"drawn": len(asked), "well_formed": len(well_formed), "used": kept}

    def _room(self, stage: Stage, frame: Frame) -> int:
        """Tokens of an example that is written: together with what asks for it no more than a row may have."""
        data = stage.config.data
        return int(min(self.config.pseudo_tokens, data.max_source + data.max_target - len(frame.asking())))

    def training_data(self, stage: Stage, own: Source) -> list[Source]:
        for task in stage.plan.tasks:
            rows = zip(own.examples, own.tasks, strict=True)
            self.frames[task] = Frame.of([example for example, name in rows if name == task])
        past = self.written.source()
        examples, tasks = [*own.examples, *past.examples], [*own.tasks, *past.tasks]
        room = {task: self._room(stage, frame) for task, frame in self.frames.items()}
        pairs = zip(examples, tasks, strict=True)
        writing = [self.frames[task].to_write(example, room[task]) for example, task in pairs]
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

        from cl_runner.models.forward import evaluating

        assert self.old is not None
        past = [task in self.written.tasks for task in batch.tasks]
        before = now.detach()
        if any(past):  # the graph is the same without: it is of what is now
            condition = {"prefix": self.old.to(stage.device).expand(batch.size, -1, -1)}
            with torch.no_grad(), evaluating(stage.adapters.model):
                before = stage.forward(replace(batch, condition=condition))
        return divergence(before, now, 1.0) * torch.tensor(past, device=now.device)[:, None]

    def end_task(self, stage: Stage) -> None:
        super().end_task(stage)
        self.old = None  # the next stage begins with what this one ended with
        prompts_of(stage).single = self.held["prompt"]

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


def shared_beginning(rows: Sequence[list[int]]) -> list[int]:
    """The longest beginning that all rows have."""
    # Of the first and the last in order, for all others lie between.
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(min(rows), max(rows), strict=False))]


METHOD = LFPT5
