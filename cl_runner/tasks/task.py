"""A task: what is asked, which labels there are, where its rows come from, and how a row becomes a prompt."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, field_validator, model_validator

from cl_runner.config import Section
from cl_runner.metrics.comparison import Comparison, comparison_of

Metric = Literal[
    "exact", "accuracy", "normalised", "numeric", "f1", "labels-f1", "rouge-l", "bleu", "matthews", "pearson"
]
Split = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Row:
    """One example. ``id`` is split and row number in the source, from 0: ``test/12``."""

    id: str
    text: str
    label: str


class Prompt(NamedTuple):
    """The model's input in three parts; only the middle one may be cut when it is too long."""

    head: str
    text: str
    tail: str

    def __str__(self) -> str:
        return self.head + self.text + self.tail


class Frozen(Section):
    """A section that is not changed once made: tasks are shared by all stages of a run."""

    model_config = ConfigDict(frozen=True)


class Source(Frozen):
    """A task's own files: JSON, JSON Lines, CSV, TSV or Parquet, by their ending."""

    train: str = Field(description="File of the train rows.")
    test: str = Field(description="File of the test rows.")
    dev: str | None = Field(default=None, description="File of the dev rows, if there are any.")

    def path(self, split: Split) -> Path | None:
        """The split's file, or None where there is none."""
        named = {"train": self.train, "dev": self.dev, "test": self.test}[split]
        return Path(named).expanduser() if named else None


class Columns(Frozen):
    """Which fields of a task's own files hold what."""

    text: str = Field(default="text", min_length=1, description="Field that holds the text.")
    label: str = Field(
        default="label", min_length=1, description="Field that holds the label, or the free-text target."
    )


class Sizes(Frozen):
    """Rows of the benchmark's splits; hub data is cut to them."""

    train: int | None = Field(default=None, ge=1)
    test: int | None = Field(default=None, ge=1)


class HubSplits(Frozen):
    """The hub's names of the splits. GLUE and SuperGLUE hide their test labels: ``validation`` there."""

    train: str = "train"
    test: str = "test"


class Hub(Frozen):
    """A data set on the hub, and how its fields become the task's text and label."""

    id: str = Field(min_length=1, description="Namespaced id: offline caches key on it.")
    config: str | None = Field(default=None, description="Configuration of the data set.")
    revision: str | None = Field(default=None, description="Commit, where one is known.")
    splits: HubSplits = Field(default_factory=HubSplits)
    text: list[str] = Field(
        min_length=1,
        description="Templates with {field}; the first whose fields are all filled is taken, else the last.",
    )
    label: str = Field(default="label", description="Field of the label.")
    labels: dict[str, str] | None = Field(
        None, description="The hub's class name (or value, where classes have no names) → the task's label."
    )
    files: dict[str, str] | None = Field(
        default=None,
        description="train and test → CSV file, for repositories of nothing more (splits do not matter then).",
    )
    column_names: list[str] | None = Field(default=None, description="Columns of CSV files that have no header.")

    @model_validator(mode="after")
    def _files_of_both(self) -> Hub:
        if self.files is not None and set(self.files) != {"train", "test"}:
            raise ValueError("files must name train and test")
        return self

    @field_validator("text", mode="before")
    @classmethod
    def _one_template(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


def check_name(name: str) -> str:
    """The name itself if it can stand in a path and on a line; ValueError says why not."""
    if not name or name != name.strip():
        raise ValueError(f"{name!r} is empty or begins or ends with a space")
    if "/" in name or "\\" in name or name in {".", ".."} or ".." in name:
        raise ValueError(f"{name!r} may not hold '/', '\\' or '..': names become folders")
    if any(unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} for c in name):
        raise ValueError(f"{name!r} holds a control character")
    if len(name.encode()) > 100:
        raise ValueError(f"{name[:20]!r}… is longer than 100 bytes")
    return name


