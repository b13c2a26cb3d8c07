"""The matrices of linear layers in a model folder, read one by one: no model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cl_runner.adapters.targets import is_linear, is_transposed, shape_of
from cl_runner.atomic import read_json
from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError, first_line
from cl_runner.models import folder_check, hub_files
from cl_runner.models.base import outline
from cl_runner.models.locate import locate

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class LinearWeights:
    """``shapes``: layer → (m, n), out by in, of the linear layers that have a weight of their own in the files.

    Args:
        like: of another folder with the same model, whose config then need not be read.

    Raises:
        UserError: the files are not safetensors, or broken; the model brings its own code.
    """

    def __init__(self, folder: Path, like: LinearWeights | None = None) -> None:
        self.folder = folder
        self._file = _files(folder)
        self._known: Mapping[str, tuple[tuple[int, int], bool]] = like._known if like else _linear(folder)
        self.shapes = {name: shape for name, (shape, _) in self._known.items() if f"{name}.weight" in self._file}

    def weight(self, layer: str) -> Tensor:
        """W (m, n) fp32 of a layer. Raises UserError where it has another shape."""
        name = f"{layer}.weight"
        with safe_open(self._file[name], "pt") as opened:
            weight: Tensor = opened.get_tensor(name).float()
        shape, transposed = self._known[layer]
        weight = weight.T.contiguous() if transposed else weight
        if weight.shape != shape:
            raise UserError(f"{self.folder}: {layer} is {tuple(weight.shape)}, and {shape} by the model's config")
        return weight


def base_folder(model: ModelConfig) -> Path:
    """Where a base model's files are on this machine; the hub is not asked. Raises UserError."""
    located = locate(model)
    found = located.path if located.path is not None else hub_files.cached(located)
    if found is None:
        raise UserError(f"the base {model.name} is not on this machine")
    return found


def _linear(folder: Path) -> dict[str, tuple[tuple[int, int], bool]]:
    """Linear layer → (m, n), and whether its weight lies in by out."""
    network = outline(ModelConfig(name=str(folder)))
    if network is None:
        raise UserError(f"{folder}: the model brings its own code, so that its layers are not known")
    layers: dict[str, Any] = {name: module for name, module in network.named_modules() if is_linear(module)}
    return {name: (shape_of(layer), is_transposed(layer)) for name, layer in layers.items()}


def _files(folder: Path) -> dict[str, Path]:
    """Tensor → the file that it is in."""
    if (folder / INDEX).is_file():
        folder_check.weights(folder_check.Folder(folder, str(folder)))  # the index names files of this folder alone
        return {name: folder / file for name, file in read_json(folder / INDEX)["weight_map"].items()}
    file = folder / WEIGHTS
    try:
        with safe_open(file, "pt") as opened:
            return dict.fromkeys(opened.keys(), file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)[:100]})") from None
