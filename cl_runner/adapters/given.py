"""The adapter that a run starts from (``model.adapter``): anybody's LoRA folder, as pairs of the run's own layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from cl_runner.adapters.lora_folder import LoraFolder, NeedsBase
from cl_runner.adapters.pairs import Pair
from cl_runner.adapters.saved import given_name
from cl_runner.config.schema import ADAPTER
from cl_runner.errors import UserError, by

Number = TypeVar("Number", int, float)
Shapes = Mapping[str, tuple[int, int]]  # layer → (m, n), out by in


class Given:
    """What is to be known of the folder beside the layers of a run.

    Args:
        targets: the layers that the run adapts.
        linear: all linear layers of the base, where they are known.

    Raises:
        UserError: it is no LoRA, not all of it is s·B A, or the base or the run has none of its layers.
    """

    def __init__(self, path: Path, targets: Shapes, linear: Shapes | None = None) -> None:
        try:
            self.folder = LoraFolder(path)
        except NeedsBase as error:
            raise UserError(
                f"{ADAPTER}: {error}, and a run starts from LoRA; merge it into its base (PEFT's merge_and_unload) and "
                "give that folder as --model"
            ) from None
        except UserError as error:
            raise UserError(f"{ADAPTER}: {error}") from None
        if self.folder.notes:
            raise UserError(
                f"{ADAPTER}: {path}: {self.folder.notes[0]}, so that a run cannot start from it as it answers"
            )
        self.targets = targets
        self._refuse_other_layers(linear)

    def _refuse_other_layers(self, linear: Shapes | None) -> None:
        path, shapes = self.folder.path, self.folder.shapes
        base = f"the base; its adapter_config.json names {self.folder.base or 'none'}"
        for layer, shape in shapes.items():
            of_base = (linear if linear is not None else self.targets).get(layer)
            if linear is not None and of_base is None:
                raise UserError(f"{ADAPTER}: {path} adapts {layer}, which is no linear layer of {base}")
            if of_base is not None and of_base != shape:
                raise UserError(f"{ADAPTER}: {path}: {layer} is {by(shape)}, and {by(of_base)} in {base}")
        others = [layer for layer in shapes if layer not in self.targets]
        if others:
            named = ",".join(endings([*shapes, *self.targets]))
            raise UserError(
                f"{ADAPTER}: {path} adapts {', '.join(endings(others))} too, and what it adds is folded where the run "
                f"adapts alone; set adapter.target_modules=[{named}]"
            )

    @property
    def about(self) -> str:
        """``LoRA of rank 8 in 24 layers``."""
        layers = f"{len(self.folder.shapes)} layer{'s' * (len(self.folder.shapes) > 1)}"
        tasks = f", the pairs of {len(self.folder.tasks)} tasks," if len(self.folder.tasks) > 1 else ""
        ranks = sorted(set(self.ranks.values()))
        whole = "whole matrices" if self.dense else f"rank {'/'.join(map(str, ranks))}"
        return f"LoRA of {whole}{tasks} in {layers}"

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Layer → rows of A."""
        return {layer: self.folder.rank_of(layer) for layer in self.folder.shapes}

    @cached_property
    def dense(self) -> bool:
        """Whether a layer's A is the identity: B is a matrix, and there are no factors."""
        return any(self.folder.of(layer).A is None for layer in self.folder.shapes)

    def unlike(self, ranks: Mapping[str, int]) -> str:
        """Why its pair is none that the run could train on; empty where it is. ``ranks``: of the run's, by target."""
        if self.dense:
            return "it holds whole matrices"
        if len(self.folder.tasks) > 1:
            return f"it holds the pairs of {len(self.folder.tasks)} tasks"
        if missing := [target for target in self.targets if target not in self.folder.shapes]:
            return f"it has no pair in {', '.join(endings(missing))}"
        for target, rank in self.ranks.items():
            if rank != ranks[target]:
                return f"its rank is {rank}, and {ranks[target]} that of the run (adapter.r)"
        return ""

    def pair(self, scales: Mapping[str, float]) -> Pair:
        """The one pair, with these scales by target in place of its own: B takes up the difference."""
        A, B = {}, {}
        for target in self.targets:
            A[target], own, scale = self.folder.factors(target)
            B[target] = own * (scale / scales[target])
        rank, scale = _commonest(self.ranks.values()), _commonest(scales[target] for target in self.targets)
        return Pair(
            given_name(1),
            rank,
            scale,
            A,
            B,
            {target: r for target, r in self.ranks.items() if r != rank},
            {target: s for target in self.targets if (s := scales[target]) != scale},
        )

    def pairs(self) -> list[Pair]:
        """As past pairs, one for each task that it tells apart: of one rank at all targets, rows of zeros where a layer
        has fewer, or none."""
        rank = max(self.ranks.values())
        found = {target: self._padded(target, rank) for target in self.targets}
        scale = _commonest(s for _, _, s in found.values())
        tasks = self.folder.tasks if all(sum(self.folder.tasks) == r for r in self.ranks.values()) else ()
        if any(rank * (m + n) >= m * n for m, n in self.targets.values()):
            tasks = ()  # a folder holds several pairs of so many rows as one matrix, and gives none back
        pairs, first = [], 0
        for number, own in enumerate(tasks or (rank,), 1):
            rows = slice(first, first + own)
            first = rows.stop
            pairs.append(
                Pair(
                    given_name(number),
                    own,
                    scale,
                    {target: A[rows].clone() for target, (A, _, _) in found.items()},
                    {target: B[:, rows].contiguous() for target, (_, B, _) in found.items()},
                    scales={target: s for target, (_, _, s) in found.items() if s != scale},
                )
            )
        return pairs

    def _padded(self, target: str, rank: int) -> tuple[Tensor, Tensor, float]:
        m, n = self.targets[target]
        A, B = torch.zeros(rank, n), torch.zeros(m, rank)
        if target not in self.folder.shapes:
            return A, B, self.folder.factors(next(iter(self.folder.shapes)))[2]
        own_A, own_B, scale = self.folder.factors(target)
        A[: len(own_A)], B[:, : len(own_A)] = own_A, own_B
        return A, B, scale

    def matrices(self) -> dict[str, Tensor]:
        """Target → ΔW (m, n), zero where the folder has none."""
        shapes = self.folder.shapes
        return {
            target: self.folder.of(target).whole() if target in shapes else torch.zeros(shape)
            for target, shape in self.targets.items()
        }


def endings(layers: Iterable[str]) -> list[str]:
    """The last parts of names of layers, each once."""
    return sorted({layer.rsplit(".", 1)[-1] for layer in layers})


def _commonest(values: Iterable[Number]) -> Number:
    every = list(values)
    return max(dict.fromkeys(every), key=every.count)
