"""The stage that hooks are handed: its services, on the raw module and over the ranks.

``methods/base.py`` says what each service promises; this file keeps the promise for one process or many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cl_runner.adapters import Adapters, FactorGroup
from cl_runner.config import RunConfig
from cl_runner.engine import Autocast, Engine
from cl_runner.methods.base import Method, Progress, Source, StagePlan, overrides
from cl_runner.models.base import Base
from cl_runner.models.batch import IGNORE, Batch, Example, collate, collate_prompts
from cl_runner.models.encoding import Encoder
from cl_runner.models.forward import evaluating, greedy, logits
from cl_runner.place import Place
from cl_runner.plan import derived_seed


@dataclass
class Room:
    """What lives through all stages of a process: base, adapters, method, place."""

    base: Base
    encoder: Encoder
    adapters: Adapters
    method: Method
    place: Place
    root: Autocast
    order: tuple[StagePlan, ...]


class StageRun:
    """One stage in one process; implements ``methods.base.Stage``."""

    def __init__(self, room: Room, config: RunConfig, index: int, *, evaluating: bool = False) -> None:
        self.room = room
        self.config = config
        self.index = index
        self.plan = room.order[index]
        self.order = room.order
        self.adapters: Adapters = room.adapters
        self.evaluating = evaluating
        self.engine: Engine | None = None
        self.own: Source | None = None
        self.step = 0
        self.steps = 0
        self.task_loss: Tensor | None = None
        self._batch: Batch | None = None
        self._observers: list[tuple[str, Callable[[str, Tensor, Tensor | None], None]]] = []
        self._hooks = [
            layer.register_forward_hook(self._observed(target)) for target, layer in self.adapters.layers.items()
        ]

    def close(self) -> None:
        """Remove the observation hooks."""
        for hook in self._hooks:
            hook.remove()

    # Facts.

    @property
    def progress(self) -> Progress:
        return Progress(self.step, self.steps, self.task_loss)

    @property
    def device(self) -> torch.device:
        return self.room.place.torch_device

    @property
    def rank(self) -> int:
        return self.room.place.rank

    @property
    def ranks(self) -> int:
        return self.room.place.ranks

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.adapters.parameters().items() if p.requires_grad}

    def factors(self) -> list[FactorGroup]:
        return self.adapters.groups()

    def base_weight(self, target: str) -> Tensor:
        return self.adapters.past[target].base

    def input_groups(self) -> list[tuple[str, ...]]:
        groups: dict[str, list[str]] = {}
        for target in self.adapters.layers:
            groups.setdefault(self._input_of(target), []).append(target)
        return [tuple(targets) for targets in groups.values()]

    def _input_of(self, target: str) -> str:
        """Layers of one attention (or feed-forward) block read one input; cross-attention reads two."""
        parent, _, name = target.rpartition(".")
        if "EncDecAttention" in parent or "encoder_attn" in parent or "cross_attn" in parent:
            return f"{parent}/{'query' if name.startswith('q') else 'memory'}"
        if name in ("wo", "o", "o_proj", "down_proj", "c_proj", "out_proj", "fc2"):
            return target
        return parent

    # Forward and gradient, on the raw module.

    def forward(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        self._batch = batch

        def compute() -> Tensor:
            return logits(self.adapters.model, batch)

        if parameters is None:
            found: Tensor = self.room.root(compute)
            return found
        names = self._full_names()
        values = {f"model.{names[name]}": value for name, value in parameters.items()}
        out: Tensor = torch.func.functional_call(self.room.root, values, (compute,))
        return out

    def _full_names(self) -> dict[str, str]:
        by_id = {id(p): name for name, p in self.adapters.model.named_parameters()}
        return {name: by_id[id(p)] for name, p in self.adapters.parameters().items()}

    def gradient(
        self, loss: Callable[[Batch], Tensor], batches: Iterator[Batch], per_example: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        return self._each_gradient(loss, batches) if per_example else iter([self._sum_gradient(loss, batches)])

    def _one_gradient(self, loss: Callable[[Batch], Tensor], batch: Batch) -> dict[str, Tensor]:
        parameters = self.parameters()
        with torch.enable_grad():
            found = torch.autograd.grad(loss(batch), list(parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p) if g is None else g.float()
            for (name, p), g in zip(parameters.items(), found, strict=True)
        }

    def _sum_gradient(self, loss: Callable[[Batch], Tensor], batches: Iterator[Batch]) -> dict[str, Tensor]:
        total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.parameters().items()}
        with evaluating(self.adapters.model):
            for batch in batches:
                for name, gradient in self._one_gradient(loss, batch).items():
                    total[name] += gradient
        return {name: self.sum(gradient) for name, gradient in total.items()}

    def _each_gradient(self, loss: Callable[[Batch], Tensor], batches: Iterator[Batch]) -> Iterator[dict[str, Tensor]]:
        with evaluating(self.adapters.model):
            for batch in batches:
                for row in range(batch.size):
                    one = batch.slice(slice(row, row + 1))
                    if float(one.token_weights.sum()) > 0:
                        yield self._one_gradient(loss, one)

    # Observation.

    @contextmanager
    def observe(
        self, what: Literal["inputs", "outputs"], see: Callable[[str, Tensor, Tensor | None], None]
    ) -> Iterator[None]:
        entry = (what, see)
        self._observers.append(entry)
        try:
            yield
        finally:
            self._observers.remove(entry)

    def _observed(self, target: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # A forward inside a backward is activation checkpointing's second look at the same rows.
            if not self._observers or torch._C._current_graph_task_id() != -1:
                return
            for what, see in self._observers:
                rows = (inputs[0] if what == "inputs" else output).detach()
                see(target, rows, self._mask(target, rows))

        return hook

    def _mask(self, target: str, rows: Tensor) -> Tensor | None:
        batch = self._batch
        if batch is None or rows.dim() != 3:
            return None
        masks = [batch.attention_mask, batch.labels != IGNORE]
        in_decoder = self.room.base.encoder_decoder and ".decoder." in f".{target}"
        for mask in reversed(masks) if in_decoder else masks:
            if mask.shape == rows.shape[:2]:
                return mask.bool()
        return None

    # Rows.

    def batches(self, source: Source | None = None) -> Iterator[Batch]:
        source = source or self.own
        assert source is not None, "this stage has no rows of its own yet"
        micro = self.config.training.micro_batch
        tokens = sum(len(example.target) for example in source.examples)
        chunks = [range(i, min(i + micro, len(source.examples))) for i in range(0, len(source.examples), micro)]
        for first in range(0, len(chunks), self.ranks):
            mine = first + self.rank
            rows = chunks[mine] if mine < len(chunks) else range(0, 1)
            weight = source.weight / tokens if mine < len(chunks) else 0.0
            examples = [source.examples[i] for i in rows]
            yield self.make_batch(examples, [source.tasks[i] for i in rows], [weight] * len(rows))

    def make_batch(self, examples: Sequence[Example], tasks: Sequence[str], weights: Sequence[float]) -> Batch:
        """Padded tensors with row weights, conditioned by the method."""
        return self._conditioned(collate(examples, self.room.base.layout, self.device, list(weights)), tasks)

    def _conditioned(self, batch: Batch, tasks: Sequence[str]) -> Batch:
        if not overrides(self.room.method, "condition"):
            return batch
        task = tasks[0] if len(set(tasks)) == 1 else None
        return replace(batch, condition=self.room.method.condition(self, batch, task) or {})

    def generate(self, examples: Sequence[Example], task: str | None = None) -> list[str]:
        size = self.config.eval.batch
        answers: dict[int, str] = {}
        # By length, so that little is padded; by number, so that the ranks' count changes no batch.
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].source))
        for number, start in enumerate(range(0, len(order), size)):
            if number % self.ranks == self.rank:
                rows = order[start : start + size]
                answers.update(zip(rows, self._answer([examples[i] for i in rows], task), strict=True))
        return [answer for _, answer in sorted(self.gather(answers).items())]

    def _answer(self, examples: Sequence[Example], task: str | None) -> list[str]:
        prompts = collate_prompts(examples, self.room.base.layout, self.device)
        self._batch = self._conditioned(prompts, [task or ""])
        with torch.no_grad(), self.room.root.context():
            ids = greedy(self.adapters.model, self._batch, self.room.base.layout, self.config.eval.max_new_tokens)
        return [self.room.encoder.decode(row) for row in ids]

    # Ranks.

    def gather(self, mine: dict[int, Any]) -> dict[int, Any]:
        """The union of every rank's numbered results, on every rank. *Collective*."""
        if self.ranks == 1:
            return mine
        parts: list[dict[int, Any]] = [{} for _ in range(self.ranks)]
        torch.distributed.all_gather_object(parts, mine)
        return {number: value for part in parts for number, value in part.items()}

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        if self.ranks > 1:
            torch.distributed.all_reduce(total)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        return self.sum(tensor) / self.ranks

    def broadcast(self, tensor: Tensor) -> Tensor:
        value = tensor.detach().clone()
        if self.ranks > 1:
            torch.distributed.broadcast(value, src=0)
        return value

    def rng(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self.config.seed, self.index, purpose))

    # Parameters.

    def write(self, values: Mapping[str, Tensor]) -> None:
        if self.engine is not None:
            self.engine.write(values)
            return
        own = self.adapters.parameters()
        for name, value in values.items():
            own[name].data.copy_(value)

    def moments(self, name: str) -> dict[str, Tensor] | None:
        return self.engine.moments(name) if self.engine else None

    def set_moments(self, name: str, moments: Mapping[str, Tensor]) -> None:
        assert self.engine is not None, "moments live with the engine"
        self.engine.set_moments(name, moments)
