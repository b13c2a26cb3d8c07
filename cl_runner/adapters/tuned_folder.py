"""A stage of ``tuned.py`` on disk: PEFT's own folder of the kind where nothing is folded beside it, else one of LoRA's.

A sum of past updates is A = I and B = ΔW, or pairs side by side, as ``peft_folder.py`` has it. What trains on, and the
folder does not give back to the bit, stands beside it, name by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl_runner.adapters import patterns, peft_folder
from cl_runner.adapters.base import Held
from cl_runner.adapters.pairs import Pair
from cl_runner.adapters.saved import PairOnDisk, Saved

if TYPE_CHECKING:
    from cl_runner.adapters.tuned import Tuned, Values

SET = "set."  # tensors of a stage's own parameter set


def save(where: Path, adapters: Tuned, stage: str, held: Held) -> tuple[Saved, dict[str, Tensor]]:
    """Write a folder that answers as ``held`` does in plain PEFT; what is said of it, and what stands beside it."""
    values: Values | None = held.shown
    if values is None:
        saved = peft_folder.save_adapter(where, adapters, held)
        return saved, peft_folder.beside(saved, stage, held)
    if any(total is not None for total in held.sums.values()):
        return _save_with_past(where, adapters, held, values)
    if adapters.kind.on_disk == "lora":
        pair = adapters.pair_of(values)
        peft_folder.save_adapter(where, adapters, replace(held, kept={stage: pair}, live=stage, shown=pair))
        return Saved("state"), _named(values)
    _write_native(where, adapters, values)
    exact = adapters.kind.on_disk == "exact"
    return Saved("adapter" if exact else "state"), {} if exact else _named(values)


def _write_native(where: Path, adapters: Tuned, values: Values) -> None:
    from safetensors.torch import save_file

    where.mkdir(parents=True)
    save_file(adapters.peft_tensors(values), where / peft_folder.WEIGHTS, metadata={"format": "pt"})
    config = copy.deepcopy(adapters.peft_config)
    config.base_model_name_or_path, config.revision = adapters.name_or_path, adapters.revision
    config.inference_mode = True
    if adapters.kind.config.patterns:
        config.rank_pattern = patterns.exact(adapters.ranks)
        config.alpha_pattern = patterns.exact(patterns.alphas(adapters.kind.config, list(adapters.layers)))
    config.target_modules = sorted(adapters.target_modules)  # PEFT's set has another order in every process
    config.save_pretrained(str(where))


def _save_with_past(where: Path, adapters: Tuned, held: Held, values: Values) -> tuple[Saved, dict[str, Tensor]]:
    """A set that answers beside a sum: their whole as A = I, B = ΔW, and both of them beside it."""
    live = adapters.update_of(values, held.sums)
    whole = {t: live[t] if total is None else total.to(live[t]) + live[t] for t, total in held.sums.items()}
    saved = peft_folder.save_adapter(where, adapters, Held(dense=held.dense, sums=whole))
    pairs = tuple(PairOnDisk(pair.stage, pair.rank, pair.scale, pair.ranks, pair.scales) for pair in held.folded)
    past = {peft_folder.PAST_PREFIX + t: total for t, total in held.sums.items() if total is not None}
    return replace(saved, own="state", pairs=pairs), _named(values) | past


def own(adapters: Tuned, where: Path, stage: str, saved: Saved, tensors: Mapping[str, Tensor]) -> Values | Pair:
    """A stage's own parameter set; of one that was folded, its pair."""
    if any(pair.stage == stage for pair in saved.pairs):
        return peft_folder.own_pair(where, stage, saved, tensors)
    return _values(adapters, where, stage, saved, tensors)


def load(
    adapters: Tuned,
    where: Path,
    stage: str,
    saved: Saved,
    tensors: Mapping[str, Tensor],
    live: str | None,
    earlier: Callable[[str], Pair],
    kept: Mapping[str, Any],
) -> Held:
    """What ``save`` was given; ``earlier`` reads another stage's pair, ``kept`` are the other parameter sets."""
    if live is None:
        return peft_folder.load_adapter(where, stage, saved, tensors, None, earlier, kept)
    values = _values(adapters, where, stage, saved, tensors)
    pairs = tuple(earlier(pair.stage) for pair in saved.pairs)
    prefix = peft_folder.PAST_PREFIX
    sums = {key.removeprefix(prefix): tensor.clone() for key, tensor in tensors.items() if key.startswith(prefix)}
    return Held(pairs, saved.dense_stages, {**kept, live: values}, live, values, sums)


def _named(values: Values) -> dict[str, Tensor]:
    return {SET + name: tensor for name, tensor in values.tensors.items()}


def _values(adapters: Tuned, where: Path, stage: str, saved: Saved, tensors: Mapping[str, Tensor]) -> Values:
    from safetensors.torch import load_file

    from cl_runner.adapters.tuned import Values, our_name

    if saved.own == "adapter":
        own = adapters.parameters()
        named = {our_name(name): tensor for name, tensor in load_file(where / peft_folder.WEIGHTS).items()}
        named = {name if name in own else f"{name}.weight": tensor for name, tensor in named.items()}
        found = {name: tensor for name, tensor in named.items() if name in own}  # PEFT may have frozen ones beside
    else:
        found = {key.removeprefix(SET): tensor for key, tensor in tensors.items() if key.startswith(SET)}
    return Values(stage, {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found.items()})
