"""What a base model is: fingerprints of its files, weights and tokenizer, and whether it is another by now."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cl_runner.atomic import sha256
from cl_runner.config.schema import ADAPTER
from cl_runner.errors import UserError
from cl_runner.models.locate import Located
from cl_runner.plain_files import refuse_foreign

HASHED = 2**26  # bytes: of larger files samples are hashed
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_SAMPLES, _SAMPLE = 256, 2**16  # so many of so many bytes, 16 MiB of a file in all
TOKENIZER = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
    "chat_template.jinja", "chat_template.json",
}  # fmt: skip


def model_identity(located: Located, quantize: str | None = None) -> dict[str, Any]:
    """Where a base model is from, and fingerprints of it.

    Of a folder: ``files`` (small ones by what they hold, large ones by their size), ``weights`` (large ones, by samples
    from end to end: training changes nearly every number), ``tokenizer`` (its files). Of a GGUF file: ``file``, all of
    it. Of the hub: ``revision`` as it is asked for, ``commit`` where the local cache knows which that is. ``quantize``:
    how it is quantised, if it is.
    """
    of = {"quantize": quantize} if quantize else {}
    return {**_fingerprints(located), **of}


def adapter_identity(folder: Path) -> str:
    """Hex digest of an adapter's config and weights, of large ones by samples. Raises UserError: they are not there."""
    if not os.path.isdir(folder):  # noqa: PTH112 - Path's takes no long name
        raise UserError(f"{ADAPTER}: {folder} {'is no folder' if os.path.lexists(folder) else 'does not exist'}")
    refuse_foreign(folder)
    files = [folder / name for name in _ADAPTER if (folder / name).is_file()]
    if len(files) < 2:
        raise UserError(f"{ADAPTER}: {folder} is no PEFT adapter (adapter_config.json with adapter_model.safetensors)")
    return _digest((file, sha256(file) if file.stat().st_size < HASHED else _sampled(file)) for file in files)


def differing_model(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two identities differ, each ``files: 0123… → 4567…``; nothing where they are of one model.

    What one does not know, of an earlier version, does not count; nor which revision was asked for, where both know
    what commit that is.
    """
    known = [key for key in then if key in now or key == "quantize"] + ["quantize"] * ("quantize" in now)
    commits = "commit" in then and "commit" in now
    keys = [
        key for key in dict.fromkeys(known) if then.get(key) != now.get(key) and not (commits and key == "revision")
    ]
    return [f"{key}: {short(then.get(key))} → {short(now.get(key))}" for key in keys]


def short(value: Any) -> str:
    """A value; of a hash its beginning."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)


def _fingerprints(located: Located) -> dict[str, Any]:
    if located.path is None:
        from cl_runner.models.hub_files import cached

        snapshot = cached(located)
        return {"from": "hub", "revision": located.revision, **({"commit": snapshot.name} if snapshot else {})}
    if located.file is not None:
        return {"from": "gguf", "file": located.file.digest}
    refuse_foreign(located.path)
    files = sorted(file for file in located.path.iterdir() if file.is_file() and file.suffix != ".md")
    large = [file for file in files if file.stat().st_size >= HASHED]
    return {
        "from": located.kind,
        "files": _digest((file, "" if file in large else sha256(file)) for file in files),
        **({"weights": _digest((file, _sampled(file)) for file in large)} if large else {}),
        "tokenizer": _digest((file, sha256(file)) for file in files if file.name in TOKENIZER),
    }


def _digest(files: Iterable[tuple[Path, str]]) -> str:
    """Of files, each with what stands for its content."""
    digest = hashlib.sha256()
    for file, content in files:
        digest.update(f"{file.name} {file.stat().st_size} {content}\n".encode())
    return digest.hexdigest()


def _sampled(file: Path) -> str:
    """Hex digest of blocks of a large file, as far from one another, the first and the last among them."""
    last = max(file.stat().st_size - _SAMPLE, 0)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for number in range(_SAMPLES):
            stream.seek(last * number // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()
