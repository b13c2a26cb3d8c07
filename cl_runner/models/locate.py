"""Which base model a name means, and whether it can be trained. Neither torch nor weights are loaded to say so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cl_runner import cache
from cl_runner.atomic import sha256
from cl_runner.config.lookup import expanded
from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError, did_you_mean
from cl_runner.models import folder_check

EMBEDDED = ("tiny-t5", "tiny-llama")
_FETCHED = {"smollm2": "scripts/get_smollm2.sh smollm2"}  # folders of no hub, and what makes them
_REVISION = 1  # of how GGUF files are dequantised: raise it when other numbers or ids come out
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")  # of a model that is split, as llama.cpp names them
_EMBEDDED_DIR = Path(__file__).resolve().parent / "embedded"

# The hub's own rule for ids: one or two words of letters, digits, "_", "-", "."; nothing doubled, nothing dangling.
_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"{_WORD}(?:/{_WORD})?")


class GGUF(NamedTuple):
    """A GGUF file, and the digest of what it holds."""

    path: Path
    digest: str


@dataclass(frozen=True)
class Located:
    """A base model's whereabouts. ``name_or_path`` is what PEFT writes as ``base_model_name_or_path``."""

    kind: Literal["embedded", "folder", "gguf", "hub"]
    path: Path | None  # of a GGUF file: the folder that it is, or will be, dequantised to
    name_or_path: str
    note: str
    revision: str | None = None
    trust_remote_code: bool = False
    file: GGUF | None = None


@dataclass(frozen=True)
class Facts:
    """What ``check`` found without loading weights."""

    encoder_decoder: bool
    model_type: str


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
    if name in _FETCHED:
        raise UserError(f"model.name: there is no folder {name} here; {_FETCHED[name]} makes it (README.md)")
    if _is_hub_id(name):
        at = f" at {model.revision}" if model.revision else ""
        note = f"model {name}: from the Hugging Face hub{at}"
        return Located("hub", None, name, note, model.revision, model.trust_remote_code)
    raise UserError(
        f"model.name: '{name}' is no folder here, no embedded model ({', '.join(EMBEDDED)}) and cannot be a hub id"
        + did_you_mean(name, EMBEDDED)
    )


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path is, or that its folder holds in the place of a model's files; None: no such thing.

    Links are not followed: the hub's cache links to names that are digests.
    """
    if path.is_file():
        return path.absolute() if path.suffix == ".gguf" else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"model.name: {path} holds several GGUF files ({names}); name one of them")
    return found[0].absolute() if found else None


def _dequantised(name: str, file: Path) -> Located:
    """A GGUF file as the folder in the cache that it is dequantised to once, known by what the file holds."""
    if _PART.search(file.name):
        raise UserError(f"{file}: one part of a model in several files; merge them (llama-gguf-split --merge) first")
    folders = cache.folder("models")
    if folders is None:
        raise UserError(f"{file}: is dequantised once into a folder, and there is no home for it; set CL_RUNNER_CACHE")
    try:
        about = file.stat()
        digest = _digest(file, about.st_size, about.st_mtime_ns, about.st_ino)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    to = folders / f"{file.stem}-{digest[:16]}-{_REVISION}"
    note = f"model {name}: the GGUF file {file}, dequantised to fp32 in {to}"
    return Located("gguf", to, str(to), note, file=GGUF(file, digest))


@lru_cache(maxsize=8)
def _digest(file: Path, size: int, changed: int, inode: int) -> str:
    """Hex digest of all of a file (merged models differ in the middle), once in a process while it stays as it is."""
    return sha256(file)


def check(located: Located) -> Facts:
    """Refuse what cannot be trained, from file names and small files alone; a GGUF file is dequantised first, once.

    There must be a readable config.json, an architecture that answers text with text (encoder-decoder, or
    decoder-only with a language-model head), all weight files, and a tokenizer. For a hub id the hub is asked (a few
    seconds at most) and config.json is downloaded; without network the local cache is looked at. Raises UserError.
    """
    files = _files(located)
    config = folder_check.config(files)
    folder_check.weights(files)
    folder_check.tokenizer(files)
    if located.kind == "embedded":  # ours: known to be fine, and the answer comes without importing transformers
        return Facts(bool(config.get("is_encoder_decoder")), str(config["model_type"]))
    from cl_runner.models.architecture import is_encoder_decoder

    return Facts(is_encoder_decoder(config, files.where, located.trust_remote_code), str(config.get("model_type")))


def config_of(located: Located) -> dict[str, Any]:
    """config.json as read. Raises UserError."""
    return folder_check.config(_files(located))


def _files(located: Located) -> folder_check.Files:
    if located.file is not None and located.path is not None and not folder_check.whole(located.path):
        from cl_runner.models import gguf

        gguf.keep(located.file.path, located.path)
    if located.path is not None:
        return folder_check.Folder(located.path, located.name_or_path)
    from cl_runner.models import hub_files

    return hub_files.listing(located)


def _folder(name: str, base_dir: Path) -> Path | None:
    try:
        path = base_dir / expanded(name) if name.strip() else None
        return path if path is None or path.exists() or path.suffix == ".gguf" else None
    except (OSError, RuntimeError, ValueError):  # too long a name, ~somebody, a NUL
        return None


def _is_hub_id(name: str) -> bool:
    return len(name) <= 96 and bool(_HUB_ID.fullmatch(name)) and "--" not in name and ".." not in name
