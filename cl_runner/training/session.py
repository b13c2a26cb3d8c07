"""One process of a run: it opens the folder, trains, and tells the end in one line."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_runner.engine.process import Assigned
from cl_runner.errors import (
    OUT_OF_MEMORY,
    LimitReached,
    OutOfMemory,
    TrainingError,
    UserError,
    no_memory,
    out_of_memory,
)
from cl_runner.imports import light_imports
from cl_runner.launch.channel import ANOTHER, STOP, TOLD, Channel
from cl_runner.models.locate import Located
from cl_runner.runs import catalog, checkpoints
from cl_runner.runs.checkpoints import Checkpoint
from cl_runner.runs.commit import clear_drafts
from cl_runner.runs.drift import drift
from cl_runner.runs.folder import RunDir, readable
from cl_runner.runs.resume_guard import computes, refuse_other_settings
from cl_runner.settings import Resolved, dump_order, dump_whole
from cl_runner.terminal import console, stopping
from cl_runner.terminal.console import one_line
from cl_runner.terminal.stopping import Stopped
from cl_runner.trackers.processes import Trackers
from cl_runner.training.environment import environment, record_environment
from cl_runner.training.plan import Plan
from cl_runner.training.reuse import decided, decided_alone
from cl_runner.training.taken_over import TakenOver

if TYPE_CHECKING:
    from cl_runner.engine.process import Place
    from cl_runner.terminal.progress import Screen
    from cl_runner.training.run import Run


class Session:
    """One process of a run that is not finished: prepares, trains, and tells the end in one line."""

    def __init__(
        self,
        resolved: Resolved,
        located: Located,
        plan: Plan,
        identity: Mapping[str, Any],
        folder: RunDir,
        part: Assigned | None,
        taken: TakenOver | None,
        restart_stage: bool = False,
        anew: bool = False,
    ) -> None:
        """anew: nothing is taken over of other runs from here on."""
        with light_imports():
            from cl_runner.engine.process import here

            self.place = here()
        self.resolved = resolved
        self.located = located
        self.plan = plan
        self.identity = identity
        self.folder = folder
        self.part = part
        self.taken = taken
        self.restart_stage = restart_stage
        self.anew = anew
        self.entered: Checkpoint | None = None  # what the first stage to train goes on from
        self.channel = Channel.given()

    def run(self) -> int:
        """Train; returns the exit code. What goes wrong before the run's folder is open is raised."""
        with light_imports():
            from cl_runner.engine import zero as engine
            from cl_runner.terminal.progress import Screen
            from cl_runner.training.agreement import refuse_apart
            from cl_runner.training.disk_space import check_disk_space
            from cl_runner.training.run import Run

        if self.channel:
            from cl_runner.launch.local import die_with_parent

            die_with_parent()  # the launcher, which ends all of us, may be killed itself
        if self.place.rank != 0:
            stopping.end_at_once()
        try:
            with Screen(enabled=self.place.rank == 0) as screen, ExitStack() as stack:
                self.folder = RunDir(Path(self._agreed(str(self.folder.path))))
                refuse_apart(self.place, self.folder.path, self.resolved.config, self.identity)
                self.trackers = Trackers(self.resolved.config.output.trackers, screen.line)
                run = Run(self.plan, self.folder, self.place, screen, self.trackers.hear)
                new = not self.folder.exists()
                self.taken = self._settle_taken(screen) if new else None
                if not new:
                    self._open(stack, screen)
                if not new or self.taken:
                    begun = self.taken.run if new and self.taken else self.folder
                    self.plan.computes = computes(begun.about()["identity"])
                embedded = self.located.kind == "embedded"
                if not embedded:  # loading takes its time, and says what
                    self._introduce(screen)
                room, _ = run.prepare()
                if self.place.rank == 0:
                    done = len(self.taken.stages) if self.taken else self.folder.committed(self.plan.names)
                    copied = self.taken.bytes if self.taken else 0
                    if full := check_disk_space(self.folder.path, self.plan, room, done, copied):
                        screen.line(full)
                        run.keeps = False
                if new:
                    if room.compute.kept:
                        self.identity = {**self.identity, "computes": room.compute.name}
                    if self.place.rank == 0:
                        self._create(screen)
                    self._open(stack, screen)
                run.entered = self.entered
                run.takes_over = self.resolved.config.output.reuse and not self.anew
                if embedded:
                    self._introduce(screen)
                code = self._train(run, screen)
        finally:
            # After a failure with others, taking the group down may wait for them: the process ends instead.
            if self.place.ranks == 1 or sys.exc_info()[0] is None:
                engine.stop()
        return code

    def _agreed(self, path: str) -> str:
        """Rank 0's word on every rank."""
        from cl_runner.engine import zero as engine

        if self.place.ranks > 1:
            engine.start(self.place)
        return str(engine.broadcast_object(self.place, path))

    def _settle_taken(self, screen: Screen) -> TakenOver | None:
        """What is taken over of another run, by rank 0's word, and only what this process would have trained alike."""
        from cl_runner.engine import zero as engine

        taken: TakenOver | None = None
        if self.taken and self.place.rank == 0:
            now = environment(self.plan, self.place)
            for one in (self.taken, *self.taken.others):
                if not (lines := one.otherwise(now)):
                    taken = one
                    break
                screen.line(f"nothing is taken over of the run {one.run.path}: {lines[0]}")
        settled: TakenOver | None = engine.broadcast_object(self.place, taken)
        return settled

    def _create(self, screen: Screen) -> None:
        """Make the run's folder, unless another process has, meanwhile."""
        try:
            self.folder.create(*self._new())
        except UserError as error:
            if self.taken is None or self.taken.key == "extends":
                raise
            # The run that they are of goes on, and may have removed what its settings let it remove.
            screen.line(f"nothing is taken over of the run {self.taken.run.path} after all: {error}")
            self.taken = None
            self.folder.create(*self._new())

    def _introduce(self, screen: Screen) -> None:
        notes = [*self.resolved.notes, *self.plan.notes(), *filter(None, [self.plan.starts, self.plan.grows])]
        if self.taken and self.taken.key == "reuses":
            notes.append(f"{self.taken.said}: not trained again")
        for line in [self.located.note, *notes, *free_devices(self.place)]:
            screen.line(line)

    def _new(self) -> tuple[str, str, dict[str, Any], Callable[[Path], None] | None]:
        """``run.yaml``, ``order.yaml`` and ``run.json`` of a new run, and what fills the rest of its folder."""
        config, plan, order = self.resolved.config, self.plan, self.resolved.order
        assert order is not None
        if self.folder.name != (config.output.name or catalog.folder_name(self.resolved)):
            config.output.name = self.folder.name  # --restart: its run.yaml gives this run, not the old one
        cut = {name: rows for name, rows in plan.data.train.items() if rows.cut}
        taken = ", ".join(f"{name} {len(rows)} of {len(rows) + rows.cut}" for name, rows in cut.items())
        notes = [*([f"train rows taken: {taken}"] if taken else []), *plan.data.without_gold()]
        notes += [*plan.data.scored_unknown(), *plan.data.in_train()]
        stages: list[dict[str, Any]] = [
            {"name": stage.name, "tasks": list(stage.tasks), "steps": shown.steps, "test_rows": shown.rows}
            for stage, shown in zip(plan.stages, plan.shown(), strict=True)
        ]
        if not (self.taken and self.taken.key == "extends"):  # they were trained elsewhere, or not scored on all tasks
            for one, by in zip(stages, decided(config, self.identity), strict=True):
                one["decided"] = by
            for one, by in zip(stages, decided_alone(config, self.identity), strict=False):
                one["alone"] = by
        about = {
            "order": plan.order,
            "method": config.method.name,
            "model": config.model.name if self.located.kind not in ("folder", "gguf") else Path(config.model.name).name,
            "seed": config.seed,
            "synthetic": plan.data.synthetic,
            "named_task": (config.data.add_task_name or config.data.add_dataset_name)
            and not all(task.whole for task in plan.data.tasks.values()),
            **({"chosen": True} if config.eval.mode == "choose" else {}),
            "form": plan.method.form,
            "variant": catalog.variant(self.resolved),
            "changed": catalog.changed(self.resolved),
            "notes": notes,
            "tasks": list(plan.data.tasks),
            "metrics": {name: task.metric for name, task in plan.data.tasks.items()},
            "stages": stages,
            "identity": dict(self.identity),
        }
        if self.taken:
            more = self.taken.about(config.eval.future)
            about |= {**more, "notes": [*notes, *more["notes"]]}
        return (
            dump_whole(config, order),
            dump_order(order.written()),
            about,
            self.taken.fill if self.taken else None,
        )

    def _open(self, stack: ExitStack, screen: Screen) -> None:
        """Lock the folder, and clear what an interrupted process left in it."""
        if self.place.rank != 0:
            return
        stack.enter_context(self.folder.lock())
        # Another process may have made the folder, or gone on with it, since we looked.
        refuse_other_settings(self.folder, self.resolved.config, self.identity)
        clear_drafts(self.folder)
        done = self.folder.committed(self.plan.names)
        rows = self._enter(done, screen) if done < len(self.plan.names) else 0
        names = ["base", *self.plan.names]
        self.folder.keep_log_rows(names[: done + 1], names[done + 1] if rows else "", rows)

    def _enter(self, index: int, screen: Screen) -> int:
        """Find where the stage (from 0) was left, if it was; returns how many rows it had logged by then."""
        name = self.plan.names[index]
        checkpoints.clear(self.folder, but=None if self.restart_stage else self.folder.stage_dir(index, name).name)
        self.entered = checkpoints.newest(self.folder, index, name, screen.line)
        if self.entered is None:
            return 0
        with readable(self.folder):
            about = self.entered.about()
            checkpoints.refuse_others(
                self.entered, about["facts"], self.plan.facts(self.folder, index, self.place.ranks)
            )
            return int(about["log_rows"])

    def _train(self, run: Run, screen: Screen) -> int:
        """Train what is missing; a bad end is told here, in one line, on the screen and in ``run.log``."""
        first = self.place.rank == 0
        try:
            if first:
                self._begin(screen)
            run.train()
        except BaseException as error:
            if first:
                return self._tell(run, screen, error)
            if not isinstance(error, Stopped | KeyboardInterrupt):  # which is no failure of this process
                self.channel.fail(self.place.rank, why(error))
            raise
        if first:
            self.folder.set_status("done")
            self.trackers.close()
        return 0

    def _begin(self, screen: Screen) -> None:
        now = environment(self.plan, self.place)
        before = record_environment(self.folder, now)
        if not before and self.taken:
            before = self.taken.run.environment()
        done = self.folder.committed(self.plan.names)
        screen.log_to(self.folder.log_file)
        screen.line(f"run folder: {self.folder.path}")
        for line in drift(before, now, self._about_to_train(done)):
            screen.line(line)
        self.folder.set_status("running", pid=os.getpid(), host=socket.gethostname())
        self.trackers.start(self.folder, done, self.entered.step if self.entered else 0)

    def _about_to_train(self, index: int) -> str:
        """``stage 2 (amazon) from step 20 on, and later ones,``: what this process trains, from a stage (from 0) on."""
        names = self.plan.names
        if index == len(names):
            return "results"
        step = f" from step {self.entered.step} on" if self.entered else ""
        return f"stage {index + 1} ({names[index]}){step}{', and later ones,' if index + 1 < len(names) else ''}"

    def _tell(self, run: Run, screen: Screen, error: BaseException) -> int:
        """One line: the stage, why, what is kept, the command to go on. Returns the exit code."""
        stopping.last_words()
        if console.debugging:
            traceback.print_exception(error)
        stopped, reason = self._reason(error)
        kept = run.names[: self.folder.committed(run.names)]
        where = f" in stage {run.names.index(run.current) + 1} ({run.current})" if run.current else ""
        limited = isinstance(error, LimitReached) and not stopped  # which stays, where the same command goes on
        what = f"stopped{where}" if stopped else f"{'stopped' if limited else 'failed'}{where}: {reason}"
        without = error.without if isinstance(error, LimitReached | OutOfMemory) else ""
        again = f"{self._again()} --set {without}" if without else self._again()
        keeps = f"kept: {self._kept(kept)}" if self._kept(kept) else "no stage is finished yet"
        screen.close()
        code = 130 if stopped else 2 if isinstance(error, UserError) or _of_memory(reason) else 1
        self.channel.say(f"{TOLD}{code}")
        screen.line(f"{what}; {keeps}; go on: {again}")
        with suppress(OSError):  # a full disk must not hide what is being told
            self.folder.set_status("stopped" if stopped or limited else "failed", message=reason)
        self.trackers.close(stopped or limited)
        return code

    def _kept(self, done: Sequence[str]) -> str:
        """What is on disk: ``dbpedia, and amazon to step 120``."""
        step = checkpoints.kept_to(self.folder, self.plan.names, len(done))
        whole = ", ".join(done)
        return f"{whole}{', and ' if whole else ''}{self.plan.names[len(done)]} to step {step}" if step else whole

    def _reason(self, error: BaseException) -> tuple[bool, str]:
        """Whether this is a stop that was asked for, and why the run ends."""
        if lost(error):
            self.channel.await_failure()
        others = self.channel.failures()
        asked = stopping.asked()
        if asked or isinstance(error, KeyboardInterrupt | Stopped):
            # The launcher ends us with SIGTERM too, when another process of the run has ended.
            if asked == "SIGTERM" and self.channel and STOP not in self.channel.heard():
                return False, others[0] if others else f"{ANOTHER}, or its launcher"
            return True, f"by {asked or str(error) or 'SIGINT'}"
        if others and not isinstance(error, UserError | TrainingError | OSError | MemoryError):
            return False, others[0]
        return False, why(error)

    def _again(self) -> str:
        """The command that goes on."""
        if self.part is not None and not self.channel:
            return "the same command again"
        words = [word for word in sys.argv[1:] if word not in ("--restart", "--restart-stage")]
        if "--restart" in sys.argv:
            words += ["--name", self.folder.name]
        return shlex.join(["cl-runner", *words])


def why(error: BaseException) -> str:
    """An error in one line of plain words."""
    text = one_line(str(error))
    kind = type(error).__name__
    if isinstance(error, UserError | TrainingError):
        return text
    if "No space left on device" in text:
        return "the disk of the run folder is full; make room"
    if out_of_memory(error):
        return no_memory(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if lost(error):
        return f"{ANOTHER} (killed, or out of memory?); --debug shows more"
    return f"{kind}: {text} (--debug shows where)"


def _of_memory(reason: str) -> bool:
    """Whether a process had no memory left, this one or another that has said so."""
    return re.match(rf"(host \S+: )?(process \d+: )?{OUT_OF_MEMORY}", reason) is not None


def lost(error: BaseException) -> bool:
    """Whether an error says that another process of the run is gone."""
    kind, text = type(error).__name__, str(error)
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")
    return kind.startswith("Dist") or (kind == "RuntimeError" and any(word in text for word in words))


def free_devices(place: Place) -> list[str]:
    """A line on GPUs that this run leaves alone."""
    if place.device != "cuda" or place.ranks > 1:
        return []
    import torch

    others = torch.cuda.device_count() - 1
    return [f"training on the first visible GPU; {others} more: --gpus {others + 1} takes them"] if others > 0 else []
