"""``cl-runner export``: what a stage left, as a folder for anybody: a PEFT adapter, or a whole model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cl_runner.atomic import read_json, write_folder, write_json, write_text
from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError, first_line
from cl_runner.imports import light_imports
from cl_runner.methods import METHODS
from cl_runner.models.identity import differing_model, model_identity
from cl_runner.models.locate import locate
from cl_runner.report.card.card import HERE, card_text
from cl_runner.runs import catalog
from cl_runner.runs.answering import Answering, answering
from cl_runner.runs.card import read_card
from cl_runner.runs.folder import RunDir, readable, stage_names
from cl_runner.runs.resume_guard import as_written
from cl_runner.terminal.console import print_json, say, size

DTYPES = ("fp32", "bf16", "fp16")
ROUNDED = 0.01  # of an update's norm: from here on it is said what a precision takes away


@dataclass(frozen=True)
class Asked:
    """What is to be exported.

    stage: from 1, None for the last. task: the one that the folder shall answer. merged: as a whole model, in
    ``dtype``. base: what the hub calls the base. model: where that is now. repo: what the hub will call this.
    """

    stage: int | None = None
    task: str | None = None
    merged: bool = False
    dtype: str | None = None
    license: str | None = None
    base: str | None = None
    model: str | None = None
    trust: bool = False
    repo: str = HERE


@dataclass
class Exported:
    """What was written, and lines on what is to be known of it."""

    run: str
    stage: int
    name: str
    what: str
    notes: list[str] = field(default_factory=list)


def export(wanted: str | None, to: Path, asked: Asked, *, root: Path, as_json: bool) -> None:
    """``cl-runner export``. Raises UserError."""
    refuse_target(to)
    run = catalog.find(root, wanted)
    found = write_export(run, to, asked)
    files = {file.relative_to(to).as_posix(): file.stat().st_size for file in sorted(to.rglob("*")) if file.is_file()}
    if as_json:
        print_json({"folder": str(to), **vars(found), "files": files})
        return
    for note in found.notes:
        say(note)
    print(f"{to}: {found.what}, {size(sum(files.values()))}: stage {found.stage} ({found.name}) of {found.run}")


def refuse_target(to: Path) -> None:
    """Refuse a folder that holds something, or cannot be made, before anything is read. Raises UserError."""
    try:
        if to.is_dir():
            if any(to.iterdir()):
                raise UserError(f"--to {to}: is there already and is not empty; name another folder")
        elif os.path.lexists(to):
            raise UserError(f"--to {to}: is there already and is no folder; name another")
        above = next(folder for folder in [*to.absolute().parents] if os.path.lexists(folder))
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise UserError(f"--to {to}: {above} is no folder that can be written to")
    except OSError as error:
        raise UserError(f"--to {str(to)[:200]}: {error.strerror or error}") from None


def write_export(run: RunDir, to: Path, asked: Asked) -> Exported:
    """Write the folder in one step: it is whole, or not there. Raises UserError."""
    with readable(run):
        about = run.about()
        names = stage_names(about)
        number = run.finished(names, asked.stage)
        index, name = number - 1, names[number - 1]
        _refuse_removed(run.stage_dir(index, name))
        learned = dict.fromkeys(task for stage in about["stages"][:number] for task in stage["tasks"])
        found = answering(run, index, name, list(learned), asked.task)
    exported = Exported(str(run.path), number, name, "")
    if about["method"] not in METHODS.names():
        exported.notes.append(
            f"the method {about['method']} is not here: that this folder answers as it did is not known"
        )
    write = _writer(run, found, asked, exported)
    seq2seq = _seq2seq(found)
    hub_base = asked.base or (about["model"] if about["identity"]["model"].get("from") == "hub" else None)
    card = read_card(
        run,
        number,
        found,
        base=_base(found, asked, exported),
        hub_base=hub_base,
        seq2seq=seq2seq,
        license=asked.license,
        dtype=asked.dtype or ("fp32" if asked.merged and found.what != "model" else ""),
        merged=asked.merged,
        repo=asked.repo,
    )
    if not asked.license:
        exported.notes.append("README.md names no license; --license apache-2.0, for example, does")

    def whole(draft: Path) -> None:
        write(draft)
        write_text(draft / "README.md", card_text(card))

    _written(to, whole)
    return exported


def _written(to: Path, write: Callable[[Path], None]) -> None:
    from safetensors import SafetensorError

    try:
        write_folder(to, write)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or first_line(error)[:200]
        raise UserError(f"--to {to}: cannot be written ({why})") from None


def _refuse_removed(folder: Path) -> None:
    with light_imports():
        from cl_runner.training.checkpoint import refuse_removed

    refuse_removed(folder)


def _writer(run: RunDir, found: Answering, asked: Asked, exported: Exported) -> Callable[[Path], None]:
    """What fills the folder, all that can be refused being refused before."""
    if asked.dtype is not None and asked.dtype not in DTYPES:
        raise UserError(f"--dtype {asked.dtype}: must be one of {', '.join(DTYPES)}")
    if found.what == "model":
        if not asked.merged:
            raise UserError(
                f"the stages of {run.path} are whole models (all weights trained): no adapter holds what they learned; "
                "say --merged"
            )
        exported.what = "a whole model"
        return _model(found, asked)
    if not asked.merged:
        if asked.dtype is not None:
            raise UserError(
                "--dtype: an adapter is written as it is, in fp32; say --merged for a whole model in another"
            )
        exported.what = "soft prompts for PEFT" if found.what == "prompts" else "a PEFT adapter"
        return lambda draft: _copy(found, draft, asked.base)
    if found.what == "prompts":
        raise UserError("--merged: soft prompts change no weight of the base; leave it out")
    exported.what = f"a whole model in {asked.dtype or 'fp32'}"
    return _merged(run, found, asked, exported)


def _copy(found: Answering, draft: Path, base: str | None) -> None:
    for name in found.files:
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found.folder / name, draft / name)
    if base is not None:
        config = read_json(draft / "adapter_config.json")
        write_json(draft / "adapter_config.json", {**config, "base_model_name_or_path": base, "revision": None})


def _model(found: Answering, asked: Asked) -> Callable[[Path], None]:
    if asked.dtype is None:
        return lambda draft: _copy(found, draft, None)
    from cl_runner.models.merged import DTYPES as KNOWN
    from cl_runner.models.merged import write

    network = _network(ModelConfig(name=str(found.folder), dtype="fp32"), chat=False)
    return lambda draft: write(draft, network, found.folder, KNOWN[str(asked.dtype)])


def _merged(run: RunDir, found: Answering, asked: Asked, exported: Exported) -> Callable[[Path], None]:
    """The base with the update in its weights, loaded and added up by now."""
    config = as_written(run)
    here = {"dtype": "fp32", "trust_remote_code": asked.trust, **({"name": asked.model} if asked.model else {})}
    model = config.model.model_copy(update=here)
    if model.quantize:
        raise UserError(
            f"--merged: {run.path} has its base in 4 bits (model.quantize), into which nothing can be folded, and "
            "beside other weights the update does not answer the same; export the adapter"
        )
    with readable(run):
        then = run.about()["identity"]["model"]
    if other := differing_model(then, model_identity(locate(model))):
        raise UserError(f"the base model {model.name} is not the one of the run ({', '.join(other)})")
    with light_imports():
        from cl_runner.models.linear_weights import base_folder
        from cl_runner.models.merged import DTYPES as KNOWN
        from cl_runner.models.merged import fold, write

    dtype = KNOWN[asked.dtype or "fp32"]
    network = _network(model, config.data.chat_template)
    lost = fold(network, found.folder, dtype)
    if lost >= ROUNDED:
        exported.notes.append(
            f"{asked.dtype} rounds {lost:.0%} of what was learned away (of its norm); fp32 keeps all of it"
        )
    return lambda draft: write(draft, network, base_folder(model), dtype)


def _network(model: ModelConfig, chat: bool) -> Any:
    with light_imports():
        import torch

        from cl_runner.models.base import load_base

    return load_base(model, torch.device("cpu"), chat_template=chat).model


def _seq2seq(found: Answering) -> bool:
    if found.what == "model":
        return bool(read_json(found.folder / "config.json").get("is_encoder_decoder"))
    return read_json(found.folder / "adapter_config.json").get("task_type") == "SEQ_2_SEQ_LM"


def _base(found: Answering, asked: Asked, exported: Exported) -> str:
    """The base's name or folder, to be loaded beside the adapter."""
    if asked.base is not None or found.what == "model" or asked.merged:
        return asked.base or ""
    name = str(read_json(found.folder / "adapter_config.json").get("base_model_name_or_path"))
    if Path(name).is_absolute():
        exported.notes.append(
            f"the base is named by where it lies here, {name}; --base NAME says what the hub calls it"
        )
    return name
