"""Which base model a name means, and whether it can be trained. Neither torch nor weights are loaded to say so."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cl_runner.atomic import sha256
from cl_runner.config.lookup import expanded
from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError, did_you_mean
from cl_runner.models import folder_check

EMBEDDED = ("tiny-t5", "tiny-llama")
HASHED = 2**26  # bytes: larger files of a model are told apart by their size
_EMBEDDED_DIR = Path(__file__).resolve().parent / "embedded"

# The hub's own rule for ids: one or two words of letters, digits, "_", "-", "."; nothing doubled, nothing dangling.
_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"{_WORD}(?:/{_WORD})?")


@dataclass(frozen=True)
class Located:
    """A base model's whereabouts. ``name_or_path`` is what PEFT writes as ``base_model_name_or_path``."""

    kind: Literal["embedded", "folder", "hub"]
    path: Path | None
    name_or_path: str
    note: str
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Facts:
    """What ``check`` found without loading weights; ``advice`` is a line for the screen, or None."""

    encoder_decoder: bool
    model_type: str
    advice: str | None = None


def locate(model: ModelConfig, base_dir: Path | None = None) -> Located:
    """Say which model ``model.name`` is: a folder of that name, else an embedded model, else a hub id.

    ``base_dir`` is where relative names start (default: the working directory). Nothing is read from the folder and
    the hub is not asked. Raises UserError for a name that can be none of the three.
    """
    name = model.name
    folder = _folder(name, base_dir or Path.cwd())
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
        raise UserError(f"model.name: {name} is a file; give the model's folder (the one that holds config.json)")
    if _is_hub_id(name):
        at = f" at {model.revision}" if model.revision else ""
        note = f"model {name}: from the Hugging Face hub{at}"
        return Located("hub", None, name, note, model.revision, model.trust_remote_code)
    raise UserError(
        f"model.name: '{name}' is no folder here, no embedded model ({', '.join(EMBEDDED)}) and cannot be a hub id"
        + did_you_mean(name, EMBEDDED)
    )


def check(located: Located) -> Facts:
    """Refuse what cannot be trained, from file names and small files alone.

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
    digest = hashlib.sha256()
    for file in sorted(file for file in located.path.iterdir() if file.is_file() and file.suffix != ".md"):
        length = file.stat().st_size
        digest.update(f"{file.name} {length} {sha256(file) if length < HASHED else ''}\n".encode())
    return {"from": located.kind, "files": digest.hexdigest()}
