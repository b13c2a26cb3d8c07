"""How figures look: narrow enough for a phone, and in a page as vectors whose ink is the page's, light or dark.

Matplotlib draws without a display and with no state of its own here (no pyplot); it is imported when the first figure
is drawn.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.4  # inches: 389 points, about as many as a phone is wide, so that 8 points are read there
# What a page replaces by its own colours; in a file of its own they are as they stand.
INK, MUTED, FAINT = "#111213", "#676a6d", "#d5d8db"
_OF_THE_PAGE = {INK: "var(--ink)", MUTED: "var(--muted)", FAINT: "var(--faint)"}
# Okabe and Ito's colours, which people with any vision tell apart, without black and yellow: one is not seen in the
# dark, the other not in the light.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
GOOD, BAD, GREY = "#009e73", "#d55e00", "#9aa0a6"
LEVELS = 40  # colours of a map; matplotlib makes a scale of more than 50 an image, which is no vector
SHARE, LOSS = "viridis", "OrRd"  # maps for what is to be much, and for what is to be little

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a task may be called "$a$"
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.4,
}


@contextmanager
def drawing(height: float, rows: int = 1, columns: int = 1, **more: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure of ``WIDTH`` × ``height`` inches and its axes (one, or an array of them), in our style.

    ``more`` goes to ``Figure.subplots``. Inside, everything that is drawn has the style.
    """
    with _quiet():
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context(_STYLE), _quiet():
        figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.04))
        yield figure, figure.subplots(rows, columns, **more)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of fonts on the screen: that they are looked for, the first time, and where that is kept; that one lacks
    a letter of a task's name, which a browser takes from another."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
            yield
    finally:
        log.setLevel(level)


class Drawn:
    """A finished figure: what it shows in words (for who cannot see it, and the caption), and its name in a folder."""

    def __init__(self, name: str, says: str, figure: Figure) -> None:
        self.name, self.says = name, says
        self._figure = figure

    def svg(self) -> str:
        """The element to stand in a page: ink by the page's variables, no fixed size, no name that another has too."""
        return _for_page(self._written("svg").decode("utf-8"), self.name, self.says)

    def save(self, folder: Path) -> list[Path]:
        """``NAME.svg`` and ``NAME.png`` (300 dots per inch) in a folder that is there. OSError."""
        files = []
        for form in ("svg", "png"):
            file = folder / f"{self.name}.{form}"
            file.write_bytes(self._written(form))
            files.append(file)
        return files

    def _written(self, form: str) -> bytes:
        from matplotlib import rc_context

        out = io.BytesIO()
        # No date, and ids that are the same each time: the same run makes the same file.
        metadata = {"Date": None} if form == "svg" else {}
        with rc_context({**_STYLE, "svg.hashsalt": self.name, "savefig.facecolor": "white"}), _quiet():
            self._figure.savefig(out, format=form, dpi=300, transparent=form == "svg", metadata=metadata)
        self._figure.set_layout_engine("none")  # which would move things a hair each time
        return out.getvalue()


def _for_page(svg: str, name: str, says: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    for colour, variable in _OF_THE_PAGE.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    # Of names only those that something refers to stay, and those become this figure's own.
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r"(url\(|href=\")#", rf"\1#{name}-", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    head = re.match(r"<svg[^>]*>", svg)
    assert head is not None
    box = re.search(r'viewBox="([^"]+)"', head[0])
    assert box is not None
    width = float(box[1].split()[2])
    opened = (
        f'<svg viewBox="{box[1]}" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{_escaped(says)}" style="max-width:{1.7 * width:.0f}px">'
    )
    return opened + svg[head.end() :]


def _escaped(text: str) -> str:
    from html import escape

    return escape(text, quote=True)


def short(name: str, width: int = 14) -> str:
    """A name cut to be a label."""
    return name if len(name) <= width else name[: width - 1] + "…"


def colours(count: int) -> list[Any]:
    """One for each of several series: apart while there are few, else from first to last."""
    if count <= len(SERIES):
        return list(SERIES[:count])
    import matplotlib

    ramp = matplotlib.colormaps["turbo"]
    return [ramp(0.05 + 0.9 * i / (count - 1)) for i in range(count)]


def plain_numbers(axis: Axes) -> None:
    """Powers of ten up a logarithmic axis, as numbers."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def heat(
    axis: Axes,
    values: Sequence[Sequence[float | None]],
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    low: float | None = None,
    high: float | None = None,
    map: str = SHARE,
    text: Sequence[Sequence[str]] | None = None,
) -> None:
    """A heat map: cells without a value are empty; ``text`` in them, in a colour that is read there, or a scale beside.

    ``low`` and ``high``: the values at the ends of the map, by default the least and the largest there is.
    """
    import matplotlib
    import numpy as np

    grid = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float).reshape(
        len(rows), len(columns)
    )
    steps = matplotlib.colormaps[map].resampled(LEVELS)
    drawn = axis.pcolormesh(np.ma.masked_invalid(grid), cmap=steps, vmin=low, vmax=high, edgecolors="none", snap=True)
    if text is None:
        scale = axis.figure.colorbar(drawn, ax=axis, pad=0.02, shrink=0.9)
        scale.outline.set_visible(False)
    axis.invert_yaxis()
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    _ticks(axis, "x", columns)
    _ticks(axis, "y", rows)
    for i, line in enumerate(text or ()):
        for j, said in enumerate(line):
            if said:
                red, green, blue, _ = drawn.cmap(drawn.norm(grid[i, j]))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                ink = "#ffffff" if dark else "#000000"
                axis.text(j + 0.5, i + 0.5, said, ha="center", va="center", color=ink, fontsize=7, linespacing=1.15)


def _ticks(axis: Axes, which: str, names: Sequence[str]) -> None:
    """A label a cell; of many, every few."""
    every = max(1, -(-len(names) // 26))
    at = range(0, len(names), every)
    labels = [short(names[i]) for i in at]
    if which == "y":
        axis.set_yticks([i + 0.5 for i in at], labels)
        return
    turned = len(names) * max((len(label) for label in labels), default=0) > 44
    axis.set_xticks([i + 0.5 for i in at], labels)
    if turned:
        axis.tick_params("x", rotation=90 if len(names) > 8 else 40)
        if len(names) <= 8:
            for label in axis.get_xticklabels():
                label.set_horizontalalignment("right")
                label.set_rotation_mode("anchor")
