"""What updates made of the base's weights, for people and machines: ΔM and ΔD, intruder dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import Tensor

from cl_runner.metrics.updates.against_base import Intruding, Moved
from cl_runner.report.update_numbers import plain, plain_values, short, table, update_name


@dataclass(frozen=True)
class MovedSection:
    """``names`` of the updates, ``base`` by name."""

    names: Sequence[str]
    base: str
    found: Moved
    key: ClassVar[str] = "against_base"

    def to_json(self) -> dict[str, Any]:
        """Means over layers; the correlation of ΔM and ΔD is Pearson's over layers, at last over updates too."""
        magnitude, direction = (values.tolist() for values in self.found.together)
        each = self.found.correlations()
        return {
            "base": self.base,
            "layers": len(self.found.layers),
            "by_update": [
                {
                    "name": name,
                    "delta_magnitude": plain(magnitude[t]),
                    "delta_direction": plain(direction[t]),
                    "correlation": plain(each[t]),
                }
                for t, name in enumerate(self.names)
            ],
            "correlation": plain(self.found.correlation()),
            "by_layer": {
                layer: {column: plain_values(values[layer]) for column, values in self.columns().items()}
                for layer in self.found.layers
            },
        }

    def columns(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Column of the CSV → layer → value of each update (T)."""
        found = self.found
        named = {"delta_magnitude": found.magnitude, "delta_direction": found.direction}
        return {name: dict(zip(found.layers, values.T, strict=True)) for name, values in named.items()}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"\nthe tuned weights against the base {self.base}, means over layers and columns")
        magnitude, direction = (values.tolist() for values in self.found.together)
        shown = table("update", "ΔM, of lengths", "ΔD, of directions", "their correlation")
        for t, each in enumerate(self.found.correlations()):
            shown.add_row(update_name(t, self.names[t]), *map(short, (magnitude[t], direction[t], each)))
        yield shown
        yield Text(f"correlation over layers and updates: {short(self.found.correlation())}")


@dataclass(frozen=True)
class IntrudersSection:
    """``names`` of the updates, ``base`` by name, ``pattern`` that chose the layers."""

    names: Sequence[str]
    base: str
    found: Intruding
    pattern: str | None = None
    key: ClassVar[str] = "intruders"

    def to_json(self) -> dict[str, Any]:
        """Counts; ``checked``: of how many."""
        found = self.found
        columns = self.columns()
        sides = {"left": found.left, "right": found.right}
        sides |= {"left_alone": found.left_alone, "right_alone": found.right_alone}
        return {
            "base": self.base,
            **({"pattern": self.pattern} if self.pattern is not None else {}),
            "top_k": found.looked.top_k,
            "epsilon": found.looked.epsilon,
            "layers": len(found.layers),
            "checked": sum(found.checked),
            "by_update": [
                {"name": name, **{side: int(counts[t].sum()) for side, counts in sides.items()}}
                for t, name in enumerate(self.names)
            ],
            "by_layer": {
                layer: {
                    "checked": checked,
                    **{side: columns[f"intruders_{side}"][layer].tolist() for side in sides},
                }
                for layer, checked in zip(found.layers, found.checked, strict=True)
            },
        }

    def columns(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Column of the CSV → layer → value of each update (T)."""
        found = self.found
        named = {"left": found.left, "right": found.right}
        named |= {"left_alone": found.left_alone, "right_alone": found.right_alone}
        return {f"intruders_{name}": dict(zip(found.layers, values.T, strict=True)) for name, values in named.items()}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = self.found
        yield Text(
            f"\nintruder dimensions among the {found.looked.top_k} first singular vectors of a layer: unlike all of "
            f"{self.base} (|cos| under {found.looked.epsilon:g}), of {sum(found.checked)}"
        )
        shown = table("update", "left", "right", "alone: left", "right")
        for t, name in enumerate(self.names):
            counts = (found.left, found.right, found.left_alone, found.right_alone)
            shown.add_row(update_name(t, name), *(str(int(each[t].sum())) for each in counts))
        yield shown
