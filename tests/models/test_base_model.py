"""Loading: every weight accounted for, heads kept, precision, tokenizers from sentencepiece, a silent screen."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file

from cl_runner.adapters.layers import Layers
from cl_runner.adapters.targets import default_targets, target_shapes
from cl_runner.config.schema import AdapterConfig, ModelConfig
from cl_runner.errors import UserError
from cl_runner.models.base import Base, load_base, outline, tokenizer_of
from cl_runner.models.encoding import Encoder
from cl_runner.models.tokenizer import load_tokenizer
from cl_runner.tasks.task import Prompt
from tests.families import FAMILIES
from tests.models.tiny_models import LINES

CPU = torch.device("cpu")


def load(folder: Path, **settings: Any) -> Base:
    return load_base(ModelConfig(name=str(folder), **settings), CPU)


@pytest.fixture
def copy(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: shutil.copytree(saved(family), tmp_path / family)


@pytest.mark.parametrize("family", ["t5", "llama", "gpt2", "qwen2"])
def test_the_outline_has_the_shapes_of_what_is_loaded_and_no_weights(
    saved: Callable[[str], Path], family: str, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = AdapterConfig()
    folder = saved(family)
    capfd.readouterr()
    found = outline(ModelConfig(name=str(folder)))
    assert capfd.readouterr() == ("", "")
    assert found is not None and all(p.is_meta for p in found.parameters())
    base = load(folder)
    adapters = Layers(base.model, settings, name_or_path="x", encoder_decoder=base.encoder_decoder)
    assert target_shapes(found, default_targets(found)) == adapters.targets()


@pytest.mark.parametrize("family", ["t5", "llama", "gpt2", "qwen2"])
def test_loads_frozen_quietly_and_names_itself(
    saved: Callable[[str], Path], family: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = saved(family)
    capfd.readouterr()
    base = load(folder)
    assert capfd.readouterr() == ("", "")
    assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    assert base.name_or_path == base.model.name_or_path == str(folder.resolve())
    assert base.encoder_decoder == (family == "t5") and base.eos_id == 0
    assert base.pad_id == (1 if family in ("t5", "qwen2") else base.eos_id)
    assert base.layout.max_positions == (128 if family == "gpt2" else None)
    plain = load_file(folder / "model.safetensors")
    assert all(torch.equal(base.model.state_dict()[name], value) for name, value in plain.items())
    assert "the folder" in base.note


def test_precision_is_what_is_asked_for_whatever_the_checkpoint_has(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert {p.dtype for p in load(folder).model.parameters()} == {torch.float32}
    assert {p.dtype for p in load(folder, dtype="bf16").model.parameters()} == {torch.bfloat16}


def test_attention_is_taken_over_or_refused_by_name(saved: Callable[[str], Path]) -> None:
    assert load(saved("llama"), attention="eager").model.config._attn_implementation == "eager"
    with pytest.raises(UserError, match=r"model\.attention 'flash_attention_2'"):
        load(saved("t5"), attention="flash_attention_2")
    with pytest.raises(UserError, match=r"model\.attention 'fastest'"):
        load(saved("llama"), attention="fastest")


def test_a_head_of_its_own_survives_a_later_tie(saved: Callable[[str], Path]) -> None:
    """T5 v1.1 and Flan: transformers 5 calls every T5 tied, and any later tie_weights() would lose the head."""
    base = load(saved("t5"))
    head = load_file(saved("t5") / "model.safetensors")["lm_head.weight"]
    base.model.tie_weights()
    assert torch.equal(base.model.lm_head.weight, head)
    assert not torch.equal(base.model.lm_head.weight, base.model.shared.weight)
    assert base.model.encoder.embed_tokens.weight is base.model.shared.weight
    tied = load(saved("qwen2")).model
    tied.tie_weights()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_refused(copy: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    folder = copy("llama")
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    capfd.readouterr()
    with pytest.raises(UserError, match=r"lack lm_head\.weight, which LlamaForCausalLM needs"):
        load(folder)
    assert capfd.readouterr() == ("", "")


def test_unexpected_weights_are_refused_but_not_old_buffers(copy: Callable[[str], Path]) -> None:
    folder = copy("gpt2")
    change_weights(folder, lambda w: w.update({"transformer.h.0.attn.bias": torch.ones(2)}))
    load(folder)
    extra = {f"transformer.h.7.ln_{i}.weight": torch.ones(2) for i in range(5)}
    change_weights(folder, lambda w: w.update(extra))
    with pytest.raises(UserError, match=r"hold transformer\.h\.7\.ln_0\.weight, .* and 2 more"):
        load(folder)


def test_weights_of_another_shape_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("gpt2")
    change_weights(folder, lambda w: w.update({"transformer.wpe.weight": torch.ones(4, 32)}))
    with pytest.raises(UserError, match=r"gpt2: cannot be loaded"):
        load(folder)


def test_pickled_weights_are_refused_with_how_they_are_converted(copy: Callable[[str], Path]) -> None:
    folder = copy("gpt2")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"are pickles \(pytorch_model\.bin\).*convert them once.*save_pretrained"):
        load(folder)

    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "ran",))

    torch.save({"transformer.wte.weight": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="are pickles"):
        load(folder)
    assert not (folder / "ran").exists()


def test_a_padding_token_beyond_the_embedding_is_not_used(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    base = load(folder)
    base.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    base.tokenizer.add_tokens([f"[more {i}]" for i in range(30)])
    base.tokenizer.add_special_tokens({"pad_token": "[more 29]"})
    base.tokenizer.save_pretrained(folder)
    again = load(folder)
    assert again.tokenizer.pad_token_id >= 420 and again.pad_id == again.eos_id


def test_all_end_tokens_end(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 0, 9999]}))
    base = load(folder)
    assert base.eos_id == 0 and base.layout.end_ids == (0, 7)


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("trusted", [False, True])
def test_a_tokenizer_alone_is_loaded_as_with_its_model(
    saved: Callable[[str], Path], family: str, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def spied(*given: Any) -> Any:
        asked.append(given)
        return load_tokenizer(*given)

    monkeypatch.setattr("cl_runner.models.base.load_tokenizer", spied)
    load(saved(family), trust_remote_code=trusted)
    tokenizer_of(ModelConfig(name=str(saved(family)), trust_remote_code=trusted))
    assert asked[0] == asked[1] and asked[0][2:] == (family == "t5", trusted)


def sentencepiece_model(**options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3), model_writer=model, minloglevel=2, hard_vocab_limit=False, **options
    )
    return model.getvalue()


def only_sentencepiece(folder: Path, name: str, model: bytes) -> sentencepiece.SentencePieceProcessor:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / name).write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


def test_spiece_model_alone_gives_sentencepieces_ids(copy: Callable[[str], Path]) -> None:
    folder = copy("t5")
    model = sentencepiece_model(vocab_size=150, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    processor = only_sentencepiece(folder, "spiece.model", model)
    base = load(folder)
    assert (base.eos_id, base.pad_id) == (1, 0)
    encoder = Encoder(base.tokenizer, base.layout, max_source=30)
    for prompt in (Prompt("Option: World\n", "a quick fox", "\nAnswer:"), Prompt("", "Zürich", "")):
        assert encoder.encode(prompt, "True").source == [*processor.EncodeAsIds(str(prompt)), 1]
    assert encoder.encode(prompt, "very negative").target == [*processor.EncodeAsIds("very negative"), 1]
    long = encoder.encode(Prompt("Option: World\n", "the lazy dog " * 30, "\nAnswer:"), "True")
    assert len(long.source) == 30 and long.truncated
    text = encoder.decode(long.source)
    assert text.startswith("Option: World the lazy dog") and text.endswith("Answer:")


@pytest.mark.parametrize("with_config", [False, True])
def test_tokenizer_model_alone_gives_sentencepieces_ids(copy: Callable[[str], Path], with_config: bool) -> None:
    """Also the space before the text and ``<s>``, which a generic conversion loses."""
    folder = copy("llama")
    model = sentencepiece_model(
        vocab_size=400, model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
    )  # fmt: skip
    processor = only_sentencepiece(folder, "tokenizer.model", model)
    if with_config:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    base = load(folder)
    encoder = Encoder(base.tokenizer, base.layout)
    prompt = Prompt("Option: World\n", "naïve {café}  日本 100", "\nAnswer:")
    example = encoder.encode(prompt, "True")
    assert example.source == [1, *processor.EncodeAsIds(str(prompt))]
    assert example.target == [*processor.EncodeAsIds("True"), 2]
    assert encoder.decode(example.source) == str(prompt)


def test_bos_is_left_out_where_the_config_says_so(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    options = {"model_type": "bpe", "byte_fallback": True, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    only_sentencepiece(folder, "tokenizer.model", sentencepiece_model(vocab_size=400, **options))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False})
    )
    base = load(folder)
    assert Encoder(base.tokenizer, base.layout).before == []


def test_a_broken_tokenizer(copy: Callable[[str], Path]) -> None:
    folder = copy("gpt2")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        load(folder)


@pytest.mark.parametrize(
    ("kind", "rope", "most"),
    [
        ("Phi-3", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}, 16),
        ("LLaMA 2", {"rope_type": "dynamic", "factor": 4.0}, 64),
    ],
)
def test_positions_end_where_the_longest_row_would_change_the_others(
    tmp_path: Path, kind: str, rope: dict[str, Any], most: int
) -> None:
    more = {"original_max_position_embeddings": 16} if "short_factor" in rope else {}
    model = FAMILIES[kind].model(rope_parameters={"rope_theta": 1e4, **rope, **more}, **more)
    model.save_pretrained(tmp_path)
    FAMILIES[kind].special.tokenizer().save_pretrained(tmp_path)
    base = load(tmp_path)
    assert base.layout.max_positions == most
    with torch.no_grad():
        alone, short, long = (base.model(torch.arange(n)[None] % 20 + 4).logits[0, :8] for n in (8, most, most + 1))
    torch.testing.assert_close(short, alone, rtol=0, atol=1e-4)
    assert float((long - alone).abs().max()) > 1e-3
