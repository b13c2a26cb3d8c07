"""``list``, ``show`` and ``config schema``: what there is, told from the code itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cl_runner import runs
from cl_runner.config import Section
from cl_runner.console import aligned, print_json
from cl_runner.errors import UserError, did_you_mean
from cl_runner.methods import METHODS, method_class, method_schema
from cl_runner.report.tables import number
from cl_runner.settings import schema
from cl_runner.yamlfile import as_yaml

KINDS = ("orders", "tasks", "methods", "adapters", "models", "presets", "runs")


def show_list(what: str, *, root: Path, as_json: bool) -> None:
    """``cl-runner list``. Raises UserError for a kind there is not."""
    if what not in KINDS:
        hint = did_you_mean(what, KINDS) or f" (there are {', '.join(KINDS)})"
        raise UserError(f"list {what}: there is nothing of that kind{hint}")
    lists: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "orders": _orders,
        "tasks": _tasks,
        "methods": _methods,
        "adapters": _adapters,
        "models": _models,
        "presets": _presets,
        "runs": lambda: _runs(root),
    }
    rows = lists[what]()
    if as_json:
        print_json({what: rows})
    elif not rows:
        print(f"there are no {what} in {root}")
    else:
        rows = [_run_row(row) for row in rows] if what == "runs" else rows
        head = list(rows[0])
        print(aligned(head, [[_cell(row[key]) for key in head] for row in rows], right=("seed", "AA")))


def show_method(name: str, *, as_json: bool) -> None:
    """``cl-runner show METHOD``. Raises UserError for a method there is not."""
    method = method_class(name)
    settings = {
        key: {"default": _plain(field.get_default(call_default_factory=True)), "what": field.description or ""}
        for key, field in method.Config.model_fields.items()
    }
    about: dict[str, Any] = {
        "name": method.name,
        "title": method.title,
        "equation": method.equation,
        "paper": f"arXiv {method.paper}" if method.paper else "",
        "trains": method.trains + ("; method.train=full: all weights of the model" if "train" in settings else ""),
        "factors": method.factors,
        "frozen": method.frozen + ("; method.train=full: nothing" if "train" in settings else ""),
        **({"forms": method.forms} if method.forms else {}),
        "carried": method.carried,
        "growth": method.growth,
        "task id at inference": {"yes": "needed", "no": "not needed"}.get(method.task_id, "as the settings have it"),
        "settings": settings,
    }
    if as_json:
        print_json(about)
        return
    for key, value in about.items():
        if key != "settings":
            print(f"{key + ':':<22}{value}")
    print("settings:" if settings else "settings: none of its own")
    for key, setting in settings.items():
        print(f"  method.{key} = {as_yaml(setting['default'])}\n      {setting['what']}")


def _plain(value: Any) -> Any:
    """A default as JSON has it."""
    return value.model_dump(mode="json") if isinstance(value, Section) else value


def show_schema() -> None:
    """``cl-runner config schema``."""
    print_json(schema({name: method_schema(name) for name in METHODS}))


def _run_row(run: dict[str, Any]) -> dict[str, Any]:
    """A run as people read it."""
    score = run["average_accuracy"]
    without = f" without {', '.join(run['undefined'])}" if run["undefined"] and score is not None else ""
    return {
        **{key: run[key] for key in ("name", "method", "order", "model", "seed")},
        "stage": f"{run['stage']}/{run['stages']}",
        "state": run["state"],
        "AA": number(score) + without + (" (synthetic)" if run["synthetic"] and score is not None else ""),
    }


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) or value is None:
        return number(value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _orders() -> list[dict[str, Any]]:
    from cl_runner.tasks.order import load_order, order_names

    return [{"order": name, "tasks": load_order(name).names} for name in order_names()]


def _tasks() -> list[dict[str, Any]]:
    from cl_runner.tasks import catalog

    rows = []
    for name in catalog.names():
        task = catalog.get(name)
        rows.append({"task": name, "kind": task.kind, "labels": task.labels or "free text"})
    return rows


def _methods() -> list[dict[str, Any]]:
    rows = []
    for name in METHODS:
        method = method_class(name)
        rows.append({"method": name, "what": method.title, "carried": method.carried, "task id": method.task_id})
    return rows


def _adapters() -> list[dict[str, Any]]:
    return [{"adapter": "lora", "update": "s·B A, s = alpha / r", "paper": "arXiv 2106.09685"}]


def _models() -> list[dict[str, Any]]:
    from cl_runner.models.catalog import EMBEDDED

    rows = [{"model": name, "what": "embedded, works offline"} for name in EMBEDDED]
    return [*rows, {"model": "FOLDER or HUB-ID", "what": "any encoder-decoder or decoder-only model of transformers"}]


def _presets() -> list[dict[str, Any]]:
    from cl_runner.lookup import shipped
    from cl_runner.settings.presets import PUBLISHED, preset_names

    rows = []
    for name in preset_names():
        comment = (shipped("configs") / f"{name}.yaml").read_text("utf-8").splitlines()[0].lstrip("# ")
        rows.append({"preset": name, "what": comment.split(". ")[0].rstrip(".:")})
    rows[-1] = {"preset": PUBLISHED, "what": "what was published for the method, the model's family and the order"}
    return rows


def _runs(root: Path) -> list[dict[str, Any]]:
    return [asdict(runs.listed(run)) for run in runs.all_runs(root)]
