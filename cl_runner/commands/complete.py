"""What the shell completes behind a flag: names that there are, settings and their values. Nothing imports torch.

A key comes with ``=``, and where it is the only one left, with its values too: of two words a shell completes what they
have in common, and puts no space behind it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cl_runner.errors import UserError

if TYPE_CHECKING:
    from cl_runner.settings.keys import Setting

VARIABLE = "_CL_RUNNER_COMPLETE"  # by it the shell asks
Words = Iterable[str | tuple[str, str]]


def _quiet(complete: Callable[..., Words]) -> Callable[..., list[Any]]:
    """Nothing is completed where something is wrong: the command itself says what."""

    @wraps(complete)
    def completed(*given: Any, **named: Any) -> list[Any]:
        try:
            return list(complete(*given, **named))
        except (UserError, OSError, ValueError, ImportError):
            return []

    return completed


@_quiet
def methods() -> Words:
    from cl_runner.registry import METHODS

    return METHODS.names()


@_quiet
def sources() -> Words:
    from cl_runner.registry import SOURCES

    return ["auto", *SOURCES]


@_quiet
def engines() -> Words:
    from cl_runner.registry import ENGINES

    return ENGINES.names()


@_quiet
def orders() -> Words:
    from cl_runner.tasks.order import order_names

    return order_names()


@_quiet
def presets() -> Words:
    from cl_runner.settings.presets import preset_names

    return preset_names()


@_quiet
def models() -> Words:
    from cl_runner.models.locate import EMBEDDED

    return EMBEDDED


@_quiet
def lists() -> Words:
    from cl_runner.commands.list import LISTS

    return LISTS


@_quiet
def states() -> Words:
    from cl_runner.runs.listing import STATES

    return STATES


@_quiet
def sorts() -> Words:
    from cl_runner.runs.listing import SORTS

    return SORTS


@_quiet
def metrics() -> Words:
    from cl_runner.metrics.scores import METRICS

    return METRICS


@_quiet
def runs(ctx: typer.Context) -> Words:
    """Run folders: under ``--output-dir``, the newest first."""
    from cl_runner.runs.catalog import all_runs

    return [run.name for run in all_runs(Path(ctx.params.get("output_dir") or "runs"))]


@_quiet
def tasks(ctx: typer.Context) -> Words:
    """The tasks of the order that is given, else those of the benchmark."""
    from cl_runner.tasks import benchmark
    from cl_runner.tasks.order import load_order

    order = ctx.params.get("order")
    return load_order(order).names if isinstance(order, str) else benchmark.names()


@_quiet
def settings(ctx: typer.Context, incomplete: str) -> Words:
    """``section.key=value``, also behind ``tasks.NAME.`` and ``stages.K.``; of the method and kind that are given."""
    from cl_runner.config.schema import settings_of_kind
    from cl_runner.methods import method_schema
    from cl_runner.settings.keys import settings as listed
    from cl_runner.settings.layers import SETTABLE

    before, where = "", re.match(r"(tasks|stages)\.([^.=]*)(\.)?", incomplete)
    if where and not where[3]:
        names = tasks(ctx) if where[1] == "tasks" else [str(place) for place in range(1, 16)]
        return [f"{where[1]}.{name}.{section}." for name in names for section in SETTABLE[where[1]]]
    there = listed(
        method_schema(_given(ctx, "method.name", "olora")), settings_of_kind(_given(ctx, "adapter.kind", "lora"))
    )
    if where:
        before = where[0]
        there = [each for each in there if each.key.partition(".")[0] in SETTABLE[where[1]]]
    key, equals, _ = incomplete[len(before) :].partition("=")
    fitting = [each for each in there if (each.key == key if equals else each.key.startswith(key))]
    values = [f"{before}{fitting[0].key}={value}" for value in _values(fitting[0])] if len(fitting) == 1 else []
    return values if equals else [*((f"{before}{each.key}=", each.what) for each in fitting), *values]


def _values(setting: Setting) -> list[str]:
    """The values that there are of a setting; where there is no end of them, its default beside those with a name."""
    named: dict[str, Callable[[], list[Any]]] = {
        "method.name": methods, "order": orders, "model.name": models, "adapter.target_modules": _target_sets,
    }  # fmt: skip
    known = named[setting.key]() if setting.key in named else [value.strip('"') for value in setting.values]
    default = [setting.default] if setting.open and setting.default not in ("", "null") else []
    return list(dict.fromkeys([*known, *default]))


def _target_sets() -> list[Any]:
    from cl_runner.config.schema import TARGET_SETS

    return list(TARGET_SETS)


def _given(ctx: typer.Context, key: str, default: str) -> str:
    """What the command line has for a setting so far: by its flag, or by ``--set``."""
    flag = ctx.params.get("method") if key == "method.name" else None
    for text in ctx.params.get("set_") or []:
        name, _, value = str(text).partition("=")
        flag = value if name == key else flag
    return flag if isinstance(flag, str) and flag else default


@contextmanager
def words_of_bash() -> Iterator[None]:
    """Inside, what bash asks is put together, and what it is answered is cut to what it expects.

    bash ends a word at ``=``: of ``--set training.schedule=li`` it tells ``training.schedule``, ``=``, ``li``, and
    takes completions of ``li`` alone.
    """
    if os.environ.get(VARIABLE) != "complete_bash" or not os.environ.get("COMP_CWORD", "").isdigit():
        yield
        return
    text, place = os.environ.get("COMP_WORDS", ""), int(os.environ["COMP_CWORD"])
    apart = "\n" if "\n" in text else " "
    words = text.split(apart)
    words += [""] * (place + 1 - len(words))
    joined: list[str] = []
    for number, word in enumerate(words[: place + 1]):
        after = number > 0 and (word == "=" or words[number - 1] == "=") and joined
        joined = [*joined[:-1], joined[-1] + word] if after else [*joined, word]
    os.environ.update(COMP_WORDS=apart.join(joined), COMP_CWORD=str(len(joined) - 1))
    # What stands before the word that bash completes; ``--set=`` itself is no part of an answer.
    last = words[place] if words[place] != "=" else ""
    before = joined[-1][: len(joined[-1]) - len(last)] if joined[-1] != last else ""
    before = re.sub(r"^--[\w-]+=", "", before)
    answer = StringIO()
    try:
        with redirect_stdout(answer):
            yield
    finally:
        for line in answer.getvalue().splitlines():
            if rest := line.removeprefix(before):
                print(rest)
