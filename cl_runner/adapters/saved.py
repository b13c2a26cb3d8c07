"""What a stage's ``state.json`` says of its adapter folder. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# Where the stage's own factors, or weights, are to be read: side by side in the ``adapter``, in its ``state`` file, in
# what the method carries (``terms``, ``prompts``), or in a ``model`` folder.
Own = Literal["adapter", "state", "terms", "prompts", "model"]


# In the place of a stage: the adapter that a run starts from, and each of its pairs. No task has such a name.
GIVEN = "from"


def given_name(number: int) -> str:
    """A pair of the adapter that a run starts from, from 1."""
    return f"{GIVEN}:{number}"


def is_given(name: str) -> bool:
    """Whether a pair is one of those, and none of a stage's."""
    return name.startswith(f"{GIVEN}:")


class Sized:
    """What a pair's update is made with: r and s, and those of the targets that have others."""

    rank: int
    scale: float
    ranks: Mapping[str, int]
    scales: Mapping[str, float]

    def rank_of(self, target: str) -> int:
        """r at a target."""
        return self.ranks.get(target, self.rank)

    def scale_of(self, target: str) -> float:
        """s at a target."""
        return self.scales.get(target, self.scale)


@dataclass(frozen=True)
class PairOnDisk(Sized):
    """A pair in the sum: of which stage, its rank, its scale.

    borrows: the second half of its rows is what the pair began with, and the weight is without where it answers.
    """

    stage: str
    rank: int
    scale: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    borrows: bool = False

    def to_json(self) -> dict[str, Any]:
        """Its part of ``state.json``: of what most pairs have not, only what there is."""
        other = {"ranks": dict(self.ranks), "scales": dict(self.scales), "borrows": self.borrows}
        return {"stage": self.stage, "rank": self.rank, "scale": self.scale, **{k: v for k, v in other.items() if v}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PairOnDisk:
        """The inverse of ``to_json``."""
        other = values.get("ranks", {}), values.get("scales", {}), values.get("borrows", False)
        return cls(values["stage"], values["rank"], values["scale"], *other)


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
        pairs = tuple(map(PairOnDisk.from_json, values["pairs"]))
        return cls(values["own"], pairs, tuple(values["dense"]), tuple(values["dense_stages"]))
