"""GGUF files into model folders: the same numbers, the same ids, and nothing left out without a word."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError
from cl_runner.models import gguf as models_gguf
from cl_runner.models.base import load_base, outline
from cl_runner.models.gguf import convert
from cl_runner.models.identity import model_identity
from cl_runner.models.locate import check, locate
from tests.command_line import ORDER, SMALL, call, results
from tests.models.tiny_gguf import model_and_tokenizer, write
from tests.models.tiny_models import LINES

gguf = pytest.importorskip("gguf", reason='GGUF files are written and read with gguf: pip install "cl-runner[gguf]"')


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """``tiny(...)``: a GGUF file of a tiny random LLaMA, with ``write``'s options."""
    return lambda **options: write(tmp_path / "tiny.gguf", *model_and_tokenizer(), **options)


def test_every_weight_comes_back_and_the_folder_is_an_ordinary_one(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer()
    (tmp_path / "folder").mkdir()  # an empty one may be there
    convert(write(tmp_path / "tiny.gguf", model, tokenizer), tmp_path / "folder")
    found = weights_of(tmp_path / "folder")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "folder"}
    assert (tmp_path / "folder/model.safetensors").stat().st_mode & 0o044  # readable by who may read the folder

    base = load_base(ModelConfig(name=str(tmp_path / "folder")), torch.device("cpu"))
    config = base.model.config
    assert (config.rope_parameters["rope_theta"], config.vocab_size, config.architectures) == (
        5000.0, 420, ["LlamaForCausalLM"],
    )  # fmt: skip
    assert not hasattr(config, "quantization_config") and config.max_position_embeddings == 128
    assert (base.eos_id, base.tokenizer.bos_token, base.tokenizer.eos_token) == (0, "<s>", "</s>")
    for line in LINES:
        assert base.tokenizer(line)["input_ids"] == tokenizer(line)["input_ids"]
    assert base.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    model.config.rope_parameters["rope_theta"] = 5000.0
    same = type(model)(model.config)
    same.load_state_dict(model.state_dict())
    ids = torch.tensor([tokenizer(LINES[0])["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(base.model(ids).logits, same.eval()(ids).logits, atol=1e-6)


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer(tied=True)
    convert(write(tmp_path / "tiny.gguf", model, tokenizer), tmp_path / "folder")
    assert "lm_head.weight" not in weights_of(tmp_path / "folder")
    found = load_base(ModelConfig(name=str(tmp_path / "folder")), torch.device("cpu")).model
    assert found.config.tie_word_embeddings and found.lm_head.weight is found.model.embed_tokens.weight


def by_hand(block: bytes) -> list[float]:
    """The 32 numbers of a block of Q4_1 (two halves, 16 bytes) or Q8_0 (one half, 32 bytes), in fp32."""
    if len(block) == 20:
        scale, least = np.frombuffer(block[:4], np.float16).astype(np.float32)
        integers = [byte & 15 for byte in block[4:]] + [byte >> 4 for byte in block[4:]]
    else:
        [scale], least = np.frombuffer(block[:2], np.float16).astype(np.float32), np.float32(0)
        integers = [int(value) for value in np.frombuffer(block[2:], np.int8)]
    return [float(np.float32(scale * np.float32(integer)) + least) for integer in integers]


@pytest.mark.parametrize(("kind", "length"), [("Q4_1", 20), ("Q8_0", 34)])
def test_quantised_weights_are_what_their_blocks_say(tmp_path: Path, kind: str, length: int) -> None:
    model, tokenizer = model_and_tokenizer()
    convert(write(tmp_path / "tiny.gguf", model, tokenizer, kind=kind), tmp_path / "folder")
    found = weights_of(tmp_path / "folder")
    name = "model.layers.1.mlp.down_proj.weight"
    quantised = getattr(gguf.GGMLQuantizationType, kind)
    rows = gguf.quants.quantize(model.state_dict()[name].numpy(), quantised)
    wanted = [by_hand(bytes(row[i : i + length])) for row in rows for i in range(0, len(row), length)]
    assert torch.equal(found[name], torch.tensor(wanted).reshape(found[name].shape))
    assert not torch.equal(found[name], found[name].to(torch.float16).float())  # nothing shorter than fp32 holds them
    assert torch.equal(found["model.norm.weight"], model.state_dict()["model.norm.weight"])
    # q and k were quantised in their other order: a row is a whole number of blocks, so that rows may move.
    q = model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    plain = [by_hand(bytes(row)) for row in gguf.quants.quantize(q.numpy(), quantised)]
    assert torch.equal(found["model.layers.0.self_attn.q_proj.weight"], torch.tensor(plain).reshape(q.shape))


def test_text_is_split_as_the_file_says(tiny: Callable[..., Path], tmp_path: Path) -> None:
    ids = {}
    text = "of 100% and 100\n\n7"
    for pre in ("gpt-2", "smollm"):
        convert(tiny(pre=pre), tmp_path / pre)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / pre)
        ids[pre] = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids[pre]) == text
    plain = AutoTokenizer.from_pretrained(tmp_path / "gpt-2")
    apart = [id for piece in re.split(r"(\d)", text) for id in plain(piece, add_special_tokens=False)["input_ids"]]
    assert ids["smollm"] == apart != ids["gpt-2"]


def refused(file: Path, tmp_path: Path, message: str) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message) as caught:
        convert(file, tmp_path / "folder")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_files_that_are_broken_or_something_else(tiny: Callable[..., Path], tmp_path: Path) -> None:
    whole = tiny().read_bytes()
    for length in (0, 3, 20, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        refused(tmp_path / "cut.gguf", tmp_path, "broken, or no GGUF file .*download it again")
    (tmp_path / "text.gguf").write_text("This is no model, but a text of more than a few words.")
    refused(tmp_path / "text.gguf", tmp_path, "broken, or no GGUF file")
    refused(tmp_path / "none.gguf", tmp_path, "No such file")
    (tmp_path / "other.gguf").write_bytes(
        whole.replace(b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05" + bytes(7) + b"clips")
    )
    refused(tmp_path / "other.gguf", tmp_path, "transformers cannot read its architecture")


def test_what_would_be_left_out_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    refused(
        tiny(without="blk.1.ffn_up.weight"), tmp_path, r"has no model\.layers\.1\.mlp\.up_proj\.weight, which Llama"
    )
    wrong = tiny(**{"blk.1.ffn_up.weight": torch.ones(3, 64)})
    refused(wrong, tmp_path, r"its model\.layers\.1\.mlp\.up_proj\.weight is 3 × 64, where Llama\w+ .* has \d+ × \d+;")
    refused(
        tiny(**{"rope_freqs.weight": torch.ones(4)}), tmp_path, r"holds [\d,]+ numbers, of which Llama\w+ has [\d,]+"
    )
    refused(tiny(**{"llama.rope.scaling.type": "linear"}), tmp_path, r"positions are scaled \('linear'\)")
    refused(tiny(pre="deepseek-llm"), tmp_path, r"splits text \('deepseek-llm'\) is not known")
    refused(tiny(pre=None), tmp_path, r"splits text \(not said\) is not known")


def test_a_folder_that_holds_something_is_left_alone(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine").touch()
    with pytest.raises(UserError, match="folder exists and is not an empty folder"):
        convert(tiny(), tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["mine"]


def test_without_the_package(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny()
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(file, tmp_path, r'the package gguf; pip install "cl-runner\[gguf\]"')


# As a base model.


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where dequantised models are kept."""
    monkeypatch.setenv("CL_RUNNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def test_a_file_is_a_base_model_and_is_dequantised_once(
    tiny: Callable[..., Path], kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny(kind="Q8_0")
    first = load_base(ModelConfig(name=str(file)), torch.device("cpu"))
    assert capsys.readouterr().err.count("dequantising to fp32 in") == 1
    [folder] = (path for path in kept.iterdir() if path.is_dir())
    assert first.name_or_path == str(folder) and str(file) in first.note
    monkeypatch.setattr("cl_runner.models.gguf.convert", None)
    again = load_base(ModelConfig(name=str(file)), torch.device("cpu"))
    plain = load_base(ModelConfig(name=str(folder)), torch.device("cpu"))
    for other in (again, plain):
        assert all(map(torch.equal, first.model.state_dict().values(), other.model.state_dict().values()))
    assert outline(ModelConfig(name=str(file))) is not None and capsys.readouterr().err == ""


def test_two_files_are_two_models(tiny: Callable[..., Path], kept: Path) -> None:
    found = []
    for kind in ("Q8_0", "Q4_1"):
        located = locate(ModelConfig(name=str(tiny(kind=kind))))
        check(located)
        found.append((located.path, model_identity(located)))
    (first, one), (second, two) = found
    assert first != second and one["from"] == two["from"] == "gguf" and one["file"] != two["file"]


def test_two_at_once(tiny: Callable[..., Path], kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def slow(file: Path, folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.2)
        convert(file, folder)

    monkeypatch.setattr(models_gguf, "convert", slow)
    file = tiny()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: models_gguf.keep(file, kept / "one"), range(3)))
    assert calls == [kept / "one"]


def test_a_base_model_that_cannot_be_had(
    tiny: Callable[..., Path], kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="broken, or no GGUF file"):
        check(locate(ModelConfig(name=str(file))))
    file.write_bytes(whole)
    shutil.rmtree(kept)
    kept.touch()
    with pytest.raises(UserError, match="CL_RUNNER_CACHE names another place"):
        check(locate(ModelConfig(name=str(file))))
    assert capsys.readouterr().err == ""


def test_where_there_is_no_room(tiny: Callable[..., Path], kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny()
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30, 0))
        with pytest.raises(UserError, match=r"0 MB free in .*, and dequantised it takes about \d+ MB; make room"):
            check(locate(ModelConfig(name=str(file))))
    monkeypatch.setattr(models_gguf, "convert", full)
    with pytest.raises(UserError, match=r"No space left on device; CL_RUNNER_CACHE names another place"):
        check(locate(ModelConfig(name=str(file))))


def full(file: Path, folder: Path) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device")


def test_what_was_cleaned_away_in_part_is_made_anew(tiny: Callable[..., Path], kept: Path) -> None:
    located = locate(ModelConfig(name=str(tiny())))
    check(located)
    assert located.path is not None
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (located.path / name).unlink()
        check(located)
        assert (located.path / name).exists()


def test_a_run_on_one(tiny: Callable[..., Path], kept: Path, tmp_path: Path) -> None:
    """Trained, gone on with elsewhere, asked again; its adapters name the folder, with which plain PEFT answers."""
    tiny(kind="Q8_0")
    (tmp_path / "three.yaml").write_text(ORDER)
    sets = ("data.max_source=60", "data.truncate=tail", "adapter.r=4", "eval.max_new_tokens=4")
    given = ("train", "--order", "three.yaml", "--model", "tiny.gguf", "--data", "synthetic", "--name", "it", *SMALL,
             *(word for each in sets for word in ("--set", each)))  # fmt: skip
    done = call(*given, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.err.count("dequantising") == 1 and "tiny.gguf, dequantised to fp32 in" in done.err
    run = tmp_path / "runs" / "it"
    before = results(run)
    shutil.rmtree(run / "stages" / "03-agnews")
    (tmp_path / "tiny.gguf").touch()
    assert call(*given, cwd=tmp_path).code == 0 and results(run) == before
    (elsewhere := tmp_path / "elsewhere").mkdir()
    shutil.rmtree(kept)  # it is dequantised again
    again = call("eval", str(run), "--stage", "2", "--json", cwd=elsewhere)
    assert again.code == 0 and not any(again.json["differing_rows"].values()), again.err
    (tmp_path / "tiny.gguf").rename(tmp_path / "moved.gguf")
    again = call("eval", str(run), "--stage", "2", "--model", str(tmp_path / "moved.gguf"), "--json", cwd=elsewhere)
    assert again.code == 0 and not any(again.json["differing_rows"].values()), again.err
    named = json.loads((run / "stages" / "02-amazon" / "adapter" / "adapter_config.json").read_text())
    assert Path(named["base_model_name_or_path"]).parent == kept
