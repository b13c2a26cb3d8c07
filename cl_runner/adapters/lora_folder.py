"""A PEFT folder of LoRA pairs, whoever made it: what it adds to each layer, read layer by layer without the base.

``s·B A`` as PEFT 0.21 computes it: alpha / r or alpha / √r, ranks and alphas by pattern, one adapter, under a name or
none. What ``fan_in_fan_out`` says is how the base keeps its weight: A and B lie the same way in any case. Files of the
code of O-LoRA and N-LoRA hold the pairs of several tasks (``grown_folder.py``).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_runner.adapters import patterns, tensor_file
from cl_runner.adapters.expressions import Costly
from cl_runner.adapters.grown_folder import FORKS, grown
from cl_runner.adapters.tensor_file import Tensors
from cl_runner.atomic import read_json
from cl_runner.errors import UserError
from cl_runner.metrics.updates.update import Update
from cl_runner.plain_files import pickled, refuse_foreign

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?:embedding_)?(?P<factor>[AB])"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.weight)?"
)
# Of LoRA's config: what makes ΔW another thing than s·B A, and what it would take.
_OTHERWISE = {
    "use_dora": "DoRA: ΔW = m ∘ (W + s·B A) / ‖W + s·B A‖ − W needs the base",
    "use_qalora": "QA-LoRA: A reads a pooled input",
    "use_bdlora": "BD-LoRA: its factors are block-diagonal",
    "kasa_config": "KaSA: it takes singular values off the base",
    "monteclora_config": "MonteCLoRA: its factors are drawn",
    "target_parameters": "a pair for each expert of a layer (target_parameters)",
}
LARGEST = 1e30  # of a rank or alpha
_BORROWS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # as the weight began, so did the pair


class NeedsBase(UserError):
    """What an adapter adds depends on the weight that it is beside, or only PEFT knows it."""


class LoraFolder:
    """``shapes``: layer → (m, n), out by in. ``base``: what it names as its base, if it does. ``notes``: lines on why
    its updates are not all that it does. ``tasks``: ranks of the tasks whose pairs it holds one under the other, oldest
    first; empty of PEFT's own.

    Raises:
        UserError: it is no adapter, or a broken one; ``NeedsBase`` where it is not LoRA's, whose updates alone can be
            told without the base.
    """

    from_base = True

    def __init__(self, path: Path, name: str = "") -> None:
        self.path, self.name = path, name or path.name
        self._config = _config(path)
        self.base = str(self._config.get("base_model_name_or_path") or "")
        self._tensors = tensors_of(path, self._config)
        self.tasks: tuple[int, ...] = ()
        if held := grown(self._tensors, self._config, str(path)):
            self._tensors, self.tasks = held.tensors, held.ranks
        self.notes: list[str] = []
        self._names = self._factors()
        self.shapes: dict[str, tuple[int, int]] = {}
        self._scales: dict[str, float] = {}
        for layer, names in self._names.items():
            self._check(layer, *(self._tensors.shapes[name] for name in names))
        if not self.shapes:
            raise UserError(f"{path}: holds no lora_A and lora_B of a linear layer")
        self._note()

    def of(self, layer: str) -> Update:
        """ΔW of a layer; a matrix, where A is the identity."""
        A, B = (self._read(name) for name in self._names[layer])
        if A.shape[0] == A.shape[1] and torch.equal(A, torch.eye(len(A))):
            return Update(self._scales[layer] * B)
        return Update(self._scales[layer] * B, A)

    def factors(self, layer: str) -> tuple[Tensor, Tensor, float]:
        """A (r, n), B (m, r) and s of a layer, fp32, as they stand in the file."""
        A, B = (self._read(name) for name in self._names[layer])
        return A, B, self._scales[layer]

    def total(self, layer: str) -> Update:
        """The same: it stands beside the base alone."""
        return self.of(layer)

    def rank_of(self, layer: str) -> int:
        """Rows of A at a layer."""
        return self._tensors.shapes[self._names[layer][0]][0]

    def _read(self, name: str) -> Tensor:
        return self._tensors.read(name).float()

    def _factors(self) -> dict[str, tuple[str, str]]:
        """Layer → the names of its A and its B."""
        found: dict[str, dict[str, str]] = {}
        adapters, others = set(), []
        for name in self._tensors.shapes:
            match = _FACTOR.fullmatch(name)
            if match is None:
                others.append(name)
                continue
            adapters.add(match["adapter"])
            found.setdefault(match["layer"], {})[match["factor"]] = name
        if len(adapters) > 1:
            names = ", ".join(sorted(str(name) for name in adapters))
            raise UserError(f"{self.path}: its file holds several adapters ({names}); save each in a folder of its own")
        for layer, pair in found.items():
            if len(pair) < 2:
                there = next(iter(pair))
                raise UserError(f"{self.path}: broken: {layer} has lora_{there} alone")
        if others:
            several = len(others) > 1
            names = f"{len(others)} tensors ({others[0]}, …)" if several else others[0]
            self.notes.append(f"{names} {'are' if several else 'is'} left out, no part of a pair")
        return {layer: (pair["A"], pair["B"]) for layer, pair in found.items()}

    def _check(self, layer: str, A: tuple[int, ...], B: tuple[int, ...]) -> None:
        if len(A) != 2 or len(B) != 2:
            self.notes.append(f"{layer} is no linear layer and is left out")
            return
        if A[0] != B[1] or 0 in (*A, *B):
            raise UserError(f"{self.path}: broken: {layer} has lora_A {A} and lora_B {B}")
        rank = self._decided("r", "rank_pattern", layer)
        if A[0] != (sum(self.tasks) or rank):
            raise UserError(f"{self.path}: broken: {layer} has rank {A[0]}, and {rank:g} in {CONFIG}")
        for name in self._names[layer]:
            if not self._read(name).isfinite().all():
                raise UserError(f"{self.path}: {name} holds values that are not finite")
        alpha = self._decided("lora_alpha", "alpha_pattern", layer)
        self._scales[layer] = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        self.shapes[layer] = B[0], A[1]

    def _decided(self, setting: str, pattern: str, layer: str) -> float:
        """A layer's own value of a setting: that of the first pattern that fits its name."""
        values, usual = self._config.get(pattern) or {}, self._config.get(setting)
        try:
            key = patterns.first(values, layer)
            found = usual if key is None else values[key]
        except (re.error, Costly, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise UserError(f"{self.path / CONFIG}: {pattern}: {error}") from None
        if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) < LARGEST:
            raise UserError(f"{self.path / CONFIG}: {setting}: must be a number, not {str(found)[:40]}")
        return found

    def _note(self) -> None:
        init = str(self._config.get("init_lora_weights")).lower()
        if init.startswith(_BORROWS):
            self.notes.append(f"began with a part of the weight (init_lora_weights {init}), which s·B A has in it")
        if self._config.get("alora_invocation_tokens"):
            self.notes.append("is added only after its invocation tokens (aLoRA)")


