"""``SWEEP.yaml``: what a user writes of a sweep, checked as far as that needs no run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from cl_runner.config.schema import RunConfig, Section
from cl_runner.config.validation import first_fault, section_of, unknown
from cl_runner.config.yamlfile import Key, load, printable
from cl_runner.errors import UserError, did_you_mean

# Settings, dotted key → value: ``method`` and ``model`` are short for their names.
Settings = dict[str, Any]
SHORT = {"method": "method.name", "model": "model.name"}


class Condition(Section):
    """One entry of ``when``: what is otherwise for the runs that it fits."""

    if_: dict[str, Any] = Field(alias="if", min_length=1)
    set: dict[str, Any] = Field(default_factory=dict)
    drop: list[str] = Field(default_factory=list)
    skip: bool = False


class SweepFile(Section):
    """A sweep: every entry of ``list`` with every combination of ``grid`` under every seed, each on top of ``base``."""

    name: str | None = None
    base: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    entries: Annotated[list[dict[str, Any]], Field(min_length=1)] = Field(alias="list", default=[{}])
    seeds: Annotated[list[int], Field(min_length=1)] | None = None
    when: list[Condition] = Field(default_factory=list)
    retries: int = Field(default=1, ge=0, le=100)
    engine: dict[str, Any] = Field(default_factory=dict)

    @field_validator("seeds", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            raise ValueError(f"must be a list, such as [{value}] for one seed or [1, 2, 3] for three")
        return value


class Sweep:
    """A sweep as its file has it, settings by dotted keys.

    ``fixed`` are those of all runs, ``entries`` those of ``list``, ``grid`` key (or several) → its values.
    """

    def __init__(self, path: Path) -> None:
        """Read a file. Raises UserError, with the place in it, for what is wrong there."""
        self.document = load(path)
        for key in self.document.data:
            if key not in (known := [field.alias or name for name, field in SweepFile.model_fields.items()]):
                raise self._wrong((key,), f"is not a key of a sweep{did_you_mean(str(key), known)}", key=True)
        found, at, problem = first_fault(SweepFile, self.document.data)
        if found is None:
            raise self._wrong(at, problem)
        self.file = found
        self.name = found.name or path.stem
        if not re.fullmatch(r"\w[\w.+-]{0,59}", self.name):
            problem = "must be letters, digits and . + - _: runs go to a folder of that name"
            raise self._wrong(("name",), problem if found.name else f"'{path.stem}' will not do, say one: it {problem}")
        self.fixed = self._settings(found.base, ("base",))
        self.entries = [self._settings(entry, ("list", index)) for index, entry in enumerate(found.entries)]
        self.grid = dict(self._dimensions())
        self.conditions = [
            (
                self._settings(one.if_, ("when", index, "if")),
                self._settings(one.set, ("when", index, "set")),
                [SHORT.get(key, key) for key in one.drop],
                one.skip,
            )
            for index, one in enumerate(found.when)
        ]
        self._check()

    def _settings(self, values: Mapping[Any, Any], at: Key) -> Settings:
        """By dotted keys, each of which has to be one. Raises UserError."""
        found: Settings = {}
        for key, path, value in _dotted(values, at):
            self._check_key(key, path)
            if key in found:
                raise self._wrong(path, f"{key} is set twice", key=True)
            if key == "order" and not isinstance(value, str | list):
                raise self._wrong(path, "order must be a name or a YAML file")
            found[key] = value
        return found

    def _dimensions(self) -> Iterator[tuple[tuple[str, ...], list[tuple[Any, ...]]]]:
        """Of ``grid``: the keys that go together, and the values that they take."""
        for together, values in self.file.grid.items():
            at = ("grid", together)
            keys = tuple(SHORT.get(key.strip(), key.strip()) for key in together.split(","))
            for key in keys:
                self._check_key(key, at)
            if len(keys) == 1:
                yield keys, [(value,) for value in values]
                continue
            for index, value in enumerate(values):
                if not isinstance(value, list) or len(value) != len(keys):
                    raise self._wrong((*at, index), f"must be a list of {len(keys)} values, for {' and '.join(keys)}")
            yield keys, [tuple(value) for value in values]

    def _check_key(self, key: str, at: Key) -> None:
        """Raises UserError where there is no such setting; a method's own are known once the method is."""
        section, _, name = key.partition(".")
        if section not in RunConfig.model_fields:
            known = [*SHORT, *RunConfig.model_fields]
            raise self._wrong(at, f"'{printable(key)}' is not a setting{did_you_mean(section, known)}", key=True)
        kind = section_of(RunConfig, section)
        if kind is not None and not name:
            raise self._wrong(at, f"{section} must be settings, such as {section}.KEY", key=True)
        if (
            kind is not None
            and section not in ("method", "adapter")
            and name.partition(".")[0] not in kind.model_fields
        ):
            raise self._wrong(at, unknown(key, name, kind), key=True)
        if key == "seed" and at[0] in ("grid", "list"):
            raise self._wrong(at, "seed: say seeds: [1, 2, 3], beside base and grid", key=True)

    def _check(self) -> None:
        """Raises UserError for a setting that is varied twice, and for conditions that fit nothing."""
        varied = [key for keys in self.grid for key in keys]
        for key in varied:
            if varied.count(key) > 1:
                raise self._wrong(("grid",), f"{key} stands in it twice")
            for index, entry in enumerate(self.entries):
                if key in entry:
                    raise self._wrong(("list", index), f"{key} is set by grid too; leave it out of one")
        known = {*self.fixed, *varied, *(key for entry in self.entries for key in entry)}
        known |= {"seed"} if self.file.seeds else set()
        for index, (wanted, changed, dropped, skip) in enumerate(self.conditions):
            for key in wanted:
                if key not in known:
                    raise self._wrong(("when", index, "if"), f"no run sets {key}")
            known |= set(changed)
            for key in dropped:
                if key not in known:
                    raise self._wrong(("when", index, "drop"), f"no run sets {key}")
            if sum(map(bool, (changed or dropped, skip))) != 1:
                raise self._wrong(("when", index), "wants set or drop (what is otherwise then), or skip: true")

    def _wrong(self, at: Key, problem: str, *, key: bool = False) -> UserError:
        words = ".".join(str(part) for part in at)
        return UserError(f"{self.document.position(at, key=key)}: {words + ': ' if words else ''}{problem}")


def _dotted(values: Mapping[Any, Any], above: Key) -> Iterator[tuple[str, Key, Any]]:
    """Settings by section or by dotted key, each with where it stands."""
    for given, value in values.items():
        key, path = str(given), (*above, given)
        if key in SHORT and not isinstance(value, Mapping):
            yield SHORT[key], path, value
        elif key in ("tasks", "stages") and isinstance(value, Mapping):
            for name, entry in value.items():
                for inner, inner_path, inner_value in _dotted(entry or {}, (*path, name)):
                    yield f"{key}.{name}.{inner}", inner_path, inner_value
        elif section_of(RunConfig, key) is not None and isinstance(value, Mapping):
            for name, inner_value in value.items():
                yield f"{key}.{name}", (*path, name), inner_value
        else:
            yield key, path, value
