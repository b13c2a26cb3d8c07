"""``cl-runner train``: what is checked before it starts, where it goes, and how its end is told.

Everything that can be refused is refused in this order, and nothing is written until all of it is fine: settings,
model files, rows of every task, the run folder (all without torch), then the model itself, every row as tokens, disk.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_runner import console, runs, stopping
from cl_runner.commands import Request, rich_print
from cl_runner.console import aligned, one_line, print_json
from cl_runner.errors import TrainingError, UserError
from cl_runner.extend import Extended
from cl_runner.launch.channel import FAILED, STOP, TOLD, Channel
from cl_runner.models.catalog import Located, check, locate, model_identity
from cl_runner.place import Assigned, assigned
from cl_runner.plan import Plan
from cl_runner.report import tables
from cl_runner.rundir import RunDir, read_json, write_json
from cl_runner.settings import Resolved, dump, dump_order
from cl_runner.stopping import Stopped

if TYPE_CHECKING:
    from cl_runner.place import Place
    from cl_runner.progress import Screen
    from cl_runner.run import Run


def train(request: Request, *, gpus: int | None, restart: bool, dry_run: bool, as_json: bool) -> int:
    """Train what is asked for, or say that it is done; returns the exit code.

    Raises:
        UserError, TrainingError, Stopped: before there was a run to tell the end of.
    """
    check_platform()
    resolved, order = request.with_order()
    config = resolved.config
    part = assigned()
    check_gpus(gpus, part)
    folder = name_of(resolved, restart)
    runs.refuse_unwritable(folder.path)
    located = locate(config.model)
    check(located)
    plan = Plan.make(config, order.name, order.tasks)
    plan.check_shapes()
    processes = part.ranks if part else gpus or 1
    identity = {"model": model_identity(located), **plan.identity(processes)}
    extended = None
    if request.extends is not None and not folder.exists():
        extended = Extended.of(request.extends, order.name, plan, config, identity)
    done = len(extended.stages) if extended else 0
    if folder.exists():
        runs.refuse_other_settings(folder, config, identity)
        folder.refuse_gaps(plan.names)
        done = folder.committed(plan.names)
    if dry_run:
        print_plan(plan, resolved, folder, done, processes, as_json)
        return 0
    if done == len(plan.stages):
        if part is None or part.rank == 0:
            finish(folder)
            print(f"the run {folder.path} is done already; --restart begins anew beside it", file=sys.stderr)
            print_result(folder, as_json)
        return 0
    if processes > 1 and part is None:
        if folder.exists():
            with folder.lock():  # rather now than when all processes are up
                pass
        from cl_runner.launch.local import launch

        return launch(processes, sys.argv[1:])
    return Session(resolved, located, plan, identity, folder, part, extended).run(as_json)


def check_platform() -> None:
    """Training needs Linux. Raises UserError elsewhere."""
    if not sys.platform.startswith("linux"):
        raise UserError(f"cl-runner trains on Linux; this is {sys.platform} (WSL 2, a container or a GPU box will do)")


def check_gpus(gpus: int | None, part: Assigned | None) -> None:
    """Refuse a number of GPUs that there is not, or that is not the launcher's. Raises UserError."""
    if gpus is None:
        return
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: must be 1 or more")
    if part is not None:
        if gpus != part.ranks:
            raise UserError(
                f"--gpus {gpus}: another launcher has started {part.ranks} processes already; leave --gpus out"
            )
    elif gpus > 1:
        from cl_runner.launch.local import check as enough

        enough(gpus)


