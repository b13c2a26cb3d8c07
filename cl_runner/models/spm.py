"""A sentencepiece model as a fast tokenizer, id for id.

transformers 5 builds a tokenizer class's own idea of a model from such a file (no space before the text, no
normalisation, BPE where the file says unigram), so that ids differ without a word. This follows the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

# Words, figures, runs of spaces, a newline, composed and wide letters, a ligature.
PROBES = ("The quick brown fox: True, 3 of 10 (very negative).", " a  b\n c Zürich naïve ﬁne 日本 {x} ")

_UNIGRAM, _BPE = 1, 2  # trainer_spec.model_type
_CONTROL, _USER_DEFINED = 3, 4  # piece.type


def open_model(file: Path) -> SentencePieceProcessor | None:
    """The model in ``file``; None where it is no sentencepiece model (LLaMA 3's tokenizer.model is tiktoken's)."""
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromFile(str(file))
    except Exception:  # it raises different things for different rubbish
        return None
    return processor


def agrees(tokenizer: Any, processor: SentencePieceProcessor) -> bool:
    """Whether a tokenizer cuts the probes into the pieces that sentencepiece itself does."""
    return all(
        tokenizer.convert_ids_to_tokens(tokenizer(probe, add_special_tokens=False)["input_ids"])
        == [processor.IdToPiece(i) for i in processor.EncodeAsIds(probe)]
        for probe in PROBES
    )


def convert(file: Path, add_bos: bool, add_eos: bool) -> PreTrainedTokenizerFast:
    """The sentencepiece model in ``file`` as a fast tokenizer, with begin and end tokens put around as asked."""
    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when imported
    model.ParseFromString(file.read_bytes())
    trainer = model.trainer_spec
    tokenizer = Tokenizer(_algorithm(model))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(model.normalizer_spec))
    prefix = [decoders.Strip(" ", 1, 0)] if model.normalizer_spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *prefix]
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in model.pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ]
    )
    ids = {"bos": trainer.bos_id, "eos": trainer.eos_id, "pad": trainer.pad_id, "unk": trainer.unk_id}
    named = {f"{name}_token": model.pieces[i].piece for name, i in ids.items() if 0 <= i < len(model.pieces)}
    around = [("bos_token", add_bos), ("eos_token", add_eos)]
    before, after = (f"{named[name]} " if wanted and name in named else "" for name, wanted in around)
    used = [(named[name], tokenizer.token_to_id(named[name])) for name, _ in around if name in named]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before}$A {after}".strip(), pair=f"{before}$A $B {after}".strip(), special_tokens=used
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def _algorithm(model: Any) -> models.Model:
    trainer = model.trainer_spec
    if trainer.model_type == _UNIGRAM:
        pieces = [(piece.piece, piece.score) for piece in model.pieces]
        return models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    if trainer.model_type != _BPE:
        raise ValueError("a sentencepiece model of words or characters; only unigram and BPE are read")
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces}
    # sentencepiece joins the pair whose piece scores best, whichever two parts it is of.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(ids, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    return models.BPE(ids, merges, unk_token=trainer.unk_piece, fuse_unk=True, byte_fallback=trainer.byte_fallback)


def _normalizers(spec: Any) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # Spaces alone: what else is white space either became a space above or is a piece of its own.
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    return steps
