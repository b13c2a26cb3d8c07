"""A PEFT folder of any kind that can be merged, whoever made it: what it changes of each layer, by PEFT itself.

``ΔW`` is the merged weight less the base's, both in fp64, a layer at a time. LoRA's own folders need no base and are
read by ``lora_folder.py``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cl_runner.adapters.beside import quiet
from cl_runner.adapters.foreign_config import refuse_foreign_config
from cl_runner.adapters.lora_folder import CONFIG, LoraFolder, NeedsBase, tensors_of
from cl_runner.adapters.targets import is_linear, is_transposed, shape_of
from cl_runner.atomic import read_json
from cl_runner.errors import UserError, first_line
from cl_runner.metrics.updates.update import Update
from cl_runner.plain_files import refuse_foreign

_PREFIX = "base_model.model."
_ADAPTER = "default"


def open_folder(path: Path, name: str, network: Callable[[], nn.Module]) -> LoraFolder | MergedFolder:
    """An adapter folder; the base's ``network`` is asked for only where the folder needs it. Raises UserError."""
    try:
        return LoraFolder(path, name)
    except NeedsBase:
        return MergedFolder(path, name, network())


class MergedFolder:
    """As ``LoraFolder``: ``shapes``, ``base``, ``notes``.

    Args:
        network: the base, fp32 on the CPU. It is neither changed nor copied.

    Raises:
        UserError: PEFT cannot read it, or not merge it; it is soft prompts; it is not of this base.
    """

    from_base = True

    def __init__(self, path: Path, name: str, network: nn.Module) -> None:
        self.path, self.name = path, name or path.name
        refuse_foreign(path)
        config = read_json(path / CONFIG)
        self._kind = str(config.get("peft_type"))
        shapes = tensors_of(path).shapes  # where there are none PEFT would ask the hub
        refuse_foreign_config(
            config, path / CONFIG, max((max(shape, default=1) for shape in shapes.values()), default=1)
        )
        self.base = str(config.get("base_model_name_or_path") or "")
        self.notes: list[str] = []
        self._layers = self._wrapped(network)
        self.shapes = {layer: shape_of(module.get_base_layer()) for layer, module in self._layers.items()}
        if not self.shapes:
            raise UserError(f"{path}: of the kind {self._kind}, changes no linear layer of this base")
        if kept := config.get("modules_to_save"):
            self.notes.append(f"modules that it trained whole ({', '.join(kept)}) are left out")

    def of(self, layer: str) -> Update:
        """ΔW of a layer, a matrix."""
        module = copy.deepcopy(self._layers[layer]).double()
        base = module.get_base_layer()
        before = base.weight.detach().clone()
        try:
            module.merge(adapter_names=[_ADAPTER])
        except Exception as error:  # PEFT's and torch's own, of any type
            raise self._unreadable(error) from None
        delta = base.weight.detach() - before
        return Update((delta.mT if is_transposed(base) else delta).float().contiguous())

    def total(self, layer: str) -> Update:
        """The same: it stands beside the base alone."""
        return self.of(layer)

    def _wrapped(self, network: nn.Module) -> dict[str, Any]:
        """Layer → PEFT's, around a copy of the base that shares its weights."""
        from peft import PeftConfig, PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
        try:
            with quiet(), warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                config: Any = PeftConfig.from_pretrained(str(self.path))
                if config.is_prompt_learning:
                    raise UserError(f"{self.path}: of the kind {self._kind}: soft prompts change no weight")
                # PEFT draws what training began with before it reads what it came to.
                with torch.random.fork_rng(devices=[]):
                    model: Any = PeftModel.from_pretrained(
                        copy.deepcopy(network, shared), str(self.path), config=config, torch_device="cpu"
                    )
        except UserError:
            raise
        except Exception as error:  # PEFT's and torch's own, of any type
            raise self._unreadable(error) from None
        for warning in said:
            if "missing adapter keys" in str(warning.message):
                raise UserError(f"{self.path}: broken: tensors of its layers are not in its file")
        found, others = {}, 0
        for name, module in model.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            if is_linear(module.get_base_layer()):
                found[name.removeprefix(_PREFIX)] = module
            else:
                others += 1
        for layer, module in found.items():
            own = (p for name, p in module.named_parameters() if not name.startswith("base_layer."))
            if not all(parameter.isfinite().all() for parameter in own):
                raise UserError(f"{self.path}: {layer} holds values that are not finite")
        if others:
            self.notes.append(f"{others} layers that are not linear are left out")
        return found

    def _unreadable(self, error: Exception) -> UserError:
        why = f"{type(error).__name__}: {first_line(error)[:200]}"
        return UserError(f"{self.path}: of the kind {self._kind}, which PEFT cannot merge into this base ({why})")
