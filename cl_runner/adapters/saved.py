"""What a stage's ``state.json`` says of its adapter folder. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Where the stage's own factors, or weights, are to be read: side by side in the ``adapter``, in its ``state`` file, in
# what the method carries (``terms``, ``prompts``), or in a ``model`` folder.
Own = Literal["adapter", "state", "terms", "prompts", "model"]


@dataclass(frozen=True)
class PairOnDisk:
    """A pair in the sum: of which stage, its rank, its scale.

    borrows: the second half of its rows is what the pair began with, and the weight is without where it answers.
    """

    stage: str
    rank: int
    scale: float
    borrows: bool = False

    def to_json(self) -> dict[str, Any]:
        """Its part of ``state.json``."""
        return {"stage": self.stage, "rank": self.rank, "scale": self.scale} | (
            {"borrows": True} if self.borrows else {}
        )


@dataclass(frozen=True)
class Saved:
    """An adapter or model folder.

    pairs: those in the sum, in stage order, the live one last. dense: targets stored as A = I and B = ΔW.
    dense_stages: those that folded without factors. own: where the stage's own pair, or weights, can be read back.
    """

    own: Own
    pairs: tuple[PairOnDisk, ...] = ()
    dense: tuple[str, ...] = ()
    dense_stages: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Its part of ``state.json``."""
        return {
            "pairs": [pair.to_json() for pair in self.pairs],
            "dense": list(self.dense),
            "dense_stages": list(self.dense_stages),
            "own": self.own,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Saved:
        """The inverse of ``to_json``."""
        pairs = tuple(
            PairOnDisk(pair["stage"], pair["rank"], pair["scale"], pair.get("borrows", False))
            for pair in values["pairs"]
        )
        return cls(values["own"], pairs, tuple(values["dense"]), tuple(values["dense_stages"]))
