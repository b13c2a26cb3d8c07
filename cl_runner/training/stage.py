"""The stage that hooks are handed: its services, on the raw module and over the ranks.

``methods/protocol.py`` says what each service promises; this file keeps the promise for one process or many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

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
from cl_runner.methods.protocol import Method, Progress, Source, StagePlan, overrides
from cl_runner.models.base import Base
from cl_runner.models.batch import Batch, Example, Question, collate, collate_prompts, token_batches
from cl_runner.models.choose import Choice
from cl_runner.models.dropout import RowDropout
from cl_runner.models.encoding import Encoder
from cl_runner.models.forward import embedded, evaluating, features, source_mask, unwrapped
from cl_runner.models.likelihood import Likelihood
from cl_runner.models.token_cache import lengths
from cl_runner.training import asking, gradients
from cl_runner.training.fitting import Fit
from cl_runner.training.looking import Looking, See, Which
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
        self.looking = Looking(self)
        self._raw = room.root.twin()
        self._input_groups: list[tuple[str, ...]] | None = None

    def close(self) -> None:
        """Remove the observation hooks."""
        self.looking.close()

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
            self._input_groups = self.looking.shared_inputs()
        return self._input_groups

    # Forward and gradient, on the raw module.

    def without_dropout(self) -> AbstractContextManager[None]:
        return evaluating(self.adapters.model)

    def apart(self, compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` gives as in the engine's forward, of which the engine knows nothing."""
        found: Tensor = self._raw(compute)
        return found

    def forward(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        self.show(batch)

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
        if per_example:
            return gradients.by_row(self, loss, batches)
        return iter([gradients.summed(self, loss, batches)])

    def update_gradients(
        self, loss: Callable[[Batch], Tensor], batches: Iterator[Batch], per_example: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        if per_example:
            return gradients.of_updates_by_row(self, loss, batches)
        return iter([gradients.of_updates(self, loss, batches)])

    # Observation.

    def observe(self, what: Which, see: See) -> AbstractContextManager[None]:
        return self.looking.observe(what, see)

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
        return asking.answers(self, [example._replace(target=[]) for example in examples], task, tick, most=most)

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
        return asking.answers(self, examples, task, tick, labels if mode == "choose" else None)

    def likelihoods(
        self, questions: Sequence[Question], task: str | None = None, tick: Callable[[int], None] = lambda _: None
    ) -> list[list[Likelihood]]:
        """How likely the model makes each question's continuations, with the parameters that answer. *Collective*."""
        return asking.likelihoods(self, questions, task, tick)

    def sample(
        self, examples: Sequence[Example], tokens: int, top_k: int, repetition_penalty: float
    ) -> list[list[int]]:
        return asking.samples(self, examples, tokens, top_k, repetition_penalty)

    def by_batch(
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

    def prompts(self, examples: Sequence[Example], task: str | None) -> Batch:
        """Inputs alone on the device: a method's condition never sees the labels, as there are none in use."""
        prompts = self._conditioned(collate_prompts(examples, self.room.base.layout, self.device), task)
        self.show(prompts)
        return prompts

    def show(self, batch: Batch) -> None:
        """The batch that the next forward is about, for those who look at layers alone."""
        self.looking.batch = batch
        self.dropout.see(batch)
        self.adapters.condition = batch.condition

    def show_part(self, part: Batch) -> None:
        """A part of the batch shown, which the model reads by itself."""
        self.looking.batch = part
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
