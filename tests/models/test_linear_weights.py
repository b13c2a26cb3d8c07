"""Weights of linear layers as a model has them, read from its folder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cl_runner.adapters.targets import is_linear
from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError
from cl_runner.models.linear_weights import LinearWeights, base_folder
from cl_runner.models.locate import EMBEDDED
from tests.adapters.families import base_model


def saved(folder: Path, family: str, seed: int = 0, **how: Any) -> Any:
    model = base_model(family, seed=seed)
    model.save_pretrained(str(folder), **how)
    return model


@pytest.mark.parametrize("family", ["t5", "gpt2"])
@pytest.mark.parametrize("how", [{}, {"max_shard_size": "8KB"}], ids=["whole", "in parts"])
def test_every_linear_layer_out_by_in(tmp_path: Path, family: str, how: dict[str, Any]) -> None:
    model = saved(tmp_path / "a", family, **how)
    other = saved(tmp_path / "b", family, seed=1)
    if how:
        assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    found = LinearWeights(tmp_path / "a")
    layers = {name: layer for name, layer in model.named_modules() if is_linear(layer) and name != "lm_head"}
    assert set(found.shapes) == set(layers)  # the head is the embedding, which has no weight of its own
    for name, layer in layers.items():
        weight = layer.weight.T if family == "gpt2" else layer.weight
        assert found.shapes[name] == tuple(weight.shape) and torch.equal(found.weight(name), weight)
        wanted = other.get_submodule(name).weight
        beside = LinearWeights(tmp_path / "b", like=found)
        assert torch.equal(beside.weight(name), wanted.T if family == "gpt2" else wanted)


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    saved(tmp_path, "t5")
    found = LinearWeights(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    save_file({**tensors, f"{layer}.weight": torch.ones(3, 24)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"{layer} is \(3, 24\), and \(24, 24\) by the model's config$"):
        LinearWeights(tmp_path, like=found).weight(layer)
    (tmp_path / "model.safetensors").write_bytes(b"1")
    with pytest.raises(UserError, match=r"model.safetensors: cannot be read \("):
        LinearWeights(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    saved(tmp_path / "b", "t5")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "b/model.safetensors").read_bytes())
    with pytest.raises(UserError, match="brings its own code"):
        LinearWeights(tmp_path)


def test_where_a_base_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "base", "t5")
    assert base_folder(ModelConfig(name=str(tmp_path / "base"))) == tmp_path / "base"
    assert (base_folder(ModelConfig(name=EMBEDDED[0])) / "model.safetensors").is_file()
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(tmp_path / "base/config.json"))
    assert base_folder(ModelConfig(name="some/model")) == tmp_path / "base"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(UserError, match="the base some/model is not on this machine"):
        base_folder(ModelConfig(name="some/model"))
