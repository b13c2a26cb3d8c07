"""Tiny models with linear layers in 4 bits, and ordinary ones of the same weights; skipped without bitsandbytes."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cl_runner.adapters.quantized import is_quantized
from cl_runner.imports import light_imports
from tests.stages import Kind, tiny_model

CPU = torch.device("cpu")
WHY = 'a base in 4 bits needs bitsandbytes: pip install "cl-runner[qlora]"'


def need() -> None:
    """Skip, with the reason, where bitsandbytes is not installed."""
    with light_imports():
        pytest.importorskip("bitsandbytes", reason=WHY)


def in_4_bits(model: Any, compute: torch.dtype = torch.float32) -> Any:
    """The same model, loaded from its state as from a file, frozen: weights in NF4, all else as it was."""
    from cl_runner.models.quantized import compute_in, options, settle

    need()
    state = model.state_dict()
    found = type(model).from_pretrained(None, config=model.config, state_dict=state, dtype=model.dtype, **options(CPU))
    settle(found, "tiny")
    compute_in(found, compute)
    found.generation_config = model.generation_config
    return found.requires_grad_(False).eval()


def dequantised(model: Any, quantized: Any) -> Any:
    """A copy of an ordinary model, with the weights that the one in 4 bits stands for."""
    plain = copy.deepcopy(model)
    for name, layer in quantized.named_modules():
        if is_quantized(layer):
            own: Any = plain.get_submodule(name)
            weight = weight_of(layer)
            own.weight.data.copy_(weight.T if isinstance(own, Conv1D) else weight)
    return plain


def weight_of(layer: nn.Module) -> Tensor:
    """W0 (m, n) by definition: each code of 4 bits stands for a number, times its block's scale, itself a code."""
    weight: Any = layer.weight
    state, packed = weight.quant_state, weight.data.flatten()
    outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)
    scales = state.state2.code[state.absmax.long()] * outer[: len(state.absmax)] + state.offset
    numbers = state.code[torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()]
    found: Tensor = (numbers * scales.repeat_interleave(state.blocksize)[: len(numbers)]).view(state.shape)
    return found


@lru_cache(maxsize=4)
def _made(kind: Kind, dropout: float) -> tuple[Any, Any]:
    model = tiny_model(kind, dropout, wide=True)
    quantized = in_4_bits(model)
    return quantized, dequantised(model, quantized)


def twins(kind: Kind = "t5", dropout: float = 0.0) -> tuple[Any, Any]:
    """A tiny model in 4 bits, and an ordinary one of the same weights; copies, to be changed."""
    quantized, plain = _made(kind, dropout)
    return copy.deepcopy(quantized), copy.deepcopy(plain)
