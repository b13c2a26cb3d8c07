"""A stage's adapter on disk: a plain PEFT folder that answers as the whole model did after that stage.

Pairs stand one under the other (rank R = sum of ranks) while that is smaller than the matrix they add up to; else, and
after any update without factors, A = I and B = ΔW. Either way every scaling is one number in ``adapter_config.json``,
so that ``PeftModel.from_pretrained(base, folder)`` needs nothing of ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_runner.adapters.lora import Adapters, Pair

WEIGHTS = "adapter_model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def save_adapter(folder: Path, adapters: Adapters, live: Pair | None = None) -> dict[str, Any]:
    """Write all past updates and the live pair, if one is kept, as one PEFT folder; or all past updates and live terms.

    Returns what ``state.json`` says of it: ``pairs`` (stage, rank and scale of each in the sum), ``dense`` (targets
    stored as A = I, B = ΔW), ``dense_stages`` (stages that folded without factors), and ``own``: whether every pair
    can be read back to the bit from this ``adapter``, or the stage's own has to stand in its ``state``; of ``terms``,
    which the method carries, there is no pair.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    pairs = [*adapters.folded, *([live] if live else [])]
    rank = sum(pair.rank for pair in pairs)
    scale = pairs[0].scale if pairs else 1.0
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, tuple[int, float]] = {}  # target → rank, alpha
    dense: list[str] = []
    exact = True
    for target, accumulator in adapters.past.items():
        n = accumulator.base.shape[1]
        if factors := _factors_of_term(adapters, target):
            A, B = factors
            alphas[target] = A.shape[0], float(A.shape[0])
        elif not adapters.terms and not adapters.stored_whole(target, rank, len(pairs)):
            A = torch.cat([pair.A[target] for pair in pairs], dim=0)
            B = torch.cat([pair.B[target] * (pair.scale / scale) for pair in pairs], dim=1)
            alphas[target] = rank, scale * rank
            exact = exact and all(_reads_back(pair.B[target], pair.scale / scale) for pair in pairs)
        else:
            A, B = torch.eye(n), _total(adapters, target, live)
            alphas[target] = n, float(n)
            dense.append(target)
        tensors[_PREFIX + target + _A], tensors[_PREFIX + target + _B] = A.contiguous(), B.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _write_config(folder, adapters, alphas)
    return {
        "pairs": [{"stage": pair.stage, "rank": pair.rank, "scale": pair.scale} for pair in pairs],
        "dense": dense,
        "dense_stages": list(adapters.dense),
        "own": "terms" if adapters.terms else "adapter" if exact and not dense else "state",
    }


def _factors_of_term(adapters: Adapters, target: str) -> tuple[Tensor, Tensor] | None:
    """A (R, n) and B (m, R) of a live term, on the CPU; None where it has none, is not all, or ΔW is smaller."""
    if adapters.terms is None or adapters.past[target].sum is not None:
        return None
    m, n = adapters.past[target].base.shape
    found = adapters.terms.of[target].factors()
    if found is None or found[0].shape[0] * (m + n) >= m * n:
        return None
    A, B = (factor.detach().to("cpu", torch.float32, copy=True) for factor in found)
    return A, B


def _total(adapters: Adapters, target: str, live: Pair | None) -> Tensor:
    """The sum of past updates as it is computed with, and what is live, (m, n) on the CPU."""
    accumulator = adapters.past[target]
    total, update = accumulator.sum, None
    if live is not None:
        update = live.update(target, accumulator.weight.device)
    elif adapters.terms:
        update = adapters.terms.of[target].update().detach()
    if update is not None:
        total = update if total is None else total + update
    assert total is not None, "nothing was learned"
    return total.cpu()


def _reads_back(B: Tensor, ratio: float) -> bool:
    return ratio == 1.0 or torch.equal(B * ratio / ratio, B)


def _write_config(folder: Path, adapters: Adapters, alphas: Mapping[str, tuple[int, float]]) -> None:
    from peft import LoraConfig

    common, _ = Counter(alphas.values()).most_common(1)[0]
    other = {"^" + re.escape(target) + "$": found for target, found in alphas.items() if found != common}
    config = LoraConfig(
        r=common[0],
        lora_alpha=_number(common[1]),
        rank_pattern={pattern: rank for pattern, (rank, _) in other.items()},
        alpha_pattern={pattern: _number(alpha) for pattern, (_, alpha) in other.items()},
        target_modules=adapters.target_modules,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(accumulator.transposed for accumulator in adapters.past.values()),
        task_type=adapters.task_type,
        base_model_name_or_path=adapters.name_or_path,
        revision=adapters.revision,
        inference_mode=True,
    )
    config.target_modules = sorted(adapters.target_modules)  # PEFT's set has another order in every process
    config.save_pretrained(str(folder))


def _number(alpha: float) -> Any:
    return int(alpha) if alpha.is_integer() else alpha  # PEFT declares a whole number, and takes any


def load_pairs(folder: Path, state: Mapping[str, Any]) -> list[Pair]:
    """Every pair of an adapter folder that holds them side by side to the bit (``own`` is ``adapter``)."""
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS)
    pairs: list[Pair] = []
    start = 0
    for about in state["pairs"]:
        rows = slice(start, start + about["rank"])
        ratio = about["scale"] / state["pairs"][0]["scale"]
        A = {target: _aligned(tensors[_PREFIX + target + _A][rows]) for target in _targets(tensors)}
        B = {target: _aligned(tensors[_PREFIX + target + _B][:, rows]) / ratio for target in A}
        pairs.append(Pair(about["stage"], about["rank"], about["scale"], A, B))
        start += about["rank"]
    return pairs


def load_sums(folder: Path, dense: Sequence[str]) -> dict[str, Tensor]:
    """ΔW (m, n) of the targets that an adapter folder stores as A = I, B = ΔW."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "pt") as tensors:
        return {target: _aligned(tensors.get_tensor(_PREFIX + target + _B)) for target in dense}


def own_pair_tensors(pair: Pair) -> dict[str, Tensor]:
    """A pair as flat tensors, for the state of a stage from whose adapter it cannot be read back."""
    named = {f"own.{target}.A": tensor for target, tensor in pair.A.items()}
    named.update({f"own.{target}.B": tensor for target, tensor in pair.B.items()})
    return named


def load_own_pair(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Pair:
    """Inverse of ``own_pair_tensors``; ``about`` has stage, rank and scale."""
    targets = [name[4:-2] for name in tensors if name.startswith("own.") and name.endswith(".A")]
    A = {target: _aligned(tensors[f"own.{target}.A"]) for target in targets}
    B = {target: _aligned(tensors[f"own.{target}.B"]) for target in targets}
    return Pair(about["stage"], about["rank"], about["scale"], A, B)


def _targets(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name[len(_PREFIX) : -len(_A)] for name in tensors if name.endswith(_A)]


def _aligned(tensor: Tensor) -> Tensor:
    """In memory of its own: a product of views into a file may differ in the last bit from one of whole tensors."""
    return tensor.clone(memory_format=torch.contiguous_format)
