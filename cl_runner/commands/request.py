"""What a user asked for on the command line, and the settings that it resolves to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cl_runner.config.lookup import expanded
from cl_runner.errors import UserError
from cl_runner.methods import method_schema, stage_names
from cl_runner.models.locate import EMBEDDED
from cl_runner.runs import catalog
from cl_runner.runs.folder import RunDir, kept_order
from cl_runner.settings import Resolved, dotted, resolve, settings_of
from cl_runner.tasks.order import Order, order_names
from cl_runner.terminal.masking import holds_secret
from cl_runner.training.moved_runs import run_of, with_files, with_files_beside


@dataclass(frozen=True)
class Request:
    """What a user asked for, before it is resolved."""

    order: str | None
    presets: Sequence[str]
    config_file: Path | None
    flags: Mapping[str, Any]
    sets: Sequence[str]
    plugins: Sequence[str] = ()
    extends: RunDir | None = None  # a run whose settings these are

    @classmethod
    def extending(cls, name: str, given: Request, root: Path) -> Request:
        """The settings of a run by name, under the order that was given. Raises UserError."""
        if given.order is None:
            raise UserError("--extend: say the longer order, which begins with the run's, with --order")
        if given.config_file is not None or given.presets:
            raise UserError("--extend: the settings are those of the run; leave --config and --preset out")
        run = catalog.find(root, name)
        run.about()
        return replace(given, config_file=run.config_file, extends=run)

    def resolve(self) -> Resolved:
        """The settings. Raises UserError."""
        resolved = resolve(
            presets=self.presets,
            plugins=self.plugins,
            order=self.order,
            config_file=self.config_file,
            extending=self.extends is not None,
            flags=self.flags,
            sets=self.sets,
            method_schema=method_schema,
            stage_names=stage_names,
            kept_order=kept_order,
        )
        data_dir = os.environ.get("CL_RUNNER_DATA")
        if data_dir and resolved.config.data.dir is None and resolved.config.data.source in ("auto", "folder"):
            resolved.config.data.dir = data_dir
            resolved.origin["data.dir"] = "$CL_RUNNER_DATA"
        make_absolute(resolved)
        if resolved.config.data.source == "auto":
            settle_source(resolved)
        refuse_secrets(resolved)
        return resolved

    def with_order(self) -> tuple[Resolved, Order]:
        """The settings and the order, which has to be given. Raises UserError."""
        resolved = self.resolve()
        if resolved.order is None:
            raise UserError(f"no task order: say --order NAME or FILE (there are {', '.join(order_names())})")
        config, order = resolved.config, resolved.order
        if run := run_of(order):
            resolved = replace(resolved, order=with_files(order, run, config))
        elif isinstance(config.order, dict):
            resolved = replace(resolved, order=with_files_beside(order, order.file, config.data.dir))
        assert resolved.order is not None
        return resolved, resolved.order


def refuse_secrets(resolved: Resolved) -> None:
    """Settings and order are written into the run's folder, which is passed on. Raises UserError."""
    for path, value in settings_of(resolved.config):
        if holds_secret(_texts(value)):
            raise UserError(
                f"{dotted(path)} holds what looks like a secret, and settings are kept in run.yaml: leave it out"
            )
    order = resolved.order
    if order is not None and holds_secret(_texts(order.written())):
        raise UserError(f"{order.file}: the order holds what looks like a secret, and is kept in the run: leave it out")


def _texts(value: Any) -> Iterator[str]:
    """The texts in nested lists and mappings, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in (*value, *value.values()):
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def make_absolute(resolved: Resolved) -> None:
    """Paths of the user's become absolute, so that ``run.yaml`` gives the same run from any folder."""
    data, training, model = resolved.config.data, resolved.config.training, resolved.config.model
    with suppress(OSError):  # too long a name
        if model.name.strip() and ((at := expanded(model.name)).is_dir() or (at.suffix == ".gguf" and at.is_file())):
            model.name = str(at.absolute())
    if model.adapter is not None:
        model.adapter = str(expanded(model.adapter).absolute())
    if data.dir is not None:
        data.dir = str(expanded(data.dir).absolute())
    if training.deepspeed is not None:
        training.deepspeed = str(expanded(training.deepspeed).absolute())


def settle_source(resolved: Resolved) -> None:
    """``data.source: auto`` becomes what it means here: a folder if one is given, synthetic for embedded models."""
    data, model = resolved.config.data, resolved.config.model.name
    if data.dir is not None:
        data.source = "folder"
    elif model in EMBEDDED and not _own_rows(resolved.order):
        data.source = "synthetic"
        resolved.notes.append(
            f"synthetic stand-in data on the embedded {model}; for the real thing: "
            "cl-runner train --order order1 --preset t5-large --data-dir CL_Benchmark"
        )
    # Else it stays auto: tasks with files of their own need nothing, the others are refused by name.


def _own_rows(order: Order | None) -> bool:
    """Whether every task has files of its own, so that no rows are made up."""
    return order is not None and all(task.source is not None for task in order.tasks)
