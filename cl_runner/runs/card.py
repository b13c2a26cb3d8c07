"""What a model card is made of, read from a run's folder without model or torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from cl_runner.config.schema import RunConfig
from cl_runner.methods import METHODS, method_class
from cl_runner.report.card.card import HERE, Card
from cl_runner.report.tables import RunSummary
from cl_runner.runs.answering import Answering
from cl_runner.runs.folder import RunDir, readable
from cl_runner.runs.page import environment_told
from cl_runner.runs.results import summary_of
from cl_runner.runs.resume_guard import as_written, order_of

PATHS = (
    ("model", "name"),
    ("model", "adapter"),
    ("training", "deepspeed"),
)  # whose last part alone is anybody's matter
LEFT_OUT = {"data": ("dir",), "model": ("revision", "trust_remote_code"), "eval": ("batch_tokens",)}
TEXT = "The text that the task is about."
_HUB = re.compile(r"hub ([\w.-]+(?:/[\w.-]+)?)")


def read_card(
    run: RunDir,
    number: int,
    answering: Answering,
    *,
    base: str,
    hub_base: str | None,
    seq2seq: bool,
    license: str | None,
    dtype: str = "",
    merged: bool = False,
    repo: str = HERE,
) -> Card:
    """Of the folder that answers after stage ``number`` (from 1). Raises UserError: the run has a broken file."""
    config, summary = as_written(run), as_of(summary_of(run), number)
    with readable(run):
        about, environment = run.about(), run.environment()
        learned = [task for stage in about["stages"][:number] for task in stage["tasks"]]
        data = about["identity"]["data"]
        told = environment_told(environment)
        asked = {task.name: task for task in order_of(run, about).tasks}[answering.task or learned[-1]]
        words = {"add_task_name": config.data.add_task_name, "add_dataset_name": config.data.add_dataset_name}
        method = method_class(about["method"]) if about["method"] in METHODS.ours else None
        return Card(
            run=summary,
            what="model" if merged else answering.what,
            base=base,
            hub_base=hub_base,
            license=license,
            title=method.title if method else "",
            equation=method.equation if method else "",
            paper=method.paper if method else "",
            stages=[(stage["name"], stage["tasks"]) for stage in about["stages"][:number]],
            data=[_rows(task, data[task]) for task in dict.fromkeys(learned)],
            datasets=_datasets(data[task] for task in learned),
            prompt=str(asked.prompt(TEXT, **words)),
            chat=config.data.chat_template,
            new_tokens=config.eval.max_new_tokens,
            settings=settings(config),
            versions={name: told[name] for name in ("cl-runner", "Python", "packages", "device") if name in told},
            seq2seq=seq2seq,
            dtype=dtype,
            task=answering.task,
            started=PurePath(config.model.adapter).name if config.model.adapter else "",
            repo=repo,
        )


def as_of(run: RunSummary, number: int) -> RunSummary:
    """A run's summary as it was after a stage (from 1)."""
    if number >= run.stages_done:
        return run
    whole = run.matrix
    matrix = replace(
        whole,
        stages=whole.stages[:number],
        values=whole.values[:number],
        trained=whole.trained[:number],
        undefined=whole.undefined[:number],
    )
    return replace(
        run, stages_done=number, matrix=matrix, parameters=run.parameters[:number], seconds=None, megabytes=None
    )


def settings(config: RunConfig) -> dict[str, Any]:
    """A run's settings by section, without what is not set and without places on its machine."""
    values = config.model_dump(mode="json", exclude={"presets", "plugins", "order", "seed", "output"})
    for section, key in PATHS:
        if PurePath(str(values[section].get(key))).is_absolute():
            values[section][key] = PurePath(values[section][key]).name
    for section, keys in LEFT_OUT.items():
        for key in keys:
            values[section].pop(key, None)
    found = {
        section: {key: value for key, value in of.items() if value is not None and value != {}}
        for section, of in values.items()
    }
    return {section: of for section, of in found.items() if of}


def _rows(task: str, splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    sources = dict.fromkeys(whence(split["source"]) for split in splits.values())
    counts = [f"{splits[name]['rows']:,}" if name in splits else "-" for name in ("train", "test")]
    return [task, "; ".join(sources), *counts]


def whence(source: str) -> str:
    """Where rows are from, by the last part of a path."""
    word = source.partition(" ")[0]
    if word == "folder" or word == "file" or " files " in source:
        return f"{word} {PurePath(source).name}" if "/" in source else source
    return source


def _datasets(of_tasks: Any) -> Sequence[str]:
    found = (_HUB.match(split["source"]) for splits in of_tasks for split in splits.values())
    return list(dict.fromkeys(match[1] for match in found if match))