def name_of(resolved: Resolved, restart: bool) -> RunDir:
    """The folder of the run: its given name, or one made of the settings; beside the old one for ``--restart``.

    Raises UserError for a name that would leave its folder.
    """
    output = resolved.config.output
    root = Path(output.dir).expanduser()
    name = runs.check_name(output.name) if output.name else runs.folder_name(resolved)
    return RunDir(root / (runs.beside(root, name) if restart else name))


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
        extended: Extended | None,
    ) -> None:
        from cl_runner.place import here

        self.resolved = resolved
        self.located = located
        self.plan = plan
        self.identity = identity
        self.folder = folder
        self.part = part
        self.extended = extended
        self.place = here()
        self.channel = Channel.given()

    def run(self, as_json: bool) -> int:
        """Train; returns the exit code. What goes wrong before the run's folder is open is raised."""
        from cl_runner import engine
        from cl_runner.progress import Screen
        from cl_runner.run import Run

        if self.channel:
            from cl_runner.launch.local import die_with_parent

            die_with_parent()  # the launcher, which ends all of us, may be killed itself
        if self.place.rank != 0:
            stopping.end_at_once()
        try:
            with Screen(enabled=self.place.rank == 0) as screen, ExitStack() as stack:
                self.folder = RunDir(Path(self._agreed(str(self.folder.path))))
                run = Run(self.plan, self.folder, self.place, screen)
                new = not self.folder.exists()
                if not new:
                    self._open(stack)
                embedded = self.located.kind == "embedded"
                if not embedded:  # loading takes its time, and says what
                    self._introduce(screen)
                run.prepare()
                self._check_disk(run)
                if new:
                    if self.place.rank == 0:
                        self.folder.create(*self._new())  # or another process has, meanwhile
                    self._open(stack)
                if embedded:
                    self._introduce(screen)
                code = self._train(run, screen)
        finally:
            # After a failure with others, taking the group down may wait for them: the process ends instead.
            if self.place.ranks == 1 or sys.exc_info()[0] is None:
                engine.stop()
        if code == 0 and self.place.rank == 0:
            print_result(self.folder, as_json)
        return code

    def _agreed(self, path: str) -> str:
        """Rank 0's word on every rank."""
        from cl_runner import engine

        if self.place.ranks > 1:
            engine.start(self.place)
        return str(engine.broadcast_object(self.place, path))

    def _introduce(self, screen: Screen) -> None:
        notes = [*self.resolved.notes, *self.plan.notes(), *([self.plan.grows] if self.plan.grows else [])]
        for line in [self.located.note, *notes, *free_devices(self.place)]:
            screen.line(line)

    def _new(self) -> tuple[str, str, dict[str, Any], Callable[[Path], None] | None]:
        """``run.yaml``, ``order.yaml`` and ``run.json`` of a new run, and what fills the rest of its folder."""
        config, plan, order = self.resolved.config, self.plan, self.resolved.order
        assert order is not None
        if self.folder.name != (config.output.name or runs.folder_name(self.resolved)):
            config.output.name = self.folder.name  # --restart: its run.yaml gives this run, not the old one
        cut = {name: rows for name, rows in plan.data.train.items() if rows.cut}
        taken = ", ".join(f"{name} {len(rows)} of {len(rows) + rows.cut}" for name, rows in cut.items())
        notes = [*([f"train rows taken: {taken}"] if taken else []), *plan.data.scored_unknown()]
        about = {
            "order": plan.order,
            "method": config.method.name,
            "model": config.model.name if self.located.kind != "folder" else Path(config.model.name).name,
            "seed": config.seed,
            "synthetic": plan.data.synthetic,
            "named_task": config.data.add_task_name or config.data.add_dataset_name,
            "form": plan.method.form,
            "variant": runs.variant(self.resolved),
            "changed": runs.changed(self.resolved),
            "notes": notes,
            "tasks": list(plan.data.tasks),
            "metrics": {name: task.metric for name, task in plan.data.tasks.items()},
            "stages": [{"name": stage.name, "tasks": list(stage.tasks)} for stage in plan.stages],
            "identity": dict(self.identity),
        }
        if self.extended:
            more = self.extended.about(config.eval.future)
            about |= {**more, "notes": [*notes, *more["notes"]]}
        return dump(config), dump_order(order.written()), about, self.extended.fill if self.extended else None

    def _open(self, stack: ExitStack) -> None:
        """Lock the folder, and clear what an interrupted process left in it."""
        if self.place.rank != 0:
            return
        stack.enter_context(self.folder.lock())
        # Another process may have made the folder, or gone on with it, since we looked.
        runs.refuse_other_settings(self.folder, self.resolved.config, self.identity)
        self.folder.clear_drafts()
        self.folder.keep_log_rows(["base", *self.plan.names[: self.folder.committed(self.plan.names)]])

    def _check_disk(self, run: Run) -> None:
        if self.place.rank != 0:
            return
        done = len(self.extended.stages) if self.extended else self.folder.committed(self.plan.names)
        needed = run.bytes_to_write(done) + (self.extended.bytes if self.extended else 0)
        root = next(path for path in [self.folder.path, *self.folder.path.absolute().parents] if path.exists())
        free = shutil.disk_usage(root).free
        if needed > free:
            raise UserError(
                f"{self.folder.path.parent}: {size(free)} free on this disk, and the stages to come need about "
                f"{size(needed)}; make room, or give another --output-dir"
            )

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
            self.channel.say(FAILED + f"process {self.place.rank}: {why(error)}")
            raise
        if first:
            self.folder.set_status("done")
        return 0

    def _begin(self, screen: Screen) -> None:
        from cl_runner.run import environment

        record_environment(self.folder, environment(self.plan, self.place))
        screen.log_to(self.folder.log_file)
        screen.line(f"run folder: {self.folder.path}")
        self.folder.set_status("running", pid=os.getpid(), host=socket.gethostname())

    def _tell(self, run: Run, screen: Screen, error: BaseException) -> int:
        """One line: the stage, why, what is kept, the command to go on. Returns the exit code."""
        stopping.last_words()
        if console.debugging:
            traceback.print_exception(error)
        stopped, reason = self._reason(error)
        kept = run.names[: self.folder.committed(run.names)]
        where = f" in stage {run.names.index(run.current) + 1} ({run.current})" if run.current else ""
        what = f"stopped{where}" if stopped else f"failed{where}: {reason}"
        keeps = f"kept: {', '.join(kept)}" if kept else "no stage is finished yet"
        screen.close()
        self.channel.say(TOLD)
        screen.line(f"{what}; {keeps}; go on: {self._again()}")
        with suppress(OSError):  # a full disk must not hide what is being told
            self.folder.set_status("stopped" if stopped else "failed", message=reason)
        return 130 if stopped else 2 if isinstance(error, UserError) else 1

    def _reason(self, error: BaseException) -> tuple[bool, str]:
        """Whether this is a stop that was asked for, and why the run ends."""
        others = self.channel.failures()
        asked = stopping.asked()
        if asked or isinstance(error, KeyboardInterrupt | Stopped):
            # The launcher ends us with SIGTERM too, when another process of the run has ended.
            if asked == "SIGTERM" and self.channel and STOP not in self.channel.heard():
                return False, others[0] if others else "another process of the run ended, or its launcher"
            return True, f"by {asked or 'SIGINT'}"
        if others and not isinstance(error, UserError | TrainingError | OSError | MemoryError):
            return False, others[0]
        return False, why(error)

    def _again(self) -> str:
        """The command that goes on."""
        if self.part is not None and not self.channel:
            return "the same command again"
        words = [word for word in sys.argv[1:] if word != "--restart"]
        if len(words) < len(sys.argv) - 1:
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
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError):
        return f"out of memory; lower training.micro_batch, eval.batch_tokens or data.max_source ({text[:200]})"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    lost = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")
    if kind.startswith("Dist") or (kind == "RuntimeError" and any(word in text for word in lost)):
        return "another process of the run ended (killed, or out of memory?); --debug shows more"
    return f"{kind}: {text} (--debug shows where)"


