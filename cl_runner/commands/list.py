"""``list``, ``show`` and ``config schema``: what there is, told from the code itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from cl_runner.commands.given import several
from cl_runner.errors import UserError, did_you_mean
from cl_runner.registry import ENGINES, KINDS, METHODS, SOURCES, TRACKERS, Registry
from cl_runner.terminal.console import aligned, print_json

LISTS = (
    "orders", "tasks", "methods", "adapters", "compatibility", "sources", "models", "presets", "trackers", "engines",
    "runs",
)  # fmt: skip


def show_list(what: str, *, as_json: bool) -> None:
    """``cl-runner list``, but for runs. Raises UserError for a kind there is not."""
    if what not in LISTS:
        hint = did_you_mean(what, LISTS) or f" (there are {', '.join(LISTS)})"
        raise UserError(f"list {what}: there is nothing of that kind{hint}")
    lists: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "orders": _orders,
        "tasks": _tasks,
        "methods": _methods,
        "adapters": _adapters,
        "compatibility": _compatibility,
        "sources": _sources,
        "models": _models,
        "presets": _presets,
        "trackers": _trackers,
        "engines": _engines,
    }
    rows = lists[what]()
    if as_json:
        print_json({what: rows})
    else:
        lines, why = _short(rows) if what == "compatibility" else (rows, "")
        head = list(lines[0])
        print(aligned(head, [[_cell(row[key]) for key in head] for row in lines]) + why)


def show_runs(
    *, root: Path, methods: Sequence[str], orders: Sequence[str], states: Sequence[str], sort: Sequence[str],
    as_json: bool,
) -> None:  # fmt: skip
    """``cl-runner list runs``. Raises UserError for a method, order, state or key to sort by that there is not."""
    from cl_runner.runs.listing import listing
    from cl_runner.terminal.console import rich_print

    found = listing(
        root,
        methods=several("--method", methods),
        orders=several("--order", orders),
        states=several("--state", states),
        sort=several("--sort", sort),
    )
    if as_json:
        print_json(found.to_json())
    elif found.runs:
        rich_print(found)
    else:
        print(f"there are no {'such ' if methods or orders or states else ''}runs in {root}")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) or value is None:
        from cl_runner.report.tables import number

        return number(value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _orders() -> list[dict[str, Any]]:
    from cl_runner.tasks.order import load_order, order_names

    return [{"order": name, "tasks": load_order(name).names} for name in order_names()]


def _tasks() -> list[dict[str, Any]]:
    from cl_runner.tasks import benchmark

    rows = []
    for name in benchmark.names():
        task = benchmark.get(name)
        rows.append({"task": name, "kind": task.kind, "labels": task.labels or "free text"})
    return rows


def _methods() -> list[dict[str, Any]]:
    return [_registered(METHODS, "method", name, {"carried": "carried", "task id": "task_id"}) for name in METHODS]


def _sources() -> list[dict[str, Any]]:
    return [_registered(SOURCES, "source", name, {}) for name in SOURCES]


def _trackers() -> list[dict[str, Any]]:
    return [_registered(TRACKERS, "tracker", name, {"needs": "package"}) for name in TRACKERS]


def _engines() -> list[dict[str, Any]]:
    return [_registered(ENGINES, "engine", name, {}) for name in ENGINES]


def _shown(fact: Any) -> Any:
    """A fact as JSON has it."""
    return sorted(fact) if isinstance(fact, frozenset) else fact


def _registered(registry: Registry[Any], sort: str, name: str, facts: Mapping[str, str]) -> dict[str, Any]:
    """What a class says of itself (column → attribute), and whose it is; of one that cannot be used, why not."""
    whose = {"from": registry.origin(name)}
    try:
        found = registry.get(name)
    except UserError as error:
        return {sort: name, "what": f"cannot be used: {error}", **dict.fromkeys(facts, ""), **whose}
    return {
        sort: name,
        "what": found.title,
        **{key: _shown(getattr(found, fact)) for key, fact in facts.items()},
        **whose,
    }


def _adapters() -> list[dict[str, Any]]:
    facts = {"update": "equation", "offers": "offers", "folds": "folds", "4-bit base": "quantized", "paper": "paper"}
    return [_registered(KINDS, "adapter", name, facts) for name in KINDS]


def _compatibility() -> list[dict[str, Any]]:
    from cl_runner.training.compatibility import compatibility

    return list(compatibility())


def _short(rows: Sequence[Mapping[str, str]]) -> tuple[list[dict[str, str]], str]:
    """The table of ``compatibility`` for a screen: a letter for each thing that a kind lacks, and what each means."""
    gaps: dict[str, str] = {}

    def cell(told: str) -> str:
        missing = told.removeprefix("no: ").split(", ") if told.startswith("no: ") else []
        return "".join(gaps.setdefault(gap, ascii_lowercase[len(gaps)]) for gap in missing) or told

    lines = [{key: cell(value) for key, value in row.items()} for row in rows]
    return lines, "\n\nwhat a kind lacks\n" + "\n".join(f"  {letter}  {gap}" for gap, letter in gaps.items())


def _models() -> list[dict[str, Any]]:
    from cl_runner.models.locate import EMBEDDED

    rows = [{"model": name, "what": "embedded, works offline"} for name in EMBEDDED]
    return [*rows, {"model": "FOLDER or HUB-ID", "what": "any encoder-decoder or decoder-only model of transformers"}]


def _presets() -> list[dict[str, Any]]:
    from cl_runner.config.lookup import shipped
    from cl_runner.settings.presets import PUBLISHED, preset_names

    rows = []
    for name in preset_names():
        comment = (shipped("configs") / f"{name}.yaml").read_text("utf-8").splitlines()[0].lstrip("# ")
        rows.append({"preset": name, "what": comment.split(". ")[0].rstrip(".:")})
    rows[-1] = {"preset": PUBLISHED, "what": "what was published for the method, the model's family and the order"}
    return rows
