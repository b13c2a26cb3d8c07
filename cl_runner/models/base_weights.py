"""The weights W0 of a base model on this machine: linear layers one by one, the whole model where it must be."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.adapters.targets import is_linear, is_transposed
from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError
from cl_runner.models.base import load_base
from cl_runner.models.linear_weights import LinearWeights, base_folder


class BaseWeights:
    """``name``: the model's. Raises UserError where it is not on this machine; the hub is not asked."""

    def __init__(self, model: ModelConfig) -> None:
        self.name = model.name
        self.folder = base_folder(model)
        self._model = model

    @cached_property
    def _linear(self) -> LinearWeights | None:
        """Its linear layers in the files; None where they are not safetensors, or no network is known by its config."""
        try:
            return LinearWeights(self.folder)
        except UserError:
            return None

    def weight(self, layer: str) -> Tensor:
        """W0 (m, n) fp32 of a layer; from the files, or from the model where layers have other names in them.

        Raises UserError where there is none."""
        if self._linear is not None and layer in self._linear.shapes:
            return self._linear.weight(layer)
        found: Any = dict(self.network.named_modules()).get(layer)
        if found is None or not is_linear(found):
            raise UserError(f"the base {self.name} has no linear layer {layer}")
        weight: Tensor = found.weight.detach()
        return weight.T.contiguous() if is_transposed(found) else weight

    @cached_property
    def network(self) -> nn.Module:
        """The model, loaded: fp32, on the CPU. Raises UserError."""
        plain = self._model.model_copy(update={"dtype": "fp32", "quantize": None})
        network: nn.Module = load_base(plain, torch.device("cpu")).model
        return network
