"""What ``analysis.json`` says of the updates: how they overlap, and their spectra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cl_runner.report.figures.style import SERIES, SHARE, Drawn, colours, drawing, heat, plain_numbers, short

# Key → what it is, and the ends of its map where they are fixed.
BETWEEN = {
    "orthogonal_overlap": ("overlap OO of what they read, ‖A A'ᵀ‖²", 0.0, None),
    "input_angle_mean": ("mean principal angle of what they read, degrees", 0.0, 90.0),
    "output_angle_mean": ("mean principal angle of what they write, degrees", 0.0, 90.0),
}


def overlaps(analysis: Mapping[str, Any]) -> Drawn | None:
    """A heat map for each of ``BETWEEN``, update × update below the diagonal; ``None`` with fewer than two updates."""
    names = list(analysis["updates"])
    T = len(names)
    if T < 2:
        return None
    between = analysis["together"]["between"]
    there = [key for key in BETWEEN if any(v is not None for row in between[key] for v in row)]
    if not there:
        return None
    with _maps(len(there), T - 1, names) as (figure, axes):
        for axis, key in zip(axes, there, strict=True):
            what, low, high = BETWEEN[key]
            below = [[between[key][i][j] if j < i else None for j in range(T - 1)] for i in range(1, T)]
            text = [["" if v is None else _few(v) for v in row] for row in below] if T <= 8 else None
            labels = [f"{t} {name}" for t, name in enumerate(names, 1)]
            heat(axis, below, columns=labels[:-1], rows=labels[1:], low=low, high=high, map=SHARE, text=text)
            axis.set_title(what)
        return Drawn("overlap", "how the stages' updates overlap, each (down) with each before it (across)", figure)


@contextmanager
def _maps(count: int, cells: int, names: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """A figure for so many square maps under each other, and their axes."""
    named = 0.2 + 0.055 * max(len(short(name)) for name in names)
    size = 0.3 if cells <= 16 else 0.11
    with drawing(count * (size * max(cells, 3) + named + 0.5), rows=count, squeeze=False) as (figure, axes):
        yield figure, axes[:, 0]


def spectra(analysis: Mapping[str, Any]) -> Drawn | None:
    """Singular values of each update ΔW, the mean over layers; ``None`` where none is known."""
    values = [_mean_spectrum(analysis, t) for t in range(len(analysis["updates"]))]
    if not any(values):
        return None
    with drawing(2.3) as (figure, axis):
        for name, spectrum, colour in zip(analysis["updates"], values, colours(len(values)), strict=True):
            if spectrum:
                axis.plot(
                    range(1, len(spectrum) + 1),
                    spectrum,
                    color=colour,
                    marker="o" if len(spectrum) <= 32 else "",
                    markersize=2.5,
                    label=short(name),
                )
        axis.set(xlabel="which, from the largest", ylabel="singular value", yscale="log")
        plain_numbers(axis)
        if len(values) <= 16:
            figure.legend(loc="outside lower center", ncols=4)
        return Drawn("spectra", "singular values of each stage's update, the mean over layers", figure)


def _mean_spectrum(analysis: Mapping[str, Any], t: int) -> list[float]:
    """Over the layers that have so many; those that are 0 but for rounding are left out."""
    layers = [layer["by_update"][t].get("singular_values") or [] for layer in analysis["by_layer"].values()]
    longest = max(map(len, layers), default=0)
    columns: list[list[float]] = [[v[i] for v in layers if i < len(v) and v[i] is not None] for i in range(longest)]
    means = [sum(column) / len(column) for column in columns if column]
    return [value for value in means if value > 1e-6 * max(means, default=0.0)]


def _few(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


def gradients(analysis: Mapping[str, Any]) -> Drawn | None:
    """Cosines of the tasks' gradients, at the base and after the last stage; ``None`` where they were not asked for."""
    found = analysis.get("gradients")
    if not found or len(found["tasks"]) < 2:
        return None
    tasks = list(found["tasks"])
    with _maps(len(found["at"]), len(tasks), tasks) as (figure, axes):
        for axis, at in zip(axes, found["at"], strict=True):
            text = [["" if v is None else f"{v:.2f}" for v in row] for row in at["cosine"]] if len(tasks) <= 8 else None
            heat(axis, at["cosine"], columns=tasks, rows=tasks, low=-1, high=1, map="RdBu", text=text)
            axis.set_title("at the base" if at["stage"] == "base" else f"after {at['stage']}")
        return Drawn("gradients", "cosines of the tasks' mean gradients", figure)


