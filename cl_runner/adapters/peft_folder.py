"""A stage's adapter on disk: a plain PEFT folder that answers as the whole model did after that stage.

Pairs stand one under the other (rank R = sum of ranks) while that is smaller than the matrix they add up to; else, and
after any update without factors, A = I and B = ΔW. Either way every scaling is one number in ``adapter_config.json``,
so that ``PeftModel.from_pretrained(base, folder)`` needs nothing of ours. A pair that borrows from the weight stands
there with what it began with, as a pair of twice the rank beside the weight as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl_runner.adapters import patterns
from cl_runner.adapters.base import Held
from cl_runner.adapters.pairs import Pair
from cl_runner.adapters.saved import PairOnDisk, Saved
from cl_runner.adapters.terms import Terms

if TYPE_CHECKING:
    from cl_runner.adapters.beside import Beside

WEIGHTS = "adapter_model.safetensors"
PAST_PREFIX = "past."  # sums of past updates that the adapter holds only together with what is live
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def save_adapter(folder: Path, layers: Beside, held: Held) -> Saved:
    """Write all past updates and what is live, a pair that is kept or terms, as one PEFT folder.

    Every pair can be read back to the bit from there (``own`` is ``adapter``), or the stage's own has to stand beside
    it (``state``); of ``terms``, which the method carries, there is no pair.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    terms = held.shown if isinstance(held.shown, Terms) else None
    live = held.kept.get(held.live or "") if terms is None else None
    pairs = [*held.folded, *([live.repaid()] if live else [])]
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, tuple[int, float]] = {}  # target → rank, alpha
    dense: list[str] = []
    exact = True
    for target, accumulator in layers.past.items():
        n, rank = accumulator.shape[1], sum(pair.rank_of(target) for pair in pairs)
        if factors := _factors_of_term(layers, held, target):
            A, B = factors
            alphas[target] = A.shape[0], float(A.shape[0])
        elif not terms and not layers.stored_whole(target, rank, len(pairs)):
            scale = pairs[0].scale_of(target)
            ratios = [pair.scale_of(target) / scale for pair in pairs]
            A = torch.cat([pair.A[target] for pair in pairs], dim=0)
            B = torch.cat([pair.B[target] * ratio for pair, ratio in zip(pairs, ratios, strict=True)], dim=1)
            alphas[target] = rank, scale * rank
            exact = exact and all(_reads_back(pair.B[target], of) for pair, of in zip(pairs, ratios, strict=True))
        else:
            A, B = torch.eye(n), _total(layers, held, live, target)
            alphas[target] = n, float(n)
            dense.append(target)
        tensors[_PREFIX + target + _A], tensors[_PREFIX + target + _B] = A.contiguous(), B.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _write_config(folder, layers, alphas)
    borrows = bool(live and live.A0)
    return Saved(
        "terms" if terms else "adapter" if exact and not dense else "state",
        tuple(
            PairOnDisk(pair.stage, pair.rank, pair.scale, pair.ranks, pair.scales, borrows and pair is pairs[-1])
            for pair in pairs
        ),
        tuple(dense),
        held.dense,
    )


def beside(saved: Saved, stage: str, held: Held) -> dict[str, Tensor]:
    """What a stage's folder does not hold to the bit: its own pair, and sums that are there only with what is live."""
    live = held.kept.get(held.live or "") if saved.own != "terms" else None
    found: dict[str, Tensor] = {}
    if live is not None or saved.own == "terms":
        sums = {target: held.sums[target] for target in saved.dense}
        found.update({PAST_PREFIX + target: total for target, total in sums.items() if total is not None})
    if saved.own == "state":
        own = live or next((pair for pair in held.folded if pair.stage == stage), None)
        found.update(own_pair_tensors(own) if own else {})
    return found


def load_adapter(
    folder: Path,
    stage: str,
    saved: Saved,
    tensors: Mapping[str, Tensor],
    live: str | None,
    earlier: Callable[[str], Pair],
    kept: Mapping[str, Any],
) -> Held:
    """What ``save_adapter`` was given. ``tensors`` are those of ``beside``, ``earlier`` reads another stage's pair."""
    if saved.own == "adapter":
        pairs = load_pairs(folder, saved)
    else:
        pairs = [load_own_pair(tensors, pair) if pair.stage == stage else earlier(pair.stage) for pair in saved.pairs]
    kept = dict(kept)
    sums: Mapping[str, Tensor]
    if live or saved.own == "terms":
        if live:
            kept[live] = pairs.pop()
        sums = {key.removeprefix(PAST_PREFIX): t for key, t in tensors.items() if key.startswith(PAST_PREFIX)}
    else:
        sums = load_sums(folder, saved.dense) if saved.dense else {}
    return Held(tuple(pairs), saved.dense_stages, kept, live, kept.get(live or ""), sums)


def own_pair(folder: Path, stage: str, saved: Saved, tensors: Mapping[str, Tensor]) -> Pair:
    """A stage's own pair, from its folder or from what stands beside that."""
    if saved.own == "adapter":
        return next(pair for pair in load_pairs(folder, saved) if pair.stage == stage)
    return load_own_pair(tensors, next(pair for pair in saved.pairs if pair.stage == stage))


