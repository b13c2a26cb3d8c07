"""What lives through all stages of a run, made ready: the base with its adapters, and every row as tokens."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from cl_runner.adapters.base import Adapters
from cl_runner.adapters.kind import Opening
from cl_runner.config.schema import DataConfig, RunConfig
from cl_runner.engine import zero as engine
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.protocol import Source, StagePlan
from cl_runner.models.base import Base, load_base
from cl_runner.models.choose import Choice
from cl_runner.models.encoding import Encoder
from cl_runner.models.model_folder import ModelFolder
from cl_runner.models.quantized import compute_in
from cl_runner.models.token_cache import Encoded, Joined, TokenCache
from cl_runner.models.vocabulary import Vocabulary
from cl_runner.tasks.rows import Rows
from cl_runner.tasks.task import Task
from cl_runner.terminal.console import size
from cl_runner.training.agreement import refuse_other_base
from cl_runner.training.compatibility import check_method, stage_config
from cl_runner.training.computing import computing, rounded
from cl_runner.training.data import Data
from cl_runner.training.evaluation import TestSet
from cl_runner.training.extra_sets import ExtraTest
from cl_runner.training.plan import Plan
from cl_runner.training.stage import Room, StageRun


@dataclass
class Tokens:
    """The same rows as token ids, and lines on what the tokenizer cannot say of them."""

    train: dict[str, Encoded]
    test: dict[str, TestSet]
    notes: list[str]
    ids: dict[str, list[str]] = field(default_factory=dict)  # task → of its train rows
    extra: dict[str, ExtraTest] = field(default_factory=dict)

    @classmethod
    def make(cls, data: Data, base: Base, max_new_tokens: int, only: Sequence[str] | None = None) -> Tokens:
        """Tokenise every row; raises UserError, naming the task, for a label that does not fit or cannot be said.

        only: the tasks that will be evaluated; what the tokenizer cannot say of these is noted, and nothing is trained.
        """
        train: dict[str, Encoded] = {}
        test: dict[str, TestSet] = {}
        notes: list[str] = []
        cache, vocabulary = TokenCache(base.tokenizer), Vocabulary(base.tokenizer)
        for name, task in data.tasks.items():
            settings = data.settings[name]
            try:
                if only is None or name in only:
                    notes += sayable(task, data.test[name], vocabulary, refuse=only is None)
                encoder = _encoder(base, settings, max_new_tokens)
                cut = settings.long_targets == "cut"
                train[name] = _encode(cache, encoder, task, data.train[name], settings, cut_target=cut)
                examples = _encode(cache, encoder, task, data.test[name], settings, cut_target=True)
            except UserError as error:
                raise UserError(f"task {name}: {error}") from None
            test[name] = TestSet(task, data.test[name].rows, examples, _tree(encoder, task))
        return cls(train, test, notes, {name: [row.id for row in rows.rows] for name, rows in data.train.items()})

    def cut_targets(self) -> list[str]:
        """A line on the train targets that lost tokens (``data.long_targets``); none where none did."""
        parts = [f"{task} {rows.targets_cut}" for task, rows in self.train.items() if rows.targets_cut]
        return [f"train targets cut to data.max_target: {', '.join(parts)}"] if parts else []

    def source(self, plan: StagePlan) -> Source:
        """The own rows of a stage."""
        examples = [self.train[task] for task in plan.tasks]
        tasks = [task for task in plan.tasks for _ in self.train[task]]
        return Source(Joined(examples), tasks, ids=[id_ for task in plan.tasks for id_ in self.ids[task]])


def sayable(task: Task, test: Rows, vocabulary: Vocabulary, *, refuse: bool = True) -> list[str]:
    """Refuse labels that no answer can be; a line on golds of free text that none can equal. Raises UserError.

    refuse: false where nothing is trained: what would be refused is a line too.
    """
    problem, note = _unsayable(task, test, vocabulary)
    if problem and refuse:
        raise UserError(problem)
    said = problem or note
    return [f"task {task.name}: {said}"] if said else []


def _unsayable(task: Task, test: Rows, vocabulary: Vocabulary) -> tuple[str, str]:
    """Why the task cannot be learned with this tokenizer, and what of it cannot; empty where nothing is wrong."""
    if task.labels:
        return vocabulary.wrong_label(task.labels, task.comparison), ""
    if not task.judged:
        return "", ""
    golds = [row.label for row in test.rows]
    lost = vocabulary.unsayable(golds, task.comparison)
    if not lost:
        return "", ""
    rows = sum(gold in lost for gold in golds)
    gold, back = next(iter(lost.items()))
    said = f"{rows} of {len(golds)} test golds are none that this tokenizer can answer ({gold[:60]!r} is {back[:60]!r})"
    if rows == len(golds):
        return f"{said}; take another model, or metric: normalised", ""
    return "", f"{said}; they count as wrong"


def _encode(
    cache: TokenCache, encoder: Encoder, task: Task, rows: Rows, data: DataConfig, cut_target: bool = False
) -> Encoded:
    names = {"add_task_name": data.add_task_name, "add_dataset_name": data.add_dataset_name}
    prompts = [task.prompt(row.text, **names) for row in rows.rows]
    return cache.encode(encoder, prompts, [row.label for row in rows.rows], cut_target)


def _tree(encoder: Encoder, task: Task) -> Choice | None:
    """The task's labels, as their targets are encoded."""
    if not task.choices:
        return None
    return Choice.among(encoder.encode_labels(task.choices), encoder.layout.eos_id)


