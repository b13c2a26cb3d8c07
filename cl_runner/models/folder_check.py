"""What a model folder must hold: config.json, whole weights, a tokenizer. Only names and small files are read."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Set
from pathlib import Path
from typing import Any, Protocol

from cl_runner.errors import UserError
from cl_runner.plain_files import LARGEST_JSON, content, opened, refuse_foreign

# In the order transformers looks for them.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FOREIGN = ("tf_model.h5", "flax_model.msgpack", "model.ckpt.index", "model.gguf", "consolidated.00.pth")

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pth", ".pt", ".ckpt", ".index")
LARGEST_SMALL = 2**29  # bytes of a tokenizer's file
LARGEST_HEADER = 100_000_000  # bytes: what safetensors itself reads

_TOKENIZERS: tuple[tuple[str, ...], ...] = (
    ("tokenizer.json",),
    ("spiece.model",),
    ("tokenizer.model",),
    ("sentencepiece.bpe.model",),
    ("source.spm", "target.spm"),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)


class Files(Protocol):
    """The files of a model: those of a folder, or those the hub lists."""

    where: str  # for messages

    def names(self) -> Set[str]:
        """Names of the files at the top."""

    def read(self, name: str) -> bytes:
        """A small file's bytes."""

    def size(self, name: str) -> int | None:
        """Bytes, or None where that is not known."""

    def start(self, name: str, count: int) -> bytes | None:
        """The first ``count`` bytes, or None where they are not at hand."""


class Folder:
    """Files of a local folder."""

    def __init__(self, path: Path, where: str) -> None:
        self.path = path
        self.where = where
        self._looked_through = False

    def names(self) -> Set[str]:
        try:
            found = {entry.name for entry in self.path.iterdir() if entry.is_file()}
            # Once, and no folder without a model: that may be somebody's home, and is told by what it lacks.
            if not self._looked_through and found & {"config.json", *_SAFETENSORS}:
                refuse_foreign(self.path)
                self._looked_through = True
            return found
        except OSError as error:
            raise UserError(f"model {self.where}: cannot be read ({error.strerror})") from error

    def read(self, name: str) -> bytes:
        try:
            return content(self.path / name, LARGEST_JSON)
        except OSError as error:
            raise UserError(f"model {self.where}: {name} cannot be read ({error.strerror})") from error

    def size(self, name: str) -> int | None:
        return (self.path / name).stat().st_size

    def start(self, name: str, count: int) -> bytes | None:
        try:
            with opened(self.path / name, sys.maxsize) as file:
                return file.read(count)
        except OSError as error:
            raise UserError(f"model {self.where}: {name} cannot be read ({error.strerror})") from error


def config(files: Files) -> dict[str, Any]:
    """config.json as a dict. Raises UserError where it is missing, broken, or the folder is an adapter's."""
    names = files.names()
    if "adapter_config.json" in names:
        base = _json(files, "adapter_config.json").get("base_model_name_or_path")
        raise UserError(
            f"model {files.where}: holds adapter_config.json, so it is a PEFT adapter (of {base}), not a base model; "
            "give the base model, or a folder with the adapter merged in"
        )
    if "config.json" not in names:
        raise UserError(
            f"model {files.where}: no config.json there; a model folder holds config.json, weights and a tokenizer"
        )
    found = _json(files, "config.json")
    try:
        _refuse_kernels(files, found)
    except RecursionError:
        raise UserError(f"model {files.where}: config.json is nested too deep") from None
    return found


