"""Models and adapters of somebody else: no pickle, no code, no link out of the folder, no length taken on trust."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cl_runner.adapters import expressions, lora_folder
from cl_runner.adapters.foreign_config import refuse_foreign_config
from cl_runner.adapters.lora_folder import LoraFolder
from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError
from cl_runner.models import gguf_header
from cl_runner.models.identity import model_identity
from cl_runner.models.locate import check, locate
from tests.fuzz import inputs


class Evil:
    """What a pickle may do as it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    inputs.write({f"model/{name}": content for name, content in inputs.model_folder().items()}, tmp_path)
    return tmp_path / "model"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    inputs.write({f"adapter/{name}": content for name, content in inputs.peft_folder().items()}, tmp_path)
    return tmp_path / "adapter"


def looked_at(folder: Path) -> None:
    located = locate(ModelConfig(name=str(folder)))
    check(located)
    model_identity(located)


def refused(words: str, act: Callable[[], Any]) -> None:
    with pytest.raises(UserError, match=words) as refusal:
        act()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_a_pickled_model_is_refused_unread(model: Path, tmp_path: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    refused("are pickles.*convert them once: python -c", lambda: looked_at(model))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_safetensors_is_not_what_is_loaded(model: Path, tmp_path: Path) -> None:
    import torch

    from cl_runner.models.base import load_base

    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    load_base(ModelConfig(name=str(model)), torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_a_pickled_adapter_is_refused_unread(adapter: Path, tmp_path: Path) -> None:
    (adapter / lora_folder.WEIGHTS).unlink()
    (adapter / lora_folder.PICKLED).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    refused("is a pickle.*convert it: python -c", lambda: LoraFolder(adapter))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "extra.py", "sub"])
def test_a_link_out_of_a_model_is_not_followed(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("/etc" if name == "sub" else "/etc/passwd")
    refused("leads out of the folder", lambda: looked_at(model))
    refused("leads out of the folder", lambda: model_identity(locate(ModelConfig(name=str(model)))))


def test_a_link_out_of_an_adapter_is_not_followed(adapter: Path, tmp_path: Path) -> None:
    (adapter / lora_folder.CONFIG).rename(tmp_path / "config.json")
    (adapter / lora_folder.CONFIG).symlink_to(tmp_path / "config.json")
    refused("leads out of the folder", lambda: LoraFolder(adapter))


def test_a_snapshot_of_the_hubs_cache_is_links_and_is_read(model: Path, adapter: Path, tmp_path: Path) -> None:
    for folder, look in ((model, looked_at), (adapter, LoraFolder)):
        hub = tmp_path / f"models--x--{folder.name}"
        (hub / "blobs").mkdir(parents=True)
        (hub / "snapshots/abc").mkdir(parents=True)
        for number, file in enumerate(sorted(folder.iterdir())):
            file.rename(hub / f"blobs/{number}")
            (hub / "snapshots/abc" / file.name).symlink_to(f"../../blobs/{number}")
        look(hub / "snapshots/abc")


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json"])
def test_a_pipe_in_a_model_is_not_waited_for(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    refused("neither a file nor a folder", lambda: looked_at(model))


@pytest.mark.parametrize("length", [2**63, 2**40, 101_000_000])
def test_a_header_says_how_long_it_is_and_is_not_believed(model: Path, adapter: Path, length: int) -> None:
    for file, look in ((model / "model.safetensors", looked_at), (adapter / lora_folder.WEIGHTS, LoraFolder)):
        file.write_bytes(struct.pack("<Q", length) + b"{")
        os.truncate(file, 10 * 2**30)
        refused("broken", lambda look=look, file=file: look(file.parent))


@pytest.mark.parametrize("end", ["text", None, [], -1, 2**70])
def test_offsets_of_any_type(model: Path, end: Any) -> None:
    head = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, end]}}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + b"\0" * 4)
    refused("broken or cut short", lambda: looked_at(model))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "nowhere.safetensors"])
