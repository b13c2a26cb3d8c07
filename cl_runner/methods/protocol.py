"""The one waist: what a continual-learning method is, and what it may touch.

A method is one class in one short file. Every hook has a default that does nothing; a hook reaches the machinery only
through the ``stage`` it is handed. Nothing here imports torch at run time, so that listing methods is instant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import Field, model_validator

from cl_runner.adapters.kind import Fold, Need
from cl_runner.config.schema import RunConfig, Section

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cl_runner.adapters.pairs import FactorGroup, Pair
    from cl_runner.adapters.terms import Term
    from cl_runner.engine.optim import ParameterGroup
    from cl_runner.models.batch import Batch, Example


@dataclass(frozen=True)
class StagePlan:
    """One stage: its name, the tasks it trains on, and what it starts from."""

    name: str
    tasks: tuple[str, ...]
    start: Literal["previous", "base"] = "previous"


@dataclass
class Source:
    """A part of a stage's training mix: examples, and the weight of each one's label tokens in the loss.

    ``ids`` are what the data call the rows (``train/7``), to name them to a user; empty where they are no rows of data.
    """

    examples: Sequence[Example]
    tasks: Sequence[str]
    weight: float = 1.0
    ids: Sequence[str] = ()

    def take(self, rows: Iterable[int]) -> Source:
        """Some of its rows, by number."""
        rows = list(rows)
        ids = [self.ids[i] for i in rows] if self.ids else []
        return Source([self.examples[i] for i in rows], [self.tasks[i] for i in rows], self.weight, ids)

    def by_length(self) -> Source:
        """The same rows task by task, the longest first: for sums over all of them, with next to no padding."""
        size = [len(example.source) + len(example.target) for example in self.examples]
        return self.take(sorted(range(len(size)), key=lambda row: (self.tasks[row], -size[row])))


@dataclass
class State:
    """What a method carries over. Whatever is not here does not survive.

    ``tensors`` come back to the bit, on the CPU, with dtype and shape; ``json`` comes back as JSON has it: names are
    text, tuples are lists, and numbers are finite.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    json: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """How far the stage is: optimizer steps done, of how many, and the detached task loss of the step so far.

    The loss is this rank's share; after a step's last forward the mean over ranks is the loss of the global batch.
    """

    step: int
    steps: int
    loss: Tensor | None
    left_out: int = 0  # of the steps done, those that moved nothing (training.non_finite)

    @property
    def taken(self) -> int:
        """Steps that were taken: what Adam's moments are made of."""
        return self.step - self.left_out

    @property
    def share(self) -> float:
        """Steps done, 0 to 1."""
        return self.step / self.steps if self.steps else 1.0