def size(count: float) -> str:
    """Bytes in words."""
    for unit, scale in (("GB", 2**30), ("MB", 2**20)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 2**10:.0f} KB"


def free_devices(place: Place) -> list[str]:
    """A line on GPUs that this run leaves alone."""
    if place.device != "cuda" or place.ranks > 1:
        return []
    import torch

    others = torch.cuda.device_count() - 1
    return [f"training on the first visible GPU; {others} more: --gpus {others + 1} takes them"] if others > 0 else []


def record_environment(folder: RunDir, about: Mapping[str, Any]) -> None:
    """``environment.json``: of the run's first start; under ``later``, what was otherwise at each later one."""
    file = folder.path / "environment.json"
    if not file.is_file():
        write_json(file, {**about, "later": []})
        return
    first = read_json(file)
    later = [*first.get("later", []), {key: value for key, value in about.items() if first.get(key) != value}]
    write_json(file, {**first, "later": later})


def finish(folder: RunDir) -> None:
    """Write the results of a run that was cut off between its last stage and them; else do nothing."""
    if folder.status().get("state") != "done":
        with folder.lock():
            runs.write_results(folder)
            folder.set_status("done")


def print_result(folder: RunDir, as_json: bool) -> None:
    """The table, the folder, the next command; or one JSON object."""
    summary = runs.summary_of(folder)
    if as_json:
        print_json({"run": str(folder.path), **tables.report_json(summary)})
        return
    rich_print(tables.table(summary))
    print(f"\nrun folder: {folder.path}")
    print(f"again at any time: cl-runner report {shlex.quote(str(folder.path))}")


