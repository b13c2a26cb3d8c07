"""Where a run's settings come from: defaults < presets < order < config file < flags < ``--set``."""

from cl_runner.settings.dump import dump, dump_order, dump_whole, read_dump, schema, show
from cl_runner.settings.layers import dotted
from cl_runner.settings.plugins import load_plugins
from cl_runner.settings.resolve import (
    Resolved,
    difference,
    differing,
    differing_from_presets,
    resolve,
    settings_of,
    tells_apart,
)

__all__ = [
    "Resolved",
    "difference",
    "differing",
    "differing_from_presets",
    "dotted",
    "dump",
    "dump_order",
    "dump_whole",
    "load_plugins",
    "read_dump",
    "resolve",
    "schema",
    "settings_of",
    "show",
    "tells_apart",
]
