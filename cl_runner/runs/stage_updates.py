"""What each stage of a run has changed of the weights, from the committed folders; the model only where it must be.

Of a stage with a pair of its own it is that pair; of one that trained on with an earlier one the difference, a pair of
twice the rank; of all others the difference of what its folder and the one before add to the base. As in reports, the
last stage is taken as it answers, others as later ones have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cl_runner.adapters.lora_folder import LoraFolder
from cl_runner.adapters.merged_folder import MergedFolder, open_folder
from cl_runner.adapters.pairs import Pair
from cl_runner.adapters.peft_folder import own_pair
from cl_runner.adapters.saved import GIVEN
from cl_runner.atomic import read_json
from cl_runner.errors import UserError, first_line
from cl_runner.metrics.updates.update import Update
from cl_runner.runs.folder import RunDir
from cl_runner.runs.state import NEXT, TENSORS, Record, StageState

if TYPE_CHECKING:
    from cl_runner.models.base_weights import BaseWeights  # which brings transformers


@dataclass(frozen=True)
class StageChanges:
    """What one stage has changed; ``shapes``: layer → (m, n), out by in.

    whole: what the model has over the base after it. differs: whether it trained on with a pair, so that what has
    changed is the difference of two.
    """

    name: str
    shapes: Mapping[str, tuple[int, int]]
    read: Callable[[str], Update]
    whole: Callable[[str], Update]
    differs: bool = False
    from_base: bool = False

    def of(self, layer: str) -> Update:
        """ΔW of a layer, on the CPU."""
        return self.read(layer)

    def total(self, layer: str) -> Update:
        """The same of all stages up to this one."""
        return self.whole(layer)


@dataclass(frozen=True)
class Left:
    """What a stage left: what answers, or what the next one began from."""

    stage: str
    folder: Path
    where: str  # of the folder: the adapter's or the model's
    record: Record

    @classmethod
    def by(cls, folder: Path, answers: bool) -> Left:
        """Of a stage's folder. Raises UserError."""
        removed = read_json(folder / "DONE").get("removed") or {}
        state = StageState.read(folder)
        following = None if answers else state.next
        record, usual = following or state.answers, "model" if state.answers.saved.own == "model" else "adapter"
        where = NEXT if following else usual
        if any(Path(file).parts[0] == where for file in removed):
            raise UserError(f"the model of {state.name} was removed (output.keep_stages)")
        return cls(state.name, folder, where, record)

    @property
    def paired(self) -> bool:
        """Whether the stage has factors of its own, which are all that it has changed."""
        saved = self.record.saved
        own = any(pair.stage == self.stage for pair in saved.pairs) and saved.own in ("adapter", "state")
        return own and self.stage not in saved.dense_stages

    @property
    def merged(self) -> bool:
        """Whether the stage's update is in one sum with those before it, wherever its pair began."""
        return self.stage in self.record.saved.dense_stages

    def pair(self) -> Pair:
        """Those factors."""
        before = "next." if self.where == NEXT else ""
        file = self.folder / TENSORS
        tensors = load_file(file) if file.exists() else {}
        own = {key.removeprefix(before): tensor for key, tensor in tensors.items() if key.startswith(before)}
        return own_pair(self.folder / self.where, self.stage, self.record.saved, own)

    def trained_on_by(self, later: Left) -> bool:
        """Whether a later stage went on with the pair, which is in no sum and not kept either."""
        live = self.record.live
        kept = {*later.record.kept, *(pair.stage for pair in later.record.saved.pairs)}
        return self.paired and live is not None and live not in kept


def stage_changes(
    run: RunDir, names: Sequence[str], base: Callable[[], BaseWeights]
) -> tuple[list[StageChanges], list[str]]:
    """Of the committed stages, and a line for each reason that some have none to tell.

    base: the run's base model, asked for where weights are to be compared with it, or a kind's updates depend on it.
    """
    found: list[StageChanges] = []
    untold: dict[str, list[str]] = {}
    for index, name in enumerate(names):
        told = _told(run, names, index, base)
        if isinstance(told, str):
            untold.setdefault(told, []).append(f"{index + 1} ({name})")
        else:
            found.append(told)
    return found, [f"stage{'s' * (len(of) > 1)} {', '.join(of)}: {why}" for why, of in untold.items()]


