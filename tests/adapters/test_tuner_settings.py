"""Settings of kinds: what is refused, and before any weight is read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from cl_runner.errors import UserError
from cl_runner.registry import KINDS
from tests.adapters.families import base_model
from tests.adapters.tuners import SETTINGS, tuner
from tests.command_line import NANO, call
from tests.families import FAMILIES
from tests.nano import nano_t5

ORDER = ("--order", "three.yaml")


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A folder with an order, and a model whose file of weights has none."""
    (tmp_path / "three.yaml").write_text("name: three\ntasks: [dbpedia, amazon, agnews]\n")
    shutil.copytree(nano_t5(), tmp_path / "model" / "tiny-t5", ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({"none": torch.zeros(1)}, tmp_path / "model" / "tiny-t5" / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ("kind=vblora", "vector_length=256"),
            "adapter.vector_length: 256 does not divide the layers' widths (192); 64, 96, 192 would",
        ),
        (("kind=vblora", "vector_length=7"), "adapter.vector_length: 7 does not divide"),
        (("kind=vblora", "vector_length=48", "target_modules=[wi]"), ""),
        (("kind=vblora", "vector_length=64", "target_modules=[wi]"), "widths (96, 192); 32, 48, 96 would"),
        (("kind=oft", "block_size=5"), "adapter.block_size: 5 does not divide the layers' widths (192); 4, 6, 8 would"),
        (("kind=boft", "block_size=1000"), "adapter.block_size: 1000 does not divide"),
        (("kind=fourierft", "frequencies=40000"), "adapter.frequencies: 40000, and a layer has 36864 entries in all"),
        (("kind=lora-xs", "r=193"), "adapter.r: 193 singular vectors, and a layer has 192"),
        (("kind=ia3", "target_modules=[qq]"), "the model has no layer 'qq'; did you mean 'q'?"),
        (("kind=dora", "target_modules=[shared]"), "'shared' is no linear layer"),
    ],
)
def test_what_layers_cannot_take_is_refused_before_weights_are_loaded(
    settings: tuple[str, ...], says: str, room: Path
) -> None:
    sets = [f"--set=adapter.{setting}" for setting in settings]
    words = ("train", *NANO, "--model", "model/tiny-t5", *ORDER, "--method", "inclora", *sets)
    for dry in (("--dry-run",), ()) if says else (("--dry-run",),):
        result = call(*words, *dry, cwd=room)
        assert (result.code, says in result.err) == (2 if says else 0, True), result.err
        assert not says or says in result.line
    assert not (room / "runs").exists()
    if not says:
        assert "its weights lack" in call(*words, cwd=room).err


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("kind=vera", "r=auto"), "adapter.r must be a whole number, 1 or more"),
        (("kind=lora", "target_modules=[]"), "adapter.target_modules names no layer; leave it out"),
        (("kind=dora", "r=0"), "adapter.r must be a whole number, 1 or more"),
        (("kind=ia3", "r=auto"), "adapter.r: ia3 has no use for it; leave it out"),
        (("kind=vera", "alpha=16"), "adapter.alpha: vera has no use for it; leave it out"),
        (("kind=lokr", "dropout=0.5"), "adapter.dropout: lokr has no use for it; leave it out"),
        (("kind=dora", "dropout_past=true"), "adapter.dropout_past: dora has no use for it; leave it out"),
        (("kind=hra", "r=3"), "adapter.r must be an even number"),
        (("kind=lokr", "factor=0"), "adapter.factor must be at least 1, or -1"),
        (("kind=vblora", "topk=300"), "adapter.topk is more than the 256 vectors there are"),
        (("kind=oft", "cayley=mostly"), "adapter.cayley must be one of neumann, exact"),
        (("kind=vera", "lr_ratio=0"), "adapter.lr_ratio must be more than 0"),
        (("kind=vera", "lr_ration=2"), "adapter.lr_ration is not a setting of vera; did you mean 'lr_ratio'?"),
        (("lr_ratio=2",), "adapter.lr_ratio is not a setting"),
    ],
)
def test_a_setting_that_a_kind_has_not_or_cannot_have_is_refused(
    settings: tuple[str, ...], says: str, room: Path
) -> None:
    sets = [f"--set=adapter.{setting}" for setting in settings]
    result = call("train", *NANO, *ORDER, "--method", "inclora", *sets, "--dry-run", cwd=room)
    assert result.code == 2 and f"--set adapter.{settings[-1]}" in result.line and says in result.line


