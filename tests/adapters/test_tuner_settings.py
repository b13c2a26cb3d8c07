"""Settings of kinds: what is refused, and before any weight is read; what is counted, against what papers print."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from cl_runner.adapters.kind import Shapes
from cl_runner.errors import UserError
from cl_runner.registry import KINDS
from tests.adapters.families import base_model
from tests.adapters.tuners import SETTINGS, tuner
from tests.command_line import NANO, call
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
    found = tuner("ia3", "llama", **own).layers(layers("llama"))
    assert {name.rsplit(".", 1)[-1] for name in found} == {"k_proj", "v_proj", "down_proj"}
    with pytest.raises(
        UserError, match=r"ia3 scales what a layer gives, the bias too, .*this model's .*q_proj has one"
    ):
        tuner("ia3", **own).layers(layers("qwen2"))
    assert len(tuner("ia3", target_modules=["down_proj", "o_proj"]).layers(layers("qwen2"))) == 2
    model = layers("t5")
    model.config.model_type = "nobody's"
    with pytest.raises(UserError, match=r"adapter.target_modules: cannot tell keys, values .* of a nobody's"):
        tuner("ia3", **own).layers(model)


# What papers print.


def attention(blocks: int, d: int, names: tuple[str, ...] = ("query", "value")) -> Shapes:
    return {f"{block}.{name}": (d, d) for block in range(blocks) for name in names}


def llama(blocks: int, d: int, inner: int, names: str = "qkvogud", keys: int | None = None) -> Shapes:
    of = {"q": (d, d), "k": (keys or d, d), "v": (keys or d, d), "o": (d, d), "g": (inner, d), "u": (inner, d)}
    return {f"{block}.{name}": {**of, "d": (d, inner)}[name] for block in range(blocks) for name in names}


def t5(blocks: int, d: int, inner: int, heads: int) -> Shapes:
    """Keys, values and the second layers of feed-forward blocks."""
    found: dict[str, tuple[int, int]] = {}
    for block in range(blocks):
        for part in ("encoder", "decoder", "cross"):
            found.update({f"{part}.{block}.{name}": (heads, d) for name in "kv"})
        found.update({f"{side}.{block}.wo": (d, inner) for side in ("encoder", "decoder")})
    return found


def everything(blocks: int, d: int) -> Shapes:
    """All linear layers of a RoBERTa."""
    inner = {"up": (4 * d, d), "down": (d, 4 * d)}
    shapes = {f"{block}.{name}": shape for block in range(blocks) for name, shape in inner.items()}
    return attention(blocks, d, ("query", "key", "value", "out")) | shapes


BASE, LARGE, GPT2 = attention(12, 768), attention(24, 1024), attention(24, 1024)
LLAMA = llama(32, 4096, 11008)


@pytest.mark.parametrize(
    ("kind", "settings", "shapes", "printed"),
    [
        # 2310.11454, tables 1 to 4
        ("vera", {"r": 1}, BASE, 18.4e3),
        ("vera", {"r": 256}, BASE, 24.5e3),
        ("vera", {"r": 1024}, BASE, 0.043e6),
        ("vera", {"r": 1}, LARGE, 49.2e3),
        ("vera", {"r": 256}, LARGE, 61.4e3),
        ("vera", {"r": 1024}, GPT2, 0.098e6),
        ("vera", {"r": 1024}, LLAMA, 1.6e6),
        # 2405.03003, table 1
        ("fourierft", {"frequencies": 1000}, BASE, 24e3),
        ("fourierft", {"frequencies": 1000}, LARGE, 48e3),
        ("fourierft", {"frequencies": 1000}, llama(32, 4096, 11008, "qv"), 64e3),
        # 2402.09353, table 15: percent of LLaMA-7B
        *(
            ("dora", {"r": r}, llama(32, 4096, 11008, "qkvud"), share * 67.38e6)
            for r, share in ((16, 0.43), (32, 0.84))
        ),
        # 2405.17484, figure 1: percent of LLaMA-2 7B
        *(("hra", {"r": r}, llama(32, 4096, 11008, "qv"), share * 67.38e6) for r, share in ((16, 0.062), (32, 0.12))),
        # 2506.19847, table 11: Qwen2.5 1.5B and 7B
        ("oft", {"block_size": 32}, llama(28, 1536, 8960, keys=256), 7.89e6),
        ("oft", {"block_size": 32}, llama(28, 3584, 18944, keys=512), 17.55e6),
        # 2405.17604: RoBERTa large, four kinds of layers
        ("lora-xs", {"r": 16}, attention(24, 1024, ("query", "value", "out", "ff")), 24.6e3),
        ("lora-xs", {"r": 25}, attention(24, 1024, ("query", "value", "out", "ff")), 60e3),
        # 2205.05638: 4.2 MB for T0 of 11 B
        ("ia3", {}, t5(24, 4096, 10240, 4096), 4.2e6 / 4),
    ],
)
def test_what_trains_is_as_many_as_its_paper_prints(
    kind: str, settings: dict[str, Any], shapes: Shapes, printed: float
) -> None:
    assert tuner(kind, **settings).trained_count(shapes) == pytest.approx(printed, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "shapes", "printed"),
    [
        # 2405.15179, section 3.4: h b + 3 L M r d/b, and table 1 of all linear layers
        ({"vectors": 90}, LARGE, 90 * 256 + 3 * 24 * 2 * 4 * 4),
        ({"vectors": 90}, everything(12, 768), 0.027e6),
        ({"vectors": 90}, everything(24, 1024), 0.033e6),
        # Numbers of more than 255 vectors take two bytes, and more than 32767 four, in PEFT's folders.
        ({"vectors": 255}, LARGE, 255 * 256 + 1536 * (2 * 0.25 + 1)),
        ({"vectors": 256}, LARGE, 256 * 256 + 1536 * (2 * 0.5 + 1)),
        ({"vectors": 40000}, LARGE, 40000 * 256 + 1536 * (2 + 1)),
        ({"vectors": 90, "topk": 3}, LARGE, 90 * 256 + 1536 * (3 * 0.25 + 2)),
    ],
)
def test_what_vblora_stores_is_as_much_as_its_paper_counts(
    settings: dict[str, Any], shapes: Shapes, printed: float
) -> None:
    kind = tuner("vblora", **{"r": 4, "vector_length": 256, "topk": 2, **settings})
    assert kind.stored_count(shapes) == pytest.approx(printed, rel=0.02 if printed < 34000 else 1e-9)
    pieces = sum(4 * (m + n) // 256 for m, n in shapes.values())
    assert kind.trained_count(shapes) == settings["vectors"] * (256 + pieces)


def test_ogd_counts_what_trains_and_not_a_pair(room: Path) -> None:
    """More directions than parameters leave nothing to learn in: refused before weights are loaded."""
    words = ("train", *NANO, "--model", "model/tiny-t5", *ORDER, "--method", "ogd", "--set=method.vectors=500")
    words = (*words, "--dry-run")
    result = call(*words, "--set=adapter.kind=ia3", cwd=room)
    # Keys and values of three attentions, and the inner features of two feed-forward blocks.
    assert result.code == 2 and f"of only {6 * 192 + 2 * 96} trained parameters" in result.line
    result = call(*words, "--set=adapter.kind=fourierft", "--set=adapter.frequencies=300", cwd=room)
    assert result.code == 0 and f"500 directions of {6 * 300} parameters" in result.out + result.err
