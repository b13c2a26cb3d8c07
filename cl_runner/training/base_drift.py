"""Base drift: the loss of a run's model on text, and its choices on tasks it never learned, before and after stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cl_runner.errors import UserError
from cl_runner.metrics.drift import Known
from cl_runner.models.batch import Example, token_batches
from cl_runner.models.encoding import Encoder
from cl_runner.models.forward import token_loss
from cl_runner.training.data import Data
from cl_runner.training.evaluation import TestSet
from cl_runner.training.prepare import Tokens
from cl_runner.training.stage import StageRun

Bar = Callable[[str, int], Callable[[int], None]]  # what is done, and how much of it → what is told how much is
LONGEST = 512  # tokens of a piece of text
MOST = 256  # pieces


@dataclass(frozen=True)
class Asked:
    """What is asked after every stage: texts, and tasks with their test rows, which have labels to choose among."""

    texts: Sequence[str]
    data: Data | None

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self.data.tasks) if self.data else []


def read_texts(file: Path) -> list[str]:
    """The texts of a file: JSONL's ``text`` of each row; else what stands between empty lines. Raises UserError."""
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {file}: {getattr(error, 'strerror', None) or 'is no text in UTF-8'}") from None
    if file.suffix in (".jsonl", ".ndjson"):
        found = [_of_row(file, number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    else:
        parts = "\n".join(line.rstrip() for line in content.splitlines()).split("\n\n")
        found = [part.strip() for part in parts]
    found = [text for text in found if text.strip()]
    if not found:
        raise UserError(f"--text {file}: holds no text")
    return found


def _of_row(file: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        raise UserError(f"--text {file}:{number}: is no JSON") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(f"--text {file}:{number}: has no 'text'")
    return str(row["text"])


def pieces(texts: Sequence[str], encoder: Encoder) -> list[Example]:
    """Texts as token ids, in pieces of as many as the model is given otherwise, and ``LONGEST`` at most.

    Decoder-only: each token but the first is predicted (with a begin token that one too). Encoder-decoder: the first
    half is read, the second written. The end of a piece is not predicted: it is none of the text's. Raises UserError.
    """
    around, wide = len(encoder.before) + len(encoder.after), encoder.layout.encoder_decoder
    longest = min(LONGEST, encoder.max_source) - around
    found = []
    for text in texts:
        ids: list[int] = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), longest):
            part = ids[start : start + longest]
            read = len(part) // 2 if wide else 0 if encoder.before else 1
            if len(part) >= 2:
                found.append(Example([*encoder.before, *part[:read], *encoder.after], part[read:]))
    if not found:
        raise UserError("--text: no text in it has two tokens")
    return found[:MOST]


@torch.no_grad()
def text_loss(stage: StageRun, rows: Sequence[Example], base: bool, tick: Callable[[int], None]) -> float:
    """Mean over the target tokens of pieces of text, in nats, dropout off, teacher-forced."""
    adapters, task = stage.adapters, _task(stage, base)
    shown = adapters.shown()
    _show(stage, task, base)
    total, done = 0.0, 0
    longest = [len(row.source) + len(row.target) for row in rows]
    with stage.without_dropout():
        for numbers in token_batches(longest, 4096):
            part = [rows[number] for number in numbers]
            padded = stage.padded(part, [1.0] * len(part))
            batch = padded.to(stage.device) if base else stage.ready(padded, [task or ""] * len(part))
            total += float((token_loss(stage.forward(batch), batch.labels) * batch.token_weights).sum())
            tick(done := done + len(part))
    adapters.show(shown)
    return total / sum(len(row.target) for row in rows)


def choices(stage: StageRun, tests: Mapping[str, TestSet], base: bool, tick: Callable[[int], None]) -> dict[str, float]:
    """Task → percent of its test rows that are answered with their own label, chosen among the task's."""
    task = _task(stage, base)
    shown = stage.adapters.shown()
    _show(stage, task, base)
    found, done = {}, 0

    def more(before: int, count: int) -> None:
        tick(before + count)

    for name, test in tests.items():
        answers = stage.answer(test.examples, task, partial(more, done), test.labels)
        right = [test.task.comparison.same(*pair) for pair in zip(answers, (r.label for r in test.rows), strict=True)]
        found[name], done = 100 * sum(right) / len(right), done + len(right)
    stage.adapters.show(shown)
    return found


def known(stage: StageRun, asked: Asked, name: str, base: bool, bar: Bar) -> Known:
    """All of it, of one stage. Raises UserError as ``pieces``."""
    rows = pieces(asked.texts, stage.room.encoder) if asked.texts else []
    tests: dict[str, TestSet] = {}
    if asked.data is not None:
        tests = Tokens.make(asked.data, stage.room.base, stage.config.eval.max_new_tokens, asked.tasks).test
    tick = bar(f"base drift, {name}", len(rows) + sum(len(test.rows) for test in tests.values()))
    loss = text_loss(stage, rows, base, tick) if rows else None
    return Known(name, loss, choices(stage, tests, base, lambda done: tick(len(rows) + done)))


def _task(stage: StageRun, base: bool) -> str | None:
    """As which task a method that is told tasks is asked: the last one it learned."""
    return stage.plan.tasks[-1] if stage.room.method.knows_task and not base else None


def _show(stage: StageRun, task: str | None, base: bool) -> None:
    wanted = None if base else stage.room.method.answering(task)
    if wanted is not None:
        stage.adapters.show(stage.adapters.kept.get(wanted))
