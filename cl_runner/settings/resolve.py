"""Where a run's settings come from: defaults < presets < order < config file < flags < ``--set``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cl_runner.config.lookup import looks_like_path
from cl_runner.config.schema import LORA, RunConfig, settings_of_kind
from cl_runner.config.validation import first_fault, refuse, section_of, unknown, wants_text
from cl_runner.config.yamlfile import Document, Key, load
from cl_runner.errors import UserError, did_you_mean
from cl_runner.settings.layers import (
    OPEN,
    SETTABLE,
    Given,
    Layer,
    dotted,
    from_document,
    from_flags,
    from_order,
    from_sets,
    is_part,
    merge,
    strongest,
    user_text,
    within,
)
from cl_runner.settings.plugins import is_of_run, load_plugins
from cl_runner.settings.presets import EMBEDDED, PUBLISHED, Preset, for_kind, published
from cl_runner.tasks.order import Order, find_order, load_order, order_in

MethodSchema = Callable[[str], type[BaseModel]]
StageNames = Callable[[RunConfig, Sequence[str]], list[str]]

# What is in the name of the run's folder already, or changes no number.
_NOT_DIFFERENT = ("order", "seed", "method.name", "model.name", "presets", "data.dir")
_NO_ROW_BY = "data.empty_texts"  # of a task too: it refuses rows or not, and which rows there are stays the same
# What is written, and looked at meanwhile; and what becomes of a step without which a run ends.
_LOOKS = ("output.", "eval.probe_", "eval.extra", "training.non_finite", "training.auto_batch")


@dataclass(frozen=True)
class Resolved:
    """The settings of a run, where each came from (dotted key → words), its order, and what to tell the user."""

    config: RunConfig
    origin: dict[str, str]
    order: Order | None
    notes: list[str] = field(default_factory=list)
    baseline: RunConfig = field(default_factory=RunConfig)  # defaults and presets alone


def resolve(
    *,
    presets: Sequence[str] = (),
    plugins: Sequence[str] = (),
    order: str | None = None,
    config_file: Path | None = None,
    extending: bool = False,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    method_schema: MethodSchema | None = None,
    stage_names: StageNames | None = None,
    kept_order: Callable[[Path], str | None] = lambda file: None,
) -> Resolved:
    """The settings of a run.

    Args:
        presets: names or files, weakest first; ``published`` goes last wherever it stands.
        plugins: Python files that are imported, beside those that the config file names (see ``load_plugins``).
        order: name or file of the task order.
        config_file: YAML of the user, or the ``run.yaml`` of a run, which gives that run again.
        extending: that run is extended by another order, under another name.
        flags: dotted key → value; None is not given.
        sets: ``section.key=value``, ``tasks.NAME.section.key=value``, ``stages.POSITION.section.key=value``.
        method_schema: gives the class of a method's own settings; without it they are not checked.
        stage_names: gives the stages of a config and the names of its tasks; without it there is one for each task.
        kept_order: gives the order that a run keeps beside its ``run.yaml``, for that which the file names.

    Raises:
        UserError: one line that names the file, line and column, or the flag, and what is wrong.
    """
    notes: list[str] = []
    document = load(config_file) if config_file is not None else Document("")
    file = from_document(document) if config_file is not None else {}
    if extending:
        file = {path: given for path, given in file.items() if path not in (("order",), ("output", "name"))}
    imported = load_plugins(plugins, file.pop(("plugins",), None), config_file)
    own_code = file.get(("model", "trust_remote_code"))
    flagged = from_flags({**(flags or {}), **({"order": order} if order is not None else {})})
    # The order goes first: which task a --set is of depends on the names of its tasks.
    of_order = [item for item in sets if item.partition("=")[0].strip() == "order"]
    ordered = strongest([file, flagged, from_sets(of_order)], ("order",))
    if config_file is not None and ordered is not None and ordered is file.get(("order",)):
        ordered = replace(ordered, value=kept_order(config_file) or ordered.value)
    loaded = _order(ordered, document)
    stronger = [file, flagged, from_sets(sets, loaded.names if loaded else ())]
    if config_file is not None and own_code is not None and own_code.value is True and is_of_run(config_file):
        _refuse_unsaid(own_code, stronger[1:])

    chosen = [*_presets_of_file(file, config_file, notes), *((name, "--preset") for name in presets)]
    if extending:  # what was published for the shorter order stands in the file
        chosen = [(name, where) for name, where in chosen if name != PUBLISHED]
    made = [Preset(name, where) for name, where in chosen if name != PUBLISHED]
    want_published = any(name == PUBLISHED for name, _ in chosen)
    shared = [preset.shared for preset in made]
    model = user_text(strongest([*shared, *stronger], ("model", "name")), "model.name")
    automatic = EMBEDDED.get(model or "") if model or want_published else "tiny"
    if automatic and automatic not in [preset.name for preset in made]:
        made.insert(0, Preset(automatic))
    named = strongest([*(preset.shared for preset in made), *stronger], ("method", "name"))
    method = user_text(named, "method.name") or RunConfig().method.name
    own_settings = _own_settings(method_schema, method, named)

    kind = user_text(strongest([*shared, *stronger], ("adapter", "kind")), "adapter.kind") or LORA
    weakest = [_elsewhere(own_settings, method), *(preset.layer(method, kind) for preset in made)]
    if want_published:
        weakest.append(for_kind(published(method, model, loaded, notes), kind))
    weakest = [_without_absent_tasks(layer, loaded) for layer in weakest]
    names = [_absolute(preset.name) for preset in made] + [PUBLISHED] * want_published
    origin = "--preset" if presets else file[("presets",)].origin if ("presets",) in file else "default"
    weakest.append({("presets",): Given(names, origin, "--preset", "--preset"), ("plugins",): imported})
    stronger = [{path: value for path, value in layer.items() if path != ("presets",)} for layer in stronger]

    merged = merge([*weakest, from_order(loaded) if loaded else {}, *stronger], loaded, notes)
    if loaded is not None and ("order",) in merged:
        merged[("order",)] = _rerunnable(merged[("order",)], loaded)
    if loaded is not None:
        _check_tasks(merged, loaded)
    config = _config(merged, method, own_settings)
    if loaded is not None:
        names = list(loaded.names)
        _check_positions(merged, loaded, len(stage_names(config, names) if stage_names else names), method)
    baseline = for_kind(merge(weakest, loaded))
    baseline[("method", "name")] = Given(method, "", "--preset", "--preset")
    return Resolved(config, _origins(config, merged, method), loaded, notes, _config(baseline, method, own_settings))


def _refuse_unsaid(given: Given, said: Sequence[Layer]) -> None:
    """A run folder may come from somebody else: that it trusts code of a model is no reason to run it here."""
    if strongest(list(said), ("model", "trust_remote_code")) is None:
        problem = (
            "the model's own code is run only if you say so: look at it, and give --set model.trust_remote_code=true"
        )
        raise refuse(given.where, f"{problem} (--trust-remote-code of eval, verify and analyze)")


def _presets_of_file(file: Layer, config_file: Path | None, notes: list[str]) -> list[tuple[str, str]]:
    """The presets that a config file names. A run's file has all settings: presets that are gone are said."""
    given = file.get(("presets",))
    if given is None or given.value is None:
        return []
    if not isinstance(given.value, list) or not all(isinstance(name, str) for name in given.value):
        raise refuse(given.where, "presets must be a list of names, such as [t5-large]")
    gone: list[str] = []
    if config_file is not None and is_of_run(config_file):
        gone = [name for name in given.value if looks_like_path(name) and not Path(name).is_file()]
    notes += [f"the preset {name} is not here; what it set stands in {config_file}" for name in gone]
    return [(name, given.where) for name in given.value if name not in gone]


