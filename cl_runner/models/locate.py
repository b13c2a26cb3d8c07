"""Which base model a name means, and whether it can be trained. Neither torch nor weights are loaded to say so."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cl_runner import cache
from cl_runner.atomic import sha256
from cl_runner.config.lookup import expanded
from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError, did_you_mean
from cl_runner.models import folder_check

EMBEDDED = ("tiny-t5", "tiny-llama")
_END = 2**20  # bytes
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")  # of a model that is split, as llama.cpp names them
HASHED = 2**26  # bytes: larger files of a model are told apart by their size
_EMBEDDED_DIR = Path(__file__).resolve().parent / "embedded"

# The hub's own rule for ids: one or two words of letters, digits, "_", "-", "."; nothing doubled, nothing dangling.
_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"{_WORD}(?:/{_WORD})?")


@dataclass(frozen=True)
class Located:
    """A base model's whereabouts. ``name_or_path`` is what PEFT writes as ``base_model_name_or_path``."""

    kind: Literal["embedded", "folder", "gguf", "hub"]
    path: Path | None  # of a GGUF file: the folder that it is, or will be, dequantised to
    name_or_path: str
    note: str
    revision: str | None = None
    trust_remote_code: bool = False
    file: Path | None = None  # the GGUF file


@dataclass(frozen=True)
class Facts:
    """What ``check`` found without loading weights; ``advice`` is a line for the screen, or None."""

    encoder_decoder: bool
    model_type: str
    advice: str | None = None


def locate(model: ModelConfig, base_dir: Path | None = None) -> Located:
    """Say which model ``model.name`` is: a folder or a GGUF file of that name, else an embedded model, else a hub id.

    A folder that holds a GGUF file and no config.json is that file. ``base_dir`` is where relative names start
    (default: the working directory). Nothing is loaded and the hub is not asked. Raises UserError for a name that can
    be none of these.
    """
    name = model.name
    folder = _folder(name, base_dir or Path.cwd())
    if folder is not None and (file := _gguf_file(folder)):
        return _dequantised(name, file)
    if folder is not None and folder.is_dir():
        note = f"model {name}: the folder {folder.resolve()}"
        if name in EMBEDDED:
            note += " (not the embedded model of that name)"
        elif _is_hub_id(name):
            note += " (a local folder wins over the hub)"
        return Located("folder", folder.resolve(), str(folder.resolve()), note, None, model.trust_remote_code)
    if name in EMBEDDED:
        path = _EMBEDDED_DIR / name
        return Located("embedded", path, str(path), f"model {name}: embedded")
    if folder is not None and folder.exists():
        raise UserError(
            f"model.name: {name} is a file; give the model's folder (the one that holds config.json), or a .gguf file"
        )
    if name.endswith(".gguf"):
        raise UserError(f"model.name: there is no file {name}")
    if _is_hub_id(name):
        at = f" at {model.revision}" if model.revision else ""
        note = f"model {name}: from the Hugging Face hub{at}"
        return Located("hub", None, name, note, model.revision, model.trust_remote_code)
    raise UserError(
        f"model.name: '{name}' is no folder here, no embedded model ({', '.join(EMBEDDED)}) and cannot be a hub id"
        + did_you_mean(name, EMBEDDED)
    )


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path is, or that its folder holds in the place of a model's files; None: no such thing."""
    if path.is_file():
        return path.resolve() if path.suffix == ".gguf" else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"model.name: {path} holds several GGUF files ({names}); name one of them")
    return found[0].resolve() if found else None


def _dequantised(name: str, file: Path) -> Located:
    """A GGUF file as the folder in the cache that it is dequantised to once, known by what the file holds."""
    if _PART.search(file.name):
        raise UserError(f"{file}: one part of a model in several files; merge them (llama-gguf-split --merge) first")
    folders = cache.folder("models")
    if folders is None:
        raise UserError(f"{file}: is dequantised once into a folder, and there is no home for it; set CL_RUNNER_CACHE")
    try:
        digest = _ends(file)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    to = folders / f"{file.stem}-{digest}"
    return Located("gguf", to, str(to), f"model {name}: the GGUF file {file}, dequantised to fp32 in {to}", file=file)


def _ends(file: Path) -> str:
    """What tells a large file from another without reading all of it: its size, and its first and last megabyte."""
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with file.open("rb") as stream:
        for start in {0, max(size - _END, 0)}:
            stream.seek(start)
            digest.update(stream.read(_END))
    return digest.hexdigest()


def check(located: Located) -> Facts:
    """Refuse what cannot be trained, from file names and small files alone; a GGUF file is dequantised first, once.

    There must be a readable config.json, an architecture that answers text with text (encoder-decoder, or
    decoder-only with a language-model head), all weight files, and a tokenizer. For a hub id the hub is asked (a few
    seconds at most) and config.json is downloaded; without network the local cache is looked at. Raises UserError.
    """
    files = _files(located)
    config = folder_check.config(files)
    advice = folder_check.weights(files)
    folder_check.tokenizer(files)
    if located.kind == "embedded":  # ours: known to be fine, and the answer comes without importing transformers
        return Facts(bool(config.get("is_encoder_decoder")), str(config["model_type"]), advice)
    from cl_runner.models.architecture import is_encoder_decoder

    return Facts(
        is_encoder_decoder(config, files.where, located.trust_remote_code), str(config.get("model_type")), advice
    )


def config_of(located: Located) -> dict[str, Any]:
    """config.json as read. Raises UserError."""
    return folder_check.config(_files(located))


def _files(located: Located) -> folder_check.Files:
    if located.file is not None and located.path is not None and not located.path.is_dir():
        from cl_runner.models import gguf

        gguf.keep(located.file, located.path)
    if located.path is not None:
        return folder_check.Folder(located.path, located.name_or_path)
    from cl_runner.models import hub_files

    return hub_files.listing(located)


def _folder(name: str, base_dir: Path) -> Path | None:
    try:
        return base_dir / expanded(name) if name.strip() else None
    except RuntimeError:  # ~somebody, and there is none
        return None


def _is_hub_id(name: str) -> bool:
    return len(name) <= 96 and bool(_HUB_ID.fullmatch(name)) and "--" not in name and ".." not in name


def model_identity(located: Located) -> dict[str, Any]:
    """Which base model: where it is from, and for files at hand a hash of them (of large ones, of their size)."""
    if located.path is None:
        return {"from": "hub", "revision": located.revision}
    digest = hashlib.sha256(b"" if located.file is None else f"{located.path.name}\n".encode())
    for file in sorted(file for file in located.path.iterdir() if file.is_file() and file.suffix != ".md"):
        length = file.stat().st_size
        digest.update(f"{file.name} {length} {sha256(file) if length < HASHED else ''}\n".encode())
    return {"from": located.kind, "files": digest.hexdigest()}
