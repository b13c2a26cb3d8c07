"""A LoRA folder of anybody's: what is read of it is what PEFT itself adds to each layer, and what cannot be is told."""

from __future__ import annotations

import copy
import json
import pickle
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_runner.adapters.lora_folder import CONFIG, PICKLED, WEIGHTS, LoraFolder
from cl_runner.errors import UserError
from tests.adapters.families import base_model

LLAMA = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
GPT2 = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 5, "v_proj": 3},
    "alpha_pattern": {"^model.layers.1.self_attn.v_proj$": 7},
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """PEFT's own calls of what transformers deprecates, and its notes on what is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def made(folder: Path, family: str, config: Any, name: str = "default") -> dict[str, Tensor]:
    """A random adapter of PEFT's saved into a folder; layer → what PEFT says it adds, (out, in) fp64."""
    model = get_peft_model(copy.deepcopy(base_model(family)), config, adapter_name=name)
    dice = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(generator=dice)
    model.save_pretrained(str(folder))
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {key.removeprefix("base_model.model."): _delta(layer, name) for key, layer in layers.items()}


def _delta(layer: Any, name: str) -> Tensor:
    delta = layer.get_delta_weight(name).detach().double()
    weight_is_in_by_out = layer.fan_in_fan_out or name in layer.lora_embedding_A
    return delta.T if weight_is_in_by_out else delta


