"""The stage that hooks are handed: its services, on the raw module and over the ranks.

``methods/protocol.py`` says what each service promises; this file keeps the promise for one process or many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from cl_runner.adapters.base import Adapters, Held
from cl_runner.adapters.folding import summed
from cl_runner.adapters.pairs import FactorGroup, Pair
from cl_runner.adapters.targets import is_transposed
from cl_runner.adapters.terms import Term
from cl_runner.config.schema import RunConfig
from cl_runner.engine.optim import ParameterGroup, by_learning_rate, ordinary_groups
from cl_runner.engine.precision import Compute
from cl_runner.engine.process import Place
from cl_runner.engine.zero import Autocast, Engine, gather_objects
from cl_runner.maths.vectors import flat, unflat
from cl_runner.methods.protocol import Method, Progress, Source, StagePlan, overrides
from cl_runner.models.base import Base
from cl_runner.models.batch import IGNORE, Batch, Example, Question, collate, collate_prompts, token_batches
from cl_runner.models.choose import Choice, choose
from cl_runner.models.dropout import RowDropout
from cl_runner.models.encoding import Encoder
from cl_runner.models.forward import embedded, evaluating, features, logits, sampled, source_mask, unwrapped
from cl_runner.models.likelihood import Likelihood, likelihoods
from cl_runner.models.token_cache import lengths
from cl_runner.models.verify import answers as verified_answers
from cl_runner.training.fitting import Fit
from cl_runner.training.options import Option, make_options
from cl_runner.training.sampling import derived_seed
from cl_runner.training.sharing import Sharing

Result = TypeVar("Result")


@dataclass
class Room:
    """What lives through all stages of a process: base, adapters, method, place, options."""

    base: Base
    encoder: Encoder
    adapters: Adapters
    method: Method
    place: Place
    root: Autocast
    order: tuple[StagePlan, ...]
    options: tuple[Option, ...] = field(default_factory=make_options)
    initial: Held | None = None  # the adapter that the run starts from, if it does
    told: set[str] = field(default_factory=set)  # what is said once a run, and has been
    compute: Compute = field(default_factory=lambda: Compute(False))  # what ``root`` computes in, and why

    def to_base(self) -> None:
        """Hold nothing that was learned, but what is kept by stage and what the run started from."""
        held = self.initial or Held()
        self.adapters.restore(held.folded, self.adapters.kept, None, sums=held.sums, dense=held.dense)

    def from_base(self, target: str) -> Tensor | None:
        """ΔW (m, n) that the run started from at a target, where it was folded; None of none."""
        held = self.initial or Held()
        total = held.sums.get(target)
        if total is not None:
            return total
        pairs = [pair.of(target) for pair in held.folded if target in pair.A]
        return summed(pairs, self.adapters.past[target].weight.device) if pairs else None


class StageRun:
    """One stage in one process; implements ``methods.protocol.Stage``."""

    def __init__(self, room: Room, config: RunConfig, index: int, *, evaluating: bool = False) -> None:
        self.room = room
        self.config = config
        self.index = index
        self.plan = room.order[index]
        self.order = room.order
        self.adapters: Adapters = room.adapters
        self.evaluating = evaluating
        self.engine: Engine | None = None
        self.one_more: Callable[[Mapping[str, Tensor]], bool] | None = None  # how the loop takes a step of gradients
        self.own: Source | None = None
        self.step = 0
        self.steps = 0
        self.task_loss: Tensor | None = None
        self.dropout = RowDropout()
        self.sharing = Sharing(self)
        self.fit = Fit()
        self._batch: Batch | None = None
        self._raw = room.root.twin()
        self._input_groups: list[tuple[str, ...]] | None = None
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
        left_out = self.engine.skipped if self.engine is not None else 0
        return Progress(self.step, self.steps, self.task_loss, left_out)

    @property
    def device(self) -> torch.device:
        return self.room.place.torch_device

    @property
    def rank(self) -> int:
        return self.room.place.rank

    @property
    def ranks(self) -> int:
        return self.room.place.ranks

    @property
    def encoder_decoder(self) -> bool:
        return self.room.base.encoder_decoder

    @property
    def micro_batch(self) -> int:
        """Rows that a device takes at once: the setting's, or as many as were found to fit."""
        return self.fit.micro_batch or self.config.training.micro_batch

    @property
    def drawn_by(self) -> int | str:
        """What of the stage is in its random numbers: its place; its name, where no other has a part in it."""
        return self.plan.name if self.room.method.alone else self.index

    @property
    def options(self) -> tuple[Option, ...]:
        """What this stage has beside its method, in the order that it runs in."""
        return tuple(option for option in self.room.options if option.wanted(self.config, self.room.method))

    # What trains.

    def begin(self) -> None:
        self.adapters.begin(self.plan.name, self.rng("adapter"))

    def train_on(self) -> None:
        if self.adapters.live is None:
            self.begin()
        else:
            self.adapters.rename(self.plan.name)

    def begin_terms(self, terms: Mapping[str, Term], shared: Mapping[str, nn.Parameter] | None = None) -> None:
        self.adapters.begin_terms(self.plan.name, terms, shared)

    def hold_prompts(self, values: Mapping[str, Tensor]) -> None:
        self.adapters.hold(values)

    def answer_with(self, prompt: Tensor) -> None:
        self.adapters.single = prompt

    def vocabulary_rows(self, count: int, generator: torch.Generator) -> Tensor:
        return self.adapters.of_vocabulary(count, generator)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.adapters.parameters().items() if p.requires_grad}

    def all_parameters(self) -> dict[str, nn.Parameter]:
        return self.adapters.parameters()

    def named(self, role: str) -> dict[str, str]:
        return self.adapters.named(role)

    def ordinary_groups(self, parameters: Mapping[str, nn.Parameter] | None = None) -> list[ParameterGroup]:
        chosen = self.parameters() if parameters is None else parameters
        groups = ordinary_groups(chosen, self.config.training, self.adapters.model)
        return by_learning_rate(groups, self.adapters.learning_rates())

    # What it is beside, and makes.

    def targets(self) -> dict[str, tuple[int, int]]:
        return self.adapters.targets()

    def transposed(self, target: str) -> bool:
        return is_transposed(self.adapters.layers[target])

    def head_targets(self) -> set[str]:
        head = unwrapped(self.adapters.model).get_output_embeddings()  # type: ignore[operator]
        return {target for target, layer in self.adapters.layers.items() if layer is head}

    def rank_of(self, target: str) -> int:
        return self.adapters.rank_of(target)

    def scale_of(self, target: str) -> float:
        return self.adapters.scale_of(target)

    def factors(self) -> list[FactorGroup]:
        return self.adapters.groups()

    @property
    def start(self) -> Pair | None:
        return self.adapters.start

    def terms(self) -> dict[str, Any]:
        return dict(self.adapters.terms.of) if self.adapters.terms else {}

    def live_update(self) -> dict[str, Tensor]:
        return self.adapters.live_update()

    def base_weight(self, target: str) -> Tensor:
        return self.adapters.past[target].base

    def past_update(self, target: str) -> Tensor | None:
        return self.adapters.past[target].sum

    def whole_weight(self, target: str) -> Tensor:
        return self.adapters.past[target].whole

    def own_rows(self) -> Source:
        assert self.own is not None, "this stage has no rows of its own yet"
        return self.own

    def input_groups(self) -> list[tuple[str, ...]]:
        if self._input_groups is None:
            self._input_groups = self._look_for_shared_inputs()
        return self._input_groups

    def _look_for_shared_inputs(self) -> list[tuple[str, ...]]:
        """One small forward tells: layers that are handed the same tensor share their input."""
        inputs: dict[str, Tensor] = {}
        hooks = [
            layer.register_forward_pre_hook(lambda _, given, target=target: inputs.update({target: given[0]}))
            for target, layer in self.adapters.layers.items()
        ]
        layout = self.room.base.layout
        batch = collate([Example([layout.eos_id] * 2, [layout.eos_id] * 2)], layout, self.device)
        observers, self._observers = self._observers, []
        condition, self.adapters.condition = self.adapters.condition, {}  # that of other rows
        try:
            with torch.no_grad(), evaluating(self.adapters.model), self._raw.context():
                logits(self.adapters.model, batch)
        finally:
            self._observers, self.adapters.condition = observers, condition
            for hook in hooks:
                hook.remove()
        groups: dict[int, list[str]] = {}
        for target in self.adapters.layers:
            groups.setdefault(id(inputs.get(target, target)), []).append(target)
        return [tuple(targets) for targets in groups.values()]

    # Forward and gradient, on the raw module.

    def without_dropout(self) -> AbstractContextManager[None]:
        return evaluating(self.adapters.model)

    def apart(self, compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` gives as in the engine's forward, of which the engine knows nothing."""
        found: Tensor = self._raw(compute)
        return found

    def forward(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        self._show(batch)

        def compute() -> Tensor:
            return self.sharing.logits(batch)

        if parameters is None:
            found: Tensor = self._raw(compute)
            return found
        names = self._full_names()
        values = {f"model.{names[name]}": value for name, value in parameters.items()}
        out: Tensor = torch.func.functional_call(self._raw, values, (compute,))
        return out

    def _full_names(self) -> dict[str, str]:
        by_id = {id(p): name for name, p in self.adapters.model.named_parameters()}
        return {name: by_id[id(p)] for name, p in self.adapters.parameters().items()}

    def gradient(
        self, loss: Callable[[Batch], Tensor], batches: Iterator[Batch], per_example: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        return self._each_gradient(loss, batches) if per_example else iter([self._sum_gradient(loss, batches)])

    def _one_gradient(
        self, loss: Callable[[Batch], Tensor], batch: Batch, retain_graph: bool = False
    ) -> dict[str, Tensor]:
        parameters = self.parameters()
        with torch.enable_grad():
            found = torch.autograd.grad(
                loss(batch), list(parameters.values()), allow_unused=True, retain_graph=retain_graph
            )
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

    def update_gradients(
        self, loss: Callable[[Batch], Tensor], batches: Iterator[Batch], per_example: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        if per_example:
            for batch in batches:
                rows = map(batch.row, range(batch.size))
                yield from (self._update_gradient(loss, row) for row in rows if row.label_tokens)
            return
        total = {target: torch.zeros(shape, device=self.device) for target, shape in self.targets().items()}
        for batch in batches:
            for target, gradient in self._update_gradient(loss, batch).items():
                total[target] += gradient
        yield {target: self.sum(gradient) for target, gradient in total.items()}

    def _update_gradient(self, loss: Callable[[Batch], Tensor], batch: Batch) -> dict[str, Tensor]:
        """Of one forward: ``Σ δ xᵀ`` over its positions, δ the gradient by a layer's output for its input x."""
        found: dict[str, Tensor] = {}

        def watched(target: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                x = inputs[0].detach().flatten(0, -2).float()

                def take(delta: Tensor) -> None:
                    gradient = delta.flatten(0, -2).float().mT @ x
                    found[target] = found[target] + gradient if target in found else gradient

                output.register_hook(take)  # type: ignore[no-untyped-call]

            return hook

        hooks = [layer.register_forward_hook(watched(target)) for target, layer in self.adapters.layers.items()]
        try:
            with evaluating(self.adapters.model), torch.enable_grad():
                torch.autograd.grad(loss(batch), list(self.parameters().values()), allow_unused=True)
        finally:
            for handle in hooks:
                handle.remove()
        shapes = self.targets()
        return {t: found[t] if t in found else torch.zeros(shapes[t], device=self.device) for t in shapes}

    def _each_gradient(self, loss: Callable[[Batch], Tensor], batches: Iterator[Batch]) -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            # The rows of a batch share the graph of its condition, if that has one.
            shared = any(value.requires_grad for value in batch.condition.values())
            rows = map(batch.row, range(batch.size))
            with evaluating(self.adapters.model):
                mine = [self._one_gradient(loss, row, shared) for row in rows if row.label_tokens]
            yield from self._of_every_rank(mine)

    def _of_every_rank(self, mine: Sequence[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Rank 0's, then rank 1's, …, on every rank."""
        if self.ranks == 1:
            yield from mine
            return
        counts = self.gather({self.rank: len(mine)})
        like = {name: torch.empty_like(p, dtype=torch.float32) for name, p in self.parameters().items()}
        for owner in range(self.ranks):
            for number in range(counts[owner]):
                vector = flat(mine[number] if owner == self.rank else like, like)
                torch.distributed.broadcast(vector, src=owner)
                yield unflat(vector, like)

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

    @property
    def observed(self) -> bool:
        """Whether anybody looks at layers."""
        return bool(self._observers)

    def _observed(self, target: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # A forward inside a backward is activation checkpointing's second look at the same rows.
            if not self._observers or torch._C._current_graph_task_id() != -1:
                return
            for what, see in self._observers:
                rows = (inputs[0] if what == "inputs" else output).detach()
                if self._batch is not None:
                    rows = self._batch.by_row(rows)
                see(target, rows, self._counts(target, rows))

        return hook

    def _counts(self, target: str, rows: Tensor) -> Tensor | None:
        """How often each of a target's rows counts; None where the rows are not the batch's (a step of generation)."""
        batch = self._batch
        if batch is None or rows.dim() != 3:
            return None
        masks = [batch.attention_mask.bool(), batch.labels != IGNORE]
        if self.room.base.encoder_decoder and ".encoder." not in f".{target}" and not _reads_encoder(target):
            masks = masks[1:]
        mask = next((mask for mask in masks if mask.shape == rows.shape[:2]), None)
        if mask is None:  # positions of the model's own making are taken for real ones
            own = batch.labels.shape[1] and rows.shape[0] == batch.size
            return batch.counts.expand(rows.shape[:2]) if own else None
        return mask * batch.counts

    def features(self, batch: Batch) -> Tensor:
        with self.adapters.without_terms(), self.room.root.context():
            return features(self.adapters.model, batch)

    @property
    def embedding_width(self) -> int:
        return int(unwrapped(self.adapters.model).get_input_embeddings().weight.shape[1])  # type: ignore[operator]

    def embeddings(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return embedded(self.adapters.model, batch), source_mask(batch)

    # Rows.

    def batches(self, source: Source | None = None) -> Iterator[Batch]:
        source = source or self.own_rows()
        micro = self.micro_batch
        tokens = int(lengths(source.examples)[1].sum())
        chunks = [range(i, min(i + micro, len(source.examples))) for i in range(0, len(source.examples), micro)]
        for first in range(0, len(chunks), self.ranks):
            mine = first + self.rank
            rows = chunks[mine] if mine < len(chunks) else range(0, 1)
            weight = source.weight / max(tokens, 1) if mine < len(chunks) else 0.0
            examples = [source.examples[i] for i in rows]
            yield self.make_batch(examples, [source.tasks[i] for i in rows], [weight] * len(rows))

    def make_batch(self, examples: Sequence[Example], tasks: Sequence[str], weights: Sequence[float]) -> Batch:
        """Padded tensors with row weights, conditioned by the method."""
        return self.ready(self.padded(examples, weights, tasks), tasks)

    def padded(self, examples: Sequence[Example], weights: Sequence[float], tasks: Sequence[str] = ()) -> Batch:
        """Padded tensors on the CPU, where a GPU can fetch them without being waited for. Any thread may call it."""
        batch = self.sharing.with_heads(
            collate(examples, self.room.base.layout, weights=list(weights)), examples, tasks
        )
        return batch.pinned() if self.device.type == "cuda" else batch

    def ready(self, batch: Batch, tasks: Sequence[str], first: int | None = None) -> Batch:
        """A padded batch on the device, conditioned by the method.

        tasks: of its rows. first: the place of the first one in the step's global batch.
        """
        places = None if first is None else torch.arange(first, first + batch.size, device=self.device)
        known = replace(batch.to(self.device), tasks=tuple(tasks), places=places)
        return self._conditioned(known, tasks[0] if len(set(tasks)) == 1 else None)

    def _conditioned(self, batch: Batch, task: str | None) -> Batch:
        if not overrides(self.room.method, "condition"):
            return batch
        return replace(batch, condition=self.room.method.condition(self, batch, task) or {})

    def generate(
        self,
        examples: Sequence[Example],
        task: str | None = None,
        tick: Callable[[int], None] = lambda _: None,
        most: int | None = None,
    ) -> list[str]:
        return self._answers([example._replace(target=[]) for example in examples], task, tick, most=most)

    def answer(
        self,
        examples: Sequence[Example],
        task: str | None = None,
        tick: Callable[[int], None] = lambda _: None,
        labels: Choice | None = None,
    ) -> list[str]:
        """The same as ``generate``, of rows whose right answer is known: those that are right need no decoding.

        Under ``eval.mode: choose`` one of ``labels``, where these are given.
        """
        mode = self.config.eval.mode
        if mode == "generate":
            return self.generate(examples, task, tick)
        return self._answers(examples, task, tick, labels if mode == "choose" else None)

    def _answers(
        self,
        examples: Sequence[Example],
        task: str | None,
        tick: Callable[[int], None],
        labels: Choice | None = None,
        most: int | None = None,
    ) -> list[str]:
        layout, most = self.room.base.layout, most or self.config.eval.max_new_tokens
        heads = self.sharing.of_prompts(examples)

        def answered(_: int, numbers: Sequence[int]) -> list[str]:
            rows = [examples[number] for number in numbers]
            prompts = self._prompts(rows, task)
            targets = [[] if example.target_cut else example.target for example in rows]
            with torch.no_grad(), self.room.root.context():
                head = heads.read(prompts)
                prompts = replace(prompts, lengths=tuple(len(example.source) for example in rows))
                model = self.adapters.model
                if labels is None:
                    right = self.right(len(rows))
                    ids, _verified = verified_answers(model, prompts, targets, layout, most, self._show, head, right)
                else:
                    ids = choose(model, prompts, labels, layout, self._show, head)
            return [self.room.encoder.decode(row) for row in ids]

        return self._by_batch(examples, answered, tick)

    def likelihoods(
        self, questions: Sequence[Question], task: str | None = None, tick: Callable[[int], None] = lambda _: None
    ) -> list[list[Likelihood]]:
        """How likely the model makes each question's continuations, with the parameters that answer. *Collective*."""
        layout, prompted = self.room.base.layout, [question.prompt for question in questions]
        heads = self.sharing.of_prompts(prompted)

        def looked(_: int, numbers: Sequence[int]) -> list[list[Likelihood]]:
            rows = [prompted[number] for number in numbers]
            prompts = self._prompts(rows, task)
            with torch.no_grad(), self.room.root.context():
                head = heads.read(prompts)
                prompts = replace(prompts, lengths=tuple(len(example.source) for example in rows))
                continuations = [questions[number].continuations for number in numbers]
                return likelihoods(self.adapters.model, prompts, continuations, layout, self._show, head)

        return self._by_batch(prompted, looked, tick)

    def sample(
        self, examples: Sequence[Example], tokens: int, top_k: int, repetition_penalty: float
    ) -> list[list[int]]:
        layout = self.room.base.layout

        def drawn(number: int, rows: Sequence[int]) -> list[list[int]]:
            prompts = self._prompts([examples[row] for row in rows], None)
            with torch.random.fork_rng(self._gpus()), torch.no_grad(), self.room.root.context():
                torch.manual_seed(derived_seed(self.config.seed, self.drawn_by, "sample", number))
                return sampled(self.adapters.model, prompts, layout, tokens, top_k, repetition_penalty)

        return self._by_batch(examples, drawn, whole=True)

    def _by_batch(
        self,
        examples: Sequence[Example],
        work: Callable[[int, Sequence[int]], Sequence[Result]],
        tick: Callable[[int], None] = lambda _: None,
        whole: bool = False,
    ) -> list[Result]:
        """What ``work`` makes of each example, in their order, in batches dealt to the ranks. *Collective*.

        Batches are formed over all examples, and ``work`` is told a batch's number and the numbers of its examples: the
        ranks' count changes no answer.
        Where memory does not suffice for one, a rank may take it in parts (``Fit.answered``), unless it is ``whole``.
        """
        sources, _ = lengths(examples)
        found: dict[int, Result] = {}
        done = 0
        for number, rows in enumerate(token_batches(sources.tolist(), self.batch_tokens)):
            done += len(rows)
            if number % self.ranks == self.rank:
                width = int(sources[rows].max())
                made = self.fit.answered(rows, width, partial(work, number), self.config, whole)
                found.update(zip(rows, made, strict=True))
                tick(done)
        return [result for _, result in sorted(self.gather(found).items())]

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch of answers, padding included."""
        gpu = 65536 if self.room.base.encoder_decoder else 16384
        return self.config.eval.batch_tokens or (gpu if self.device.type == "cuda" else 4096)

    def right(self, rows: int) -> list[bool] | None:
        """Which answers of a batch are taken for right whatever the model says: of a rehearsal alone."""
        return None

    def _prompts(self, examples: Sequence[Example], task: str | None) -> Batch:
        """Inputs alone on the device: a method's condition never sees the labels, as there are none in use."""
        prompts = self._conditioned(collate_prompts(examples, self.room.base.layout, self.device), task)
        self._show(prompts)
        return prompts

    def _gpus(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    def _show(self, batch: Batch) -> None:
        """The batch that the next forward is about, for those who look at layers alone."""
        self._batch = batch
        self.dropout.see(batch)
        self.adapters.condition = batch.condition

    def show_part(self, part: Batch) -> None:
        """A part of the batch shown, which the model reads by itself."""
        self._batch = part
        self.dropout.part(part)

    # Ranks.

    def gather(self, mine: dict[int, Any]) -> dict[int, Any]:
        """The union of every rank's numbered results, on every rank. *Collective*."""
        parts: list[dict[int, Any]] = gather_objects(self.room.place, mine)
        return {number: value for part in parts for number, value in part.items()}

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        if self.ranks > 1:
            torch.distributed.all_reduce(total)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        return self.sum(tensor) / self.ranks

    def broadcast(self, tensor: Tensor) -> Tensor:
        value = tensor.detach().clone(memory_format=torch.contiguous_format)
        if self.ranks > 1:
            torch.distributed.broadcast(value, src=0)
        return value

    def rng(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self.config.seed, self.drawn_by, purpose))

    # Parameters.

    def write(self, values: Mapping[str, Tensor]) -> None:
        trained = self.engine.parameters if self.engine is not None else {}
        own = self.adapters.parameters()
        for name, value in values.items():
            if self.engine is not None and name in trained:
                self.engine.write({name: value})
            else:
                own[name].data.copy_(value)

    def moments(self, name: str) -> dict[str, Tensor] | None:
        return self.engine.moments(name) if self.engine else None

    def extra_step(self, gradients: Mapping[str, Tensor]) -> bool:
        assert self.one_more is not None, "an optimizer lives with the steps of a stage"
        return self.one_more(gradients)

    def set_moments(self, name: str, moments: Mapping[str, Tensor]) -> None:
        assert self.engine is not None, "moments live with the engine"
        self.engine.set_moments(name, moments)


def commit_update(method: Method, stage: StageRun) -> None:
    """Fold or keep what the stage has learned, as the method says; the model answers as before."""
    how = method.fold(stage)
    if how == "factors":
        stage.adapters.fold_live()
    elif how == "dense":
        stage.adapters.fold_dense(stage.plan.name, method.dense_update(stage))
    elif how == "replace":
        total = method.replacement(stage)
        if stage.plan.start == "base" and stage.room.initial is not None:
            total = {target: _added(update, stage.room.from_base(target)) for target, update in total.items()}
        stage.adapters.replace(stage.plan.name, total)
    else:
        stage.adapters.keep_live()


def _added(update: Tensor, begun: Tensor | None) -> Tensor:
    return update if begun is None else update + begun.to(update)


def _reads_encoder(target: str) -> bool:
    """Whether a target in the decoder has the encoder's positions for rows: K and V of cross-attention."""
    block, _, layer = target.rpartition(".")
    crosses = any(name in block for name in ("EncDecAttention", "encoder_attn", "cross_attn", "crossattention"))
    return crosses and layer.startswith(("k", "v"))