def _refuse_kernels(files: Files, config: Any) -> None:
    """Refuse a config that names a repository as what computes: transformers would fetch it, and run its code."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if str(key).endswith("_implementation") and "/" in str(value):
            raise UserError(f"model {files.where}: config.json: {key} names code of a hub repository, which is not run")
        _refuse_kernels(files, value)


def weights(files: Files) -> None:
    """Check that the weight files are all there and whole.

    Raises UserError naming the missing or broken file, or with how to convert it where it is a pickle.
    """
    names = files.names()
    safe, safe_index = _SAFETENSORS
    pickled, pickled_index = _PICKLED
    if safe in names:
        _whole(files, safe)
        return
    if safe_index in names:
        _shards(files, safe_index)
        return
    if pickled in names or pickled_index in names:
        if pickled in names:
            _whole(files, pickled)
        convert = (
            "import sys; from transformers import AutoModelForSeq2SeqLM as M, AutoTokenizer as T; "
            "[each.from_pretrained(sys.argv[1]).save_pretrained('converted') for each in (M, T)]"
        )
        raise UserError(
            f"model {files.where}: its weights are pickles ({pickled}), which may run code as they are read, and are "
            f'not read; where you trust their maker, convert them once: python -c "{convert}" '
            f"{shlex.quote(files.where)} (AutoModelForCausalLM where it is decoder-only), and give --model converted"
        )
    foreign = [name for name in _FOREIGN if name in names]
    found = f" (only {foreign[0]}, which is not read here)" if foreign else ""
    raise UserError(
        f"model {files.where}: no weights there{found}; model.safetensors (or its index and shards) is needed"
    )


def tokenizer(files: Files) -> None:
    """Check that there is a tokenizer, and nothing beside the weights too large to be read. Raises UserError."""
    names = files.names()
    for name in names:
        if not name.endswith(_WEIGHTS) and (files.size(name) or 0) > LARGEST_SMALL:
            raise UserError(
                f"model {files.where}: {name} is larger than {LARGEST_SMALL >> 20} MiB, and no file of weights"
            )
    if any(all(part in names for part in parts) for parts in _TOKENIZERS) or any(
        n.endswith(".tiktoken") for n in names
    ):
        return
    if "tokenizer_config.json" in names:
        settings = _json(files, "tokenizer_config.json")
        # Byte tokenizers have no vocabulary file; one with own code brings its files by own names.
        if str(settings.get("tokenizer_class", "")).startswith("ByT5") or "auto_map" in settings:
            return
    raise UserError(
        f"model {files.where}: no tokenizer there; tokenizer.json, spiece.model or tokenizer.model is needed "
        "(copy it from the model that this one was made from)"
    )


def whole(folder: Path) -> bool:
    """Whether a folder holds all of a model, where what is missing is to be made anew and not told."""
    files = Folder(folder, str(folder))
    try:
        config(files)
        weights(files)
        tokenizer(files)
    except UserError:
        return False
    return True


def _shards(files: Files, index: str) -> None:
    shards = _json(files, index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"model {files.where}: {index} has no weight_map; download the model again")
    wanted = sorted(set(shards.values()))
    missing = [name for name in wanted if name not in files.names()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"model {files.where}: {index} names {len(wanted)} weight files, but {missing[0]}{more} is not there; "
            "download it again"
        )
    for name in wanted:
        _whole(files, name)


def _whole(files: Files, name: str) -> None:
    """Catch the two common half-downloads: a git-lfs pointer, and a safetensors file cut short."""
    start = files.start(name, 64)
    size = files.size(name)
    if start is None or size is None:
        return
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"model {files.where}: {name} is only a git-lfs pointer; run `git lfs pull` there")
    if name.endswith(".safetensors"):
        # 8 bytes: length of the JSON header; the header's offsets say where the data ends.
        length = int.from_bytes(start[:8], "little")
        fits = length <= LARGEST_HEADER and 8 + length <= size
        end = _data_end(files.start(name, 8 + length) if fits else None)
        if end is None or 8 + length + end != size:
            raise UserError(f"model {files.where}: {name} is broken or cut short; download it again")


def _data_end(head: bytes | None) -> int | None:
    try:
        tensors = json.loads(head[8:]) if head else None
        if not isinstance(tensors, dict):
            return None
        ends = [t["data_offsets"][1] for key, t in tensors.items() if key != "__metadata__"]
        return max(ends, default=0) if all(type(end) is int for end in ends) else None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None


def _json(files: Files, name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.read(name))
    except (ValueError, RecursionError) as error:  # not JSON, or not text
        raise UserError(f"model {files.where}: {name} is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"model {files.where}: {name} is not a JSON object")
    return value
