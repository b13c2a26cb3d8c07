"""A stage's state, to its folder and back: the adapters, what method and options carry, and what identifies them.

A later stage, ``eval`` and a resumed run all read a stage through here. What an earlier stage holds already is named
by file and hash, not copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_runner.adapters.base import Held
from cl_runner.adapters.saved import GIVEN, Saved, is_given
from cl_runner.atomic import read_json, write_json
from cl_runner.errors import UserError
from cl_runner.methods.protocol import State
from cl_runner.runs.commit import refuse_other, sealed
from cl_runner.runs.folder import RunDir
from cl_runner.runs.predictions import FILE as PREDICTIONS
from cl_runner.runs.predictions import predictions
from cl_runner.runs.state import METHOD, NEXT, OPTION, TENSORS, Record, Reference, StageState
from cl_runner.training.stage import StageRun

NEXT_PREFIX = "next."  # of tensors of what the next stage begins from, where that is not what answers


def save_stage(folder: Path, stage: StageRun, answers: Held | None = None) -> dict[str, float]:
    """Write ``adapter/`` or ``model/``, ``state.json``, and where needed ``state.safetensors`` and ``answers.json``.

    answers: what answers, where the next stage begins from something else, which is what the adapters hold now.
    Returns the sizes of what is carried, in MB.
    """
    adapters, method, name = stage.adapters, stage.room.method, stage.plan.name
    held = answers or adapters.held()
    record, tensors = _save(folder, adapters.folder, stage, held)
    sizes = {adapters.folder: _megabytes(folder / adapters.folder / adapters.file)}
    following = None
    if answers is not None:
        following, beside = _save(folder, NEXT, stage, adapters.held())
        tensors.update({NEXT_PREFIX + key: tensor for key, tensor in beside.items()})
        sizes[NEXT] = _megabytes(folder / NEXT / adapters.file)
    state = method.state()
    options = {option.name: option.state() for option in stage.room.options}
    carried = {METHOD + key: tensor for key, tensor in state.tensors.items()}
    for owner, of_option in options.items():
        carried.update({f"{OPTION}{owner}.{key}": tensor for key, tensor in of_option.tensors.items()})
    tensors = {**carried, **tensors}
    if tensors:
        save_file({key: _to_disk(tensor) for key, tensor in tensors.items()}, folder / TENSORS)
    sizes["method"] = _megabytes(folder / TENSORS)
    StageState(
        name=name,
        method_name=stage.config.method.name,
        tasks=stage.plan.tasks,
        start=stage.plan.start,
        answers=record,
        next=following,
        method=state.json,
        options={owner: of_option.json for owner, of_option in options.items() if of_option.json},
        megabytes=sizes,
    ).write(folder)
    kept = list(record.kept)
    if record.saved.own == "prompts" and method.knows_task:
        kept = [plan.name for plan in stage.order[: stage.index]]  # every stage's prompt is a folder
    wanted = _answers(stage, kept) if kept else {}
    for task in method.each_answer(stage) if adapters.terms else ():
        wanted[task] = f"adapters/{task}"
        adapters.save(folder / wanted[task], name, adapters.held())
    if wanted:
        write_json(folder / "answers.json", wanted)
    return sizes


def _save(folder: Path, where: str, stage: StageRun, held: Held) -> tuple[Record, dict[str, Tensor]]:
    """Write what the adapters hold; its record, and the tensors that stand beside its folder."""
    name = stage.plan.name
    saved, tensors = stage.adapters.save(folder / where, name, held)
    apart = saved.own in ("state", "terms")
    earlier = [pair.stage for pair in held.folded if pair.stage != name] if apart else []
    kept = [other for other in held.kept if other != name]
    live = name if name in held.kept else None
    return Record(saved, live, _references(folder, stage, kept), _references(folder, stage, earlier)), tensors


def _answers(stage: StageRun, kept: Iterable[str]) -> dict[str, str]:
    """Task → folder of the adapter or model that answers it, relative to the stage's, for the tasks that have one."""
    method, name, what = stage.room.method, stage.plan.name, stage.adapters.folder
    where = {name: what, **{other: f"../{_folder_name(stage, other)}/{what}" for other in kept}}
    tasks = [task for plan in stage.order[: stage.index + 1] for task in plan.tasks]
    wanted = {task: method.answering(task if method.knows_task else None) for task in tasks}
    return {task: where[other] for task, other in wanted.items() if other in where}


