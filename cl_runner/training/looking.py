"""Who looks at layers while the model reads a batch: each forward's rows, and how often each of them counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from cl_runner.models.batch import IGNORE, Batch, Example, collate
from cl_runner.models.forward import evaluating, logits

if TYPE_CHECKING:
    from cl_runner.training.stage import StageRun

Which = Literal["inputs", "outputs"]
See = Callable[[str, Tensor, Tensor | None], None]  # target, rows (b, t, d), counts (b, t)


class Looking:
    """The observers of a stage's layers. ``batch``: what the model reads, or the part of it that it reads by itself."""

    def __init__(self, stage: StageRun) -> None:
        self.stage = stage
        self.batch: Batch | None = None
        self._observers: list[tuple[Which, See]] = []
        self._hooks = [
            layer.register_forward_hook(self._watched(target)) for target, layer in stage.adapters.layers.items()
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def observe(self, what: Which, see: See) -> Iterator[None]:
        """``see`` is called at every forward of a target layer inside."""
        entry = (what, see)
        self._observers.append(entry)
        try:
            yield
        finally:
            self._observers.remove(entry)

    @property
    def observed(self) -> bool:
        """Whether anybody looks."""
        return bool(self._observers)

    def shared_inputs(self) -> list[tuple[str, ...]]:
        """Targets by the tensor that they are handed: one small forward tells, which nobody else sees."""
        stage, inputs = self.stage, dict[str, Tensor]()
        hooks = [
            layer.register_forward_pre_hook(lambda _, given, target=target: inputs.update({target: given[0]}))
            for target, layer in stage.adapters.layers.items()
        ]
        layout = stage.room.base.layout
        batch = collate([Example([layout.eos_id] * 2, [layout.eos_id] * 2)], layout, stage.device)
        observers, self._observers = self._observers, []
        condition, stage.adapters.condition = stage.adapters.condition, {}  # that of other rows
        try:
            with torch.no_grad(), evaluating(stage.adapters.model), stage.room.root.context():
                logits(stage.adapters.model, batch)
        finally:
            self._observers, stage.adapters.condition = observers, condition
            for hook in hooks:
                hook.remove()
        groups: dict[int, list[str]] = {}
        for target in stage.adapters.layers:
            groups.setdefault(id(inputs.get(target, target)), []).append(target)
        return [tuple(targets) for targets in groups.values()]

    def _watched(self, target: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # A forward inside a backward is activation checkpointing's second look at the same rows.
            if not self._observers or torch._C._current_graph_task_id() != -1:
                return
            for what, see in self._observers:
                rows = (inputs[0] if what == "inputs" else output).detach()
                if self.batch is not None:
                    rows = self.batch.by_row(rows)
                see(target, rows, self._counts(target, rows))

        return hook

    def _counts(self, target: str, rows: Tensor) -> Tensor | None:
        """How often each of a target's rows counts; None where the rows are not the batch's (a step of generation)."""
        batch = self.batch
        if batch is None or rows.dim() != 3:
            return None
        masks = [batch.attention_mask.bool(), batch.labels != IGNORE]
        if self.stage.encoder_decoder and ".encoder." not in f".{target}" and not _reads_encoder(target):
            masks = masks[1:]
        mask = next((mask for mask in masks if mask.shape == rows.shape[:2]), None)
        if mask is None:  # positions of the model's own making are taken for real ones
            own = batch.labels.shape[1] and rows.shape[0] == batch.size
            return batch.counts.expand(rows.shape[:2]) if own else None
        return mask * batch.counts


def _reads_encoder(target: str) -> bool:
    """Whether a target in the decoder has the encoder's positions for rows: K and V of cross-attention."""
    block, _, layer = target.rpartition(".")
    crosses = any(name in block for name in ("EncDecAttention", "encoder_attn", "cross_attn", "crossattention"))
    return crosses and layer.startswith(("k", "v"))
