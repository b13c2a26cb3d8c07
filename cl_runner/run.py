"""A run: its plan of stages, the folder they are committed to, and the loop over them."""

from __future__ import annotations

import gc
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cl_runner import __version__, engine, stopping
from cl_runner.adapters import Adapters, FullWeights, Prompts
from cl_runner.checkpoint import committed, remove_models, restore_stage, save_stage
from cl_runner.config import DataConfig, RunConfig
from cl_runner.errors import UserError
from cl_runner.evaluate import Scored, TestSet, evaluate
from cl_runner.health import Health
from cl_runner.methods import make_method
from cl_runner.methods.base import Source, StagePlan, commit_update, overrides
from cl_runner.metrics.accuracy import Matrix
from cl_runner.models.base import Base, load_base
from cl_runner.models.encoding import Encoder
from cl_runner.models.tokens import Encoded, Joined, TokenCache
from cl_runner.models.vocabulary import Vocabulary
from cl_runner.place import Place
from cl_runner.plan import BatchPlan, Data, Plan, check_method, stage_config
from cl_runner.progress import Screen
from cl_runner.progress import StagePlan as ShownStage
from cl_runner.rundir import RunDir, append_jsonl, read_json, write_json
from cl_runner.runs import read_matrix, write_results
from cl_runner.stage import Room, StageRun
from cl_runner.tasks.rows import Rows
from cl_runner.tasks.task import Task
from cl_runner.train import Trained, train_stage


@dataclass
class Tokens:
    """The same rows as token ids, and lines on what the tokenizer cannot say of them."""

    train: dict[str, Encoded]
    test: dict[str, TestSet]
    notes: list[str]

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
            test[name] = TestSet(task, data.test[name].rows, examples)
        return cls(train, test, notes)

    def cut_targets(self) -> list[str]:
        """A line on the train targets that lost tokens (``data.long_targets``); none where none did."""
        parts = [f"{task} {rows.targets_cut}" for task, rows in self.train.items() if rows.targets_cut]
        return [f"train targets cut to data.max_target: {', '.join(parts)}"] if parts else []

    def source(self, plan: StagePlan) -> Source:
        """The own rows of a stage."""
        examples = [self.train[task] for task in plan.tasks]
        return Source(Joined(examples), [task for task in plan.tasks for _ in self.train[task]])


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


def _encoder(base: Base, data: DataConfig, max_new_tokens: int) -> Encoder:
    most = base.layout.max_positions
    if most is not None and not base.encoder_decoder and data.max_source + max_new_tokens > most:
        raise UserError(
            f"data.max_source {data.max_source} and eval.max_new_tokens {max_new_tokens} together exceed "
            f"the model's {most} positions; set data.max_source={most - max_new_tokens}"
        )
    return Encoder(base.tokenizer, base.layout, data.max_source, data.max_target, data.truncate)


def open_room(plan: Plan, place: Place) -> tuple[Room, Tokens]:
    """Load the base, tokenise, and wrap the base with adapters. Raises UserError.

    What only training asks for is not asked of a plan that is evaluated.
    """
    config = plan.config
    full = plan.method.full
    model = config.model.model_copy(update={"dtype": "fp32"}) if full else config.model  # what trains is fp32
    base = load_base(model, place.torch_device)
    most = config.eval.max_new_tokens
    tokens = Tokens.make(plan.data, base, most, plan.only)
    bf16 = config.training.precision == "bf16" or (config.training.precision == "auto" and place.device == "cuda")
    adapters = _adapters(plan, base, bf16)
    if plan.only is None:
        _check_training(plan, base, adapters)
    gc.freeze()  # what lives to the end need not be looked through after every stage
    root = engine.Autocast(adapters.model, place.torch_device, bf16)
    return Room(base, _encoder(base, config.data, most), adapters, plan.method, place, root, plan.stages), tokens


def _check_training(plan: Plan, base: Base, adapters: Adapters) -> None:
    """Refuse what this model cannot be trained with. Raises UserError."""
    check_method(plan.config, plan.stages, adapters.shapes())
    for index, stage in enumerate(plan.stages):
        of_stage = stage_config(plan.config, index, stage)
        if of_stage.training.activation_checkpointing and not base.model.supports_gradient_checkpointing:
            raise UserError(f"training.activation_checkpointing: {base.name_or_path} cannot do it; set it to false")


