"""A stage's adapter on disk: a plain PEFT folder that answers as the whole model did after that stage.

Pairs stand one under the other (rank R = sum of ranks) while that is smaller than the matrix they add up to; else
A = I and B = ΔW. Either way every scaling is one number in ``adapter_config.json``, so that
``PeftModel.from_pretrained(base, folder)`` needs nothing of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_runner.adapters.lora import Adapters, Pair

WEIGHTS = "adapter_model.safetensors"


def save_adapter(folder: Path, adapters: Adapters, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Write the sum of ``pairs`` as a PEFT folder; returns what ``load_pairs`` needs to read each pair back.

    Factors are stored as they trained wherever all pairs have one scale s (``lora_alpha = s·R``), so that reading
    them back is exact.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    scale = pairs[0].scale
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    dense: list[str] = []
    for target, accumulator in adapters.past.items():
        m, n = accumulator.base.shape
        rank = sum(pair.rank for pair in pairs)
        if rank * (m + n) < m * n or len(pairs) == 1:
            A = torch.cat([pair.A[target] for pair in pairs], dim=0)
            B = torch.cat([pair.B[target] * (pair.scale / scale) for pair in pairs], dim=1)
            ranks[target], scales[target] = rank, scale
        else:
            total = torch.zeros(m, n)
            for pair in pairs:
                total = total + pair.update(target).cpu()
            A, B = torch.eye(n), total
            ranks[target], scales[target] = n, 1.0
            dense.append(target)
        tensors[f"base_model.model.{target}.lora_A.weight"] = A.cpu().contiguous()
        tensors[f"base_model.model.{target}.lora_B.weight"] = B.cpu().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    alpha = scales[next(t for t, r in ranks.items() if r == common)] * common
    other = [t for t in ranks if ranks[t] != common or scales[t] * ranks[t] != alpha]
    pattern = {t: "^" + t.replace(".", r"\.") + "$" for t in other}
    config = LoraConfig(
        r=common,
        lora_alpha=alpha,
        rank_pattern={pattern[t]: ranks[t] for t in other},
        alpha_pattern={pattern[t]: scales[t] * ranks[t] for t in other},
        target_modules=adapters.target_modules,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(accumulator.transposed for accumulator in adapters.past.values()),
        task_type=adapters.task_type,
        base_model_name_or_path=adapters.name_or_path,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    return {
        "pairs": [{"stage": pair.stage, "rank": pair.rank, "scale": pair.scale} for pair in pairs],
        "dense": dense,
    }


def own_pair_tensors(pair: Pair) -> dict[str, Tensor]:
    """A pair as flat tensors, for the state of a stage whose adapter is dense."""
    named = {f"own.{target}.A": tensor.cpu() for target, tensor in pair.A.items()}
    named.update({f"own.{target}.B": tensor.cpu() for target, tensor in pair.B.items()})
    return named


def load_own_pair(tensors: dict[str, Tensor], about: dict[str, Any]) -> Pair:
    """Inverse of ``own_pair_tensors``; ``about`` has stage, rank and scale."""
    targets = [name[4:-2] for name in tensors if name.startswith("own.") and name.endswith(".A")]
    return Pair(
        about["stage"],
        about["rank"],
        about["scale"],
        {target: tensors[f"own.{target}.A"] for target in targets},
        {target: tensors[f"own.{target}.B"] for target in targets},
    )


def load_pairs(folder: Path, about: dict[str, Any]) -> list[Pair]:
    """Each stage's own pair from an adapter folder that holds them side by side (``about["dense"]`` empty)."""
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS)
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    targets = [name[len(prefix) : -len(suffix)] for name in tensors if name.endswith(suffix)]
    first = about["pairs"][0]["scale"]
    pairs: list[Pair] = []
    start = 0
    for entry in about["pairs"]:
        rows = slice(start, start + entry["rank"])
        ratio = entry["scale"] / first
        A = {t: tensors[f"{prefix}{t}{suffix}"][rows].clone() for t in targets}
        B = {t: tensors[f"{prefix}{t}.lora_B.weight"][:, rows].clone() / ratio for t in targets}
        pairs.append(Pair(entry["stage"], entry["rank"], entry["scale"], A, B))
        start += entry["rank"]
    return pairs
