"""Scores of a stage on extra sets (``eval.extra``): which choice of each question the model finds likeliest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cl_runner.errors import UserError
from cl_runner.metrics.choices import LETTERS, answered, section
from cl_runner.models.batch import Question
from cl_runner.models.encoding import Encoder
from cl_runner.tasks.extra import ExtraRow, ExtraSet
from cl_runner.training.evaluation import answering, counted
from cl_runner.training.stage import StageRun

UNKNOWN = ""  # the name of no task: what a method that knows its tasks is told of questions that are of none
LONGEST = 2048  # tokens of a prompt where the model has no limit of its own, as in lm-evaluation-harness


@dataclass(frozen=True)
class ExtraTest:
    """A set and its questions as token ids."""

    set: ExtraSet
    questions: Sequence[Question]

    @classmethod
    def make(cls, extra: ExtraSet, encoder: Encoder, prefix: int) -> ExtraTest:
        """Tokenise a set; prefix: how many vectors the method may put before the input. Raises UserError."""
        most = (encoder.layout.max_positions or LONGEST) - prefix
        prompts = [extra.prompt(row) for row in extra.rows]
        try:
            return cls(extra, encoder.questions(prompts, [extra.continuations(row) for row in extra.rows], most))
        except UserError as error:
            raise UserError(f"eval.extra {extra.name}: {error}") from None

    def note(self) -> str:
        """A line on the prompts that lost their beginning; empty where none did."""
        cut = sum(question.prompt.truncated for question in self.questions)
        longest = max(len(question.prompt.source) for question in self.questions)
        of = f"{cut} of {len(self.questions)} prompts"
        return f"eval.extra {self.set.name}: {of} lost their beginning, to {longest} tokens" if cut else ""


@dataclass(frozen=True)
class ExtraScored:
    """A set's answers (lines of ``extra.jsonl``), and what ``metrics.json`` says of them."""

    name: str
    answers: list[dict[str, Any]]
    section: dict[str, Any]

    @property
    def score(self) -> float:
        """Percent right."""
        return float(self.section["score"])


def score_extra(
    stage: StageRun, tests: Mapping[str, ExtraTest], tick: Callable[[str, int, int], None] = lambda *_: None
) -> list[ExtraScored]:
    """Ask each set, with the parameters that the method answers a task with that it does not know. *Collective*."""
    found = []
    known = UNKNOWN if stage.room.method.knows_task else None
    with answering(stage) as show:
        for name, test in tests.items():
            ticking = counted(tick, name, len(test.questions))
            show(known)
            likely = stage.likelihoods(test.questions, known, ticking)
            logs = [[each.log for each in row] for row in likely]
            rows = [_answer(test.set, row, of) for row, of in zip(test.set.rows, logs, strict=True)]
            found.append(ExtraScored(name, rows, section(test.set.by, test.set.shots, rows)))
    return found


def _answer(extra: ExtraSet, row: ExtraRow, logs: list[float]) -> dict[str, Any]:
    lengths = [len(choice) for choice in row.choices] if extra.by == "text_norm" else None
    said = answered(logs, lengths)
    about = {"subject": row.subject} if row.subject else {}
    return {
        "set": extra.name,
        "id": row.id,
        **about,
        "gold": LETTERS[row.answer],
        "output": LETTERS[said],
        "correct": said == row.answer,
        "log_likelihoods": logs,
        **({"lengths": lengths} if lengths else {}),
    }
