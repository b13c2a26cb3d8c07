"""Attention in fp32 where a CPU computes in bf16.

torch's flash attention for CPUs takes up to three times as long backward in bf16 as in fp32 (``benchmarks/README.md``),
and rounds more. So transformers' ``sdpa`` is wrapped, once for the process: under bf16 autocast on a CPU it is given
fp32, anywhere else what it was given before.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

NAME = "sdpa"


def keep_fp32_on_cpu() -> None:
    """See above. Safe to call again."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    theirs = functions[NAME]
    if hasattr(theirs, "__wrapped__"):
        return

    @wraps(theirs)
    def attention(module: nn.Module, query: Tensor, *given: Any, **named: Any) -> Any:
        if query.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return theirs(module, query, *given, **named)
        with torch.autocast("cpu", enabled=False):
            values = {name: _in_fp32(value) for name, value in named.items()}
            return theirs(module, query.float(), *map(_in_fp32, given), **values)

    functions.register(NAME, attention)


def _in_fp32(value: Any) -> Any:
    """A mask of truths stays one."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