class Task(Frozen):
    """One task of an order. Text and labels of users are only ever joined, never formatted."""

    name: str = Field(description="Name; the model reads it in 'Dataset:<name>'.")
    dataset: str | None = Field(
        default=None, description="What the model reads in the name's place, where a task comes twice in an order."
    )
    kind: str = Field(description="Kind; the model reads it in 'Task:<kind>'.")
    instruction: str = Field(default="", description="What is asked; ends in a newline unless empty.")
    labels: list[str] | None = Field(default=None, description="The answers there are; none: free text.")
    options: bool = Field(default=True, description="Print the labels in an 'Option:' line.")
    metric: Metric = Field(default="exact", description="Score of the answers.")
    tolerance: float = Field(default=0.0, ge=0, description="Metric numeric: how far off an answer may be.")
    source: Source | None = Field(default=None, description="The task's own files; they win over data.source.")
    columns: Columns = Field(default_factory=Columns)
    hub: Hub | None = Field(default=None, description="Where the hub has it.")
    sizes: Sizes = Field(default_factory=Sizes)

    @field_validator("name", "kind", "dataset")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        return None if value is None else check_name(value)

    @field_validator("instruction")
    @classmethod
    def _instruction(cls, value: str) -> str:
        return value if not value or value.endswith("\n") else value + "\n"

    @field_validator("labels")
    @classmethod
    def _labels(cls, value: list[str] | None) -> list[str] | None:
        if value is None:
            return None
        if not value:
            raise ValueError("no labels: leave the key out for free text")
        for label in value:
            if not label.strip() or "\0" in label or "\n" in label:
                raise ValueError(f"{label!r} is empty, or holds a newline or NUL")
        twice = sorted({label for label in value if value.count(label) > 1})
        if twice:
            raise ValueError(f"{twice[0]!r} is there twice")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if self.tolerance and self.metric != "numeric":
            raise ValueError(f"tolerance goes with metric numeric, not with {self.metric}")
        if self.labels is None:
            if self.metric in ("matthews", "labels-f1"):
                raise ValueError(f"metric {self.metric} needs labels")
        elif self.metric == "numeric":
            raise ValueError("metric numeric is for free text; leave it out, or the labels")
        elif problem := self.comparison.why_not(self.labels):
            raise ValueError(problem)
        elif self.hub and self.hub.labels:
            strange = sorted(set(self.hub.labels.values()) - set(self.labels))
            if strange:
                raise ValueError(f"hub.labels maps to {strange[0]!r}, which is not one of the task's labels")
        return self

    @property
    def called(self) -> str:
        """The name that the model reads and that sources of rows know; ``name`` but for a task that comes again."""
        return self.dataset or self.name

    @property
    def asked(self) -> dict[str, Any]:
        """What is asked, as JSON: where rows are from is not in it, nor by which rule of the metric they are scored."""
        # Earlier versions called the benchmark's metric ``exact``.
        metric = "exact" if self.metric == "normalised" else self.metric
        return {
            **self.model_dump(include={"kind", "instruction", "labels", "options"}),
            "name": self.called,
            "metric": metric,
        }

    @property
    def sets(self) -> bool:
        """Whether a row may have several labels, joined by ", "."""
        return self.metric == "labels-f1"

    @property
    def comparison(self) -> Comparison:
        """How an answer is held against the gold one."""
        return comparison_of(self.metric, self.labels, self.tolerance)

    def prompt(self, text: str, *, add_task_name: bool = True, add_dataset_name: bool = True) -> Prompt:
        """The model's input for a row's text, in the benchmark's form."""
        head = ""
        if add_task_name:
            head += "Task:" + self.kind + "\n"
        if add_dataset_name:
            head += "Dataset:" + self.called + "\n"
        head += self.instruction
        if self.options and self.labels:
            head += "Option: " + ", ".join(self.labels) + " \n"
        return Prompt(head, text, "\nAnswer:")

    def beside(self, folder: Path) -> Task:
        """The same task, its relative files taken from ``folder`` (where its order's file lies)."""
        if self.source is None:
            return self
        paths = {
            key: str(folder / Path(value).expanduser()) if value else None
            for key, value in self.source.model_dump().items()
        }
        return self.model_copy(update={"source": Source.model_validate(paths)})
