"""What ``analysis.json`` says of the updates: how they overlap, and their spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cl_runner.report.figures.style import SHARE, Drawn, colours, drawing, heat, plain_numbers, short

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
    size = 0.3 if T <= 16 else 0.11
    named = 0.2 + 0.055 * max(len(short(name)) for name in names)
    with drawing(len(there) * (size * (T - 1) + named + 0.35), rows=len(there), squeeze=False) as (figure, axes):
        for axis, key in zip(axes[:, 0], there, strict=True):
            what, low, high = BETWEEN[key]
            below = [[between[key][i][j] if j < i else None for j in range(T - 1)] for i in range(1, T)]
            text = [["" if v is None else _few(v) for v in row] for row in below] if T <= 8 else None
            labels = [f"{t} {name}" for t, name in enumerate(names, 1)]
            heat(axis, below, columns=labels[:-1], rows=labels[1:], low=low, high=high, map=SHARE, text=text)
            axis.set_title(what)
        return Drawn("overlap", "how the stages' updates overlap, each (down) with each before it (across)", figure)


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


def told(analysis: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """A row for each update: its size, nuclear norm, effective rank, density and overlap with those before it."""
    rows = []
    for t, update in enumerate(analysis["together"]["by_update"], 1):
        keys = ("update_norm", "nuclear_norm", "effective_rank", "free_share", "orthogonal_overlap")
        values = [update.get(key) for key in keys]
        if values[3] is not None:
            values[3] *= 100
        rows.append([f"{t} {update['name']}", *("–" if v is None else f"{v:.3g}" for v in values)])
    return rows


TOLD = ("update", "size ‖ΔW‖", "nuclear norm", "effective rank", "free input space, %", "OO with those before")