def test_an_index_names_files_of_its_folder_alone(model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"shared.weight": name}}))
    refused("is not there", lambda: looked_at(model))
    from cl_runner.models.linear_weights import LinearWeights

    refused("is not there", lambda: LinearWeights(model))


def test_code_that_comes_with_a_model_is_not_run(model: Path, tmp_path: Path) -> None:
    import torch

    from cl_runner.models.base import load_base

    (model / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    config = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "evil.Config", "AutoModelForSeq2SeqLM": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    (model / "config.json").write_text(json.dumps({**config, "auto_map": own}))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "auto_map": own}))
    load_base(ModelConfig(name=str(model)), torch.device("cpu"))  # of a known kind: as transformers has it
    (model / "config.json").write_text(json.dumps({**config, "auto_map": own, "model_type": "evil"}))
    refused("model.trust_remote_code runs that, if you trust it", lambda: looked_at(model))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_of_the_hub_is_not_fetched(model: Path, key: str) -> None:
    config = json.loads((model / "config.json").read_text())
    for changed in ({**config, key: "evil/kernel"}, {**config, "text_config": {key: {"full": "evil/kernel"}}}):
        (model / "config.json").write_text(json.dumps(changed))
        refused("names code of a hub repository", lambda: looked_at(model))


def test_json_of_a_model_is_bounded(model: Path) -> None:
    (model / "config.json").write_text("[" * 200_000)
    refused("not readable JSON", lambda: looked_at(model))
    os.truncate(model / "config.json", 10 * 2**30)
    refused("larger than 64 MiB", lambda: looked_at(model))


@pytest.mark.parametrize(
    "key",
    ["(a+)+", "(a|aa)+b*", "(.*)*x", r"((\w+)\.)*", "a{0,99}b{0,99}c{0,99}d{0,99}", r"(.)\1", "(?=a)", "x" * 2000],
)
def test_an_expression_that_could_be_matched_for_ever_is_refused(adapter: Path, key: str) -> None:
    config = json.loads((adapter / lora_folder.CONFIG).read_text())
    (adapter / lora_folder.CONFIG).write_text(json.dumps({**config, "rank_pattern": {key: 2}}))
    refused("rank_pattern: ", lambda: LoraFolder(adapter))


@pytest.mark.parametrize(
    "key", ["q_proj", r".*\.layers\.[0-9]+\..*q_proj", "(q|v)_proj", r"^model\.q$", r"layers\.\d{1,3}\.q"]
)
def test_expressions_that_people_write_are_taken(key: str) -> None:
    expressions.check(key)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"peft_type": "XLORA", "adapters": {"0": "evil/adapter"}}, "X-LoRA"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "would import the module"),
        ({"r": 10**9}, "nothing in the adapter's file is as large"),
        ({"layer_replication": [[0, 10**6]]}, "another model of the base"),
        ({"target_modules": "(a+)+b"}, "target_modules"),
        ({"modules_to_save": ["(a+)+b"]}, "modules_to_save"),
    ],
)  # fmt: skip
def test_what_peft_would_do_with_a_config_is_looked_at_first(change: dict[str, Any], why: str) -> None:
    refused(why, lambda: refuse_foreign_config({"peft_type": "HRA", **change}, Path("c.json"), 8))


def test_lengths_in_a_gguf_header_are_within_the_file(tmp_path: Path) -> None:
    file, good = tmp_path / "x.gguf", inputs.gguf_file()
    file.write_bytes(good)
    gguf_header.check(file)
    count = struct.pack("<IQ", 6, 2)  # of the scores
    for bad in (
        good.replace(count, struct.pack("<IQ", 6, 2**60)), good.replace(count, struct.pack("<IQ", 9, 2)),
        good[:16] + b"\xff" * 8 + good[24:], good[:8] + b"\xff" * 8 + good[16:], good[:60], b"GGUF", b"",
        good[:24] + struct.pack("<Q", 2**40) + good[32:],
    ):  # fmt: skip
        file.write_bytes(bad)
        refused("broken, or no GGUF file", lambda: gguf_header.check(file))
    file.unlink()
    os.mkfifo(file)
    refused("no plain file", lambda: gguf_header.check(file))