class Stage(Protocol):
    """What a hook is handed: the stage it works for, and the services of the machinery.

    Services marked *collective* have to be called on every rank, in the same order.
    """

    config: RunConfig
    plan: StagePlan
    index: int  # from 0
    order: tuple[StagePlan, ...]
    evaluating: bool  # True when the stage was rebuilt only to answer

    @property
    def progress(self) -> Progress:
        """Steps done and the task loss of the step so far."""

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""

    @property
    def rank(self) -> int:
        """This process's number."""

    @property
    def encoder_decoder(self) -> bool:
        """Whether the base reads its input in an encoder of its own."""

    # What trains.

    def begin(self) -> None:
        """A new parameter set of the adapter kind, from seed and stage alone."""

    def train_on(self) -> None:
        """Train on with the set that answers now; a new one where there is none."""

    def begin_terms(self, terms: Mapping[str, Term], shared: Mapping[str, torch.nn.Parameter] | None = None) -> None:
        """Target → a term in the place of its pair; all their parameters train.

        ``shared`` are parameters that several terms hold, or none of them. Targets without a term keep the pair, where
        one was begun.
        """

    def hold_prompts(self, values: Mapping[str, Tensor]) -> None:
        """Of a kind with prompts: parameters of these values, by name, in place of those there are."""

    def answer_with(self, prompt: Tensor) -> None:
        """Of a kind with prompts: the one prompt (p, d) that answers after this stage, for its folder on disk."""

    def vocabulary_rows(self, count: int, generator: torch.Generator) -> Tensor:
        """Of a kind with prompts: embeddings of ``count`` tokens drawn from a CPU generator, (count, d) fp32."""

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Everything that trains, by name."""

    def all_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The same, whether or not it asks for gradients now (between stages nothing does)."""

    def named(self, role: str) -> dict[str, str]:
        """Target → name of its parameter of that role: ``A``, ``B``, ``weight``, or a term's own word for it."""

    def ordinary_groups(self, parameters: Mapping[str, torch.nn.Parameter] | None = None) -> list[ParameterGroup]:
        """All that trains, or these of it, by the rule that ``training.optimizer`` says."""

    # What it is beside, and makes.

    def targets(self) -> dict[str, tuple[int, int]]:
        """Target layer → (m, n), out by in."""

    def transposed(self, target: str) -> bool:
        """Whether a target's own weight lies in by out, as GPT-2's do."""

    def head_targets(self) -> set[str]:
        """The targets that are the output head of the model."""

    def rank_of(self, target: str) -> int:
        """r of the stage's pair at a target."""

    def scale_of(self, target: str) -> float:
        """s of the stage's pair at a target, alpha / r (``adapter.rslora``: alpha / √r)."""

    def factors(self) -> list[FactorGroup]:
        """The live pair and past ones in groups of equal shape."""

    @property
    def start(self) -> Pair | None:
        """The pair as the stage began, where it trains on."""

    def terms(self) -> dict[str, Any]:
        """Target → the live term that the method gave it; none where there are no terms."""

    def live_update(self) -> dict[str, Tensor]:
        """Target → ΔW (m, n) fp32 of what the stage trains."""

    def base_weight(self, target: str) -> Tensor:
        """W0 of a target layer, (m, n)."""

    def past_update(self, target: str) -> Tensor | None:
        """The sum of past updates of a target layer, folded in whatever way, (m, n) fp32, no copy; None of none."""

    def whole_weight(self, target: str) -> Tensor:
        """W0 and all past updates of a target layer, (m, n) fp32, before any rounding."""

    def own_rows(self) -> Source:
        """The stage's own rows, from ``begin_task`` to ``end_task``."""

    def input_groups(self) -> list[tuple[str, ...]]:
        """Targets that share an input."""

    # Forwards and gradients.

    def without_dropout(self) -> AbstractContextManager[None]:
        """Inside, forwards have no dropout."""

    def forward(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (b, t, vocabulary) at the label positions, on the raw module; other parameter values if given."""

    def gradient(
        self, loss: Callable[[Batch], Tensor], batches: Iterator[Batch], per_example: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Gradients of ``loss`` by name, fp32, on the raw module, dropout off. *Collective*.

        One dict: the sum over all batches of all ranks, the same on every rank. ``per_example``: one dict for each
        example of all ranks, in the order of the source, the same on every rank.
        """

    def update_gradients(
        self, loss: Callable[[Batch], Tensor], batches: Iterator[Batch], per_example: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Gradients of ``loss`` by the update ΔW (m, n) of each target, fp32, on the raw module, dropout off.

        One dict: the sum over all batches of all ranks, the same on every rank (*collective*). ``per_example``: one for
        each example of this rank, and of no other.
        """

    def observe(
        self, what: Literal["inputs", "outputs"], see: Callable[[str, Tensor, Tensor | None], None]
    ) -> AbstractContextManager[None]:
        """Call ``see(target, rows, counts)`` at every forward of a target layer: ``rows`` (b, t, d), counts (b, t).

        counts: int64, how many tokens of the batch's rows each is: 0 of padding and of rows without weight, more than 1
        where rows share the beginning of their prompts, which is then a forward by itself, or stands with all rows in
        one. None where a target is handed other rows (in a step of generation).
        """

    def batches(self, source: Source | None = None) -> Iterator[Batch]:
        """This rank's share of a source (default: the stage's own rows), as many batches on every rank.

        Row weights are such that the sum of the token losses over all batches and ranks is the mean per label token.
        """

    def generate(
        self,
        examples: Sequence[Example],
        task: str | None = None,
        tick: Callable[[int], None] = lambda _: None,
        most: int | None = None,
    ) -> list[str]:
        """Greedy answers, in order, the same on every rank. *Collective*.

        ``task`` where the method may know it; ``tick`` is told how many examples are answered, batch by batch; ``most``
        tokens long, default ``eval.max_new_tokens``.
        """

    def sample(
        self, examples: Sequence[Example], tokens: int, top_k: int, repetition_penalty: float
    ) -> list[list[int]]:
        """An answer drawn to each example, as ids without the end token. *Collective*.

        In order, the same on every rank; at most ``tokens`` long, each token among the ``top_k`` likeliest. A second
        call in a stage draws the same.
        """

    def features(self, batch: Batch) -> Tensor:
        """What the frozen base makes of each source: the mean of its last hidden states, (b, d) fp32.

        Without prompts, live terms, labels, dropout or gradient.
        """

    @property
    def embedding_width(self) -> int:
        """d, the width of the input embeddings."""

    def embeddings(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The base's embeddings of the input tokens (b, s, d), fp32, and which are a row's source (b, s).

        Padding and label tokens are not. Without gradient.
        """

    # Over the ranks.

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks. *Collective*."""

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over ranks. *Collective*."""

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's value on every rank. *Collective*."""

    def rng(self, purpose: str) -> torch.Generator:
        """A CPU generator from seed, stage and purpose alone: the same on every rank."""

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Set parameters by name: the only write that lasts. The same values on every rank."""

    def moments(self, name: str) -> dict[str, Tensor] | None:
        """Adam's whole moments of a parameter; None before the first step. *Collective*."""

    def extra_step(self, gradients: Mapping[str, Tensor]) -> bool:
        """One more step of the stage's optimizer, from ``after_step``: of whole gradients, the same on every rank.

        They are clipped, ``edit_gradients`` sees them, moments and their age go on, the learning rate is that of the
        step before. Whether it was taken: not where one is not finite. *Collective*.
        """

    def set_moments(self, name: str, moments: Mapping[str, Tensor]) -> None:
        """Replace Adam's moments of a parameter."""


class Reorthogonalise(Section):
    """Every few steps a factor is put back to orthonormal rows, or rows of norm 1."""

    how: Literal["hard", "soft"] = Field(default="hard", description="hard: QR, the same span; soft: rows of norm 1.")
    every: int = Field(default=100, ge=1, description="Optimizer steps between.")
    on: Literal["A", "B", "both"] = Field(default="A", description="Which factor; of B the columns.")
    rescale: bool = Field(default=False, description="Correct the other factor, so that the update stays as it was.")
    moments: bool | None = Field(
        default=None, description="Whether Adam's moments go over to the new factors; null: with rescale."
    )

    @model_validator(mode="after")
    def _one_to_correct(self) -> Reorthogonalise:
        if self.rescale and self.on == "both":
            raise ValueError("cannot rescale on: both, as no factor is left to correct; use A or B")
        return self

    @property
    def maps_moments(self) -> bool:
        """Whether Adam's moments go over."""
        return self.rescale if self.moments is None else self.moments


class PairSettings(Section):
    """Of every method that trains a LoRA pair without promising anything of its factors."""

    reorthogonalise: Reorthogonalise | None = Field(
        None,
        description="{how: hard or soft, every: steps, on: A, B or both, rescale: true, moments: true}; null: never.",
    )


class LoraOrFull(PairSettings):
    """What the papers' baselines have the choice of."""

    train: Literal["lora", "full"] = Field(
        "lora", description="What trains: a LoRA pair beside the frozen base, or all weights of the model (full)."
    )


class Method:
    """A continual-learning method. Subclass it in one file, or one folder; ``methods/__init__.py`` lists them.

    Class attributes are what ``cl-runner show METHOD`` prints.
    """

    class Config(Section):
        """The method's own settings.

        ``elsewhere: ClassVar`` are defaults of other sections that the method has beside them, dotted key → value: all
        that is given is stronger.
        """

    name: ClassVar[str]
    title: ClassVar[str]
    equation: ClassVar[str] = ""
    paper: ClassVar[str] = ""  # arXiv id and short title
    carried: ClassVar[str] = ""
    growth: ClassVar[str] = ""
    task_id: ClassVar[Literal["no", "yes", "optional"]] = "no"  # at inference; optional: as the settings have it
    trains: ClassVar[str] = "a LoRA pair"
    factors: ClassVar[str] = "A (r × n, reads the input) is PEFT's lora_A, B (m × r) its lora_B; ΔW = alpha/r · B A"
    frozen: ClassVar[str] = "the base and all past updates"
    forms: ClassVar[str] = ""  # how ``method.reference`` and the paper differ, where both are built
    any_rank: ClassVar[bool] = False  # every stage begins a pair of its own, whose rank may be chosen (adapter.r=auto)
    trains_on: ClassVar[bool] = False  # one parameter set serves all stages, each of which goes on with it
    by_order: ClassVar[bool] = False  # what a stage does depends on how many the order has: no run can be extended
    # Every task is trained from the base as if there were no other: its random numbers are drawn by its name, not its
    # place, and runs of other orders have the stage in common (``training/adopted.py``). No hook may read of another
    # stage, nor keep what one will read.
    alone: ClassVar[bool] = False
    # Own settings that the first stage does not read, nor what it leaves: there is no past to penalise yet. Runs that
    # differ in them alone have it in common (``training/reuse.py``; a test trains both).
    since_second: ClassVar[tuple[str, ...]] = ()
    # What earlier stages left beside what trains: folded pairs, nothing, a folded matrix, what the method alone knows.
    past_as: ClassVar[Literal["pairs", "none", "matrix", "other"]] = "pairs"
    by_shape: ClassVar[bool] = False  # whether ``check`` or ``grows`` wants the layers' shapes
    only_kind: ClassVar[str] = ""  # the adapter kind without which there is no such method, whatever ``adapter.kind``
    edits_before_clip: ClassVar[bool] = False  # ``edit_gradients`` comes first, and the clip goes by what it left
    dense: ClassVar[bool] = False  # every stage folds ΔW without factors: its folder holds whole matrices
    # Tasks whose answers no later stage changes: those learned, from their last stage on; or all of them, the others
    # being answered by the untouched base. They are not asked again, so that all that a forward of such a task reads
    # has to stay the same to the bit: what is kept, ``condition``, terms.
    settled: ClassVar[Literal["none", "learned", "all"]] = "none"
    remade: ClassVar[str] = ""  # what the method does with what has trained, so that something else answers
    revision: ClassVar[int] = 1  # goes up where equations change whatever is set: no run goes on from one to another

    def __init__(self, config: Section) -> None:
        self.config: Any = config
        self.stages = 1  # of the plan, once ``plan`` has made it
        # In ``check`` and ``grows``, once the layers are known: how many numbers train, and what the layers are called.
        self.trained: int | None = None
        self.targets: Sequence[str] | None = None

    @property
    def full(self) -> bool:
        """Whether all weights of the model train."""
        return isinstance(self.config, LoraOrFull) and self.config.train == "full"

    @property
    def needs(self) -> tuple[Need, ...]:
        """What an adapter kind has to offer, as the settings have it; of each tuple any one will do.

        Factors ``A`` and ``B`` are such as receive gradient: a penalty on others would be silently nothing.
        """
        if self.full:
            return (("weights",),)
        return (("update", "weights"),) if "train" in type(self).Config.model_fields else (("update",),)

    def kind(self, config: RunConfig) -> str:
        """The name of the adapter kind that trains."""
        return "full" if self.full else type(self).only_kind or config.adapter.kind

    @property
    def has_rank(self) -> bool:
        """Whether what trains has the rank and the scale that ``adapter`` sets."""
        return not self.full and not type(self).factors.startswith("none")

    @property
    def reorthogonalise(self) -> Reorthogonalise | None:
        """When and how a factor is put back, where the method has that option and it is set."""
        return self.config.reorthogonalise if isinstance(self.config, PairSettings) else None

    @property
    def form(self) -> str:
        """``reference`` or ``paper`` where a method has both, ``full`` where all weights train instead of a pair."""
        return "full" if isinstance(self.config, LoraOrFull) and self.full else ""

    @property
    def knows_task(self) -> bool:
        """Whether a row's task is known where it is answered: always, never, or (optional) as settings have it."""
        return type(self).task_id == "yes"

    def configure(self, config: Section) -> None:
        """Take the settings of one stage (per-task and per-position ones included), before ``build``."""
        self.config = config

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        """Refuse with UserError, before anything is trained, what cannot work.

        Runs before stage 1, after ``plan``: with the settings alone, and with the target layers' (m, n) once they are
        known (where ``by_shape``, from the model's config, before its weights are loaded).
        """

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        """Runs with ``check``, where ``by_shape``: a line on how much this method will carry; empty says nothing."""
        return ""

    def plan(self, order: Sequence[str]) -> list[StagePlan]:
        """Runs once: the stages of the order. Default: one a task, each from the state before; ``stages`` of them."""
        self.stages = len(order)
        return [StagePlan(task, (task,)) for task in order]

    def prefix_tokens(self, stages: int) -> int:
        """Runs before stage 1: how long a prefix may become (``condition``), of an order of so many stages."""
        return 0

    def build(self, stage: Stage) -> None:
        """Runs at the start of a stage, on resume and before ``eval``: structures from config and state alone.

        Default: a new pair for the stage. What is no pair goes by ``stage.begin_terms``; a term that was folded at
        commit is not needed where ``stage.evaluating``, one that was kept has to be there as it was.
        """
        stage.begin()

    def parameter_groups(self, stage: Stage) -> list[ParameterGroup]:
        """Runs after build: learning rates, weight decay and rules. Default: ``training.optimizer`` for everything."""
        return stage.ordinary_groups()

    def begin_task(self, stage: Stage) -> None:
        """Runs once a stage, before ``training_data`` and ``parameter_groups``; what it makes is state.

        Data at hand, dropout off, no engine yet: it may still decide what trains, and in what shape.
        """

    def training_data(self, stage: Stage, own: Source) -> list[Source]:
        """Runs before training: the mix. Default: the stage's own rows."""
        return [own]

    def condition(self, stage: Stage, batch: Batch, task: str | None) -> dict[str, Tensor] | None:
        """Runs before every forward: per-example tensors (b, …), sliced with the batch as ``batch.condition``.

        ``prefix`` (b, p, d) is soft prompts: embeddings that stand before each row's input.
        """
        return None

    def routes(self, stage: Stage, batch: Batch) -> Tensor | None:
        """Runs when ``analyze --routes`` asks: what each stage's part counts for in each row's answer, (b, stages).

        Default: None, no part is weighed by the row.
        """
        return None

    def loss(self, stage: Stage, batch: Batch) -> Tensor:
        """Runs at every micro-batch. Default: the weighted token loss."""
        from cl_runner.models.forward import token_loss

        return (token_loss(stage.forward(batch), batch.labels) * batch.token_weights).sum()

    def take_back(self, stage: Stage) -> None:
        """Runs where a step that did not fit into memory is done again from its beginning (``training.auto_batch``).

        What ``loss``, ``penalty`` and ``condition`` have left of it in the method itself goes. Default: they leave
        nothing. (With that setting they may be no collectives.)
        """

    def reads_past(self) -> Mapping[str, str]:
        """Runs at commit: what this method reads of the past factors that ``stage.factors()`` offers.

        ``A`` or ``B`` to ``rows`` (all of them, however many) or to ``gram`` (``past.gram`` where there are more rows
        than the matrix has; fewer may be read as rows). What is not read is let go of, once the adapter's folder does
        without it too: memory then stays constant. Default: everything.
        """
        return {"A": "rows", "B": "rows"}

    def penalty(self, stage: Stage) -> Tensor | None:
        """Runs once per optimizer step, the same on every rank, fp32; None adds nothing.

        ``training.penalty_at: micro`` takes it as many times as the step has micro-batches.
        """
        return None

    def logged(self, stage: Stage) -> dict[str, Any]:
        """Runs at every logged step, after the step, on every rank: columns of its own for ``log.jsonl``."""
        return {}

    def edit_gradients(self, stage: Stage, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Runs after clipping, on whole fp32 mean gradients; returns those to replace. None leaves all.

        Before clipping where ``edits_before_clip``: the norm that is clipped, and logged, is then that of the result.
        """
        return None

    def whole_step(self, stage: Stage, name: str, gradient: Tensor, lr: float) -> Tensor:
        """Runs for each parameter of rule ``whole``: the update to add to it, lr applied."""
        raise NotImplementedError

    def after_step(self, stage: Stage) -> None:
        """Runs after the optimizer step; writes only through ``stage.write``.

        Not after one that was left out (``training.non_finite``).
        """

    def end_task(self, stage: Stage) -> None:
        """Runs when the parameters are final, the engine still alive."""

    def said(self, stage: Stage) -> str:
        """Runs after ``end_task``: a line for the user on what this stage came to; empty says nothing.

        It begins with ``warning:`` where the method did not do what it is for.
        """
        return ""

    def fold(self, stage: Stage) -> Fold:
        """Runs at commit: what becomes of the stage's update.

        ``factors`` adds the live pair to the sum of past updates, ``dense`` adds ``dense_update`` instead, ``replace``
        makes the sum exactly ``replacement`` (element-wise merges), ``keep`` leaves the pair in the forward, as the
        parameter set of the stage's name (live terms stay as they are, and are carried by the method's own state).
        """
        return "factors"

    @property
    def fold_loses(self) -> bool:
        """Whether the fold may change the answers: the stage is scored before it too."""
        return False

    @property
    def answers_later(self) -> str:
        """Why the model between two steps does not answer as it would were the stage over; empty: it does.

        Then it cannot be probed (``eval.probe_every``). Default: where the fold may change the answers, or ``remade``.
        """
        return "may answer otherwise once a stage is folded" if self.fold_loses else self.remade

    @property
    def no_folder(self) -> str:
        """What the method does so that neither one folder nor one for each task answers as it does after a stage: it …;
        empty where they do."""
        return ""

    def dense_update(self, stage: Stage) -> dict[str, Tensor]:
        """Runs at commit where ``fold`` is ``dense``: ΔW (m, n) fp32 of every target. Default: the live one's."""
        return stage.live_update()

    def replacement(self, stage: Stage) -> dict[str, Tensor]:
        """Runs at commit where ``fold`` is ``replace``: of every target the new sum of past updates, (m, n) fp32.

        Of full fine-tuning: the new weights, by the model's own names.
        """
        raise NotImplementedError

    def each_answer(self, stage: Stage) -> Iterator[str]:
        """Runs at commit: yields each task that live terms answer by a ΔW of its own, ``update`` being that meanwhile.

        Each has an adapter folder then, which ``answers.json`` names.
        """
        yield from ()

    def free_share(self, stage: Stage) -> float | None:
        """Runs at commit: the share of directions that this method leaves to later stages, mean over layers.

        None: they are the input directions that no pair in the sum reads, and reports see those in the folders.
        """
        return None

    def state(self) -> State:
        """Runs at commit: what is carried on, beside the adapters."""
        return State()

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        """About how large this method's own files are after so many stages: for the room on disk.

        ``shapes`` are the target layers' (m, n), ``trained`` the parameters of a stage. Token ids do not count.
        """
        return 0

    def load_state(self, state: State) -> None:
        """Runs before ``build`` of a later stage, on resume and before ``eval``."""

    def step_state(self) -> State:
        """Between two steps: what this rank holds that neither the state carried nor ``training_data`` gives again.

        Parameters, those that do not train too, are none of it.
        """
        return State()

    def load_step_state(self, stage: Stage, state: State) -> None:
        """Runs in the place of ``begin_task`` where a stage is entered in its middle. Default: ``begin_task`` again.

        It finds what trains as ``build`` has left it; values are put in afterwards.
        """
        self.begin_task(stage)

    def answering(self, task: str | None) -> str | None:
        """Runs at evaluation: the stage whose kept pair answers; None is the model as it is.

        ``task`` is None unless the method may know it (``knows_task``); it may be one that no stage trains.
        """
        return None


def overrides(method: Method, hook: str) -> bool:
    """Whether a method defines a hook itself: what it leaves alone costs nothing."""
    return getattr(type(method), hook) is not getattr(Method, hook)