def print_plan(plan: Plan, resolved: Resolved, folder: RunDir, done: int, ranks: int, as_json: bool) -> None:
    """``--dry-run``: stages, steps, batch arithmetic, rows."""
    stages = []
    for index, (stage, batch) in enumerate(zip(plan.stages, plan.batches(ranks), strict=True)):
        tested = list(plan.data.tasks) if plan.config.eval.future else plan.seen(index)
        stages.append(
            {
                "stage": index + 1,
                "name": stage.name,
                "done": index < done,
                "train_rows": batch.rows,
                "test_rows": sum(len(plan.data.test[task]) for task in tested),
                "epochs": batch.epochs,
                "steps": batch.steps,
                "global_batch": batch.global_batch,
                "micro_batch": batch.micro_batch,
                "accumulation": batch.accumulation,
            }
        )
    about = {
        "order": plan.order,
        "method": plan.config.method.name,
        "model": plan.config.model.name,
        "synthetic": plan.data.synthetic,
        "processes": ranks,
        "grows": plan.grows or None,
        "folder": str(folder.path),
        "stages_done": done,
        "stages": stages,
    }
    if as_json:
        print_json(about)
        return
    for note in [*resolved.notes, *plan.notes()]:
        print(note)
    made_up = plan.data.made_up()
    whole = len(made_up) == len(plan.data.tasks)
    mark = (" (synthetic data)" if whole else f" (synthetic: {', '.join(made_up)})") if made_up else ""
    print(f"{about['order']} with {about['method']} on {about['model']}{mark}, {ranks} process{'es' * (ranks > 1)}")
    head = ["", "stage", "train rows", "test rows", "epochs", "steps", "batch = micro × accumulation × processes"]
    rows = [
        [
            f"{s['stage']}{'*' if s['done'] else ''}",
            str(s["name"]),
            *(str(s[key]) for key in ("train_rows", "test_rows", "epochs", "steps")),
            f"{s['global_batch']} = {s['micro_batch']} × {s['accumulation']} × {ranks}",
        ]
        for s in stages
    ]
    print(aligned(head, rows, right=("train rows", "test rows", "epochs", "steps")))
    if done:
        print("* done")
    if plan.grows:
        print(plan.grows)
    there = "done already" if done == len(stages) else f"goes on after stage {done}" if folder.exists() else "new"
    print(f"folder: {folder.path} ({there}; nothing was written)")
