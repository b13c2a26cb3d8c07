"""A saved adapter is plain PEFT: read by PeftModel alone it answers as the whole model; pairs come back to the bit."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from cl_runner.adapters.layers import Layers
from cl_runner.adapters.pairs import Pair
from cl_runner.adapters.peft_folder import load_own_pair, load_pairs, load_sums, own_pair_tensors
from cl_runner.adapters.saved import PairOnDisk
from tests.adapters.families import FAMILIES, adapters_of, base_model, logits, naive_updates, off, random_pair, saved_as


def plain(base: Any, folder: Path) -> PeftModel:
    """The folder loaded by PEFT alone, and every weight of the file at its place in the model. Warnings are errors."""
    with warnings.catch_warnings():
        # PEFT's own call of a name that transformers deprecates: there with any adapter.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        loaded = PeftModel.from_pretrained(base, folder)
    inside = get_peft_model_state_dict(loaded, save_embedding_layers=False)  # or it asks the hub
    stored = load_file(folder / "adapter_model.safetensors")
    assert inside.keys() == stored.keys()
    assert all(torch.equal(inside[name], tensor) for name, tensor in stored.items())
    return loaded.eval()


def same_pair(a: Pair, b: Pair) -> bool:
    return (a.stage, a.rank, a.scale, a.ranks, a.scales) == (b.stage, b.rank, b.scale, b.ranks, b.scales) and all(
        x.keys() == y.keys() and all(torch.equal(x[t], y[t]) for t in x) for x, y in ((a.A, b.A), (a.B, b.B))
    )


def folded(
    family: str, ranks: Sequence[int], scales: Sequence[float | None] = (), layers: int = 2, **more: Any
) -> tuple[Any, Layers]:
    """A fresh base, and adapters around a copy of it with so many pairs folded."""
    base = base_model(family, layers)
    adapters = adapters_of(copy.deepcopy(base), family, **more)
    for i, rank in enumerate(ranks):
        adapters.fold(random_pair(adapters, f"s{i}", rank=rank, scale=scales[i] if scales else None, seed=i))
    return base, adapters


# Pairs side by side.


def test_fifteen_pairs_of_one_scale_read_back_to_the_bit(tmp_path: Path) -> None:
    _, adapters = folded("llama", [1] * 11)
    state = saved_as(tmp_path / "a", adapters)
    assert state.pairs == tuple(PairOnDisk(f"s{i}", 1, 3.0) for i in range(11))
    assert (state.own, state.dense, state.dense_stages) == ("adapter", (), ())
    read = load_pairs(tmp_path / "a", state)
    assert len(read) == 11 and all(same_pair(a, b) for a, b in zip(read, adapters.folded, strict=True))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (11, 33)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for target in adapters.past:
        prefix = f"base_model.model.{target}"
        assert torch.equal(stored[f"{prefix}.lora_A.weight"], torch.cat([p.A[target] for p in adapters.folded]))
        assert torch.equal(stored[f"{prefix}.lora_B.weight"], torch.cat([p.B[target] for p in adapters.folded], 1))


@pytest.mark.parametrize(
    ("scales", "own"),
    [([0.1, 0.1, 0.1], "adapter"), ([2.0, 4.0, 0.25], "adapter"), ([4.0, 3.0, 0.7], "state")],
    ids=["one", "powers of two", "any"],
)
def test_other_ranks_and_scales_answer_right_and_say_whether_they_read_back(
    tmp_path: Path, scales: list[float | None], own: str
) -> None:
    base, adapters = folded("llama", [2, 3, 1], scales)
    state = saved_as(tmp_path / "a", adapters)
    assert [(p.rank, p.scale) for p in state.pairs] == list(zip([2, 3, 1], scales, strict=True))
    assert state.own == own and state.dense == ()
    read = load_pairs(tmp_path / "a", state)
    exact = all(same_pair(a, b) for a, b in zip(read, adapters.folded, strict=True))
    assert exact == (own == "adapter")
    assert off(logits(plain(base, tmp_path / "a")), logits(adapters.model)) < 1e-5


def test_an_own_pair_in_the_state_comes_back_to_the_bit() -> None:
    _, adapters = folded("qwen2", [3], [0.3])
    tensors = own_pair_tensors(adapters.folded[0])
    assert all(name.startswith("own.") for name in tensors)
    mixed = {**tensors, "method.own.x.A": torch.ones(1)}
    assert same_pair(load_own_pair(mixed, PairOnDisk("s0", 3, 0.3)), adapters.folded[0])


# Dense.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("live", [False, True], ids=["folded", "folded and live"])
@pytest.mark.parametrize("rank", [2, 9], ids=["pairs", "dense"])
def test_plain_peft_on_a_fresh_base_answers_like_the_model(tmp_path: Path, family: str, live: bool, rank: int) -> None:
    base, adapters = folded(family, [rank, rank])
    pair = random_pair(adapters, "now", seed=7) if live else None
    adapters.show(pair)
    state = saved_as(tmp_path / "a", adapters, pair)
    assert [p.stage for p in state.pairs] == ["s0", "s1", *(["now"] if live else [])]
    assert state.own == ("adapter" if rank == 2 else "state")
    shapes = {target: tuple(past.base.shape) for target, past in adapters.past.items()}
    total = 2 * rank + (2 if live else 0)
    assert list(state.dense) == [t for t, (m, n) in shapes.items() if total * (m + n) >= m * n]
    # 24 × 24 turns dense at rank 12, 12 × 24 at 8, 72 × 24 at 18.
    assert len(state.dense) == (0 if rank == 2 else len(shapes))
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for target in state.dense:
        A, B = (stored[f"base_model.model.{target}.lora_{f}.weight"] for f in "AB")
        assert torch.equal(A, torch.eye(shapes[target][1])) and B.shape == shapes[target]
        if not live:
            assert torch.equal(B, adapters.past[target].sum)
        naive = sum(u[target] for u in naive_updates(adapters, [*adapters.folded, *([pair] if pair else [])]))
        assert off(B, naive) < 1e-6
    wanted = logits(adapters.model)
    assert off(logits(base), wanted) > 0.01
    assert off(logits(plain(base, tmp_path / "a")), wanted) < 1e-5


def test_some_targets_dense_and_some_not(tmp_path: Path) -> None:
    """Qwen2's value (12 × 24) turns dense at rank 8, its query (24 × 24) at 12: at 9 the folder holds both forms."""
    base, adapters = folded("qwen2", [4, 5], layers=12)
    state = saved_as(tmp_path / "a", adapters)
    assert len(state.dense) == 12 and all(target.endswith("v_proj") for target in state.dense)
    loaded = plain(base, tmp_path / "a")
    for target, past in adapters.past.items():
        layer = loaded.base_model.model.get_submodule(target)
        dense = target in state.dense
        assert (layer.r["default"], layer.scaling["default"]) == ((24, 1.0) if dense else (9, 3.0))
        assert off(layer.get_delta_weight("default"), past.sum) < 1e-6
    assert off(logits(loaded), logits(adapters.model)) < 1e-5


