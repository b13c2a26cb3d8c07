"""The job that the three ways of ``order.py`` all do: the same model, the same rows as ids, the same settings.

Everything comes from the package's own order, preset and encoding, so that the ways differ in how they train and
answer, and in nothing else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cl_runner.config.schema import ModelConfig, RunConfig
from cl_runner.methods import make_method
from cl_runner.metrics.exact_match import normalise
from cl_runner.models.base import Base, load_base
from cl_runner.models.batch import IGNORE, Example
from cl_runner.models.encoding import Encoder
from cl_runner.settings import resolve
from cl_runner.tasks import benchmark
from cl_runner.tasks.order import load_order
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.synthetic import sample
from cl_runner.tasks.task import Row


@dataclass(frozen=True)
class Job:
    """An order to learn, with which model, and how large it is to be."""

    order: str = "order1"
    train: int = 200
    test: int = 100
    epochs: int = 3
    seed: int = 42
    model: str | None = None  # None: the embedded model of the preset ``tiny``, with its settings
    micro_batch: int = 16  # of every way also the rows of an optimizer step
    max_source: int = 256
    lr: float | None = None  # None: the preset's, or cl-runner's own
    data_dir: str | None = None  # where ``write_rows`` has put the rows

    @classmethod
    def given(cls, arguments: argparse.Namespace) -> Job:
        """The job that the command line asks for."""
        return cls(**{each.name: getattr(arguments, each.name) for each in fields(cls)})

    def as_arguments(self) -> list[str]:
        """The same, for another process."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]

    @property
    def presets(self) -> list[str]:
        """What the settings begin with."""
        return [] if self.model else ["tiny"]

    @property
    def sets(self) -> dict[str, Any]:
        """What of the job is a setting of ``cl-runner train``."""
        values = {
            "method.name": "olora",
            "model.name": self.model,
            "data.max_train": self.train,
            "data.max_test": self.test,
            "data.max_source": self.max_source,
            "training.epochs": self.epochs,
            "training.lr": self.lr,
            "training.global_batch": self.micro_batch,
            "training.micro_batch": self.micro_batch,
            "data.source": "folder" if self.data_dir else "synthetic",
            "data.dir": self.data_dir,
        }
        return {key: value for key, value in values.items() if value is not None}

    @cached_property
    def config(self) -> RunConfig:
        """The settings, as ``cl-runner train`` makes them out."""
        sets = [f"{key}={value}" for key, value in self.sets.items()]
        return resolve(presets=self.presets, order=self.order, sets=sets).config

    @property
    def penalty(self) -> float:
        """λ1 of O-LoRA's published form."""
        olora: Any = make_method(self.config)
        return float(olora.config.weight)

    @cached_property
    def tasks(self) -> list[str]:
        """The order's tasks."""
        return load_order(self.order).names

    def base(self) -> Base:
        """The frozen model, read from disk."""
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

    def encoder(self, base: Base) -> Encoder:
        """What makes ids of texts."""
        data = self.config.data
        return Encoder(base.tokenizer, base.layout, data.max_source, data.max_target, data.truncate)

    def rows(self, task: str, split: Any) -> list[Row]:
        """The rows of a task."""
        return load_rows(benchmark.get(task), self.config.data, split).rows

    def examples(self, base: Base, task: str, split: Any) -> list[Example]:
        """The rows of a task as token ids."""
        known, rows = benchmark.get(task), self.rows(task, split)
        return self.encoder(base).encode_many([known.prompt(row.text) for row in rows], [row.label for row in rows])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that size a job."""
    default = Job()
    parser.add_argument("--order", default=default.order, help="task order (default %(default)s)")
    parser.add_argument(
        "--train", type=int, default=default.train, help="most training rows a task (default %(default)s)"
    )
    parser.add_argument("--test", type=int, default=default.test, help="most test rows a task (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=default.epochs, help="passes over a task (default %(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="seed (default %(default)s)")
    parser.add_argument("--lr", type=float, help="learning rate (default: the preset's, or cl-runner's own)")
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which model reads which rows, how many at once, and how long."""
    default = Job()
    parser.add_argument("--model", metavar="FOLDER", help="model folder (default: the embedded tiny-t5)")
    parser.add_argument("--data-dir", help="benchmark folder to read (default: synthetic rows)")
    parser.add_argument(
        "--micro-batch", type=int, default=default.micro_batch, help="rows of a step (default %(default)s)"
    )
    parser.add_argument(
        "--max-source", type=int, default=default.max_source, help="longest input in tokens (default %(default)s)"
    )


def training_row(base: Base, example: Example) -> tuple[list[int], list[int]]:
    """What a model reads of a row in training and its labels: the answer's tokens, of decoder-only models behind it."""
    if base.encoder_decoder:
        return example.source, example.target
    return example.source + example.target, [IGNORE] * len(example.source) + example.target


def exact_match(base: Base, answers: Sequence[Sequence[int]], examples: Sequence[Example]) -> float:
    """Percent of answers that say the gold label after the benchmark's normalisation."""

    def text(ids: Sequence[int]) -> str:
        return normalise(base.tokenizer.decode(list(ids), skip_special_tokens=True))

    right = sum(text(answer) == text(example.target) for answer, example in zip(answers, examples, strict=True))
    return 100.0 * right / len(examples)
