"""A whole model on disk: a plain transformers folder, and its weights back into a model of the same kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cl_runner.errors import UserError
from cl_runner.models import folder_check
from cl_runner.models.tokenizer import quiet

WEIGHTS = "model.safetensors"


def save_model(folder: Path, model: Any, tokenizer: Any = None) -> None:
    """Write weights (one file), configs and tokenizer: ``AutoModelFor….from_pretrained(folder)`` needs nothing of ours.

    Its greedy answers are the run's: the neutral generation config goes along.
    """
    with quiet():
        model.save_pretrained(str(folder), max_shard_size="100TB")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))


def read_model(folder: Path, like: nn.Module) -> dict[str, Tensor]:
    """Name → weight of every parameter of a model, on the CPU, as ``save_model`` wrote them.

    Through transformers, because names in a file need not be those in the model (fused experts).

    Raises:
        UserError: a parameter is not there.
    """
    files = folder_check.Folder(folder, str(folder))
    folder_check.config(files)  # an adapter's beside it would be added, whose base transformers would fetch
    folder_check.weights(files)
    loader: Any = type(like)
    with quiet():
        found = dict(loader.from_pretrained(str(folder), dtype="auto", use_safetensors=True).named_parameters())
    for name, parameter in like.named_parameters():
        if name not in found or found[name].shape != parameter.shape:
            raise UserError(f"{folder} is damaged: it holds no {name} of the shape {tuple(parameter.shape)}")
    return {name: found[name].detach() for name, _ in like.named_parameters()}


class ModelFolder:
    """A model and its tokenizer as a folder on disk."""

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def save(self, folder: Path) -> None:
        """As ``save_model``."""
        save_model(folder, self.model, self.tokenizer)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """As ``read_model``."""
        return read_model(folder, self.model)