@pytest.mark.parametrize(
    ("kind", "of_preset", "others"),
    [
        ("dora", {"r", "alpha"}, {"energy", "max_r", "dropout_past"}),
        ("vera", set(), {"alpha"}),
        ("randlora", set(), {"energy"}),
        ("loha", {"r"}, {"dropout"}),
        ("ia3", set(), {"r", "alpha", "dropout"}),
    ],
)
def test_a_presets_values_for_lora_count_where_they_mean_the_same(
    kind: str, of_preset: set[str], others: set[str], room: Path
) -> None:
    """The tiny preset has r and alpha for LoRA; a kind's own default stands; what it has no use for is not there."""
    words = ("config", "show", *NANO, *ORDER, "--method", "seqlora", "--set", f"adapter.kind={kind}")
    shown = call(*words, cwd=room).out
    settings = yaml.safe_load(shown)["adapter"]
    lines = {line.split(":")[0].strip(): line.split("#")[1].strip() for line in shown.splitlines() if "#" in line}
    assert {name for name in settings if lines[name] == "preset tiny"} == of_preset
    assert not others & set(settings)
    default = KINDS.get(kind).Config()
    assert all(settings[name] == getattr(default, name) for name in {"r", "alpha"} & set(settings) - of_preset)


def test_a_preset_may_have_values_by_kind(room: Path) -> None:
    (room / "mine.yaml").write_text("adapter: {r: 3, dropout: 0.2}\nadapters: {vera: {r: 17}, boft: {alpha: 3}}\n")
    words = ("config", "show", *NANO, "--preset", "mine.yaml", *ORDER, "--method", "seqlora", "--set")
    settings = yaml.safe_load(call(*words, "adapter.kind=vera", cwd=room).out)["adapter"]
    assert (settings["r"], settings["dropout"]) == (17, 0.2)
    assert yaml.safe_load(call(*words, "adapter.kind=dora", cwd=room).out)["adapter"]["r"] == 3
    assert "mine.yaml:2:34: adapter.alpha: boft has no use for it" in call(*words, "adapter.kind=boft", cwd=room).line


@pytest.mark.parametrize("kind", SETTINGS)
def test_each_setting_says_what_it_is_and_is_read_back(kind: str) -> None:
    config = tuner(kind).config
    assert all(field.description for field in type(config).model_fields.values())
    shown = config.model_dump(mode="json")
    assert not type(config).unused & set(shown) and {"kind", "lr_ratio", "target_modules"} <= set(shown)
    assert type(config).unused <= set(type(config).model_fields)
    assert type(config).model_validate(shown) == config
    assert KINDS.get(kind).equation and KINDS.get(kind).paper


def layers(family: str) -> Any:
    """One of the family by its config alone, as a plan has it."""
    with torch.device("meta"):
        return type(base_model(family, layers=1))(base_model(family, layers=1).config)


@pytest.mark.parametrize("kind", SETTINGS)
def test_conv1d_is_refused_where_the_kinds_layer_cannot_stand_in_for_it(kind: str) -> None:
    model = layers("gpt2")
    if KINDS.get(kind).takes_conv1d:  # type: ignore[attr-defined]
        assert list(tuner(kind, "gpt2").layers(model).values()) == [(72, 24), (96, 24)]
    else:
        with pytest.raises(UserError, match=rf"adapter.kind: {kind} cannot adapt a Conv1D, which this model's .*c_"):
            tuner(kind, "gpt2").layers(model)


def test_ia3_names_layers_by_family_and_refuses_what_no_update_can_be() -> None:
    """A bias that is scaled too, or a family whose keys, values and feed-forward blocks are not known."""
    own = {"target_modules": None}
    assert {name.rsplit(".", 1)[-1] for name in tuner("ia3", **own).layers(layers("t5"))} == {"k", "v", "wo"}
    for family in ("LLaMA 2", "Gemma", "Qwen 3"):  # of the last two PEFT takes queries for keys
        found = tuner("ia3", "llama", **own).layers(FAMILIES[family].model())
        assert {name.rsplit(".", 1)[-1] for name in found} == {"k_proj", "v_proj", "down_proj"}
    assert {name.rsplit(".", 1)[-1] for name in found} == {"k_proj", "v_proj", "down_proj"}
    with pytest.raises(
        UserError, match=r"ia3 scales what a layer gives, the bias too, .*this model's .*k_proj has one"
    ):
        tuner("ia3", **own).layers(layers("qwen2"))
    assert len(tuner("ia3", target_modules=["down_proj", "o_proj"]).layers(layers("qwen2"))) == 2
    model = layers("t5")
    model.config.model_type = "nobody's"
    with pytest.raises(UserError, match=r"adapter.target_modules: cannot tell keys, values .* of a nobody's"):
        tuner("ia3", **own).layers(model)


def test_ogd_counts_what_trains_and_not_a_pair(room: Path) -> None:
    """More directions than parameters leave nothing to learn in: refused before weights are loaded."""
    words = ("train", *NANO, "--model", "model/tiny-t5", *ORDER, "--method", "ogd", "--set=method.vectors=500")
    words = (*words, "--dry-run")
    result = call(*words, "--set=adapter.kind=ia3", cwd=room)
    # Keys and values of three attentions, and the inner features of two feed-forward blocks.
    assert result.code == 2 and f"of only {6 * 192 + 2 * 96} trained parameters" in result.line
    result = call(*words, "--set=adapter.kind=fourierft", "--set=adapter.frequencies=300", cwd=room)
    assert result.code == 0 and f"500 directions of {6 * 300} parameters" in result.out + result.err