def restore_stage(rundir: RunDir, stage: StageRun, index: int) -> StageState:
    """Put adapters and method into the state that stage ``index`` (from 0) committed.

    Where the stage was opened to evaluate, that is what answers, else what the next stage begins from. Returns what the
    stage left.

    Raises:
        UserError: a file is missing, or is not what was committed.
    """
    folder = rundir.stage_dir(index, stage.order[index].name)
    verify(folder)
    state = StageState.read(folder)
    tensors = load_file(folder / TENSORS) if (folder / TENSORS).exists() else {}
    following = None if stage.evaluating else state.next
    record, where = (following, NEXT) if following else (state.answers, stage.adapters.folder)
    own = _named(tensors, NEXT_PREFIX) if following else tensors
    held = stage.adapters.load(
        folder / where,
        state.name,
        record.saved,
        own,
        record.live,
        lambda name: _referenced(stage, folder, name, record.earlier[name]),
        {name: _referenced(stage, folder, name, reference) for name, reference in record.kept.items()},
    )
    stage.adapters.restore(held.folded, held.kept, held.live, sums=held.sums, dense=held.dense)
    # Copies: a tensor within a file's bytes lies where it may, and a product of it adds up in another order.
    own_tensors = {key: tensor.clone() for key, tensor in tensors.items() if key.startswith((METHOD, OPTION))}
    stage.room.method.load_state(State(_named(own_tensors, METHOD), dict(state.method)))
    for option in stage.room.options:
        of_option = _named(own_tensors, f"{OPTION}{option.name}.")
        option.load_state(State(of_option, dict(state.options.get(option.name, {}))))
    return state


def committed(rundir: RunDir, stage: StageRun) -> None:
    """A stage is on disk: what can be read from there need not be held any more. On every rank."""
    name = stage.plan.name
    folder = rundir.stage_dir(stage.index, name)
    stage.adapters.committed(folder / (NEXT if (folder / NEXT).is_dir() else stage.adapters.folder), name)


def refuse_removed(folder: Path) -> None:
    """Refuse a stage whose weights the run has removed, before anything is loaded. Raises UserError."""
    if read_json(folder / "DONE").get("removed"):
        raise UserError(
            f"{folder}: this stage's model was removed (output.keep_stages); its scores are in metrics.json, and later "
            "stages have theirs"
        )


def verify(folder: Path, removed: bool = False) -> None:
    """Every committed file is there and is what was committed; ``removed``: but for what the run removed itself.

    Raises:
        UserError: naming the first one that is not.
    """
    if not removed:
        refuse_removed(folder)
    for name, digest in sealed(folder).items():
        refuse_other(folder, name, digest)


def answers_to(folder: Path, task: str, rows: Sequence[str]) -> list[str] | None:
    """What a stage committed as answers to a task's rows, by their ids; None where it was not asked.

    Raises:
        UserError: the file is not what was committed, or is of other rows.
    """
    answers = {row["id"]: row["output"] for row in predictions(folder).get(task, [])}
    if answers and list(answers) != list(rows):
        raise UserError(f"{folder}: {PREDICTIONS} is of other rows of {task}")
    return list(answers.values()) or None


def _references(folder: Path, stage: StageRun, names: Sequence[str]) -> dict[str, Reference]:
    """The files that hold the own pairs (or models) of earlier stages, relative to ``folder``, and their hashes."""
    found = {}
    for name in names:
        other = f"../{_folder_name(stage, name)}"
        where, saved = _newest(folder / other, stage)
        file = TENSORS if saved.own == "state" else f"{where}/{stage.adapters.file}"
        found[name] = Reference(f"{other}/{file}", sealed(folder / other)[file])
    return found


def _newest(folder: Path, stage: StageRun) -> tuple[str, Saved]:
    """The folder in a stage's, and what was saved of it, that later stages went on from."""
    state = StageState.read(folder)
    return (NEXT, state.next.saved) if state.next else (stage.adapters.folder, state.answers.saved)


def _referenced(stage: StageRun, folder: Path, name: str, reference: Reference) -> Any:
    """The own parameter set of an earlier stage that ``folder`` names by file and hash."""
    other = folder.parent / Path(reference.file).parts[1]
    verify(other)
    if sealed(other).get(Path(*Path(reference.file).parts[2:]).as_posix()) != reference.sha256:
        raise UserError(f"{other} is not the stage that {folder.name} was committed with")
    return own_set(stage, other, name)


def own_set(stage: StageRun, folder: Path, name: str) -> Any:
    """The own parameter set of a stage, as later ones went on from it, read from its folder in whosever run.

    Raises:
        UserError: a file is missing or broken.
    """
    where, saved = _newest(folder, stage)
    tensors = load_file(folder / TENSORS) if saved.own == "state" else {}
    return stage.adapters.own(folder / where, name, saved, _named(tensors, NEXT_PREFIX) if where == NEXT else tensors)


def _folder_name(stage: StageRun, name: str) -> str:
    if is_given(name):
        return f"00-{GIVEN}"
    index = next(i for i, plan in enumerate(stage.order) if plan.name == name)
    # The draft stands beside the stages, as its final place does, so that a relative path is right from both.
    return f"{index + 1:02d}-{name}"


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _to_disk(tensor: Tensor) -> Tensor:
    """A copy: safetensors refuses tensors that share memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _megabytes(file: Path) -> float:
    return round(file.stat().st_size / 2**20, 3) if file.exists() else 0.0