def _order(given: Given | None, document: Document) -> Order | None:
    """The order of that name or file, or the one that stands in the config file (``document``)."""
    if given is not None and isinstance(given.value, dict) and given.value is (document.data or {}).get("order"):
        return order_in(document.part(("order",)), Path(document.file))
    name = user_text(given, "order")
    if given is None or name is None:
        return None
    try:
        find_order(name)
    except UserError as error:
        raise refuse(_place(given, "--order"), str(error)) from error
    return load_order(name)


def _rerunnable(given: Given, order: Order) -> Given:
    """An order that does not come along, by its full path, or as it stands in the config: from any folder the same."""
    whole = order.written() if isinstance(given.value, dict) else str(order.file.resolve())
    return Given(order.file.stem if order.shipped else whole, given.origin, given.where, given.where_key)


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if looks_like_path(name) else name


def _without_absent_tasks(layer: Layer, order: Order | None) -> Layer:
    """A preset may set things for tasks that this order has not."""
    if order is None:
        return layer
    return {
        path: given
        for path, given in layer.items()
        if not (path[0] == "tasks" and path[1] not in order.names)
        and not (path[0] == "stages" and int(path[1]) > len(order.names))
    }


def _check_tasks(merged: Layer, order: Order) -> None:
    """Every task that something is set for must be in the order."""
    for path, given in merged.items():
        if path[0] == "tasks" and path[1] not in order.names:
            hint = did_you_mean(str(path[1]), order.names) or f", which has {', '.join(order.names)}"
            raise refuse(given.where_key, f"task '{path[1]}' is not in {order.name}{hint}")


