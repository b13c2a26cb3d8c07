"""A stage's state, to its folder and back: the adapters, what the method carries, and what identifies them.

A later stage, ``eval`` and a resumed run all read a stage through here. What an earlier stage holds already is named
by file and hash, not copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_runner.adapters import FullWeights, Pair, Prompts, Stored
from cl_runner.adapters.saved import WEIGHTS, load_own_pair, load_pairs, load_sums, own_pair_tensors, save_adapter
from cl_runner.errors import UserError
from cl_runner.methods.base import State
from cl_runner.models.saved import WEIGHTS as MODEL_WEIGHTS
from cl_runner.models.saved import read_model, save_model
from cl_runner.rundir import RunDir, read_json, sha256, write_json
from cl_runner.stage import StageRun

METHOD_PREFIX = "method."
PAST_PREFIX = "past."  # sums of past updates that the adapter holds only together with the live one
STATE = "state.safetensors"


def save_stage(folder: Path, stage: StageRun) -> dict[str, Any]:
    """Write ``adapter/`` or ``model/``, ``state.json``, and where needed ``state.safetensors`` and ``answers.json``.

    Returns the sizes of what is carried, in MB.
    """
    adapters, method, name = stage.adapters, stage.room.method, stage.plan.name
    live = adapters.kept.get(name)
    if isinstance(adapters, FullWeights):
        save_model(folder / "model", adapters.model, stage.room.base.tokenizer)
        saved: dict[str, Any] = {"pairs": [], "dense": [], "dense_stages": [], "own": "model"}
        sizes = {"model": _megabytes(folder / "model" / MODEL_WEIGHTS)}
    else:
        where = folder / "adapter"
        saved = adapters.save(where) if isinstance(adapters, Prompts) else save_adapter(where, adapters, live)
        sizes = {"adapter": _megabytes(where / WEIGHTS)}
    state = method.state()
    tensors = {METHOD_PREFIX + key: _to_disk(tensor) for key, tensor in state.tensors.items()}
    if live is not None or saved["own"] == "terms":
        sums = {target: adapters.past[target].sum for target in saved["dense"]}
        tensors.update({PAST_PREFIX + target: _to_disk(s) for target, s in sums.items() if s is not None})
    if saved["own"] == "state":
        own = live or next((pair for pair in adapters.folded if pair.stage == name), None)
        tensors.update(own_pair_tensors(own) if own else {})
    if tensors:
        save_file(tensors, folder / STATE)
    apart = saved["own"] in ("state", "terms")
    earlier = [pair.stage for pair in adapters.folded if pair.stage != name] if apart else []
    kept = [other for other in adapters.kept if other != name]
    sizes["method"] = _megabytes(folder / STATE)
    write_json(
        folder / "state.json",
        {
            "method": stage.config.method.name,
            "stage": name,
            "tasks": list(stage.plan.tasks),
            "start": stage.plan.start,
            "live": name if live else None,
            "kept": _references(folder, stage, kept),
            "earlier": _references(folder, stage, earlier),
            "state": state.json,
            "megabytes": sizes,
            **saved,
        },
    )
    if isinstance(adapters, Prompts) and method.knows_task:
        kept = [plan.name for plan in stage.order[: stage.index]]  # every stage's prompt is a folder
    answers = _answers(stage, kept) if kept else {}
    for task in method.each_answer(stage) if adapters.terms else ():
        answers[task] = f"adapters/{task}"
        save_adapter(folder / answers[task], adapters)
    if answers:
        write_json(folder / "answers.json", answers)
    return sizes


def _answers(stage: StageRun, kept: Iterable[str]) -> dict[str, str]:
    """Task → folder of the adapter or model that answers it, relative to the stage's, for the tasks that have one."""
    method, name = stage.room.method, stage.plan.name
    what = "model" if isinstance(stage.adapters, FullWeights) else "adapter"
    where = {name: what, **{other: f"../{_folder_name(stage, other)}/{what}" for other in kept}}
    tasks = [task for plan in stage.order[: stage.index + 1] for task in plan.tasks]
    wanted = {task: method.answering(task if method.knows_task else None) for task in tasks}
    return {task: where[other] for task, other in wanted.items() if other in where}


