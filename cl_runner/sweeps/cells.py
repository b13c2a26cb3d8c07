"""The runs that a sweep is of: every combination, under its conditions, each once, as words of ``cl-runner train``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from cl_runner.config.yamlfile import as_yaml
from cl_runner.errors import UserError
from cl_runner.sweeps.file import Settings, Sweep

FLAGS = {
    "order": "--order", "presets": "--preset", "plugins": "--plugin", "method.name": "--method",
    "model.name": "--model", "seed": "--seed", "data.dir": "--data-dir", "data.source": "--data",
    "output.dir": "--output-dir", "output.name": "--name",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: what it is called on the screen, and its settings."""

    label: str
    settings: Settings

    def given(self, key: str) -> list[str]:
        """What a flag is given, each time once; nothing where the setting is null or not there."""
        value = self.settings.get(key)
        return [str(each) for each in (value if isinstance(value, list) else [value]) if each is not None]

    @property
    def sets(self) -> list[str]:
        """What ``--set`` is given: the settings without a flag of their own."""
        return [f"{key}={as_yaml(value)}" for key, value in self.settings.items() if key not in FLAGS]

    @property
    def words(self) -> list[str]:
        """What goes behind ``cl-runner train``."""
        flags = [word for key, flag in FLAGS.items() for each in self.given(key) for word in (flag, each)]
        return [*flags, *(word for each in self.sets for word in ("--set", each))]


def cells(sweep: Sweep, output_dir: str | None = None) -> list[Cell]:
    """The runs, in the order of the file: ``list``, then ``grid``, then ``seeds``.

    Where ``when`` takes away in what two of them differ they are one. Raises UserError where none is left.
    """
    always: Settings = {"output.reuse": True, "output.dir": str(Path("runs") / sweep.name), **sweep.fixed}
    if output_dir is not None:
        always["output.dir"] = output_dir
    found: dict[str, Cell] = {}
    met: set[int] = set()  # conditions that fit a run
    for own in _combinations(sweep):
        settings = _under_conditions(sweep, {**always, **own}, met)
        if settings is not None:
            cell = Cell(_label(settings, sweep), settings)
            found.setdefault(repr(sorted(settings.items(), key=lambda item: item[0])), cell)
    if not found:
        raise UserError(f"{sweep.document.file}: when skips every run")
    for index, (wanted, *_) in enumerate(sweep.conditions):
        if index not in met:
            what = ", ".join(f"{key}: {as_yaml(value)}" for key, value in wanted.items())
            raise UserError(f"{sweep.document.position(('when', index, 'if'))}: when.{index}.if: no run has {what}")
    return list(found.values())


def _combinations(sweep: Sweep) -> Iterator[Settings]:
    dimensions: Sequence[Sequence[tuple[Any, ...]]] = list(sweep.grid.values())
    seeds: Sequence[Settings] = [{"seed": seed} for seed in sweep.file.seeds] if sweep.file.seeds else [{}]
    for entry in sweep.entries:
        for values in product(*dimensions):
            varied = {
                key: value
                for keys, each in zip(sweep.grid, values, strict=True)
                for key, value in zip(keys, each, strict=True)
            }
            for seed in seeds:
                yield {**entry, **varied, **seed}


def _under_conditions(sweep: Sweep, settings: Settings, met: set[int]) -> Settings | None:
    """What the conditions make of a run's settings, one after the other; None where one skips it."""
    for index, (wanted, changed, dropped, skip) in enumerate(sweep.conditions):
        if all(_fits(settings.get(key), value) for key, value in wanted.items()):
            met.add(index)
            if skip:
                return None
            settings = {key: value for key, value in {**settings, **changed}.items() if key not in dropped}
    return settings


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a setting is what a condition wants, or one of several."""
    return any(_same(value, each) for each in ([wanted, *wanted] if isinstance(wanted, list) else [wanted]))


def _same(one: Any, other: Any) -> bool:
    """1 and 1.0 are, true and 1 are not."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _label(settings: Settings, sweep: Sweep) -> str:
    """Order and method, what is varied beside them, the seed."""
    varied = [key for keys in sweep.grid for key in keys] + [key for entry in sweep.entries for key in entry]
    varied += [key for _, changed, _, _ in sweep.conditions for key in changed]
    parts = [Path(str(settings["order"])).stem] if "order" in settings else []
    parts += [str(settings["method.name"])] if "method.name" in settings else []
    for key in dict.fromkeys(varied):
        if key in settings and key not in ("order", "method.name"):
            parts.append(f"{key}={as_yaml(settings[key])}")
    if "seed" in settings:
        parts.append(f"seed {settings['seed']}")
    return " ".join(parts)