def _factors_of_term(layers: Beside, held: Held, target: str) -> tuple[Tensor, Tensor] | None:
    """A (R, n) and B (m, R) of a live term, on the CPU; None where it has none, is not all, or ΔW is smaller."""
    if not isinstance(held.shown, Terms) or held.sums[target] is not None or target not in held.shown.of:
        return None
    m, n = layers.past[target].shape
    found = held.shown.of[target].factors()
    if found is None or found[0].shape[0] * (m + n) >= m * n:
        return None
    A, B = (factor.detach().to("cpu", torch.float32, copy=True) for factor in found)
    return A, B


def _total(layers: Beside, held: Held, live: Pair | None, target: str) -> Tensor:
    """The sum of past updates as it is computed with, and what is live, (m, n) on the CPU."""
    total, update = held.sums[target], None
    if live is not None:
        update = live.update(target, layers.past[target].weight.device)
    elif isinstance(held.shown, Terms):
        update = held.shown.of[target].update().detach()
    if update is not None:
        total = update if total is None else total + update
    assert total is not None, "nothing was learned"
    return total.cpu()


def _reads_back(B: Tensor, ratio: float) -> bool:
    return ratio == 1.0 or torch.equal(B * ratio / ratio, B)


def _write_config(folder: Path, layers: Beside, alphas: Mapping[str, tuple[int, float]]) -> None:
    from peft import LoraConfig

    common, _ = Counter(alphas.values()).most_common(1)[0]
    other = {target: found for target, found in alphas.items() if found != common}
    config = LoraConfig(
        r=common[0],
        lora_alpha=_number(common[1]),
        rank_pattern=patterns.exact({target: rank for target, (rank, _) in other.items()}),
        alpha_pattern=patterns.exact({target: _number(alpha) for target, (_, alpha) in other.items()}),
        target_modules=layers.target_modules,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(accumulator.transposed for accumulator in layers.past.values()),
        task_type=layers.task_type,
        base_model_name_or_path=layers.name_or_path,
        revision=layers.revision,
        inference_mode=True,
    )
    config.target_modules = sorted(layers.target_modules)  # PEFT's set has another order in every process
    config.save_pretrained(str(folder))


def _number(alpha: float) -> Any:
    return int(alpha) if alpha.is_integer() else alpha  # PEFT declares a whole number, and takes any


def load_pairs(folder: Path, saved: Saved) -> list[Pair]:
    """Every pair of an adapter folder that holds them side by side to the bit (``own`` is ``adapter``)."""
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS)
    A: list[dict[str, Tensor]] = [{} for _ in saved.pairs]
    B: list[dict[str, Tensor]] = [{} for _ in saved.pairs]
    for target in _targets(tensors):
        start = 0
        for about, of_A, of_B in zip(saved.pairs, A, B, strict=True):
            rows = slice(start, start + about.rank_of(target))
            ratio = about.scale_of(target) / saved.pairs[0].scale_of(target)
            of_A[target] = _aligned(tensors[_PREFIX + target + _A][rows])
            of_B[target] = _aligned(tensors[_PREFIX + target + _B][:, rows]) / ratio
            start = rows.stop
    return [_pair(about, *factors) for about, *factors in zip(saved.pairs, A, B, strict=True)]


def load_sums(folder: Path, dense: Sequence[str]) -> dict[str, Tensor]:
    """ΔW (m, n) of the targets that an adapter folder stores as A = I, B = ΔW."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "pt") as tensors:
        return {target: _aligned(tensors.get_tensor(_PREFIX + target + _B)) for target in dense}


def own_pair_tensors(pair: Pair) -> dict[str, Tensor]:
    """A pair as flat tensors, for the state of a stage from whose adapter it cannot be read back."""
    pair = pair.repaid()
    named = {f"own.{target}.A": tensor for target, tensor in pair.A.items()}
    named.update({f"own.{target}.B": tensor for target, tensor in pair.B.items()})
    return named


def load_own_pair(tensors: Mapping[str, Tensor], about: PairOnDisk) -> Pair:
    """Inverse of ``own_pair_tensors``."""
    targets = [name[4:-2] for name in tensors if name.startswith("own.") and name.endswith(".A")]
    A = {target: _aligned(tensors[f"own.{target}.A"]) for target in targets}
    B = {target: _aligned(tensors[f"own.{target}.B"]) for target in targets}
    return _pair(about, A, B)


def _pair(about: PairOnDisk, A: dict[str, Tensor], B: dict[str, Tensor]) -> Pair:
    pair = Pair(about.stage, about.rank, about.scale, A, B, about.ranks, about.scales)
    return pair.borrowing() if about.borrows else pair


def _targets(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name[len(_PREFIX) : -len(_A)] for name in tensors if name.endswith(_A)]


def _aligned(tensor: Tensor) -> Tensor:
    """In memory of its own: a product of views into a file may differ in the last bit from one of whole tensors."""
    return tensor.clone(memory_format=torch.contiguous_format)
