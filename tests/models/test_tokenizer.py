"""tokenizer.json says the ids, whatever class transformers has for the model's family."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cl_runner.models.tokenizer import load_tokenizer, quiet

LINES = ["Pay 12345 or 1,000.5, I'll say, not 12345!", "  the year 2024\r\n\tand 日本 naïve"] * 20


def qwen2_folder(folder: Path, splits: str) -> Path:
    """A Qwen 2 model's folder with byte-level BPE that cuts figures as Qwen does (each), or not at all."""
    one_by_one = transformers.Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[]).backend_tokenizer.pre_tokenizer
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = one_by_one if splits == "each" else pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>"]
    made.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False,
                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    transformers.Qwen2Config().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("splits", ["each", "none"])
def test_ids_are_those_of_the_file(tmp_path: Path, splits: str) -> None:
    folder = qwen2_folder(tmp_path, splits)
    file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder, "x", encoder_decoder=False)
    for line in LINES[:2]:
        assert tokenizer(line)["input_ids"] == file.encode(line).ids
        assert tokenizer.decode(tokenizer(line)["input_ids"], clean_up_tokenization_spaces=False) == line
    # The class itself, where the file agrees with it; the trap is there where it does not.
    assert (type(tokenizer) is transformers.Qwen2Tokenizer) == (splits == "each")
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs(LINES[0])["input_ids"] == file.encode(LINES[0]).ids) == (splits == "each")


@pytest.mark.parametrize("splits", ["each", "none"])
def test_special_tokens_that_only_the_class_knows_stay(tmp_path: Path, splits: str) -> None:
    folder = qwen2_folder(tmp_path, splits)
    named = load_tokenizer(folder, "x", encoder_decoder=False)
    assert (named.eos_token, named.pad_token, named.truncation_side) == ("<|im_end|>", "<|endoftext|>", "right")
    (folder / "tokenizer_config.json").unlink()
    bare = load_tokenizer(folder, "x", encoder_decoder=False)
    assert (bare.eos_token_id, bare.pad_token_id, bare.bos_token) == (0, 0, None)


def test_deepspeed_is_told_what_there_is_where_nobody_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with quiet():
        assert os.environ["DS_ACCELERATOR"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert "DS_ACCELERATOR" not in os.environ
    monkeypatch.setenv("DS_ACCELERATOR", "hpu")
    with quiet():
        assert os.environ["DS_ACCELERATOR"] == "hpu"
    assert os.environ["DS_ACCELERATOR"] == "hpu"