class Named(nn.Module):
    """Linear layers of unequal size whose names end, begin or read like one another."""

    SIZES: ClassVar = {
        "layers.1.q": 6, "layers.11.q": 24, "layers.21.q": 24, "encoder.layers.1.q": 24, "layersx1.q": 24,
        "encoder.layers.11.q": 6,
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig()
        for name, size in self.SIZES.items():
            module: nn.Module = self
            *parents, last = name.split(".")
            for part in parents:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.add_module(last, nn.Linear(size, size))

    def prepare_inputs_for_generation(self) -> None: ...


def test_patterns_hit_the_layer_they_name_and_no_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Named()
    adapters = adapters_of(copy.deepcopy(base), targets=["q"])
    assert set(adapters.past) == set(Named.SIZES)
    for i in range(2):
        adapters.fold(random_pair(adapters, f"s{i}", seed=i))
    state = saved_as(tmp_path / "a", adapters)
    assert sorted(state.dense) == sorted(target for target, size in Named.SIZES.items() if size == 6)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {r"^layers\.1\.q$": 6, r"^encoder\.layers\.11\.q$": 6} == config["alpha_pattern"]
    loaded = plain(base, tmp_path / "a")
    for target, past in adapters.past.items():
        layer = loaded.base_model.model.get_submodule(target)
        assert off(layer.get_delta_weight("default"), past.sum) < 1e-6


@pytest.mark.parametrize("rank", [1, 8, 20])
def test_a_lone_pair_stays_a_pair_however_large(tmp_path: Path, rank: int) -> None:
    """It could only be stored beside its own matrix."""
    base, adapters = folded("qwen2", [])
    pair = random_pair(adapters, "only", rank=rank)
    state = saved_as(tmp_path / "live", adapters, pair)
    adapters.fold(pair)
    assert saved_as(tmp_path / "folded", adapters) == state
    assert (state.dense, state.own) == ((), "adapter")
    for name in ("live", "folded"):
        (read,) = load_pairs(tmp_path / name, state)
        assert same_pair(read, pair)
    assert off(logits(plain(base, tmp_path / "live")), logits(adapters.model)) < 1e-5


@pytest.mark.parametrize("after", [False, True], ids=["as the last", "before another pair"])
def test_an_update_without_factors_is_dense_however_small(tmp_path: Path, after: bool) -> None:
    base, adapters = folded("gpt2", [1])
    update = {t: torch.randn(past.base.shape) * 0.1 for t, past in adapters.past.items()}
    adapters.fold_dense("merge", update)
    if after:
        adapters.fold(random_pair(adapters, "s2", rank=1, seed=2))
    state = saved_as(tmp_path / "a", adapters)
    assert state.dense == tuple(adapters.past) and state.dense_stages == ("merge",) and state.own == "state"
    assert [p.stage for p in state.pairs] == (["s0", "s2"] if after else ["s0"])
    sums = load_sums(tmp_path / "a", state.dense)
    assert all(torch.equal(sums[t], past.sum) for t, past in adapters.past.items())
    assert off(logits(plain(base, tmp_path / "a")), logits(adapters.model)) < 1e-5


# The files.


def test_the_files_are_what_other_tools_expect(tmp_path: Path) -> None:
    for family in ("t5", "gpt2"):
        _, adapters = folded(family, [2], name_or_path="google/some-base")
        saved_as(tmp_path / family, adapters)
        assert sorted(f.name for f in (tmp_path / family).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        config = json.loads((tmp_path / family / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "google/some-base"
        assert config["task_type"] == ("SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM")
        assert config["fan_in_fan_out"] == (family == "gpt2")
        assert config["target_modules"] == (["q", "v"] if family == "t5" else ["c_attn"])
        assert (config["bias"], config["lora_dropout"], config["use_rslora"]) == ("none", 0.0, False)
        assert config["inference_mode"] is True and isinstance(config["lora_alpha"], int)
        with safe_open(tmp_path / family / "adapter_model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118


def test_the_order_of_targets_in_the_file_is_not_by_chance(tmp_path: Path) -> None:
    _, adapters = folded("t5", [1], targets=["wo", "v", "k", "q", "o", "wi"])
    saved_as(tmp_path / "a", adapters)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k", "o", "q", "v", "wi", "wo"]


FRESH = """
import sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
sys.modules["cl_runner"] = None
import torch
from peft import AutoPeftModelForSeq2SeqLM
from safetensors.torch import load_file, save_file
model = AutoPeftModelForSeq2SeqLM.from_pretrained(sys.argv[1]).eval()
ids = load_file(sys.argv[2])
with torch.no_grad():
    logits = model(input_ids=ids["ids"], decoder_input_ids=ids["decoder"], use_cache=False).logits
save_file({"logits": logits.contiguous()}, sys.argv[3])
"""


@pytest.mark.slow
def test_a_fresh_process_without_us_finds_base_and_adapter(tmp_path: Path) -> None:
    """Half of the targets dense: T5 with feed-forward layers in, whose shapes differ from the attention's."""
    base = base_model("t5")
    base.save_pretrained(tmp_path / "base")
    adapters = adapters_of(base, name_or_path=str(tmp_path / "base"), targets=["q", "v", "wi", "wo"])
    for i in range(2):
        adapters.fold(random_pair(adapters, f"s{i}", rank=6, seed=i))
    state = saved_as(tmp_path / "stage" / "adapter", adapters)
    assert 0 < len(state.dense) < len(adapters.past)
    dice = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 48, (2, 6), generator=dice)
    with torch.no_grad():
        wanted = adapters.model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits
    from safetensors.torch import save_file

    save_file({"ids": ids, "decoder": ids.clone()}, tmp_path / "ids.safetensors")
    files = [str(tmp_path / name) for name in ("stage/adapter", "ids.safetensors", "logits.safetensors")]
    done = subprocess.run([sys.executable, "-c", FRESH, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert off(load_file(files[-1])["logits"], wanted) < 1e-5


@pytest.mark.parametrize("revision", [None, "v1.0"])
def test_the_bases_revision_is_named(tmp_path: Path, revision: str | None) -> None:
    adapters = adapters_of(base_model("t5"), revision=revision)
    adapters.fold(random_pair(adapters, "one"))
    saved_as(tmp_path / "a", adapters)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["revision"] == revision
