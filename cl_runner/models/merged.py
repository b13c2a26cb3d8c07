"""An adapter folded into its base for good: a plain transformers folder, as servers and converters want it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cl_runner.adapters.merged_folder import open_folder
from cl_runner.adapters.targets import is_transposed
from cl_runner.errors import UserError
from cl_runner.models.identity import TOKENIZER
from cl_runner.models.tokenizer import quiet

SHARD = "5GB"  # of a file at most
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def fold(network: nn.Module, adapter: Path, dtype: torch.dtype) -> float:
    """Add what an adapter folder changes to the weights of its base, which is fp32 on the CPU.

    The update is added in fp32. Returns which share of its norm is lost where the sum is rounded to ``dtype``.

    Raises:
        UserError: the folder cannot be read, or is none of this base.
    """
    found = open_folder(adapter, adapter.name, lambda: network)
    layers: dict[str, Any] = dict(network.named_modules())
    lost = whole = 0.0
    for name in found.shapes:
        layer = layers.get(name)
        if layer is None:
            raise UserError(f"{adapter}: adapts {name}, which the base does not have")
        update, weight = found.of(name).whole(), layer.weight.data
        update = update.T if is_transposed(layer) else update
        if update.shape != weight.shape:
            raise UserError(f"{adapter}: {name} is {tuple(update.shape)}, and {tuple(weight.shape)} in the base")
        moved = (weight + update).to(dtype).float() - weight.to(dtype).float()
        lost += float((moved - update).double().square().sum())
        whole += float(update.double().square().sum())
        weight.add_(update)
    return math.sqrt(lost / whole) if whole and dtype != torch.float32 else 0.0


def write(folder: Path, network: Any, tokenizer_of: Path, dtype: torch.dtype, shard: str = SHARD) -> None:
    """Weights as safetensors, in several files where one would be larger than ``shard``, configs, and the tokenizer.

    Its files are those of ``tokenizer_of``, byte for byte: transformers would not write the ones that others read.
    """
    with quiet():
        network.to(dtype)
        network.config._name_or_path = ""
        network.save_pretrained(str(folder), max_shard_size=shard)
    for file in sorted(tokenizer_of.iterdir()):
        if file.name in TOKENIZER and file.is_file():
            shutil.copyfile(file, folder / file.name)
