"""``cl-runner train``: what is checked before it starts, and where it goes.

Everything that can be refused is refused in this order, and nothing is written until all of it is fine: settings,
model files, rows of every task, the run folder (all without torch), then the model itself, every row as tokens, disk.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_runner.commands.analyze import analyze_after
from cl_runner.commands.report import print_result, write_page
from cl_runner.commands.request import Request
from cl_runner.engine.process import Assigned, assigned
from cl_runner.errors import UserError
from cl_runner.launch.channel import Channel
from cl_runner.launch.hostfile import Host, read_hostfile
from cl_runner.models.identity import adapter_identity, model_identity
from cl_runner.models.locate import Located, check, locate
from cl_runner.runs import catalog, checkpoints
from cl_runner.runs.commit import clear_drafts, remove_models
from cl_runner.runs.folder import RunDir, readable
from cl_runner.runs.results import summary_of, write_results
from cl_runner.runs.resume_guard import plugin_identity, refuse_other_settings, refuse_unwritable
from cl_runner.settings import Resolved
from cl_runner.terminal.console import aligned, one_line, print_json, say
from cl_runner.trackers.processes import refuse_missing
from cl_runner.training.extend import Extended
from cl_runner.training.plan import Plan
from cl_runner.training.reuse import Reused
from cl_runner.training.session import Session
from cl_runner.training.taken_over import TakenOver


@dataclass(frozen=True)
class Prepared:
    """A run that may be trained, as far as is known without its model.

    done: stages that are committed. step: that the next one goes on from. part: what a launcher made of this process.
    """

    resolved: Resolved
    located: Located
    plan: Plan
    identity: Mapping[str, Any]
    folder: RunDir
    taken: TakenOver | None
    done: int
    step: int
    processes: int
    part: Assigned | None
    hosts: Sequence[Host]

    @classmethod
    def of(
        cls,
        request: Request,
        gpus: int | None,
        hostfile: Path | None,
        restart: bool,
        restart_stage: bool = False,
        elsewhere: int = 1,
    ) -> Prepared:
        """Check all that can be checked without torch. Raises UserError.

        elsewhere: processes that the run will have on another machine, where none is asked for here.
        """
        check_platform()
        resolved, order = request.with_order()
        config = resolved.config
        part = assigned()
        hosts = hosts_of(hostfile, gpus, part)
        if hostfile is None:
            check_gpus(gpus, part)
        refuse_missing(config.output.trackers)
        folder = name_of(resolved, restart)
        refuse_unwritable(folder.path)
        located = locate(config.model)
        check(located)
        plan = Plan.make(config, order.name, order.tasks)
        plan.check_shapes()
        processes = part.ranks if part else sum(host.slots for host in hosts) or gpus or elsewhere
        identity = {
            "model": model_identity(located, config.model.quantize),
            **plan.identity(processes),
            **plugin_identity(),
            **started_from(config.model.adapter, request.extends or folder),
        }
        taken: TakenOver | None = None
        if request.extends is not None and not folder.exists():
            taken = Extended.of(request.extends, order.name, plan, config, identity)
        elif config.output.reuse and not folder.exists() and not restart:
            taken = Reused.find(folder.path.parent, config, identity)
        done = len(taken.stages) if taken else 0
        if folder.exists():
            refuse_other_settings(folder, config, identity)
            folder.refuse_gaps(plan.names)
            done = folder.committed(plan.names)
        step = 0
        if folder.exists() and done < len(plan.stages) and not restart_stage:
            step = step_to_enter(folder, plan, done, processes)
        return cls(resolved, located, plan, identity, folder, taken, done, step, processes, part, hosts)


def started_from(adapter: str | None, run: RunDir) -> dict[str, Any]:
    """For the identity of a run that starts from an adapter: its files.

    Where they are gone the copy of the run that goes on stands in for them. Raises UserError.
    """
    if adapter is None:
        return {}
    if run.exists() and not os.path.lexists(adapter):
        with readable(run):
            known = run.about()["identity"].get("adapter")
        if known:
            return {"adapter": known}
    return {"adapter": adapter_identity(Path(adapter))}


def train(
    request: Request,
    *,
    gpus: int | None,
    hostfile: Path | None,
    restart: bool,
    restart_stage: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Train what is asked for, or say that it is done; returns the exit code.

    Raises:
        UserError, TrainingError, Stopped: before there was a run to tell the end of.
    """
    run = Prepared.of(request, gpus, hostfile, restart, restart_stage)
    folder, part = run.folder, run.part
    if dry_run:
        print_plan(run, as_json)
        return 0
    if run.done == len(run.plan.stages) and not run.taken:
        if part is None or part.rank == 0:
            finish(folder, run.plan)
            say_done(folder)
            print_result(folder, as_json, folder.page_file if folder.page_file.is_file() else None)
        return 0
    if part is None and (run.hosts or run.processes > 1):
        if folder.exists():
            with folder.lock():  # rather now than when all processes are up
                pass
        from cl_runner.launch import hosts, local

        return hosts.launch(run.hosts, sys.argv[1:]) if run.hosts else local.launch(run.processes, sys.argv[1:])
    anew = restart or restart_stage
    session = Session(run.resolved, run.located, run.plan, run.identity, folder, part, run.taken, restart_stage, anew)
    code = session.run()
    if code == 0 and session.place.rank == 0:
        print_result(session.folder, as_json, page_of(session.folder) if run.resolved.config.output.html else None)
    return code


def check_platform() -> None:
    """Training needs Linux. Raises UserError elsewhere."""
    if not sys.platform.startswith("linux"):
        raise UserError(f"cl-runner trains on Linux; this is {sys.platform} (WSL 2, a container or a GPU box will do)")