def routes(analysis: Mapping[str, Any]) -> Drawn | None:
    """What each stage's part counts for with each task's rows, after the last stage; ``None`` where not asked for."""
    found = analysis.get("routes")
    if not found or not found["at"] or len(found["at"][-1]["parts"]) < 2:
        return None
    last = found["at"][-1]
    tasks, weights = list(last["weights"]), list(last["weights"].values())
    parts = [f"{t} {name}" for t, name in enumerate(last["parts"], 1)]
    with _maps(1, len(parts), parts) as (figure, [axis]):
        text = [["" if v is None else f"{v:.2f}" for v in row] for row in weights] if len(parts) <= 8 else None
        heat(axis, weights, columns=parts, rows=tasks, low=0, high=1, map=SHARE, text=text)
        return Drawn("routes", "what each stage's part (across) counts for with each task's rows (down)", figure)


def drift(analysis: Mapping[str, Any]) -> Drawn | None:
    """What is left of the base, stage by stage: loss on text, choices on unseen tasks; ``None`` where not asked for."""
    found = analysis.get("drift")
    if not found:
        return None
    panels = [key for key in ("loss", "mean_accuracy") if any(at[key] is not None for at in found["at"])]
    if not panels:
        return None
    names = [short(at["stage"]) for at in found["at"]]
    mark = " (synthetic)" if any(task["synthetic"] for task in found["tasks"].values()) else ""
    with drawing(0.5 + 1.5 * len(panels), rows=len(panels), sharex=True, squeeze=False) as (figure, axes):
        for axis, key in zip(axes[:, 0], panels, strict=True):
            values = [float("nan") if at[key] is None else at[key] for at in found["at"]]
            axis.plot(range(len(values)), values, color=SERIES[0], marker="o", markersize=3)
            axis.set_ylabel("loss, nats a token" if key == "loss" else f"unseen tasks, %{mark}")
        every = -(-len(names) // 16)
        axes[-1, 0].set_xticks(range(0, len(names), every), names[::every], rotation=30, ha="right")
        return Drawn("drift", "what the model says of text and of tasks that it does not learn, stage by stage", figure)


def told(analysis: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A table, head and rows: of each update its sizes and its overlap with those before, and what else is known."""
    columns: dict[str, list[float | None]] = {}
    of = analysis["together"]["by_update"]
    for key, head in TOLD.items():
        columns[head] = [update.get(key) for update in of]
    columns["free, %"] = [None if (v := update.get("free_share")) is None else 100 * v for update in of]
    for section, more in BESIDE.items():
        for key, head in more.items() if section in analysis else ():
            columns[head] = [update.get(key) for update in analysis[section]["by_update"]]
    rows = [
        [f"{t + 1} {update['name']}", *("–" if (v := values[t]) is None else f"{v:.3g}" for values in columns.values())]
        for t, update in enumerate(of)
    ]
    return ["update", *columns], rows


TOLD = {
    "update_norm": "size ‖ΔW‖",
    "nuclear_norm": "nuclear",
    "effective_rank": "eff. rank",
    "orthogonal_overlap": "OO",
}
BESIDE = {
    "against_base": {"delta_magnitude": "ΔM", "delta_direction": "ΔD"},
    "intruders": {"left": "intruders, left", "right": "right"},
}
