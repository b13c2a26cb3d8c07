"""A task: what is asked, which labels there are, where its rows come from, and how a row becomes a prompt."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, field_validator, model_validator

from cl_runner.config.lookup import expanded
from cl_runner.config.schema import Section
from cl_runner.metrics.exact_match import Comparison, comparison_of
from cl_runner.metrics.scores import judges
from cl_runner.tasks.template import Templates, is_template

Metric = Literal[
    "exact", "accuracy", "normalised", "numeric", "answer-letter", "f1", "labels-f1", "rouge-l", "rouge-l-summary",
    "bleu", "sari", "edit-similarity", "matthews", "pearson",
]  # fmt: skip
Split = Literal["train", "dev", "test"]
Format = Literal["auto", "columns", "alpaca", "sharegpt", "messages", "instances"]


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


class FileFormat(Frozen):
    """How files are read; each ``auto`` is worked out from the files themselves, and said where it is not plain."""

    format: Format = Field(
        default="auto",
        description="What a row is: columns, alpaca, sharegpt, messages or instances; auto: known by the first row.",
    )
    delimiter: str | None = Field(
        default=None,
        description="What parts the cells of delimited text; default: a tab in .tsv, else a comma (or as the header).",
    )
    quoting: Literal["auto", "csv", "none"] = Field(
        default="auto",
        description="csv: cells may stand in double quotes; none: quotes are text; auto: none where a tab parts cells.",
    )
    encoding: str | None = Field(default=None, description="Encoding of text files; default: UTF-8.")

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, value: str | None) -> str | None:
        value = {"tab": "\t", "\\t": "\t"}.get(value or "", value)
        if value is not None and (len(value) != 1 or value in '"\r\n\0'):
            raise ValueError("must be one character, such as ';', or tab")
        return value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        try:
            "a".encode(value or "utf-8")
        except (LookupError, ValueError) as error:
            raise ValueError(f"{value!r} is no text encoding; such as utf-16, latin-1 or cp1252") from error
        return value


class Source(FileFormat):
    """A task's own files: JSON, JSON Lines, CSV, TSV or Parquet by their ending, or a saved ``datasets`` folder.

    Each split is a path, a pattern (``part-*.parquet``), or a list of these.
    """

    train: str | list[str] = Field(description="File, folder or pattern of the train rows, or a list of them.")
    test: str | list[str] = Field(description="File, folder or pattern of the test rows, or a list of them.")
    dev: str | list[str] | None = Field(default=None, description="The same of the dev rows, if there are any.")

    @field_validator("train", "test", "dev", mode="before")
    @classmethod
    def _paths(cls, value: object) -> object:
        named = value if isinstance(value, list) else [value]
        if value is not None and not (named and all(isinstance(path, str) and path.strip() for path in named)):
            raise ValueError("must be a path, or a list of paths")
        return value

    def named(self, split: Split) -> list[str]:
        """What is named for the split; empty where nothing is."""
        named = {"train": self.train, "dev": self.dev, "test": self.test}[split]
        return [named] if isinstance(named, str) else named or []

    def beside(self, folder: Path) -> Source:
        """The same files, relative paths taken from ``folder``."""

        def there(path: str) -> str:
            return str(folder / expanded(path))

        paths = {
            split: [there(path) for path in named] if isinstance(named, list) else there(named)
            for split, named in (("train", self.train), ("test", self.test), ("dev", self.dev))
            if named
        }
        return self.model_copy(update=paths)


class Columns(Frozen):
    """Which fields of a task's own files hold what. Where neither is named, they are known by the first row."""

    text: str | list[str] | None = Field(
        default=None,
        description="Field that holds the text, or a template such as '{premise}\\n{hypothesis}' ('{{' is a brace); of "
        "a list of templates the first whose fields are all filled is taken, else the last.",
    )
    label: str | None = Field(default=None, min_length=1, description="Field that holds the label or free-text target.")
    separator: str = Field(
        default=",", min_length=1, description="What parts the labels of a cell that holds several (labels-f1)."
    )

    @field_validator("text")
    @classmethod
    def _readable(cls, value: str | list[str] | None) -> str | list[str] | None:
        for text in [value] if isinstance(value, str) else value or []:
            if is_template(text) or isinstance(value, list):
                Templates([text])
            elif not text:
                raise ValueError("must not be empty")
        if value == []:
            raise ValueError("must not be empty")
        return value

    @property
    def given(self) -> bool:
        """Whether the text's field or the label's is named."""
        return self.text is not None or self.label is not None


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

    @field_validator("text")
    @classmethod
    def _readable(cls, value: list[str]) -> list[str]:
        Templates(value)
        return value


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
    whole: bool = Field(
        default=False,
        description="A row's text is the whole input: no task, instruction, options or 'Answer:' around it.",
    )
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
        if self.source is not None and self.columns.given and self.source.format not in ("auto", "columns"):
            raise ValueError(f"columns name the fields, and source.format {self.source.format} too; leave one out")
        if self.whole and self.instruction:
            raise ValueError("whole says that the text is the whole input; leave it out, or the instruction")
        if self.labels is None:
            if self.metric in ("matthews", "labels-f1"):
                raise ValueError(f"metric {self.metric} needs labels")
        elif self.metric in ("numeric", "answer-letter"):
            raise ValueError(f"metric {self.metric} is for free text; leave it out, or the labels")
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
            **({"whole": True} if self.whole else {}),
            "name": self.called,
            "metric": metric,
        }

    @property
    def definition(self) -> str:
        """A hash of what is asked, by which a run knows its tasks again."""
        return hashlib.sha256(json.dumps(self.asked, sort_keys=True).encode()).hexdigest()

    @property
    def sets(self) -> bool:
        """Whether a row may have several labels, joined by ", "."""
        return self.metric == "labels-f1"

    @property
    def comparison(self) -> Comparison:
        """How an answer is held against the gold one."""
        return comparison_of(self.metric, self.labels, self.tolerance)

    @property
    def choices(self) -> list[str] | None:
        """The answers there are, where an answer is one of a closed set: not of free text, nor of sets of labels."""
        return None if self.sets else self.labels

    def given(self, label: str) -> list[str]:
        """The labels of a row: one, but where rows have sets."""
        return label.split(", ") if self.sets else [label]

    @property
    def judged(self) -> bool:
        """Whether the score is made of answers that are right or wrong by ``comparison``."""
        return judges(self.metric, self.labels)

    @property
    def scoring(self) -> str | None:
        """The rule of ``comparison``; None where the score is made of something else."""
        return str(self.comparison) if self.judged else None

    def prompt(self, text: str, *, add_task_name: bool = True, add_dataset_name: bool = True) -> Prompt:
        """The model's input for a row's text, in the benchmark's form, or as it stands (``whole``)."""
        if self.whole:
            return Prompt("", text, "")
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
        """The same task, its files taken from ``folder`` (where its order's file lies), as ``Source.beside`` has it."""
        if self.source is None:
            return self
        return self.model_copy(update={"source": self.source.beside(folder)})
