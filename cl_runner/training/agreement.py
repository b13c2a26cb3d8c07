"""Before a run on several processes begins: whether all of them are about to compute the same, into one folder.

On one machine they cannot but agree. On several, whoever started them, each has its own libraries, rows and disks: what
would end in other numbers, or in a process that waits for ever, ends here in a line.
"""

from __future__ import annotations

import hashlib
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cl_runner.config.schema import RunConfig
from cl_runner.engine import zero as engine
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.models.identity import differing_model
from cl_runner.runs.resume_guard import deciding
from cl_runner.versions import differing, versions

SOME = 16  # numbers of each parameter, from end to end


def refuse_apart(place: Place, folder: Path, config: RunConfig, identity: Mapping[str, Any]) -> None:
    """Refuse processes that do not agree with process 0, the same on all. *Collective*.

    folder: of the run; as long as it is not there, one above it is looked at.

    Raises:
        UserError: another version, setting, base model or row, or a folder that process 0 does not write.
    """
    if place.ranks == 1:
        return
    # Where files lie may be each machine's own, as it may be when a run goes on.
    ours = {"versions": versions(), "settings": deciding(config), "identity": dict(identity)}
    theirs, first = engine.broadcast_object(place, (socket.gethostname(), ours))
    with _written(place, folder) as (file, word):
        wrong = _otherwise(first, ours)
        if not wrong and word is not None and not _holds(Path(file), word):
            wrong = f"does not see what process 0 on {theirs} writes into {Path(file).parent}"
            wrong += ", where the run's folder is to be; give an --output-dir that all machines share"
        _refuse_any(place, wrong)


def refuse_other_base(place: Place, model: nn.Module) -> None:
    """Refuse a base model that was loaded with other weights than process 0's. *Collective*.

    A machine that had a name of the hub in its cache may have an older commit than one that has just fetched it. A few
    numbers of each parameter tell. Raises UserError.
    """
    if place.ranks == 1:
        return
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = torch.linspace(0, flat.numel() - 1, min(SOME, flat.numel()), dtype=torch.float64).long()
        values = flat[some.to(flat.device)].to("cpu")
        digest.update(f"{name} {tuple(parameter.shape)} {values.tolist()}\n".encode())
    mine = digest.hexdigest()
    first = engine.broadcast_object(place, mine)
    _refuse_any(place, "" if mine == first else "loaded other weights than process 0; give a model.revision")


def _refuse_any(place: Place, wrong: str) -> None:
    """Raise UserError on every rank where one of them has something wrong: the first one's. *Collective*."""
    for rank, (host, problem) in enumerate(engine.gather_objects(place, (socket.gethostname(), wrong))):
        if problem:
            raise UserError(f"process {rank} on {host}: {problem}")


def _otherwise(first: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What is otherwise here than for process 0, in a few words; empty where nothing is."""
    if other := differing(first["versions"], ours["versions"]):
        return f"other versions than process 0: {other}; install the same"
    then, here = first["settings"], ours["settings"]
    if keys := [key for key in {**then, **here} if then.get(key) != here.get(key)]:
        return f"other settings than process 0 ({', '.join(keys)}); start all with the same command"
    then, here = first["identity"], ours["identity"]
    if model := differing_model(then["model"], here["model"]):
        return f"the base model is not what process 0 has ({', '.join(model)})"
    for task, splits in then["data"].items():
        for split, data in splits.items():
            if here["data"].get(task, {}).get(split, {}).get("fingerprint") != data["fingerprint"]:
                return f"other {split} data of {task} than process 0 has"
    parts = [part for part in {**then, **here} if part not in ("model", "data") and then.get(part) != here.get(part)]
    return f"other {parts[0].replace('_', ' ')} than process 0; start all with the same command" if parts else ""


@contextmanager
def _written(place: Place, folder: Path) -> Iterator[tuple[str, str | None]]:
    """A file of process 0 as near to the run as there is a folder, and the word in it. *Collective*."""
    near = next(above for above in [folder.absolute(), *folder.absolute().parents] if above.is_dir())
    file, word = near / f".cl-runner-{uuid.uuid4().hex}", None
    try:
        if place.rank == 0:
            word = _put(file, uuid.uuid4().hex)
        yield engine.broadcast_object(place, (str(file), word))  # no word: it could not be made
    finally:
        if place.rank == 0:
            with suppress(OSError):
                file.unlink()


def _put(file: Path, word: str) -> str | None:
    """Write a word; returns what stands there, None where nothing can. What hinders it, the run will say."""
    try:
        file.touch()
    except OSError:
        return None
    with suppress(OSError):
        file.write_text(word)
        return word
    return ""  # the disk is full


def _holds(file: Path, word: str) -> bool:
    """Whether a file has a word in it; what a network brings may be a moment late."""
    for wait in (0.0, 0.1, 0.5, 1.0, 3.0):
        time.sleep(wait)
        with suppress(OSError, UnicodeDecodeError):
            if file.read_text() == word:
                return True
    return False