def _adapters(plan: Plan, base: Base, bf16: bool) -> Adapters:
    """What trains, as the method has it: pairs beside the base's layers, all its weights, or soft prompts."""
    config = plan.config
    if plan.method.full:
        return FullWeights(base.model, base_again=any(stage.start == "base" for stage in plan.stages))
    if plan.method.prompts:
        _check_prefix(plan, base)
        return Prompts(
            base.model,
            name_or_path=base.name_or_path,
            revision=config.model.revision,
            encoder_decoder=base.encoder_decoder,
        )
    return Adapters(
        base.model,
        config.adapter,
        name_or_path=base.name_or_path,
        revision=config.model.revision,
        encoder_decoder=base.encoder_decoder,
        compute=torch.bfloat16 if bf16 else None,
    )


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


class Run:
    """A run in its folder: trains the stages that are not committed yet."""

    def __init__(self, plan: Plan, rundir: RunDir, place: Place, screen: Screen) -> None:
        self.plan = plan
        self.rundir = rundir
        self.place = place
        self.screen = screen
        self.current: str | None = None
        self._open: tuple[Room, Tokens] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the stages."""
        return self.plan.names

    def prepare(self) -> tuple[Room, Tokens]:
        """Load the model and tokenise every row of every stage; nothing is written. Raises UserError."""
        if self._open is None:
            engine.start(self.place)
            self._open = open_room(self.plan, self.place)
        return self._open

    def bytes_to_write(self, done: int) -> int:
        """About how much room the stages after the first ``done`` will take."""
        room, _ = self.prepare()
        to_come = range(done, len(self.names))
        predictions = sum(300 * len(self.plan.data.test[task]) for index in to_come for task in self._tested(index))
        if isinstance(room.adapters, FullWeights):
            return predictions + self._model_bytes(room.adapters, done)
        shapes = room.adapters.shapes()
        trained = self.plan.config.adapter.largest * sum(map(sum, shapes))
        states = sum(self.plan.method.state_bytes(shapes, trained, index + 1) for index in to_come)
        return predictions + states + sum(self._adapter_bytes(room.adapters, index) for index in to_come)

    def _adapter_bytes(self, adapters: Adapters, index: int) -> int:
        """Each adapter holds all pairs before it."""
        rank, total = self.plan.config.adapter.largest, 0
        pairs = 1 if self.plan.stages[index].start == "base" else index + 1
        for target, past in adapters.past.items():
            m, n = past.base.shape
            whole = self.plan.method.dense or adapters.stored_whole(target, pairs * rank, pairs)
            total += (n + rank if whole else pairs * rank) * (m + n)  # an identity and the sum, its own pair beside it
        return 4 * total

    def _model_bytes(self, weights: FullWeights, done: int) -> int:
        """Each stage has a model, of which ``output.keep_stages`` and the one being written are there at a time."""
        keep = self.plan.config.output.keep_stages
        models = len(self.names) - done
        if keep != "all" and self.plan.stages[0].start != "base":  # who begins anew needs all of them
            models = min(models, keep + 1 - min(done, keep))
        parameters = sum(p.numel() for p in weights.parameters().values())
        return models * (4 * parameters + self.plan.method.state_bytes((), parameters, len(self.names)))

    def train(self) -> Matrix:
        """Train, evaluate and commit every stage that is missing; returns the accuracy matrix."""
        room, tokens = self.prepare()
        for line in [*filter(None, [room.base.advice]), *tokens.notes, *tokens.cut_targets()]:
            self.screen.line(line)
        done = int(engine.broadcast_object(self.place, self.rundir.committed(self.names)))
        batches = self.plan.batches(self.place.ranks)
        tested = [sum(len(tokens.test[task].rows) for task in self._tested(i)) for i in range(len(self.names))]
        shown = [ShownStage(n, b.steps, t) for n, b, t in zip(self.names, batches, tested, strict=True)]
        self.screen.begin(shown, done)
        if self.plan.config.eval.future and not (self.rundir.stage_dir(-1, "base") / "DONE").exists():
            self._base_scores(room, tokens)
        for index in range(done, len(self.names)):
            self.current = self.names[index]
            if index == done and index > 0:
                with_state = open_stage(room, self.plan.config, index - 1)
                restore_stage(self.rundir, with_state, index - 1)
                with_state.close()
                self._let_go(room, index - 1)
            self._stage(room, tokens, index, batches[index])
        self.current = None
        if self.place.rank == 0:
            write_results(self.rundir)
        return read_matrix(self.rundir)

    def _tested(self, index: int) -> list[str]:
        return list(self.plan.data.tasks) if self.plan.config.eval.future else self.plan.seen(index)

    def _base_scores(self, room: Room, tokens: Tokens) -> None:
        """a0: the untouched base on every task, before stage 1."""
        stage = open_stage(room, self.plan.config, 0, evaluating=True)
        room.adapters.show(None)
        scored = evaluate(stage, tokens.test, self._tick_evaluation)
        stage.close()
        if self.place.rank == 0:
            self.rundir.commit(-1, "base", lambda folder: _write_scores(folder, "base", [], scored, {}))
        self._wait()
        self._show_scores(scored)

    def _stage(self, room: Room, tokens: Tokens, index: int, batch: BatchPlan) -> None:
        name = self.names[index]
        stage = open_stage(room, self.plan.config, index)
        started = time.perf_counter()
        self.screen.stage(index + 1, len(self.names), name, batch.steps)
        try:
            if stage.plan.start == "base":
                room.adapters.restore([], room.adapters.kept, None)
            room.method.build(stage)
            own = tokens.source(stage.plan)
            trained = train_stage(stage, own, log=self._log, tick=partial(self._tick, stage))
            room.adapters.train(False)
            health = self._health(room, stage, trained)
            tests = {task: tokens.test[task] for task in self._tested(index)}
            before = time.perf_counter()
            unfolded = evaluate(stage, tests, self._tick_evaluation) if room.method.fold_loses else None
            commit_update(room.method, stage)
            scored = evaluate(stage, tests, self._tick_evaluation)
            seconds = {
                "train": round(trained.seconds, 3),
                "method": round(trained.hook_seconds, 3),
                "evaluate": round(time.perf_counter() - before, 3),
                "stage": round(time.perf_counter() - started, 3),
            }
            if self.place.rank == 0:
                write = partial(
                    self._write_stage,
                    stage=stage,
                    scored=scored,
                    unfolded=unfolded,
                    trained=trained,
                    health=health,
                    seconds=seconds,
                )
                self.rundir.commit(index, name, write)
                write_results(self.rundir)
            self._wait()
            committed(self.rundir, stage)
            keep = self.plan.config.output.keep_stages
            if self.place.rank == 0 and keep != "all":
                remove_models(self.rundir, stage, keep)
            self._let_go(room, index)
            if unfolded is not None:
                self._say(stage, f"mean score before the fold {_mean(unfolded)}, after it {_mean(scored)}")
            self._show_scores(scored, self.plan.seen(index))
            self.screen.stage_done()
        finally:
            stage.close()

    def _let_go(self, room: Room, index: int) -> None:
        """Free the past factors that no stage after ``index`` will read."""
        reads: dict[str, str] = {}
        for later, stage in enumerate(self.plan.stages[index + 1 :], index + 1):
            for factor, how in make_method(stage_config(self.plan.config, later, stage)).reads_past().items():
                reads[factor] = how if reads.get(factor) != "rows" else "rows"
        room.adapters.let_go(reads)

    def _health(self, room: Room, stage: StageRun, trained: Trained) -> Health:
        """How the stage's penalty did; said on the screen where there was one, as is a rank that was chosen."""
        stages = enumerate(self.names[: stage.index])
        files = [self.rundir.stage_dir(index, name) / "metrics.json" for index, name in stages]
        norms = [read_json(file)["training"].get("update_norm") for file in files]
        health = Health(
            loss=trained.loss,
            penalty=trained.penalty,
            ratio=trained.watch.ratio,
            idle=trained.watch.idle,
            update=room.adapters.update_norm(),
            earlier=max((norm for norm in norms if norm), default=None),
            first=stage.index == 0,
            expected=overrides(room.method, "penalty"),
        )
        rank = None if trained.rank is None else f"rank {trained.rank}, by the spectrum of the gradient"
        for text in (rank, health.line(), health.warning()):
            if text:
                self._say(stage, text)
        return health

    def _say(self, stage: StageRun, text: str) -> None:
        self.screen.line(f"stage {stage.index + 1} of {len(self.names)} {stage.plan.name}: {text}")

    def _write_stage(
        self,
        folder: Path,
        stage: StageRun,
        scored: Sequence[Scored],
        unfolded: Sequence[Scored] | None,
        trained: Trained,
        health: Health,
        seconds: Mapping[str, float],
    ) -> None:
        sizes = save_stage(folder, stage)
        about = {
            "index": stage.index,
            "training": {
                "steps": trained.steps,
                "examples": trained.examples,
                "loss": trained.loss,
                "penalty": trained.penalty,
                "penalty_gradient_ratio": health.ratio,
                "update_norm": health.update,
                "free_share": stage.room.method.free_share(stage),
                "rank": trained.rank,
                "skipped_steps": trained.skipped,
                "global_batch": trained.plan.global_batch,
                "micro_batch": trained.plan.micro_batch,
                "accumulation": trained.plan.accumulation,
                "ranks": trained.plan.ranks,
            },
            **({"scores_before_fold": {one.task: one.score for one in unfolded}} if unfolded is not None else {}),
            "megabytes": sizes,
            "synthetic": self.plan.data.synthetic,
            "seconds": dict(seconds),
        }
        _write_scores(folder, stage.plan.name, stage.plan.tasks, scored, about)

    def _show_scores(self, scored: Sequence[Scored], seen: Sequence[str] = ()) -> None:
        """One line: each score, its metric where there are several, what is synthetic, the mean over ``seen``."""
        data = self.plan.data
        synthetic = [one.task for one in scored if data.test[one.task].synthetic]
        several = len({task.metric for task in data.tasks.values()}) > 1
        named = {}
        for one in scored:
            marks: list[str] = [data.tasks[one.task].metric] * several
            marks += ["synthetic"] * (one.task in synthetic and len(synthetic) < len(scored))
            named[f"{one.task} ({', '.join(marks)})" if marks else one.task] = one.score
        of_seen = [one.score for one in scored if one.task in seen and one.score is not None]
        mean = sum(of_seen) / len(of_seen) if of_seen else None
        self.screen.scores(named, "synthetic" if len(synthetic) == len(scored) else "", mean)
        for one in scored:
            if one.undefined:
                metric = data.tasks[one.task].metric
                self.screen.line(f"{one.task}: {metric} is undefined: {one.undefined}; the average is without it")

    def _tick_evaluation(self, task: str, done: int, total: int) -> None:
        stopping.check()
        self.screen.evaluating(task, done, total)

    def _tick(self, stage: StageRun, step: int, loss: float | None, pace: float | None) -> None:
        stopping.check()
        self.screen.steps(stage.steps)
        self.screen.step(step, loss, pace)

    def _log(self, row: Mapping[str, Any]) -> None:
        if self.place.rank == 0:
            append_jsonl(self.rundir.path / "log.jsonl", [row])

    def _wait(self) -> None:
        if self.place.ranks > 1:
            torch.distributed.barrier()


