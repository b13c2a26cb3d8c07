"""What an ``adapter_config.json`` of anybody's may ask of PEFT: nothing that runs, fetches, or fills the memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cl_runner.adapters import expressions
from cl_runner.errors import UserError

_REFUSED = {
    "megatron_config": "PEFT would import the module that megatron_core names",
    "layer_replication": "it makes another model of the base",
}
_SIZES = ("r", "num_vectors", "n_frequency")
_EXPRESSIONS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")


def refuse_foreign_config(config: Mapping[str, Any], file: Path, largest: int) -> None:
    """Before PEFT is handed an adapter.

    Args:
        largest: the largest dimension of a tensor in the adapter's file: what it is made with is no larger.

    Raises:
        UserError: in one line.
    """
    if config.get("peft_type") == "XLORA":
        raise UserError(f"{file}: X-LoRA: it names other adapters, which PEFT would fetch")
    for key, why in _REFUSED.items():
        if config.get(key):
            raise UserError(f"{file}: {key}: {why}")
    ranks = config.get("rank_pattern")
    sizes = {key: config.get(key) for key in _SIZES} | (ranks if isinstance(ranks, dict) else {})
    for key, value in sizes.items():
        if isinstance(value, int | float) and value > largest:
            raise UserError(f"{file}: {key} is {value:.6g}, and nothing in the adapter's file is as large")
    for key, expression in _all_expressions(config):
        if fault := expressions.fault(expression):
            raise UserError(f"{file}: {key}: {fault}")


def _all_expressions(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in _EXPRESSIONS:
        value = config.get(key)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str):
                yield key, each
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key)
        for each in value if isinstance(value, dict) else ():
            yield key, each
