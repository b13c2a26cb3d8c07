"""A model in a GGUF file, llama.cpp's format, as a plain transformers folder that computes with the same numbers.

transformers reads and dequantises the file, but leaves out without a word what it does not know: a tensor, a scaling
of positions, a way of splitting text before the merges. Here everything is accounted for, or refused.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cl_runner.atomic import write_folder
from cl_runner.errors import UserError, by
from cl_runner.models import gguf_header
from cl_runner.models.architecture import is_encoder_decoder
from cl_runner.models.folder_check import whole
from cl_runner.models.model_folder import save_model
from cl_runner.models.tokenizer import first_line, quiet
from cl_runner.terminal.console import say

if TYPE_CHECKING:
    from gguf import GGUFReader

# How llama.cpp splits text for byte-level merges, by the name that the file gives (``tokenizer.ggml.pre``): as GPT-2
# does, which is what transformers takes for every name that it does not know; and each digit apart before that.
_AS_GPT2 = ("gpt-2", "jais", "mpt", "olmo", "phi-2")
_DIGITS_APART = ("codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder")


def keep(file: Path, folder: Path) -> None:
    """Convert into the cache, unless another process has: ``folder`` is there, and whole, afterwards.

    It takes some twenty seconds for each 100 million weights, so a line says what is waited for. Raises UserError, also
    where there is no room.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if whole(folder):
                return
            reader = _opened(file)  # a broken one is refused before anything is said to be waited for
            needed = 4 * sum(int(tensor.n_elements) for tensor in reader.tensors)
            if (free := shutil.disk_usage(folder.parent).free) < needed:
                raise UserError(
                    f"{file}: {free / 2**20:,.0f} MB free in {folder.parent}, and dequantised it takes about "
                    f"{needed / 2**20:,.0f} MB; make room, or set CL_RUNNER_CACHE to another place"
                )
            say(f"{file}: dequantising to fp32 in {folder}, once")
            shutil.rmtree(folder, ignore_errors=True)  # what a cleaner of caches has left of it
            convert(file, folder)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{folder}: {why}; CL_RUNNER_CACHE names another place") from error


def convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file to ``folder``: config.json, weights (fp32, safetensors), tokenizer, its chat form.

    fp32, because nothing shorter holds the numbers: a weight of Q4_1, for one, is a half times an integer plus a half.
    The folder is whole or not there. Raises UserError: the package ``gguf`` is not installed; ``folder`` holds
    something; the file is broken, or of a model that does not write text; transformers would read it as something
    else than it is.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; give another name, or remove it")
    reader = _opened(file)
    model = _model(file, reader)
    tokenizer = _tokenizer(file, reader)
    write_folder(folder, lambda draft: save_model(draft, model, tokenizer))


def _opened(file: Path) -> GGUFReader:
    """The file's metadata, and its tensors mapped into memory: one that is cut short is refused here."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f'{file}: GGUF files are read with the package gguf; pip install "cl-runner[gguf]"') from None
    try:
        gguf_header.check(file)
        reader = GGUFReader(file)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except UserError:
        raise
    except Exception as error:  # numpy's and struct's own, wherever the bytes end or mean nothing
        raise UserError(f"{file}: broken, or no GGUF file ({first_line(error)}); download it again") from error
    if not reader.tensors or "general.architecture" not in reader.fields:
        raise UserError(f"{file}: holds no model (a GGUF file without tensors, or without its architecture)")
    return reader


def _model(file: Path, reader: GGUFReader) -> PreTrainedModel:
    """A model of the file's config and weights, as one that was never quantised: transformers saves no other."""
    with quiet():
        try:
            config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
        except Exception as error:  # each config class, and the reader of each architecture, fails in its own way
            raise UserError(f"{file}: transformers cannot read its architecture ({first_line(error)})") from error
        auto = AutoModelForSeq2SeqLM if is_encoder_decoder(config.to_dict(), str(file)) else AutoModelForCausalLM
        options: dict[str, Any] = {
            "gguf_file": file.name,
            "dtype": torch.float32,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,  # refused below, by name
        }
        try:
            found, info = auto.from_pretrained(str(file.parent), config=config, **options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise UserError(f"{file}: transformers cannot read its weights ({first_line(error)})") from error
        _account_for(file, reader, found, info)
        with torch.device("meta"):
            model: PreTrainedModel = type(found)(config)
    model.load_state_dict(found.state_dict(), assign=True)
    return model


def _account_for(file: Path, reader: GGUFReader, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse a file whose tensors do not fill the model, or that says more than the model has."""
    name = type(model).__name__
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{file}: has no {missing[0]}, which {name} needs; it holds another model, or not all of one")
    if unlike := sorted(info["mismatched_keys"]):
        key, shape, wanted = unlike[0]
        raise UserError(
            f"{file}: its {key} is {by(shape)}, where {name} of the sizes that the file says has {by(wanted)}; "
            "it is broken"
        )
    held, taken = sum(int(tensor.n_elements) for tensor in reader.tensors), model.num_parameters()
    if held != taken:
        # Among what transformers leaves out: biases that a config of the family has none for, Llama 3.1's rope_freqs.
        raise UserError(
            f"{file}: holds {held:,} numbers, of which {name} has {taken:,}; computing without the others would not "
            "be the file's model; give the model's own folder"
        )
    scaling = _said(reader, f"{_said(reader, 'general.architecture')}.rope.scaling.type")
    rope = getattr(model.config, "rope_parameters", None) or {}
    if scaling not in (None, "none") and rope.get("rope_type", "default") == "default":
        raise UserError(
            f"{file}: its positions are scaled ('{scaling}'), which transformers does not read from a GGUF file; give "
            "the model's own folder"
        )


def _tokenizer(file: Path, reader: GGUFReader) -> PreTrainedTokenizerBase:
    """The file's tokenizer, splitting text as the file says."""
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        except Exception as error:
            raise UserError(f"{file}: transformers cannot read its tokenizer ({first_line(error)})") from error
    splits = tokenizer.backend_tokenizer
    if not isinstance(splits.pre_tokenizer, pre_tokenizers.ByteLevel):  # no such vocabulary, or a name it knows
        return tokenizer
    way = _said(reader, "tokenizer.ggml.pre")
    if way in _DIGITS_APART:
        digits, gpt2 = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        splits.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    elif way not in _AS_GPT2:
        raise UserError(
            f"{file}: how its tokenizer splits text ({repr(way) if way else 'not said'}) is not known here: ids would "
            "be wrong; give the model's own folder"
        )
    return tokenizer


def _said(reader: GGUFReader, key: str) -> Any:
    """The value of a key of the file's metadata, or None."""
    field = reader.fields.get(key)
    return field.contents() if field is not None else None