def _told(run: RunDir, names: Sequence[str], index: int, base: Callable[[], BaseWeights]) -> StageChanges | str:
    """What a stage has changed, or why that cannot be told."""
    try:
        return _changes(run, names, index, base)
    except UserError as error:
        return str(error).replace(f"{run.stage_dir(index, names[index])}/", "")
    except (SafetensorError, OSError, KeyError, StopIteration, ValueError) as error:
        return f"its folder is damaged ({type(error).__name__}: {first_line(error)[:100]})"


def _changes(run: RunDir, names: Sequence[str], index: int, base: Callable[[], BaseWeights]) -> StageChanges:
    folder, name = run.stage_dir(index, names[index]), names[index]
    left = Left.by(folder, answers=index == len(names) - 1)
    if left.record.saved.own == "prompts":
        raise UserError("soft prompts change no weight")
    begun = None
    given = run.stage_dir(-1, GIVEN)
    if index and (left.merged or StageState.read(folder).start != "base"):
        begun = Left.by(run.stage_dir(index - 1, names[index - 1]), answers=False)
    elif given.is_dir():
        begun = Left.by(given, answers=True)
    differs = bool(begun and left.paired and begun.trained_on_by(left))
    if left.record.saved.own == "model":
        shapes, read = _of_models(left, begun, base)
    elif left.paired:
        shapes, read = _of_pairs(left.pair(), begun.pair() if begun and differs else None)
    else:
        shapes, read = _of_folders(left, begun, base)
    return StageChanges(name, shapes, read, _whole(left, base) if begun else read, differs, begun is None)


def _whole(left: Left, base: Callable[[], BaseWeights]) -> Callable[[str], Update]:
    """What all stages up to this one have changed, each layer when it is asked for."""

    @cache
    def opened() -> Callable[[str], Update]:
        if left.record.saved.own == "model":
            return _of_models(left, None, base)[1]
        return _folder(left, base).of

    return lambda layer: opened()(layer)


Found = tuple[Mapping[str, tuple[int, int]], Callable[[str], Update]]


def _of_pairs(pair: Pair, begun: Pair | None) -> Found:
    """``begun``: the pair as its stage began, where it trained on. What both began with of the weight cancels out."""

    def update(of: Pair, layer: str, whole: bool) -> Update:
        A, B, scale = of.of(layer) if whole else (of.A[layer], of.B[layer], of.scale_of(layer))
        return Update(scale * B, A)

    def read(layer: str) -> Update:
        if begun is None:
            return update(pair, layer, whole=True)
        whole = not (_same(pair.A0.get(layer), begun.A0.get(layer)) and _same(pair.B0.get(layer), begun.B0.get(layer)))
        return update(pair, layer, whole).less(update(begun, layer, whole))

    return {layer: (len(pair.B[layer]), A.shape[1]) for layer, A in pair.A.items()}, read


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def _of_folders(left: Left, begun: Left | None, base: Callable[[], BaseWeights]) -> Found:
    after, before = _folder(left, base), _folder(begun, base) if begun else None

    def read(layer: str) -> Update:
        return after.of(layer).less(before.of(layer)) if before else after.of(layer)

    return after.shapes, read


def _folder(left: Left, base: Callable[[], BaseWeights]) -> LoraFolder | MergedFolder:
    return open_folder(left.folder / left.where, left.stage, lambda: base().network)


def _of_models(left: Left, begun: Left | None, base: Callable[[], BaseWeights]) -> Found:
    from cl_runner.models.linear_weights import LinearWeights  # which brings transformers

    after = LinearWeights(left.folder / left.where)
    before = LinearWeights(begun.folder / begun.where if begun else base().folder, like=after)
    shapes = {layer: shape for layer, shape in after.shapes.items() if before.shapes.get(layer) == shape}
    if not shapes:
        raise UserError(f"{before.folder} has none of its layers under the same names")
    return shapes, lambda layer: Update(after.weight(layer) - before.weight(layer))