def _check_positions(merged: Layer, order: Order, stages: int, method: str) -> None:
    """Every position that something is set for must be a stage that the method makes of the order."""
    for path, given in merged.items():
        if path[0] == "stages" and int(path[1]) > stages:
            what = "tasks" if stages == len(order.names) else f"stage{'s' * (stages > 1)} with {method}"
            raise refuse(given.where_key, f"stage {path[1]} is not in {order.name}, which has {stages} {what}")


def _own_settings(method_schema: MethodSchema | None, method: str, named: Given | None) -> type[BaseModel] | None:
    """The class of the method's own settings; an unknown method is refused where it was named."""
    if method_schema is None:
        return None
    try:
        return method_schema(method)
    except UserError as error:
        raise refuse(_place(named, "--method"), str(error)) from error


def _elsewhere(own_settings: type[BaseModel] | None, method: str) -> Layer:
    """What the method has for default in other sections than its own (``Method.Config.elsewhere``)."""
    values: Mapping[str, Any] = getattr(own_settings, "elsewhere", {})
    return {tuple(key.split(".")): Given(value, f"method {method}", key, key) for key, value in values.items()}


def _place(given: Given | None, flag: str) -> str:
    """The file and line, or the flag without its value, which the message names itself."""
    if given is None:
        return flag
    return given.where if given.origin == "--set" or not given.origin.startswith("--") else given.origin


def _config(merged: Layer, method: str, own_settings: type[BaseModel] | None) -> RunConfig:
    """Values checked, section by section, with the place of the first that is wrong."""
    tree: dict[str, Any] = {}
    for path, given in merged.items():
        if len(path) == 1:
            tree[str(path[0])] = _value(RunConfig, str(path[0]), given)
        elif len(path) == 2 and path[0] not in OPEN:
            kind = section_of(RunConfig, str(path[0]))
            assert kind is not None
            tree.setdefault(str(path[0]), {})[path[1]] = _value(kind, str(path[1]), given)
    tree["adapter"] = _adapter_settings({str(p[1]): g for p, g in merged.items() if len(p) == 2 and p[0] == "adapter"})
    own = {str(path[1]): given for path, given in merged.items() if len(path) == 2 and path[0] == "method"}
    own.pop("name", None)
    tree["method"] = {"name": method, **_method_settings(own, method, own_settings)}
    config, path, problem = first_fault(RunConfig, tree)
    if config is None:
        raise _fault(merged, path, problem)
    for path, given in merged.items():
        if path[0] in ("tasks", "stages"):
            _set_override(config, path, given, own_settings)
    return config


def _adapter_settings(own: dict[str, Given]) -> dict[str, Any]:
    """What is set for the kind that is chosen."""
    kind = user_text(own.get("kind"), "adapter.kind") or LORA
    try:
        schema = settings_of_kind(kind)
    except UserError as error:
        raise refuse(_place(own.get("kind"), "--set adapter.kind"), str(error)) from error
    values = {}
    for name, given in own.items():
        if name in schema.unused:
            raise refuse(given.where_key, f"adapter.{name}: {kind} has no use for it; leave it out")
        if name not in schema.model_fields:
            raise refuse(given.where_key, unknown(f"adapter.{name}", name, schema, "" if kind == LORA else kind))
        values[name] = _value(schema, name, given)
    return values


def _value(kind: type[BaseModel], name: str, given: Given) -> Any:
    """``output.name: 2024`` is meant as text."""
    number = isinstance(given.value, (int, float)) and not isinstance(given.value, bool)
    return given.text if number and given.text is not None and wants_text(kind, name) else given.value


def _fault(merged: Layer, path: Key, problem: str) -> UserError:
    known = path
    while known and known not in merged:
        known = known[:-1]
    where = merged[known].where if known else "settings"
    return refuse(where, f"{dotted(path)} {problem}")


def _method_settings(own: dict[str, Given], method: str, own_settings: type[BaseModel] | None) -> dict[str, Any]:
    values = {key: given.value for key, given in own.items()}
    if own_settings is None:
        return values
    for key, given in own.items():
        if key not in own_settings.model_fields:
            raise refuse(given.where_key, unknown(f"method.{key}", key, own_settings, method))
        values[key] = _value(own_settings, key, given)
    settings, path, problem = first_fault(own_settings, values)
    if settings is None:
        where = own[str(path[0])].where if path and str(path[0]) in own else "--method"
        raise refuse(where, f"{dotted(('method', *path))} {problem}")
    made: dict[str, Any] = settings.model_dump(mode="json")
    made.pop("name", None)
    return made


