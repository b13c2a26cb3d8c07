"""Which model a name means, and every refusal that needs no weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError
from cl_runner.models.locate import EMBEDDED, Located, check, locate


@pytest.fixture
def copy(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: shutil.copytree(saved(family), tmp_path / family)


def at(path: Path, **settings: Any) -> Located:
    return locate(ModelConfig(name=str(path), **settings))


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    value = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def test_the_three_kinds(tmp_path: Path) -> None:
    for name in EMBEDDED:
        located = locate(ModelConfig(name=name), tmp_path)
        assert located.kind == "embedded" and Path(located.name_or_path).is_absolute() and "embedded" in located.note
    located = locate(ModelConfig(name="google/flan-t5-large", revision="abc"), tmp_path)
    assert (located.kind, located.path, located.name_or_path) == ("hub", None, "google/flan-t5-large")
    assert located.revision == "abc" and "hub" in located.note and "abc" in located.note
    (tmp_path / "mine").mkdir()
    located = locate(ModelConfig(name="./mine"), tmp_path)
    assert located.kind == "folder" and located.name_or_path == str(tmp_path / "mine")


def test_a_folder_wins_and_the_note_says_so(tmp_path: Path) -> None:
    (tmp_path / "google/flan-t5-large").mkdir(parents=True)
    located = locate(ModelConfig(name="google/flan-t5-large"), tmp_path)
    assert located.kind == "folder" and "local folder wins over the hub" in located.note
    (tmp_path / "tiny-t5").mkdir()
    located = locate(ModelConfig(name="tiny-t5"), tmp_path)
    assert located.kind == "folder" and "not the embedded model" in located.note
    assert all("\n" not in line for line in (located.note,))


@pytest.mark.parametrize(
    "name", ["../x", "/no/such/model", "a b", "", " ", "a//b", "a/b/c", "x" * 97, "-x", "a/.b", "~no"]
)
def test_names_that_are_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"model\.name: "):
        locate(ModelConfig(name=name), tmp_path)


def test_what_a_script_makes_is_not_asked_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder smollm2 here; scripts/get_smollm2\.sh smollm2 makes it"):
        locate(ModelConfig(name="smollm2"), tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert locate(ModelConfig(name="smollm2"), tmp_path).kind == "folder"


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is a file; give the model's folder"):
        locate(ModelConfig(name="model.safetensors"), tmp_path)


def test_gguf_files_are_told_apart_by_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CL_RUNNER_CACHE", str(tmp_path / "cache"))
    many = bytes(3 << 20)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "small.gguf").write_bytes(many)
    found = at(tmp_path / "a" / "small.gguf")
    assert found.kind == "gguf" and found.file is not None and found.file.path == tmp_path / "a" / "small.gguf"
    assert found.path is not None and found.path.parent == tmp_path / "cache" / "models"
    assert found.path.name.startswith("small-") and found.name_or_path == str(found.path) and "fp32" in found.note
    assert at(tmp_path / "a").path == found.path  # the folder that holds it alone
    (tmp_path / "small.gguf").write_bytes(many)
    assert at(tmp_path / "small.gguf").path == found.path  # moved, it is the same
    middle = len(many) // 2
    for other in (b"x" + many[1:], many[:middle] + b"x" + many[middle + 1 :], many + b"x"):
        (tmp_path / "small.gguf").write_bytes(other)
        assert at(tmp_path / "small.gguf").path != found.path
    (tmp_path / "a" / "config.json").write_text("{}")
    assert at(tmp_path / "a").kind == "folder"


def test_gguf_files_that_cannot_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            locate(ModelConfig(name=name), tmp_path)
        assert "\n" not in str(caught.value)

    refused("none.gguf", r"model\.name: there is no file none\.gguf")
    for name in ("q4.gguf", "q8.gguf", "big-00001-of-00002.gguf"):
        (tmp_path / name).touch()
    refused(".", r"holds several GGUF files \(big-00001-of-00002\.gguf, q4\.gguf, q8\.gguf\); name one of them")
    refused("big-00001-of-00002.gguf", "one part of a model in several files; merge them")
    monkeypatch.delenv("CL_RUNNER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    refused("q4.gguf", "no home for it; set CL_RUNNER_CACHE")


@pytest.mark.parametrize("family", ["t5", "llama", "gpt2", "qwen2"])
def test_good_folders(saved: Callable[[str], Path], family: str) -> None:
    facts = check(at(saved(family)))
    assert (facts.encoder_decoder, facts.model_type) == (family == "t5", family)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, r"bert, BertForMaskedLM\): is encoder-only"),
        ({"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"]}, "is encoder-only"),
        ({"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"]}, "is encoder-only"),
        ({"model_type": "t5", "architectures": ["T5EncoderModel"]}, "saved with only the encoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "saved with a classification head"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "no language-model head"),
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, "text with text"),
        ({"model_type": "llamma"}, "model_type 'llamma' is not known to transformers"),
        ({"model_type": "own", "auto_map": {"AutoModel": "own.Own"}}, r"own code: model\.trust_remote_code"),
        ({"model_type": None}, "names no model_type"),
        ({"hidden_size": "wide"}, r"config\.json does not fit model_type 'llama'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
    ],
)
def test_architectures_that_cannot_be_trained(
    copy: Callable[[str], Path], changes: dict[str, Any], message: str
) -> None:
    folder = copy("llama")
    edit(folder, **changes)
    with pytest.raises(UserError, match=message) as caught:
        check(at(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_own_code_is_taken_where_it_is_trusted(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    edit(folder, model_type="own", auto_map={"AutoModelForCausalLM": "own.Own"})
    assert not check(at(folder, trust_remote_code=True)).encoder_decoder


def broken(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check(at(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_config_json(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("llama")
    for text in ("{", "\x00\xff binary", "[1]", ""):
        (folder / "config.json").write_text(text)
        broken(folder, r"config\.json is not")
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    broken(folder, r"config\.json is not readable JSON")
    (folder / "config.json").unlink()
    broken(folder, r"no config\.json there")
    (tmp_path / "empty").mkdir()
    broken(tmp_path / "empty", r"no config\.json there")
    (tmp_path / "empty" / "python").symlink_to("/bin/sh")  # somebody's folder of anything is not looked through
    broken(tmp_path / "empty", r"no config\.json there")


def test_an_adapter_is_no_base(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "google-t5/t5-large"}')
    broken(folder, r"PEFT adapter \(of google-t5/t5-large\), not a base model")


def test_weights(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    broken(folder, r"model\.safetensors is broken or cut short")
    weights.write_bytes(whole[:40])
    broken(folder, r"model\.safetensors is broken or cut short")
    weights.write_bytes(b"")
    broken(folder, r"model\.safetensors is broken or cut short")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    broken(folder, "only a git-lfs pointer")
    weights.unlink()
    broken(folder, "no weights there; ")
    (folder / "tf_model.h5").touch()
    broken(folder, r"no weights there \(only tf_model\.h5")
    (folder / "pytorch_model.bin").write_bytes(b"PK..")
    broken(folder, r"its weights are pickles \(pytorch_model\.bin\)")


def test_shards(copy: Callable[[str], Path], saved: Callable[[str], Path]) -> None:
    folder = copy("llama")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate(names)}}))
    (folder / names[0]).write_bytes(whole)
    broken(folder, rf"names 3 weight files, but {names[1]} and 1 more is not there")
    for name in names[1:]:
        (folder / name).write_bytes(whole)
    check(at(folder))
    (folder / names[2]).write_bytes(whole[:-1])
    broken(folder, rf"{names[2]} is broken")
    index.write_text("{}")
    broken(folder, "has no weight_map")


def test_tokenizers(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    (folder / "tokenizer.json").unlink()
    broken(folder, "no tokenizer there")
    (folder / "vocab.json").touch()
    broken(folder, "no tokenizer there")
    (folder / "merges.txt").touch()
    check(at(folder))
    (folder / "merges.txt").unlink()
    edit(folder, "tokenizer_config.json", tokenizer_class="ByT5Tokenizer")
    check(at(folder))
    (folder / "tokenizer_config.json").unlink()
    for name in ("spiece.model", "tokenizer.model"):
        (folder / name).touch()
        check(at(folder))
        (folder / name).unlink()


def test_names_are_known_without_torch() -> None:
    code = (
        "import sys; from cl_runner.config.schema import ModelConfig;"
        "from cl_runner.models.locate import check, locate;"
        "locate(ModelConfig(name='tiny-t5')); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
