"""A run: its plan of stages, the folder they are committed to, and the loop over them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cl_runner.adapters.base import Held
from cl_runner.adapters.saved import GIVEN
from cl_runner.atomic import append_jsonl, read_json, write_json
from cl_runner.engine import zero as engine
from cl_runner.engine.process import Place
from cl_runner.errors import TrainingError
from cl_runner.methods.protocol import Source, overrides
from cl_runner.metrics.accuracy import Matrix
from cl_runner.models.dropout import attention_dropout
from cl_runner.runs.checkpoints import Checkpoint
from cl_runner.runs.commit import await_committed, commit, remove_models
from cl_runner.runs.extra_scores import FILE as EXTRA
from cl_runner.runs.extra_scores import read_extra
from cl_runner.runs.folder import RunDir
from cl_runner.runs.predictions import FILE as PREDICTIONS
from cl_runner.runs.results import read_matrix, write_results
from cl_runner.terminal import stopping
from cl_runner.terminal.progress import Screen
from cl_runner.training.accounting import Counts, parameters
from cl_runner.training.adopted import Adopted
from cl_runner.training.checkpoint import answers_to, committed, restore_stage, save_stage
from cl_runner.training.environment import environment
from cl_runner.training.evaluation import Scored, TestSet, evaluate
from cl_runner.training.extra_sets import ExtraScored, score_extra
from cl_runner.training.given import commit_given, is_committed, restore_given
from cl_runner.training.health import Health
from cl_runner.training.keeping import Keeper
from cl_runner.training.learned import Learned
from cl_runner.training.loop import train_stage
from cl_runner.training.options import answering
from cl_runner.training.plan import Plan
from cl_runner.training.prepare import Tokens, in_4_bits, let_go, open_room, open_stage
from cl_runner.training.probe import Probe, samples
from cl_runner.training.sampling import BatchPlan
from cl_runner.training.stage import Room, StageRun, commit_update
from cl_runner.training.step_log import Trained

Asked = TypeVar("Asked")


class Run:
    """A run in its folder: trains the stages that are not committed yet."""

    def __init__(
        self, plan: Plan, rundir: RunDir, place: Place, screen: Screen, logged: Callable[[], None] = lambda: None
    ) -> None:
        self.plan = plan
        self.rundir = rundir
        self.place = place
        self.screen = screen
        self.logged = logged  # called after each row of log.jsonl
        self.current: str | None = None
        self.entered: Checkpoint | None = None  # of the first stage to train: it goes on from there (rank 0 says)
        self.keeps = True  # whether there is room for checkpoints (rank 0 says)
        self.takes_over = False  # whether stages of other runs are taken over as it comes to them
        self._open: tuple[Room, Tokens] | None = None
        self._trains = 0  # numbers, as said last

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

    def train(self) -> Matrix:
        """Train, evaluate and commit every stage that is missing; returns the accuracy matrix."""
        room, tokens = self.prepare()
        dropout = attention_dropout(room.base.model) if self.plan.config.training.dropout_by == "row" else ""
        said = filter(None, [room.compute.said, in_4_bits(self.plan, room), dropout])
        for line in [*said, *tokens.notes, *tokens.cut_targets()]:
            self.screen.line(line)
        done = int(engine.broadcast_object(self.place, self.rundir.committed(self.names)))
        self.entered, self.keeps = engine.broadcast_object(self.place, (self.entered, self.keeps))
        batches = self.plan.batches(self.place.ranks)
        self.screen.begin(self.plan.shown(), done)
        if self.plan.config.model.adapter is not None:
            self._start(room)
        wanted = self.plan.config.eval.future or self.plan.extra
        if wanted and not (self.rundir.stage_dir(-1, "base") / "DONE").exists():
            self._base_scores(room, tokens)
        for index in range(done, len(self.names)):
            self.current = self.names[index]
            if index == done and index > 0:
                with_state = open_stage(room, self.plan.config, index - 1)
                restore_stage(self.rundir, with_state, index - 1)
                with_state.close()
                let_go(room, self.plan, index - 1)
            self._stage(room, tokens, index, batches[index])
        self.current = None
        if self.place.rank == 0:
            write_results(self.rundir)
        return read_matrix(self.rundir)

    def _start(self, room: Room) -> None:
        """Hold the adapter that the run starts from, as the run has it; the first process of a run makes that copy."""
        if not is_committed(self.rundir):
            if self.place.rank == 0:
                said = commit_given(self.plan, room, self.rundir)
                if not self.plan.starts:  # which only a model without code of its own tells before it is loaded
                    self.screen.line(said)
            self._wait(-1, GIVEN)
        restore_given(room, self.rundir)

    def _base_scores(self, room: Room, tokens: Tokens) -> None:
        """a0: the base, and the adapter that the run starts from, on every task (``eval.future``) and extra set."""
        stage = open_stage(room, self.plan.config, 0, evaluating=True)
        if room.initial is None:
            room.adapters.show(None)
        tests = tokens.test if self.plan.config.eval.future else {}
        scored = evaluate(stage, tests, self._tick_evaluation)
        extra = score_extra(stage, tokens.extra, self._tick_evaluation)
        stage.close()
        if self.place.rank == 0:
            commit(self.rundir, -1, "base", lambda folder: _write_scores(folder, "base", [], scored, extra, {}))
        self._wait(-1, "base")
        if scored:
            self._show_scores(scored)
        self._show_extra(extra)

    def _stage(self, room: Room, tokens: Tokens, index: int, batch: BatchPlan) -> None:
        name = self.names[index]
        stage = open_stage(room, self.plan.config, index)
        entered, self.entered = self.entered, None
        keeper = self._keeper(stage, entered)
        self.screen.stage(index + 1, len(self.names), name, batch.steps, entered.step if entered else 0)
        try:
            if stage.plan.start == "base":
                room.to_base()
            room.method.build(stage)
            self._say_what_trains(stage)
            tests = {task: tokens.test[task] for task in self.plan.tested(index)}
            adopted = self._adopted(stage) if entered is None else None
            if adopted:
                learned = self._adopt(stage, adopted)
            else:
                learned = self._train(room, stage, tokens.source(stage.plan), tests, keeper)
            room.adapters.train(False)
            before = time.perf_counter()
            settled = self._settled(tests, index)
            score = partial(self._score, stage, tests, {**settled, **learned.answers}, keeper)
            unfolded = score("unfolded") if room.method.fold_loses else None

            def ask() -> tuple[list[Scored], list[ExtraScored]]:
                return score("folded"), score_extra(stage, tokens.extra, self._tick_evaluation)

            answers, (scored, extra) = self._fold(room, stage, ask, None if adopted else answering(stage))
            evaluated = time.perf_counter() - before
            measured = {"evaluate": round(evaluated, 3), "stage": round(keeper.seconds, 3)}
            if self.place.rank == 0:
                write = partial(
                    self._write_stage,
                    stage=stage,
                    answers=answers,
                    scored=scored,
                    extra=extra,
                    unfolded=unfolded,
                    learned=learned,
                    settled=sum(map(len, settled.values())),
                    seconds=learned.seconds if learned.taken_from else {**learned.seconds, **measured},
                )
                commit(self.rundir, index, name, write)
                write_results(self.rundir)
            self._wait(index, name)
            committed(self.rundir, stage)
            keeper.committed()
            keep = self.plan.config.output.keep_stages
            if self.place.rank == 0 and keep != "all":
                remove_models(self.rundir, self.names[: index + 1], keep)
            let_go(room, self.plan, index)
            if stage.fit.eval_tokens:
                self._say(stage, f"out of memory in evaluation: batches of {stage.fit.eval_tokens} tokens from then on")
            if unfolded is not None:
                self._say(stage, f"mean score before the fold {_mean(unfolded)}, after it {_mean(scored)}")
            self._show_scores(scored, self.plan.seen(index))
            self._show_extra(extra)
            self.screen.stage_done()
        finally:
            keeper.close()
            stage.close()

    def _train(self, room: Room, stage: StageRun, own: Source, tests: Mapping[str, TestSet], keeper: Keeper) -> Learned:
        """Train the stage, from its beginning or from where it was left."""
        probe = self._probe(stage, tests)
        trained = train_stage(
            stage,
            own,
            log=self._log,
            tick=partial(self._tick, stage),
            warn=partial(self._say, stage),
            state=keeper.state,
            between=keeper.between,
            probe=probe,
        )
        return Learned.here(stage, trained, self._health(room, stage, trained), probe)

    def _adopted(self, stage: StageRun) -> Adopted | None:
        """The stage as another run has it, where it may be taken over, by rank 0's word."""
        if not (self.takes_over and self.plan.method.alone):
            return None
        found = None
        if self.place.rank == 0:
            now, tell = environment(self.plan, self.place), partial(self._say, stage)
            found = Adopted.find(self.rundir, stage.index, self.plan.config, now, tell)
        adopted: Adopted | None = engine.broadcast_object(self.place, found)
        return adopted

    def _adopt(self, stage: StageRun, adopted: Adopted) -> Learned:
        """Answer as the other run does after its stage."""
        adopted.put(stage)
        if self.place.rank == 0:
            append_jsonl(self.rundir.path / "log.jsonl", adopted.log)
            self.logged()
        self._say(stage, adopted.said)
        return Learned.there(stage, adopted)

    def _keeper(self, stage: StageRun, entered: Checkpoint | None) -> Keeper:
        """What keeps the stage's checkpoints, and has the state of the one that it goes on from."""
        facts = self.plan.facts(self.rundir, stage.index, self.place.ranks)
        settings = self.plan.config.output.checkpoint if self.keeps else None
        return Keeper(self.rundir, stage, settings, facts, entered, partial(self._say, stage))

    def _score(
        self, stage: StageRun, tests: Mapping[str, TestSet], known: Mapping[str, list[str]], keeper: Keeper, how: str
    ) -> list[Scored]:
        """Evaluate; what an earlier process has answered already, of just these parameters, is not asked again."""
        answered = {task: rows for task, rows in keeper.answered(how).items() if len(rows) == len(tests[task].rows)}
        return evaluate(stage, tests, self._tick_evaluation, {**answered, **known}, partial(keeper.answers, how))

    def _probe(self, stage: StageRun, tests: Mapping[str, TestSet]) -> Probe | None:
        """What looks at the tasks seen while the stage trains, where that is wanted."""
        if stage.config.eval.probe_every is None:
            return None
        taken, learned, settled, missing = samples(self.plan, self.rundir, stage, tests)
        if missing:
            self._say(stage, f"not probed, as another parameter set answers: {', '.join(missing)}")
        return Probe(
            stage,
            taken,
            learned,
            settled,
            tell=lambda step, scores: self.screen.probed(step, scores, list(learned)),
            warn=partial(self._say, stage),
            tick=self._tick_probe,
        )

    def _settled(self, tests: Mapping[str, TestSet], index: int) -> dict[str, list[str]]:
        """The answers that nothing has changed since an earlier stage committed them."""
        found = {}
        for task, since in self.plan.settled(index).items():
            folder = self.rundir.stage_dir(since, self.names[since] if since >= 0 else "base")
            answers = answers_to(folder, task, [row.id for row in tests[task].rows])
            if answers is not None:
                found[task] = answers
        return found

    def _fold(
        self, room: Room, stage: StageRun, score: Callable[[], Asked], values: Mapping[str, Tensor] | None
    ) -> tuple[Held | None, Asked]:
        """Fold or keep what the stage has learned, and score what answers.

        values: where an option has others answer than those that go on (``Option.answering``). They are held apart:
        they answer beside the sum of before, and the next stage begins from what was folded without them.
        """
        adapters = room.adapters
        own = adapters.parameters()
        if values is None or all(torch.equal(own[name], value) for name, value in values.items()):
            values = None
        elif all(plan.start == "base" for plan in self.plan.stages):  # what goes on is nowhere gone on from
            adapters.put(values)
            values = None
        if values is None:
            commit_update(room.method, stage)
            return None, score()
        goes_on = {name: parameter.detach().clone() for name, parameter in own.items()}
        adapters.put(values)
        scored = score()
        adapters.keep_live()
        answers = adapters.held(copied=True)
        adapters.kept.pop(stage.plan.name)
        adapters.put(goes_on)
        commit_update(room.method, stage)
        return answers, scored

    def _health(self, room: Room, stage: StageRun, trained: Trained) -> Health:
        """How the stage's penalty did; said on the screen where there was one, as is what method and options say.

        Raises:
            TrainingError: the last step has left an update that no number can hold.
        """
        stages = enumerate(self.names[: stage.index])
        files = [self.rundir.stage_dir(index, name) / "metrics.json" for index, name in stages]
        norms = [read_json(file)["training"].get("update_norm") for file in files]
        update = room.adapters.update_norm()
        if update is not None and not math.isfinite(update):
            raise TrainingError("what the stage has learned, ‖ΔW‖, is not finite; try a lower learning rate")
        health = Health(
            loss=trained.loss,
            penalty=trained.penalty,
            ratio=trained.watch.ratio,
            idle=trained.watch.idle,
            update=update,
            earlier=max((norm for norm in norms if norm), default=None),
            first=stage.index == 0,
            expected=overrides(room.method, "penalty"),
        )
        for text in (*trained.said, health.line(), health.warning()):
            if text:
                self._say(stage, text)
        return health

    def _say_what_trains(self, stage: StageRun) -> None:
        """How many numbers, where they are not as many as before; of a rank still to be chosen nothing is known."""
        trains = Counts.of(stage).trained
        if stage.config.adapter.r != "auto" and trains != self._trains:
            self._trains = trains
            self._say(stage, f"{trains:,} parameters train")

    def _say(self, stage: StageRun, text: str) -> None:
        self.screen.line(f"stage {stage.index + 1} of {len(self.names)} {stage.plan.name}: {text}")

    def _write_stage(
        self,
        folder: Path,
        stage: StageRun,
        answers: Held | None,
        scored: Sequence[Scored],
        extra: Sequence[ExtraScored],
        unfolded: Sequence[Scored] | None,
        learned: Learned,
        settled: int,
        seconds: Mapping[str, float],
    ) -> None:
        sizes = save_stage(folder, stage, answers)
        known = {"free_share": stage.room.method.free_share(stage), **stage.fit.about()}
        about = {
            "index": stage.index,
            "training": {**learned.training, **({} if learned.taken_from else known)},
            **({"scores_before_fold": {one.task: one.score for one in unfolded}} if unfolded is not None else {}),
            **({"probe": dict(learned.probe)} if learned.probe else {}),
            **({"taken_from": dict(learned.taken_from)} if learned.taken_from else {}),
            "megabytes": sizes,
            "parameters": parameters(self.plan.kind, stage, learned.counts, folder),
            "synthetic": self.plan.data.synthetic,
            **({"settled_rows": settled} if settled else {}),  # answered by what earlier stages committed
            "seconds": dict(seconds),
        }
        _write_scores(folder, stage.plan.name, stage.plan.tasks, scored, extra, about)

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
        marks = ["synthetic"] * (len(synthetic) == len(scored)) + ["choose"] * (self.plan.config.eval.mode == "choose")
        self.screen.scores(named, ", ".join(marks), mean)
        for one in scored:
            if one.undefined:
                metric = data.tasks[one.task].metric
                self.screen.line(f"{one.task}: {metric} is undefined: {one.undefined}; the average is without it")

    def _show_extra(self, extra: Sequence[ExtraScored]) -> None:
        """One line: each extra set's score, and what was lost of it against the untouched base."""
        base = read_extra(self.rundir).base if extra else {}
        said = [f"{one.name} {one.score:.2f}{_against(one.score, base.get(one.name))}" for one in extra]
        if said:
            self.screen.line(f"extra sets (% by likelihood): {', '.join(said)}")

    def _tick_evaluation(self, task: str, done: int, total: int) -> None:
        stopping.check()
        self.screen.evaluating(task, done, total)

    def _tick_probe(self, task: str, done: int, total: int) -> None:
        stopping.check()
        self.screen.probing(task, done, total)

    def _tick(self, stage: StageRun, step: int, loss: float | None, pace: float | None) -> None:
        stopping.check()
        self.screen.steps(stage.steps)
        self.screen.step(step, loss, pace)

    def _log(self, row: Mapping[str, Any]) -> None:
        if self.place.rank == 0:
            append_jsonl(self.rundir.path / "log.jsonl", [{**row, "time": round(time.time(), 3)}])
            self.logged()

    def _wait(self, index: int, name: str) -> None:
        """Until rank 0 has committed a stage, and this process sees it."""
        if self.place.ranks > 1:
            torch.distributed.barrier()
            await_committed(self.rundir, index, name)


def _write_scores(
    folder: Path,
    stage: str,
    tasks: Sequence[str],
    scored: Sequence[Scored],
    extra: Sequence[ExtraScored],
    about: Mapping[str, Any],
) -> None:
    append_jsonl(folder / PREDICTIONS, [row for one in scored for row in one.predictions])
    if extra:
        append_jsonl(folder / EXTRA, [row for one in extra for row in one.answers])
    write_json(
        folder / "metrics.json",
        {
            "stage": stage,
            "tasks": list(tasks),
            "scores": {one.task: one.score for one in scored},
            "counts": {one.task: len(one.predictions) for one in scored},
            "undefined": {one.task: one.undefined for one in scored if one.undefined},
            **({"extra": {one.name: one.section for one in extra}} if extra else {}),
            **about,
        },
    )


def _against(score: float, base: float | None) -> str:
    """How far a score is from the base's; empty of the base itself."""
    return "" if base is None or base == score else f" ({score - base:+.2f})"


def _mean(scored: Sequence[Scored]) -> str:
    """Over the tasks that have a score, in percent."""
    known = [one.score for one in scored if one.score is not None]
    return f"{sum(known) / len(known):.4f} %" if known else "-"