def check(folder: LoraFolder, wanted: Mapping[str, Tensor]) -> None:
    assert folder.shapes == {layer: tuple(delta.shape) for layer, delta in wanted.items()}
    for layer, delta in wanted.items():
        torch.testing.assert_close(folder.of(layer).whole().double(), delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", LLAMA),
        ("llama", {**LLAMA, "use_rslora": True}),
        ("llama", {**LLAMA, **PATTERNS}),
        ("llama", {**LLAMA, **PATTERNS, "use_rslora": True}),
        ("gpt2", GPT2),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "task_type": "CAUSAL_LM"}),
        ("t5", {"target_modules": r".*SelfAttention\.(q|v)", "task_type": "SEQ_2_SEQ_LM"}),
    ],
    ids=["plain", "rslora", "patterns", "patterns and rslora", "conv1d", "embedding", "targets by expression"],
)
def test_what_peft_adds(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    wanted = made(tmp_path, family, LoraConfig(r=4, lora_alpha=6, **settings))
    folder = LoraFolder(tmp_path, "mine")
    assert folder.name == "mine" and folder.base == ""
    assert all("embed_tokens.base_layer" in note for note in folder.notes)  # PEFT saves what it adapts of it
    check(folder, wanted)
    assert {folder.of(layer).rank for layer in wanted} == ({3, 4, 5} if "rank_pattern" in settings else {4})


def test_in_half_precision_and_a_pickle_as_converted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = made(tmp_path, "llama", LoraConfig(r=4, **LLAMA))
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    short = LoraFolder(tmp_path)
    first = next(iter(wanted))
    update = short.of(first)
    assert update.B.dtype == torch.float32
    assert 1e-4 < (update.whole() - wanted[first]).norm() / wanted[first].norm() < 1e-2
    (tmp_path / WEIGHTS).unlink()
    torch.save(tensors, tmp_path / PICKLED)
    with pytest.raises(UserError, match="is a pickle, which may run code") as refusal:
        LoraFolder(tmp_path)
    python, flag, program, *files = shlex.split(str(refusal.value).partition("convert it: ")[2])
    assert (python, flag) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", ["-c", *files])
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    for layer in wanted:
        assert torch.equal(LoraFolder(tmp_path).of(layer).whole(), short.of(layer).whole())


def test_adapter_names_and_what_is_no_pair(tmp_path: Path) -> None:
    """Of a state dict that was saved as it was; and modules saved whole, biases, a length that no config speaks of."""
    config = LoraConfig(r=4, modules_to_save=["lm_head"], **LLAMA)
    wanted = made(tmp_path, "llama", config, "french")
    folder = tmp_path / "french"  # so PEFT saves an adapter with a name
    tensors = load_file(folder / WEIGHTS)
    assert any("lm_head" in name for name in tensors)
    check(LoraFolder(folder), wanted)
    [note] = LoraFolder(folder).notes
    assert note == "base_model.model.lm_head.weight is left out, no part of a pair"
    named = {name.replace(".weight", ".french.weight"): t for name, t in tensors.items() if "lora_" in name}
    bias = {name.replace("lora_B.french.weight", "lora_B.french.bias"): t for name, t in named.items() if "_B" in name}
    save_file({**named, **{name: t[:, 0].clone() for name, t in bias.items()}}, folder / WEIGHTS)
    check(LoraFolder(folder), wanted)
    assert LoraFolder(folder).notes[0].startswith(f"{len(wanted)} tensors (")
    save_file({**named, **{name.replace("french", "old"): t.clone() for name, t in named.items()}}, folder / WEIGHTS)
    refused(folder, r"its file holds several adapters \(french, old\); save each in a folder of its own$")
    refused(tmp_path, rf"is no PEFT adapter, it holds no {CONFIG}; {folder} does$")


def refused(folder: Path, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        LoraFolder(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_an_identity_is_a_matrix(tmp_path: Path) -> None:
    """As runs store sums of updates: A = I, B = ΔW."""
    made(tmp_path, "llama", LoraConfig(r=24, lora_alpha=24, **LLAMA))
    tensors = {n: torch.eye(24) if "lora_A" in n else t for n, t in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    folder = LoraFolder(tmp_path)
    layer = next(iter(folder.shapes))
    assert folder.of(layer).A is None
    assert torch.equal(folder.of(layer).B, tensors[f"base_model.model.{layer}.lora_B.weight"])


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (LoraConfig(r=4, use_dora=True, **LLAMA), r"DoRA: ΔW = .* needs the base$"),
        (VeraConfig(r=4, target_modules=["q_proj", "v_proj"]), "is of the kind VERA; LoRA's updates alone can be told"),
    ],
    ids=["dora", "vera"],
)
def test_what_cannot_be_told_without_the_base(tmp_path: Path, settings: Any, why: str) -> None:
    get_peft_model(copy.deepcopy(base_model("llama")), settings).save_pretrained(str(tmp_path))
    refused(tmp_path, why)


def test_a_pair_that_began_with_a_part_of_the_weight_says_so(tmp_path: Path) -> None:
    made(tmp_path, "llama", LoraConfig(r=4, init_lora_weights="pissa", **LLAMA))
    [note] = LoraFolder(tmp_path).notes
    assert note.startswith("began with a part of the weight (init_lora_weights pissa)")


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        change(values)
        (folder / CONFIG).write_text(json.dumps(values))

    return edit


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = load_file(folder / WEIGHTS)
        change(values)
        save_file(values, folder / WEIGHTS)

    return edit


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


def pickled(value: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / PICKLED).write_bytes(pickle.dumps(value))

    return edit


def written(text: bytes, file: str = WEIGHTS) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / file).write_bytes(text)

    return edit


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (
        lambda folder: [file.unlink() for file in folder.iterdir()],
        rf"is no PEFT adapter, it holds no {CONFIG}$",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), rf"holds no {WEIGHTS}$"),
    "cut": (lambda folder: written((folder / WEIGHTS).read_bytes()[:-9])(folder), rf"{WEIGHTS}: is broken \("),
    "pointer": (written(b"version https://git-lfs.github.com/spec/v1\n"), "is a git-lfs pointer; run `git lfs pull`"),
    "no JSON": (written(b"{", CONFIG), "broken JSON"),
    "a list": (written(b"[]", CONFIG), "must be a JSON object"),
    "kind": (edited(lambda c: c.update(peft_type="PROMPT_TUNING")), "is of the kind PROMPT_TUNING"),
    "no kind": (edited(lambda c: c.pop("peft_type")), "is of the kind None"),
    "rank": (edited(lambda c: c.update(r=8)), rf"q_proj has rank 4, and 8 in {CONFIG}$"),
    "words": (edited(lambda c: c.update(lora_alpha="x")), "lora_alpha: must be a number, not x"),
    "nothing": (edited(lambda c: c.pop("lora_alpha")), "lora_alpha: must be a number, not None"),
    "not finite": (edited(lambda c: c.update(lora_alpha=float("nan"))), "broken JSON: NaN is no number"),
    "no pattern": (edited(lambda c: c.update(rank_pattern={"(": 3})), "rank_pattern: missing \\)"),
    "experts": (edited(lambda c: c.update(target_parameters=["x"])), "a pair for each expert of a layer"),
    "one factor": (tensors(lambda t: t.pop(A0)), "q_proj has lora_B alone$"),
    "shapes": (
        tensors(lambda t: t.update({A0: torch.ones(3, 24)})),
        r"q_proj has lora_A \(3, 24\) and lora_B \(24, 4\)$",
    ),
    "nan": (tensors(lambda t: t.update({A0: torch.full((4, 24), torch.nan)})), "holds values that are not finite$"),
    "no pair": (
        tensors(lambda t: (t.clear(), t.update(x=torch.ones(1)))),
        "holds no lora_A and lora_B of a linear layer$",
    ),
    "hostile": (pickled(Evil()), rf"{PICKLED} is a pickle, which may run code as it is read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_line(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, "llama", LoraConfig(r=4, **LLAMA))
    LoraFolder(tmp_path)
    (tmp_path / "README.md").unlink(missing_ok=True)
    change, why = BROKEN[case]
    change(tmp_path)
    refused(tmp_path, why)
    assert "run" not in capsys.readouterr().out


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "does not exist$")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is no folder$")


def test_layers_that_are_not_linear_are_left_out(tmp_path: Path) -> None:
    made(tmp_path, "llama", LoraConfig(r=4, **LLAMA))
    values = load_file(tmp_path / WEIGHTS)
    values["base_model.model.conv.lora_A.weight"] = torch.ones(4, 3, 2, 2)
    values["base_model.model.conv.lora_B.weight"] = torch.ones(5, 4, 1, 1)
    save_file(values, tmp_path / WEIGHTS)
    folder = LoraFolder(tmp_path)
    assert folder.notes == ["conv is no linear layer and is left out"] and "conv" not in folder.shapes
