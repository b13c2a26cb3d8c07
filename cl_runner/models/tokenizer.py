"""A model folder's tokenizer: from tokenizer.json, or from a sentencepiece model alone, with the same ids as ever."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cl_runner.errors import UserError

FILE = "tokenizer.json"
# Figures, signs, contractions, spaces, line ends, composed and wide letters: what rules differ in.
_PROBES = (
    "I'll say 12345 or 1,000.5 (don't)!?\r\n\tA_b",
    " a  b\n c Zürich ＡＢ naïve ﬁne 日本 {x} ",
    "red blue yes no",
)


def load_tokenizer(
    folder: Path, where: str, encoder_decoder: bool, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, cutting at the right and with no length limit of its own. Raises UserError.

    Its tokenizer.json is what counts, whatever class is named beside it.

    A folder with only spiece.model or tokenizer.model is converted by transformers; the result is compared with what
    sentencepiece itself says, because a conversion that loses the first space gives other ids without a word.
    """
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
            if (folder / FILE).exists():
                tokenizer = _as_the_file_has_it(tokenizer, folder)
            else:
                tokenizer = _as_sentencepiece_has_it(tokenizer, folder, encoder_decoder)
    except Exception as error:  # each tokenizer class fails in its own way
        raise UserError(f"model {where}: its tokenizer cannot be loaded ({first_line(error)})") from error
    tokenizer.truncation_side = "right"
    tokenizer.model_max_length = int(1e30)  # lengths are ours to check; else every long text prints a warning
    return tokenizer


def _as_the_file_has_it(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer itself if it cuts texts as tokenizer.json does, else the file under no family's class.

    Classes of transformers 5 take a file's vocabulary and put the rules of their family's first model around it. A
    Qwen 2 model with another tokenizer then gets other ids, or none, without a word.
    """
    if type(tokenizer) is PreTrainedTokenizerFast or not type(tokenizer).__module__.startswith("transformers."):
        return tokenizer  # the file as it is; code of the model's own
    file = Tokenizer.from_file(str(folder / FILE))

    def agrees(one: PreTrainedTokenizerBase) -> bool:
        return all(
            one(probe, add_special_tokens=False)["input_ids"] == file.encode(probe, add_special_tokens=False).ids
            for probe in _PROBES
        )

    if agrees(tokenizer):
        return tokenizer
    names = ("bos_token", "eos_token", "pad_token", "unk_token")  # where tokenizer_config.json leaves them to the class
    named = {name: token for name in names if (token := getattr(tokenizer, name)) is not None}
    plain: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(str(folder), **named)
    return plain if agrees(plain) else tokenizer


def _as_sentencepiece_has_it(
    tokenizer: PreTrainedTokenizerBase, folder: Path, encoder_decoder: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer itself if it agrees with the folder's sentencepiece model, else one that does."""
    file = next((folder / name for name in ("spiece.model", "tokenizer.model") if (folder / name).exists()), None)
    if file is None:
        return tokenizer
    from cl_runner.models import spm

    processor = spm.open_model(file)
    if processor is None:
        return tokenizer
    add_bos = bool(_settings(folder).get("add_bos_token", not encoder_decoder))
    if not isinstance(tokenizer, transformers.T5Tokenizer) and not encoder_decoder:
        # Without tokenizer_config.json a generic class is taken, which knows nothing of the space before a text; and
        # LLaMA's <s>, on by its own default, now comes from the argument alone.
        llama = transformers.LlamaTokenizer.from_pretrained(str(folder), add_bos_token=add_bos)
        if spm.agrees(llama, processor):
            return llama
    if spm.agrees(tokenizer, processor):
        return tokenizer
    converted = spm.convert(file, add_bos=add_bos, add_eos=encoder_decoder)
    if spm.agrees(converted, processor):
        return converted
    raise ValueError(
        f"{file.name} cannot be converted so that it gives the ids sentencepiece gives; add this model's tokenizer.json"
    )


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return settings


@contextmanager
def quiet() -> Iterator[None]:
    """Without the loader's bars and its own report: what it would report is checked and raised by us.

    DeepSpeed, which is looked for as a model is saved, is told what there is, where nobody else told it: it says aloud
    that it found no GPU.
    """
    untold = "DS_ACCELERATOR" not in os.environ
    if untold:
        os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
        if untold:
            os.environ.pop("DS_ACCELERATOR", None)


def first_line(error: Exception) -> str:
    """An error's first line, or its name where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