def _config(path: Path) -> dict[str, Any]:
    if not os.path.isdir(path):  # noqa: PTH112 - Path's takes no long name
        raise UserError(f"{path}: {'is no folder' if os.path.lexists(path) else 'does not exist'}")
    if not (path / CONFIG).is_file():
        inside = sorted(each.parent.name for each in path.glob(f"*/{CONFIG}"))
        hint = f"; {path / inside[0]} does" if inside else ""
        raise UserError(f"{path}: is no PEFT adapter, it holds no {CONFIG}{hint}")
    refuse_foreign(path)
    config = read_json(path / CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise NeedsBase(f"{path}: is of the kind {kind}; LoRA's updates alone can be told without the base")
    for setting, why in _OTHERWISE.items():
        if config.get(setting):
            raise NeedsBase(f"{path}: {why}")
    return config


def tensors_of(path: Path, config: Mapping[str, Any] | None = None) -> Tensors:
    """What an adapter folder's file holds. Raises UserError where there is none, it is broken, or it is a pickle.

    config: the folder's. Of the code of O-LoRA and N-LoRA, which knows nothing else, a pickle is read for its tensors.
    """
    if (path / WEIGHTS).is_file():
        return tensor_file.safe(path / WEIGHTS)
    if (path / PICKLED).is_file():
        if config and FORKS in config:
            return tensor_file.weights_only(path / PICKLED)
        raise pickled(path / PICKLED, WEIGHTS)
    raise UserError(f"{path}: holds no {WEIGHTS}")
