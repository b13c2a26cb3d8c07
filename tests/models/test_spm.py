"""Sentencepiece models of every make, read id for id."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import transformers

from cl_runner.errors import UserError
from cl_runner.models import spm
from cl_runner.models.base import Layout
from cl_runner.models.encoding import Encoder
from cl_runner.models.tokenizer import load_tokenizer
from cl_runner.tasks.task import Prompt
from tests.models.tiny_models import LINES

TEXTS = [*LINES[:5], "", " ", "a", "  two  spaces\n\n and\tmore ", "日本 ﬁne ½ ÀÉ", "true▁bar"]


def train(algorithm: str, byte_fallback: bool, rule: str) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3), model_writer=model, minloglevel=2, hard_vocab_limit=False,
        vocab_size=390 if byte_fallback else 150, model_type=algorithm, byte_fallback=byte_fallback,
        normalization_rule_name=rule, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity", "nmt_nfkc_cf"])
@pytest.mark.parametrize("byte_fallback", [False, True])
@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_every_make_gives_sentencepieces_ids(tmp_path: Path, algorithm: str, byte_fallback: bool, rule: str) -> None:
    model = train(algorithm, byte_fallback, rule)
    (tmp_path / "tokenizer.model").write_bytes(model)
    transformers.LlamaConfig().save_pretrained(tmp_path)
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    tokenizer = load_tokenizer(tmp_path, "x", encoder_decoder=False)
    converted = spm.convert(tmp_path / "tokenizer.model", add_bos=False, add_eos=True)
    for text in TEXTS:
        expected = processor.EncodeAsIds(text)
        assert tokenizer(text)["input_ids"] == [1, *expected], text
        assert converted(text)["input_ids"] == [*expected, 2], text
        if 0 not in expected:
            assert converted.decode(expected) == processor.DecodeIds(expected)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, None)


def test_a_long_text_is_cut_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train("unigram", True, "nmt_nfkc"))
    tokenizer = spm.convert(tmp_path / "tokenizer.model", add_bos=True, add_eos=False)
    encoder = Encoder(tokenizer, Layout(False, 2, 2, (2,), None, vocab_size=len(tokenizer)), max_source=64)
    example = encoder.encode(Prompt("Option: World, Sports ", "the 日本 lazy dog " * 30, " Answer:"), "A")
    text = encoder.decode(example.source)
    assert len(example.source) <= 64 and text.startswith("Option: World, Sports the 日本") and text.endswith(" Answer:")


def test_a_tiktoken_file_is_no_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert spm.open_model(tmp_path / "tokenizer.model") is None


def test_a_word_model_is_refused(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, minloglevel=2, hard_vocab_limit=False, vocab_size=40,
        model_type="word",
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match=r"model x: its tokenizer cannot be loaded \("):
        load_tokenizer(tmp_path, "x", encoder_decoder=True)
