"""Where a run's settings come from: defaults < presets < order < config file < flags < ``--set``."""

from cl_runner.settings.layers import dotted
from cl_runner.settings.resolve import Resolved, difference, differing, differing_from_presets, resolve, settings_of
from cl_runner.settings.text import dump, dump_order, schema, show

__all__ = [
    "Resolved",
    "difference",
    "differing",
    "differing_from_presets",
    "dotted",
    "dump",
    "dump_order",
    "resolve",
    "schema",
    "settings_of",
    "show",
]
