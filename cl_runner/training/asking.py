"""What a stage's model answers, how likely it finds given answers, what it makes up: in batches, dealt to the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from cl_runner.models.batch import Example, Question
from cl_runner.models.choose import Choice, choose
from cl_runner.models.forward import sampled
from cl_runner.models.likelihood import Likelihood
from cl_runner.models.likelihood import likelihoods as likelihoods_of
from cl_runner.models.verify import answers as verified_answers
from cl_runner.training.sampling import derived_seed

if TYPE_CHECKING:
    from cl_runner.models.batch import Batch
    from cl_runner.models.heads import Head
    from cl_runner.training.sharing import PromptHead
    from cl_runner.training.stage import StageRun

Tick = Callable[[int], None]


def answers(
    stage: StageRun,
    examples: Sequence[Example],
    task: str | None,
    tick: Tick,
    labels: Choice | None = None,
    most: int | None = None,
) -> list[str]:
    """The text of each answer, of at most ``most`` tokens. Those that a target holds need no decoding. *Collective*.

    labels: the answer is one of these.
    """
    layout, most = stage.room.base.layout, most or stage.config.eval.max_new_tokens
    heads = stage.sharing.of_prompts(examples)

    def answered(_: int, numbers: Sequence[int]) -> list[str]:
        rows = [examples[number] for number in numbers]
        targets = [[] if example.target_cut else example.target for example in rows]
        with _behind_head(stage, heads, rows, task) as (prompts, head):
            model = stage.adapters.model
            if labels is None:
                right = stage.right(len(rows))
                ids, _verified = verified_answers(model, prompts, targets, layout, most, stage.show, head, right)
            else:
                ids = choose(model, prompts, labels, layout, stage.show, head)
        return [stage.room.encoder.decode(row) for row in ids]

    return stage.by_batch(examples, answered, tick)


def likelihoods(stage: StageRun, questions: Sequence[Question], task: str | None, tick: Tick) -> list[list[Likelihood]]:
    """Of each question's continuations. *Collective*."""
    layout, prompted = stage.room.base.layout, [question.prompt for question in questions]
    heads = stage.sharing.of_prompts(prompted)

    def looked(_: int, numbers: Sequence[int]) -> list[list[Likelihood]]:
        continuations = [questions[number].continuations for number in numbers]
        with _behind_head(stage, heads, [prompted[number] for number in numbers], task) as (prompts, head):
            return likelihoods_of(stage.adapters.model, prompts, continuations, layout, stage.show, head)

    return stage.by_batch(prompted, looked, tick)


@contextmanager
def _behind_head(
    stage: StageRun, heads: PromptHead, rows: Sequence[Example], task: str | None
) -> Iterator[tuple[Batch, Head | None]]:
    """Prompts, and what they begin with where that is read once; inside, the model answers."""
    prompts = stage.prompts(rows, task)
    with torch.no_grad(), stage.room.root.context():
        head = heads.read(prompts)
        yield replace(prompts, lengths=tuple(len(example.source) for example in rows)), head


def samples(
    stage: StageRun, examples: Sequence[Example], tokens: int, top_k: int, repetition_penalty: float
) -> list[list[int]]:
    """Token ids drawn after each prompt, by the run's seed and the batch's number. *Collective*."""
    layout, gpus = stage.room.base.layout, [stage.device] if stage.device.type == "cuda" else []

    def drawn(number: int, rows: Sequence[int]) -> list[list[int]]:
        prompts = stage.prompts([examples[row] for row in rows], None)
        with torch.random.fork_rng(gpus), torch.no_grad(), stage.room.root.context():
            torch.manual_seed(derived_seed(stage.config.seed, stage.drawn_by, "sample", number))
            return sampled(stage.adapters.model, prompts, layout, tokens, top_k, repetition_penalty)

    return stage.by_batch(examples, drawn, whole=True)