def _encoder(base: Base, data: DataConfig, max_new_tokens: int) -> Encoder:
    most = base.layout.max_positions
    if most is not None and not base.encoder_decoder and data.max_source + max_new_tokens > most:
        room = most - max_new_tokens
        hint = f"set data.max_source={room}" if room > 0 else "set both lower"
        raise UserError(
            f"data.max_source {data.max_source} and eval.max_new_tokens {max_new_tokens} together exceed "
            f"the model's {most} positions; {hint}"
        )
    return Encoder(base.tokenizer, base.layout, data.max_source, data.max_target, data.truncate, base.chat)


def open_room(plan: Plan, place: Place) -> tuple[Room, Tokens]:
    """Load the base, tokenise, and wrap the base with adapters. Raises UserError.

    What only training asks for is not asked of a plan that is evaluated.
    """
    config = plan.config
    full = plan.method.full
    model = config.model.model_copy(update={"dtype": "fp32"}) if full else config.model  # what trains is fp32
    base = load_base(model, place.torch_device, chat_template=config.data.chat_template)
    refuse_other_base(place, base.model)
    most = config.eval.max_new_tokens
    tokens = Tokens.make(plan.data, base, most, plan.only)
    _add_extra(tokens, plan, base)
    rows = Joined(list(tokens.train.values()))
    compute = computing(plan, place, base, rows)
    if config.model.quantize:
        compute_in(base.model, torch.bfloat16 if compute.bf16 else torch.float32)
    elif compute.bf16 and place.device != "cuda" and not full:
        rounded(base.model, but=plan.kind.layers(base.model))
    adapters = _adapters(plan, base, compute.bf16)
    if plan.only is None:
        _check_training(plan, base, adapters)
    gc.freeze()  # what lives to the end need not be looked through after every stage
    root = engine.Autocast(adapters.model, place.torch_device, compute.bf16)
    encoder = _encoder(base, config.data, most)
    return Room(base, encoder, adapters, plan.method, place, root, plan.stages, compute=compute), tokens


def _add_extra(tokens: Tokens, plan: Plan, base: Base) -> None:
    """The extra sets as token ids, and lines on what they lost. Raises UserError."""
    encoder = Encoder(base.tokenizer, base.layout, 8, 2)
    for extra in plan.extra:
        test = ExtraTest.make(extra, encoder, plan.method.prefix_tokens(len(plan.stages)))
        tokens.extra[extra.name] = test
        tokens.notes += filter(None, [test.note()])


def in_4_bits(plan: Plan, room: Room) -> str:
    """A line on what a base in 4 bits takes, and what past updates will take beside it; empty of another base."""
    if room.base.sizes is None:
        return ""
    quantized, rest = map(size, room.base.sizes)
    said = f"the base is {quantized} in 4 bits, and {rest} that stay as they are"
    if plan.method.past_as == "none":
        return said
    dense = plan.method.dense or "factors" not in plan.kind.folds
    most = room.adapters.beside_bytes(len(plan.stages), plan.config.adapter.largest, dense)
    return f"{said}; what stages leave stands beside it, at most {size(most)} after the last"


def _check_training(plan: Plan, base: Base, adapters: Adapters) -> None:
    """Refuse what this model cannot be trained with. Raises UserError."""
    trained = plan.kind.trained_count(adapters.counted())
    check_method(plan.config, plan.stages, adapters.shapes(), trained, list(adapters.targets()))
    for index, stage in enumerate(plan.stages):
        of_stage = stage_config(plan.config, index, stage)
        if of_stage.training.activation_checkpointing and not base.model.supports_gradient_checkpointing:
            raise UserError(f"training.activation_checkpointing: {base.name_or_path} cannot do it; set it to false")


def _adapters(plan: Plan, base: Base, bf16: bool) -> Adapters:
    """What trains, of the kind that the plan has."""
    if plan.kind.name == "prompts":
        _check_prefix(plan, base)
    opening = Opening(
        base.model,
        base.name_or_path,
        plan.config.model.revision,
        base.encoder_decoder,
        compute=torch.bfloat16 if bf16 else None,
        base_again=any(stage.start == "base" for stage in plan.stages),
        folder=ModelFolder(base.model, base.tokenizer),
    )
    return plan.kind.open(opening)


def _check_prefix(plan: Plan, base: Base) -> None:
    """Refuse prompts that do not fit into the model's positions together with the input. Raises UserError."""
    limit, config = base.layout.max_positions, plan.config
    for data in plan.data.settings.values() if limit is not None else ():
        taken = data.max_source + (0 if base.encoder_decoder else max(data.max_target, config.eval.max_new_tokens))
        prefix = plan.method.prefix_tokens(len(plan.stages))
        if limit is not None and taken + prefix > limit:
            raise UserError(
                f"{plan.method.name} puts up to {prefix} vectors before the input: with data.max_source "
                f"{data.max_source} that exceeds the model's {limit} positions; lower data.max_source or method.length"
            )


def open_stage(room: Room, config: RunConfig, index: int, *, evaluating: bool = False) -> StageRun:
    """A stage with its own config; the method takes the settings of that stage."""
    of_stage = stage_config(config, index, room.order[index])
    room.method.configure(type(room.method).Config.model_validate(of_stage.method.own()))
    return StageRun(room, of_stage, index, evaluating=evaluating)


def let_go(room: Room, plan: Plan, index: int) -> None:
    """Free the past factors that no stage after ``index`` will read."""
    reads: dict[str, str] = {}
    for later, stage in enumerate(plan.stages[index + 1 :], index + 1):
        for factor, how in make_method(stage_config(plan.config, later, stage)).reads_past().items():
            reads[factor] = how if reads.get(factor) != "rows" else "rows"
    room.adapters.let_go(reads)