def hosts_of(hostfile: Path | None, gpus: int | None, part: Assigned | None) -> list[Host]:
    """The machines to train on, where these are asked for and nobody has started the processes there yet.

    Raises:
        UserError: the file is wrong, or another launcher or ``--gpus`` says something else.
    """
    if hostfile is None:
        return []
    if gpus is not None:
        raise UserError("--gpus and --hostfile: the slots of the hostfile say how many; leave --gpus out")
    if part is None:
        return read_hostfile(hostfile)
    if not Channel.given():
        raise UserError(
            f"--hostfile: another launcher has started {part.ranks} processes already; leave --hostfile out"
        )
    return []  # this is one of those processes


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
    name = catalog.check_name(output.name) if output.name else catalog.folder_name(resolved)
    return RunDir(root / (catalog.beside(root, name) if restart else name))


def step_to_enter(folder: RunDir, plan: Plan, index: int, processes: int) -> int:
    """The step that a stage (from 0) goes on from, 0 where it begins. Raises UserError where it may not go on there."""
    for one in checkpoints.there(folder, index, plan.names[index]):
        if (then := one.facts()) is not None:  # else it is damaged, and the run will pass over it
            checkpoints.refuse_others(one, then, plan.facts(folder, index, processes))
            return one.step
    return 0


def say_done(folder: RunDir) -> None:
    """That there is nothing left to train."""
    say(f"the run {folder.path} is done already; --restart begins anew beside it")


def finish(folder: RunDir, plan: Plan) -> None:
    """Do what is left of a run that was cut off after its last stage's commit; else do nothing."""
    if folder.status().get("state") != "done":
        with folder.lock():
            clear_drafts(folder)
            checkpoints.clear(folder)
            if (keep := plan.config.output.keep_stages) != "all":
                remove_models(folder, plan.names, keep)
            write_results(folder)
            folder.set_status("done")


def about_plan(run: Prepared) -> dict[str, Any]:
    """Stages, steps, batch arithmetic, rows, as JSON has them."""
    plan, stages = run.plan, []
    for index, (stage, batch) in enumerate(zip(plan.stages, plan.batches(run.processes), strict=True)):
        tested = list(plan.data.tasks) if plan.config.eval.future else plan.seen(index)
        stages.append(
            {
                "stage": index + 1,
                "name": stage.name,
                "done": index < run.done,
                "train_rows": batch.rows,
                "test_rows": sum(len(plan.data.test[task]) for task in tested),
                "epochs": batch.epochs,
                "steps": batch.steps,
                "global_batch": batch.global_batch,
                "micro_batch": batch.micro_batch,
                "accumulation": batch.accumulation,
            }
        )
    return {
        "order": plan.order,
        "method": plan.config.method.name,
        "model": plan.config.model.name,
        "synthetic": plan.data.synthetic,
        "processes": run.processes,
        "grows": plan.grows or None,
        "starts": plan.starts or None,
        "folder": str(run.folder.path),
        "stages_done": run.done,
        "step": run.step,
        "stages": stages,
    }


def print_plan(run: Prepared, as_json: bool) -> None:
    """``--dry-run``: stages, steps, batch arithmetic, rows."""
    about = about_plan(run)
    if as_json:
        print_json(about)
        return
    print(plan_text(run, about, {}))


def plan_text(run: Prepared, about: Mapping[str, Any], more: Mapping[str, Sequence[str]], below: str = "") -> str:
    """A plan as the terminal shows it.

    more: columns beside the steps, a cell for each stage. below: what stands under the table.
    """
    plan, ranks, stages = run.plan, run.processes, about["stages"]
    made_up = plan.data.made_up()
    whole = len(made_up) == len(plan.data.tasks)
    mark = (" (synthetic data)" if whole else f" (synthetic: {', '.join(made_up)})") if made_up else ""
    title = f"{about['order']} with {about['method']} on {about['model']}{mark}, {ranks} process{'es' * (ranks > 1)}"
    numbers = ["train rows", "test rows", "epochs", "steps", *more]
    head = ["", "stage", *numbers, "batch = micro × accumulation × processes"]
    rows = [
        [
            f"{s['stage']}{'*' if s['done'] else ''}",
            str(s["name"]),
            *(str(s[key]) for key in ("train_rows", "test_rows", "epochs", "steps")),
            *(cells[s["stage"] - 1] for cells in more.values()),
            f"{s['global_batch']} = {s['micro_batch']} × {s['accumulation']} × {ranks}",
        ]
        for s in stages
    ]
    done, step = run.done, run.step
    goes_on = f"goes on in stage {done + 1} at step {step}" if step else f"goes on after stage {done}"
    state = "done already" if done == len(stages) else goes_on if run.folder.exists() else "new"
    lines = [
        *run.resolved.notes,
        *plan.notes(),
        title,
        aligned(head, rows, right=numbers),
        *(["* done"] if done else []),
        *filter(None, [plan.starts, plan.grows]),
        *([below] if below else []),
        f"folder: {run.folder.path} ({state}; nothing was written)",
    ]
    return "\n".join(lines)


def page_of(folder: RunDir) -> Path | None:
    """The page of a run that has just ended. The run is done, whatever becomes of it; what does is said."""
    try:
        try:
            analyze_after(folder, (summary_of(folder).seconds or {}).get("stage", 0.0))
        except UserError as error:
            say(f"of the updates the page says nothing: {error}")
        return write_page(folder)
    except Exception as error:
        say(f"{folder.page_file} is not written: {one_line(str(error))}")
        return None