def _set_override(config: RunConfig, path: Key, given: Given, own_settings: type[BaseModel] | None) -> None:
    """Check one setting of a task or a position, and put it into the config."""
    section, name, *inner = str(path[2]).split(".")
    places: dict[Any, dict[str, Any]] = config.tasks if path[0] == "tasks" else config.stages
    of_place = places.setdefault(path[1], {})
    if inner:
        whole = of_place.get(f"{section}.{name}", getattr(config, section).model_dump().get(name))
        given = replace(given, value=within(whole, inner, given.value), text=None)
    value = given.value
    kind = own_settings if section == "method" else section_of(RunConfig, section)
    if kind is not None:
        if name not in kind.model_fields:
            whose = config.method.name if section == "method" else ""
            raise refuse(given.where_key, unknown(f"{section}.{name}", name, kind, whose))
        values = config.method.own() if section == "method" else getattr(config, section).model_dump()
        made, _, problem = first_fault(kind, {**values, name: _value(kind, name, given)})
        if made is None:
            raise refuse(given.where, f"{dotted(path)} {problem}")
        value = made.model_dump(mode="json")[name]
    of_place[f"{section}.{name}"] = value


def settings_of(config: RunConfig) -> Iterator[tuple[Key, Any]]:
    """Every setting of a config with its path, in the order of the sections; of an order in it the name."""
    for name, value in config.model_dump(mode="json").items():
        if name in ("tasks", "stages"):
            for key, entry in getattr(config, name).items():
                for inner, given in entry.items():
                    yield (name, key, inner), given
        elif name == "order" and isinstance(value, dict):
            yield (name,), value["name"]
        elif isinstance(value, dict):
            for inner, given in value.items():
                yield (name, inner), given
        else:
            yield (name,), value


def _origins(config: RunConfig, merged: Layer, method: str) -> dict[str, str]:
    origins: dict[str, str] = {}
    for path, _ in settings_of(config):
        own = path[0] == "method" and path[1] != "name"
        origins[dotted(path)] = f"default of {method}" if own else "default"
        for other, given in merged.items():  # weakest first, parts of a task's setting after the whole
            if other == path or (path[0] in SETTABLE and other[:2] == path[:2] and is_part(other[2], path[2])):
                origins[dotted(path)] = given.origin
    return origins


def differing(a: RunConfig, b: RunConfig) -> list[Key]:
    """The paths of the settings in which two configs differ, in the order of the sections."""
    absent = object()
    ours, theirs = dict(settings_of(a)), dict(settings_of(b))
    paths = [*ours, *(path for path in theirs if path not in ours)]
    return [path for path in paths if _ordered(ours.get(path, absent)) != _ordered(theirs.get(path, absent))]


def _ordered(value: Any) -> Any:
    """A value to compare: of a mapping the order counts too, as of patterns the first one does."""
    return list(value.items()) if isinstance(value, dict) else value


def difference(a: RunConfig, b: RunConfig) -> list[str]:
    """The dotted keys of the settings in which two configs differ, in the order of the sections."""
    return [dotted(path) for path in differing(a, b)]


def differing_from_presets(resolved: Resolved) -> dict[str, Any]:
    """What order, config file, flags and ``--set`` changed of defaults and presets and what may change a number.

    Left out: what the run folder's name says already (order, method, model, seed), ``output.*``, ``eval.probe_*``,
    ``training.non_finite``, ``training.auto_batch``, and the path to the data. Where the rows come from
    (``data.source``, as it works out) is in.
    """
    config, baseline = resolved.config, resolved.baseline
    values = {dotted(path): value for path, value in settings_of(config)}
    found = {key: values.get(key) for key in difference(config, baseline) if key != "data.source" and tells_apart(key)}
    source = _source(config, config.model.name)
    if source != _source(baseline, config.model.name):
        found["data.source"] = source
    return found


def tells_apart(key: str) -> bool:
    """Whether a setting may change a number and is not in the name of the run's folder: order, method, model, seed."""
    return key not in _NOT_DIFFERENT and not key.startswith(_LOOKS) and not key.endswith(_NO_ROW_BY)


def _source(config: RunConfig, model: str) -> str:
    if config.data.source != "auto":
        return config.data.source
    return "synthetic" if model in EMBEDDED and config.data.dir is None else "folder"
