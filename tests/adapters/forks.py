"""Adapters as the code of O-LoRA and of N-LoRA writes them, made here from what its files are known to hold.

One dictionary of tensors, written by ``torch.save``; of each layer ``lora_A`` with the rows of all tasks, oldest first,
``lora_B`` with their columns, and, where ``save_loranew`` is set, the newest task's pair apart as ``loranew_A`` and
``loranew_B``. The config is that of PEFT 0.3 with two keys of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Pairs = list[dict[str, tuple[Tensor, Tensor]]]  # of each task: layer → A (r, n), B (m, r)


def random_pairs(shapes: Mapping[str, tuple[int, int]], tasks: int, r: int, seed: int = 0) -> Pairs:
    """Layers by name with (m, n), out by in."""
    dice = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice) * 0.05

    return [{layer: (drawn(r, n), drawn(m, r)) for layer, (m, n) in shapes.items()} for _ in range(tasks)]


def write(folder: Path, pairs: Pairs, *, alpha: float, apart: bool = False, **config: Any) -> Path:
    """apart: the newest pair is ``loranew``. config: other values of ``adapter_config.json``."""
    folder.mkdir(parents=True)
    r = next(iter(pairs[0].values()))[0].shape[0]
    held = pairs[:-1] if apart else pairs
    tensors: dict[str, Tensor] = {}
    for layer in pairs[0]:
        m, n = pairs[0][layer][1].shape[0], pairs[0][layer][0].shape[1]
        A, B = torch.zeros(len(held) * r, n), torch.zeros(m, len(held) * r)
        for number, of_task in enumerate(held):
            A[number * r : (number + 1) * r], B[:, number * r : (number + 1) * r] = of_task[layer]
        tensors[f"base_model.model.{layer}.lora_A.weight"] = A
        tensors[f"base_model.model.{layer}.lora_B.weight"] = B
        if apart:
            newest_A, newest_B = pairs[-1][layer]
            tensors[f"base_model.model.{layer}.loranew_A.weight"] = newest_A
            tensors[f"base_model.model.{layer}.loranew_B.weight"] = newest_B
    torch.save(tensors, folder / "adapter_model.bin")
    values = {
        "base_model_name_or_path": "initial_model/t5-large", "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "lora_alpha": alpha, "lora_dropout": 0.1,
        "modules_to_save": None, "peft_type": "LORA", "r": r, "r_sum": len(held) * r, "save_loranew": apart,
        "target_modules": sorted({layer.rsplit(".", 1)[-1] for layer in pairs[0]}), "task_type": "SEQ_2_SEQ_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({**values, **config}))
    return folder


def update(pairs: Sequence[Mapping[str, tuple[Tensor, Tensor]]], layer: str, alpha: float) -> Tensor:
    """ΔW (m, n) fp64 of these tasks at a layer, entry by entry sum over their ranks; the scale is one task's."""
    A, B = pairs[0][layer]
    total = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
    for of_task in pairs:
        A, B = of_task[layer]
        for row in range(A.shape[0]):
            total += alpha / A.shape[0] * torch.outer(B[:, row].double(), A[row].double())
    return total
