"""A model folder's tokenizer: from tokenizer.json, or from a sentencepiece model alone, with the same ids as ever."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cl_runner.errors import UserError

_PROBE = "The quick brown fox: True, 3 of 10 (very negative).  Is it so?"


def load_tokenizer(folder: Path, where: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, cutting at the right and with no length limit of its own. Raises UserError.

    A folder with only spiece.model or tokenizer.model is converted by transformers; the result is compared with what
    sentencepiece itself says, because a conversion that loses the first space gives other ids without a word.
    """
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
            if not (folder / "tokenizer.json").exists():
                tokenizer = _as_sentencepiece_has_it(tokenizer, folder, where)
    except UserError:
        raise
    except Exception as error:  # each tokenizer class fails in its own way
        raise UserError(f"model {where}: its tokenizer cannot be loaded ({first_line(error)})") from error
    tokenizer.truncation_side = "right"
    tokenizer.model_max_length = int(1e30)  # lengths are ours to check; else every long text prints a warning
    return tokenizer


def _as_sentencepiece_has_it(tokenizer: PreTrainedTokenizerBase, folder: Path, where: str) -> PreTrainedTokenizerBase:
    """The tokenizer itself if it agrees with the folder's sentencepiece model, else the LLaMA form of it."""
    names = [name for name in ("spiece.model", "tokenizer.model") if (folder / name).exists()]
    if not names:
        return tokenizer
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromFile(str(folder / names[0]))
    except Exception:  # tokenizer.model of LLaMA 3 is tiktoken's: transformers reads that with its own checks
        return tokenizer
    expected = [processor.IdToPiece(i) for i in processor.EncodeAsIds(_PROBE)]
    if _pieces(tokenizer) != expected:
        # Without tokenizer_config.json a generic class is taken, which knows nothing of the space before a text.
        tokenizer = transformers.LlamaTokenizer.from_pretrained(str(folder))
        if _pieces(tokenizer) != expected:
            raise UserError(
                f"model {where}: transformers {transformers.__version__} reads {names[0]} differently than "
                "sentencepiece does; add the tokenizer.json (and tokenizer_config.json) of this model"
            )
    if isinstance(tokenizer, transformers.LlamaTokenizer) and "add_bos_token" not in _settings(folder):
        # LLaMA's own default, and the documented one; transformers 5 takes it from the argument alone.
        tokenizer = transformers.LlamaTokenizer.from_pretrained(str(folder), add_bos_token=True)
    return tokenizer


def _pieces(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    pieces: list[str] = tokenizer.convert_ids_to_tokens(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    return pieces


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return settings


@contextmanager
def quiet() -> Iterator[None]:
    """Without the loader's bars and its own report: what it would report is checked and raised by us."""
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


def first_line(error: Exception) -> str:
    """An error's first line, or its name where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
