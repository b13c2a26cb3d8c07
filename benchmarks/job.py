"""The job that the three ways of ``order.py`` all do: the same model, the same rows as ids, the same settings.

Everything comes from the package's own order, preset and encoding, so that the ways differ in how they train and
answer, and in nothing else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cl_runner.config.schema import ModelConfig, RunConfig
from cl_runner.metrics.exact_match import normalise
from cl_runner.models.base import Base, load_base
from cl_runner.models.batch import Example
from cl_runner.models.encoding import Encoder
from cl_runner.settings import resolve
from cl_runner.tasks import benchmark
from cl_runner.tasks.order import load_order
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.synthetic import sample


@dataclass(frozen=True)
class Job:
    """An order to learn, and how large it is to be."""

    order: str = "order1"
    train: int = 200
    test: int = 100
    epochs: int = 3
    seed: int = 42
    data_dir: str | None = None  # where ``write_rows`` has put the rows

    @classmethod
    def given(cls, arguments: argparse.Namespace) -> Job:
        """The job that the command line asks for."""
        given = vars(arguments)
        return cls(*(given[name] for name in ("order", "train", "test", "epochs", "seed", "data_dir")))

    def as_arguments(self) -> list[str]:
        """The same, for another process."""
        values = {"order": self.order, "train": self.train, "test": self.test, "epochs": self.epochs, "seed": self.seed}
        values |= {"data-dir": self.data_dir} if self.data_dir else {}
        return [part for name, value in values.items() for part in (f"--{name}", str(value))]

    def as_sets(self) -> list[str]:
        """The same, for ``cl-runner train``."""
        values = {"data.max_train": self.train, "data.max_test": self.test, "training.epochs": self.epochs}
        return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]

    @cached_property
    def config(self) -> RunConfig:
        """The settings of ``cl-runner train --preset tiny --method olora``."""
        sets = [*self.as_sets()[1::2], "method.name=olora", "data.source=synthetic"]
        if self.data_dir:
            sets[-1:] = ["data.source=folder", f"data.dir={self.data_dir}"]
        return resolve(presets=["tiny"], order=self.order, sets=sets).config

    @property
    def penalty(self) -> float:
        """λ1 of O-LoRA's published form, as the preset has it."""
        return float(self.config.method.own()["lambda1"])

    @cached_property
    def tasks(self) -> list[str]:
        """The order's tasks."""
        return load_order(self.order).names

    def base(self) -> Base:
        """The frozen embedded model, read from disk."""
        return load_base(ModelConfig(name=self.config.model.name), torch.device("cpu"))

    def write_rows(self, folder: Path) -> None:
        """Write the synthetic rows as a benchmark folder, so that every way reads files and none runs a grammar."""
        for name in self.tasks:
            task = benchmark.get(name)
            to = folder / task.kind / name
            to.mkdir(parents=True)
            for split, most in (("train", self.train), ("test", self.test)):
                rows = [{"sentence": row.text, "label": row.label} for row in sample(name, split, most)]
                (to / f"{split}.json").write_text(json.dumps(rows))

    def examples(self, base: Base, task: str, split: Any) -> list[Example]:
        """The rows of a task as token ids."""
        data, known = self.config.data, benchmark.get(task)
        encoder = Encoder(base.tokenizer, base.layout, data.max_source, data.max_target, data.truncate)
        rows = load_rows(known, data, split).rows
        return encoder.encode_many([known.prompt(row.text) for row in rows], [row.label for row in rows])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that size a job."""
    default = Job()
    parser.add_argument("--order", default=default.order, help="task order (default %(default)s)")
    parser.add_argument(
        "--train", type=int, default=default.train, help="most training rows a task (default %(default)s)"
    )
    parser.add_argument("--test", type=int, default=default.test, help="most test rows a task (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=default.epochs, help="passes over a task (default %(default)s)")
    parser.add_argument("--data-dir", help="benchmark folder to read (default: synthetic rows)")
    parser.add_argument("--seed", type=int, default=default.seed, help="seed (default %(default)s)")


def exact_match(base: Base, answers: Sequence[Sequence[int]], examples: Sequence[Example]) -> float:
    """Percent of answers that say the gold label after the benchmark's normalisation."""

    def text(ids: Sequence[int]) -> str:
        return normalise(base.tokenizer.decode(list(ids), skip_special_tokens=True))

    right = sum(text(answer) == text(example.target) for answer, example in zip(answers, examples, strict=True))
    return 100.0 * right / len(examples)