def _write_scores(
    folder: Path, stage: str, tasks: Sequence[str], scored: Sequence[Scored], about: Mapping[str, Any]
) -> None:
    append_jsonl(folder / "predictions.jsonl", [row for one in scored for row in one.predictions])
    write_json(
        folder / "metrics.json",
        {
            "stage": stage,
            "tasks": list(tasks),
            "scores": {one.task: one.score for one in scored},
            "counts": {one.task: len(one.predictions) for one in scored},
            "undefined": {one.task: one.undefined for one in scored if one.undefined},
            **about,
        },
    )


def _mean(scored: Sequence[Scored]) -> str:
    """Over the tasks that have a score, in percent."""
    known = [one.score for one in scored if one.score is not None]
    return f"{sum(known) / len(known):.4f} %" if known else "-"


def environment(plan: Plan, place: Place) -> dict[str, Any]:
    """``environment.json``: versions, git commit, device, data."""
    packages = ("torch", "transformers", "peft", "deepspeed", "datasets", "accelerate", "safetensors")
    device = torch.cuda.get_device_name(place.torch_device) if place.device == "cuda" else platform.processor() or "cpu"
    return {
        "cl_runner": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "device": device,
        "processes": place.ranks,
        "threads": torch.get_num_threads(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "data": plan.data.about(),
    }


def _git_commit() -> str | None:
    """The commit of the checkout that this package is run from; None where it was installed."""
    git = shutil.which("git")
    if git is None:
        return None
    package = Path(__file__).resolve().parent
    asked = subprocess.run(
        [git, "-C", package, "rev-parse", "--show-toplevel", "HEAD"], capture_output=True, text=True, check=False
    )
    top, _, commit = asked.stdout.strip().partition("\n")
    # An environment within a user's own repository is not a checkout of ours.
    return commit or None if asked.returncode == 0 and Path(top) == package.parent else None