def restore_stage(rundir: RunDir, stage: StageRun, index: int) -> None:
    """Put adapters and method into the state that stage ``index`` (from 0) committed.

    Raises:
        UserError: a file is missing, or is not what was committed.
    """
    folder = rundir.stage_dir(index, stage.order[index].name)
    verify(folder)
    state = read_json(folder / "state.json")
    tensors = load_file(folder / STATE) if (folder / STATE).exists() else {}
    live = state["live"]
    pairs = load_pairs(folder / "adapter", state) if state["own"] == "adapter" else _pairs(folder, state, tensors)
    kept = {name: _referenced(stage, folder, name, where) for name, where in state["kept"].items()}
    if live or state["own"] == "terms":
        if live:
            kept[live] = _stored(stage, folder, live) if state["own"] == "model" else pairs.pop()
        sums = _named(tensors, PAST_PREFIX)
    else:
        sums = load_sums(folder / "adapter", state["dense"]) if state["dense"] else {}
    stage.adapters.restore(pairs, kept, live, sums=sums, dense=state["dense_stages"])
    # Copies: a tensor within a file's bytes lies where it may, and a product of it adds up in another order.
    carried = {key: tensor.clone() for key, tensor in _named(tensors, METHOD_PREFIX).items()}
    stage.room.method.load_state(State(carried, state["state"]))


def committed(rundir: RunDir, stage: StageRun) -> None:
    """A stage is on disk: full weights that were kept for later need no memory any more. On every rank."""
    if isinstance(stage.adapters, FullWeights):
        name = stage.plan.name
        stored = _stored(stage, rundir.stage_dir(stage.index, name), name)
        assert stored.read is not None
        stage.adapters.committed(name, stored.read)


def remove_models(rundir: RunDir, stage: StageRun, keep: int) -> None:
    """Remove the weights of all committed stages but the last ``keep``, and those that the last one names."""
    newest = read_json(rundir.stage_dir(stage.index, stage.plan.name) / "state.json")
    for index in range(stage.index + 1 - keep):
        name = stage.order[index].name
        if name not in newest["kept"]:
            rundir.remove(index, name, ("model", STATE))  # what the method carried is of no use without the weights


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
    for name, digest in _sealed(folder).items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{folder} is damaged: {name} is missing")
        if sha256(file) != digest:
            raise UserError(f"{folder} is damaged: {name} is not what was committed")


def _sealed(folder: Path) -> dict[str, str]:
    """File → hash, as committed."""
    hashes = read_json(folder / "DONE").get("sha256")
    if not isinstance(hashes, dict):
        raise UserError(f"{folder} is damaged: DONE holds no hashes")
    return hashes


def _pairs(folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Pair]:
    """The pairs in a stage's sum, where its adapter does not hold them: each from the stage that made it."""
    return [
        load_own_pair(tensors, about)
        if about["stage"] == state["stage"]
        else _referenced_pair(folder, about["stage"], state["earlier"][about["stage"]])
        for about in state["pairs"]
    ]


def _references(folder: Path, stage: StageRun, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """The files that hold the own pairs (or models) of earlier stages, relative to ``folder``, and their hashes."""
    found = {}
    for name in names:
        other = f"../{_folder_name(stage, name)}"
        own = read_json(folder / other / "state.json")["own"]
        file = {"state": STATE, "adapter": f"adapter/{WEIGHTS}", "model": f"model/{MODEL_WEIGHTS}"}[own]
        found[name] = {"file": f"{other}/{file}", "sha256": _sealed(folder / other)[file]}
    return found


def _referenced(stage: StageRun, folder: Path, name: str, where: Mapping[str, str]) -> Any:
    """What an earlier stage that ``folder`` names kept: its own pair, or its weights, to be read when they answer."""
    if isinstance(stage.adapters, FullWeights):
        return _stored(stage, _other(folder, where), name)
    return _referenced_pair(folder, name, where)


def _stored(stage: StageRun, folder: Path, name: str) -> Stored:
    return Stored(name, read=partial(read_model, folder / "model", stage.adapters.model))


def _other(folder: Path, where: Mapping[str, str]) -> Path:
    """The folder of the earlier stage that ``folder`` names by file and hash."""
    other = folder.parent / Path(where["file"]).parts[1]
    verify(other)
    if _sealed(other).get(Path(*Path(where["file"]).parts[2:]).as_posix()) != where["sha256"]:
        raise UserError(f"{other} is not the stage that {folder.name} was committed with")
    return other


def _referenced_pair(folder: Path, name: str, where: Mapping[str, str]) -> Pair:
    """The own pair of an earlier stage that ``folder`` names by file and hash."""
    other = _other(folder, where)
    state = read_json(other / "state.json")
    if state["own"] == "adapter":
        return next(pair for pair in load_pairs(other / "adapter", state) if pair.stage == name)
    about = next(about for about in state["pairs"] if about["stage"] == name)
    return load_own_pair(load_file(other / STATE), about)


def _folder_name(stage: StageRun, name: str) -> str:
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
