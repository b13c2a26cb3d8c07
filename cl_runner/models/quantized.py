"""A base in 4 bits (QLoRA, arXiv 2305.14314): linear layers in NF4, their scales quantised too, by bitsandbytes.

What transformers leaves as it is stays in the base's precision: embeddings, norms, the head, T5's ``wo``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from cl_runner.adapters.quantized import is_quantized
from cl_runner.errors import UserError
from cl_runner.imports import light_imports
from cl_runner.models.tokenizer import first_line

BLOCK = 64  # weights that share a scale


class Sizes(NamedTuple):
    """Bytes of a base: of the layers in 4 bits with their scales, and of all the rest."""

    quantized: int
    rest: int


def check_device(device: torch.device) -> None:
    """Refuse a device that bitsandbytes cannot work on: tried, on a few numbers. Raises UserError."""
    try:
        reads_right(BLOCK, device)
    except Exception as error:  # no library of its own was found, or none of its kernels is for this GPU
        raise UserError(
            f"model.quantize: bitsandbytes cannot work on {_name(device)} ({first_line(error)}); leave it out"
        ) from error


def reads_right(width: int, device: torch.device) -> bool:
    """Whether bitsandbytes gives back a matrix of so many columns as it was, but for 4 bits' rounding.

    Its kernel for CPUs with AVX-512 (0.50) takes wrong scales where a row is no whole number of blocks.
    """
    with light_imports():
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    # Each block of one value, which is its scale.
    weight = (torch.arange(width, device=device) % 7 + 1.0).repeat_interleave(BLOCK).view(BLOCK, width)
    codes, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    return torch.allclose(dequantize_4bit(codes, state), weight, rtol=0.1)


def options(device: torch.device) -> dict[str, Any]:
    """Of transformers' ``from_pretrained``."""
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return {"quantization_config": how, "device_map": {"": device}}


def settle(network: nn.Module, where: str) -> None:
    """Make a loaded model compute with the weights that were quantised, everywhere. Raises UserError where it cannot.

    On a CPU with AVX512-BF16 bitsandbytes packs weights anew at the first forward without gradient: later ones are in
    bf16, whatever is asked for, and have no gradient.
    """
    layers = _layers(network)
    if not layers:
        raise UserError(f"model {where}: has no linear layer that could be in 4 bits; leave model.quantize out")
    device = layers[0].weight.device
    wrong = [width for width in sorted({layer.in_features for layer in layers}) if not reads_right(width, device)]
    if wrong:
        raise UserError(
            f"model {where}: bitsandbytes reads layers of {', '.join(map(str, wrong))} columns wrongly on "
            f"{_name(device)}, which wants multiples of {BLOCK}; leave model.quantize out"
        )
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


def compute_in(network: nn.Module, dtype: torch.dtype) -> None:
    """What layers in 4 bits are dequantised to, and multiplied in."""
    for layer in _layers(network):
        layer.compute_dtype, layer.compute_type_is_set = dtype, True


def sizes(network: nn.Module) -> Sizes:
    """What a loaded model takes, without adapters."""
    weights = [layer.weight for layer in _layers(network)]
    codes = sum(map(_bytes, weights))
    scales = sum(_bytes(weight.quant_state.absmax) + _bytes(weight.quant_state.state2.absmax) for weight in weights)
    whole = sum(map(_bytes, (*network.parameters(), *network.buffers())))
    return Sizes(codes + scales, whole - codes)


def _layers(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if is_quantized(module)]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
