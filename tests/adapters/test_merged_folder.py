"""Adapters of other kinds than LoRA: what is read of them beside the base is what their layers do to an input."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_runner.adapters.lora_folder import LoraFolder
from cl_runner.adapters.merged_folder import MergedFolder, open_folder
from cl_runner.adapters.targets import is_transposed
from cl_runner.errors import UserError
from tests.adapters.families import base_model, off

LLAMA = {"target_modules": ["q_proj", "up_proj", "down_proj"], "task_type": "CAUSAL_LM"}
LORA = {"r": 3, "lora_alpha": 7}
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "dora": ("llama", lambda: peft.LoraConfig(**LORA, use_dora=True, use_rslora=True, **LLAMA)),
    "dora of a Conv1D": ("gpt2", lambda: peft.LoraConfig(**LORA, use_dora=True, target_modules=["c_attn"])),
    "dora with patterns": (
        "llama",
        lambda: peft.LoraConfig(**LORA, use_dora=True, rank_pattern={"up_proj": 5}, **LLAMA),
    ),
    "adalora": ("llama", lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **LLAMA)),
    "vera": ("llama", lambda: peft.VeraConfig(r=4, **{**LLAMA, "target_modules": ["q_proj"]})),
    "vera from its seed": (
        "llama",
        lambda: peft.VeraConfig(
            r=4, save_projection=False, projection_prng_key=5, **{**LLAMA, "target_modules": ["q_proj"]}
        ),
    ),
    "vblora": ("llama", lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, **LLAMA)),
    "loha": ("llama", lambda: peft.LoHaConfig(r=3, alpha=5, **LLAMA)),
    "lokr": ("llama", lambda: peft.LoKrConfig(r=3, alpha=5, decompose_factor=4, **LLAMA)),
    "ia3": (
        "llama",
        lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
    ),
    "oft": ("llama", lambda: peft.OFTConfig(oft_block_size=4, **LLAMA)),
    "boft": ("llama", lambda: peft.BOFTConfig(boft_block_size=4, **LLAMA)),
    "hra": ("llama", lambda: peft.HRAConfig(r=4, **LLAMA)),
    "randlora": ("llama", lambda: peft.RandLoraConfig(r=4, **LLAMA)),
    "fourierft": ("llama", lambda: peft.FourierFTConfig(n_frequency=40, scaling=30.0, **LLAMA)),
    "miss": ("llama", lambda: peft.MissConfig(r=4, **LLAMA)),
    "delora": ("llama", lambda: peft.DeloraConfig(r=4, **LLAMA)),
    "shira": ("llama", lambda: peft.ShiraConfig(r=4, **LLAMA)),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def made(folder: Path, family: str, config: Any) -> Any:
    """PEFT's model of a random adapter, which is saved into the folder."""
    model = peft.get_peft_model(copy.deepcopy(base_model(family)), config)
    dice = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=dice))
    model.save_pretrained(str(folder))
    return model.double().eval()


def changed(layer: Any) -> Tensor:
    """What a layer's forward makes of the unit vectors less what its base makes of them: ΔW (m, n) fp64."""
    base = layer.get_base_layer()
    n = base.weight.shape[0 if is_transposed(base) else 1]
    with torch.no_grad():
        return (layer(torch.eye(n).double()) - base(torch.eye(n).double())).T


@pytest.mark.parametrize("case", CASES)
def test_what_its_layers_do(tmp_path: Path, case: str) -> None:
    family, config = CASES[case]
    model = made(tmp_path, family, config())
    network = base_model(family)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folder = open_folder(tmp_path, "its name", lambda: network)
    assert isinstance(folder, MergedFolder) and folder.name == "its name" and not folder.notes
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module.get_base_layer(), "weight")
    }
    assert set(folder.shapes) == set(layers)
    for layer, module in layers.items():
        wanted = changed(module)
        assert wanted.norm() > 1e-3 and folder.shapes[layer] == tuple(wanted.shape)
        for _ in range(2):  # to read it leaves it as it was
            assert off(folder.of(layer).whole(), wanted) < 1e-5
    assert folder.total(layer).A is None
    assert list(network.state_dict()) == list(before), "and the base is the base"
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_small_updates_keep_their_digits(tmp_path: Path) -> None:
    """Which the merged weight in fp32 would have lost."""
    config = peft.LoraConfig(r=3, lora_alpha=3, use_dora=True, **LLAMA)
    model = peft.get_peft_model(copy.deepcopy(base_model("llama")), config)
    dice = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(1e-5 * torch.randn(parameter.shape, generator=dice))
    model.save_pretrained(str(tmp_path))
    folder = MergedFolder(tmp_path, "", base_model("llama"))
    layer = "model.layers.0.self_attn.q_proj"
    prefix, found = f"base_model.model.{layer}.", load_file(tmp_path / "adapter_model.safetensors")
    tensors = {name.removeprefix(prefix): t.double() for name, t in found.items() if name.startswith(prefix)}
    W = base_model("llama").get_submodule(layer).weight.double()
    direction = W + tensors["lora_B.weight"] @ tensors["lora_A.weight"]
    magnitude = tensors["lora_magnitude_vector"]
    wanted = (magnitude / direction.norm(dim=1))[:, None] * direction - W
    assert off(folder.of(layer).whole(), wanted) < 1e-5


def test_of_lora_no_base_is_asked_for(tmp_path: Path) -> None:
    made(tmp_path, "llama", peft.LoraConfig(**LORA, **LLAMA))

    def never() -> Any:
        raise AssertionError

    assert isinstance(open_folder(tmp_path, "", never), LoraFolder)


def test_what_else_it_trained_is_noted(tmp_path: Path) -> None:
    made(tmp_path, "llama", peft.LoHaConfig(r=3, modules_to_save=["lm_head"], **LLAMA))
    assert MergedFolder(tmp_path, "", base_model("llama")).notes == [
        "modules that it trained whole (lm_head) are left out"
    ]


def edited(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return edit


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        found = load_file(file)
        change(found)
        save_file(found, file)

    return edit


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another base": (edited(target_modules=["query"]), r"of the kind LOHA, which PEFT cannot merge into this base \("),
    "another rank": (edited(r=5), r"cannot merge into this base \("),
    "another kind": (edited(peft_type="NOTHING"), r"of the kind NOTHING, which PEFT cannot"),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        r"holds no adapter_model.safetensors",
    ),
    "cut": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12345"), r"is broken \("),
    "tensors that are not there": (
        tensors(lambda t: t.pop(next(iter(t)))),
        "broken: tensors of its layers are not in its file$",
    ),
    "nan": (tensors(lambda t: t[next(iter(t))].fill_(torch.nan)), "holds values that are not finite$"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_one_line(tmp_path: Path, case: str) -> None:
    made(tmp_path, "llama", peft.LoHaConfig(r=3, **LLAMA))
    change, why = BROKEN[case]
    change(tmp_path)
    with pytest.raises(UserError, match=why) as caught:
        MergedFolder(tmp_path, "", base_model("llama"))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "soft prompts change no weight$"),
        (peft.LNTuningConfig(target_modules=["input_layernorm"]), "changes no linear layer of this base$"),
    ],
    ids=["prompts", "norms"],
)
def test_what_changes_no_linear_layer(tmp_path: Path, config: Any, why: str) -> None:
    peft.get_peft_model(copy.deepcopy(base_model("llama")), config).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=why):
        MergedFolder(tmp_path, "", base_model("llama"))
