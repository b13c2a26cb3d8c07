"""Ranks and alphas by layer: PEFT's rule, the forward, the fold, the folder, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key

from cl_runner.adapters.kind import Opening, Shape, rank_at
from cl_runner.adapters.kinds.dora import Dora
from cl_runner.adapters.kinds.lora import Lora
from cl_runner.adapters.layers import Layers
from cl_runner.adapters.patterns import decided
from cl_runner.adapters.peft_folder import load_pairs
from cl_runner.adapters.saved import Saved
from cl_runner.config.schema import AdapterConfig
from cl_runner.errors import UserError
from tests.adapters.families import (
    FAMILIES,
    adapters_of,
    base_model,
    logits,
    naive_update,
    naive_updates,
    off,
    random_pair,
    saved_as,
    with_updates,
)
from tests.adapters.test_peft_folder import plain, same_pair
from tests.command_line import SMALL, call

NAMES = ["model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "model.layers.1.mlp.up_proj", "q_proj"]
# Family → targets, patterns of ranks and of alphas; r is 2 and alpha 6, so that s is 3 elsewhere.
BY_LAYER: dict[str, dict[str, Any]] = {
    "t5": {"ranks": {r"decoder\..*": 3, "q": 1}, "alphas": {"v": 4.0}},
    "llama": {"targets": ["q_proj", "down_proj"], "ranks": {r"layers\.1\..*": 5}, "alphas": {"down_proj": 1.0}},
    "gpt2": {"targets": ["attention", "mlp"], "ranks": {"mlp.c_proj": 4, "c_proj": 1}, "alphas": {r".*h\.0\..*": 9.0}},
    "qwen2": {"ranks": {"model.layers.0.self_attn.v_proj": 7}, "alphas": {}},
}


def by_layer(family: str, **more: Any) -> tuple[Any, Layers]:
    """A base, and adapters of its copy whose layers differ in rank and scale."""
    base = base_model(family)
    return base, adapters_of(copy.deepcopy(base), family, **{**BY_LAYER[family], **more})


# The rule.


@pytest.mark.parametrize(
    "keys",
    [
        ["q_proj"], ["self_attn.q_proj"], ["layers.1.self_attn.q_proj"], [r"model\.layers\.\d\..*"],
        ["mlp.*", "q_proj"], ["model", ".*"], ["q_proj|up_proj"], [r"^q_proj$", "q_proj"], [r"layers\.1\..*", "q_proj"],
    ],
)  # fmt: skip
def test_the_first_pattern_that_matches_counts_as_in_peft(keys: list[str]) -> None:
    patterns = {key: number for number, key in enumerate(keys, 1)}
    keyed = {name: get_pattern_key(keys, name) for name in NAMES}
    if not set(keys) <= set(keyed.values()):
        with pytest.raises(UserError):
            decided("rank_pattern", patterns, NAMES)
        return
    assert decided("rank_pattern", patterns, NAMES) == {
        name: patterns[key] for name, key in keyed.items() if key in patterns
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_has_the_rank_and_the_scale_that_peft_gives_it(family: str) -> None:
    _, adapters = by_layer(family)
    adapters.begin("one", torch.Generator().manual_seed(0))
    wanted = {
        "t5": lambda t: (3, (4.0 if t.endswith("v") else 6.0) / 3) if "decoder" in t else
                        ((1, 6.0) if t.endswith("q") else (2, 2.0)),
        "llama": lambda t: (r := 5 if "layers.1" in t else 2, (1.0 if "down" in t else 6.0) / r),
        "gpt2": lambda t: (
            r := 4 if "mlp.c_proj" in t else 1 if "c_proj" in t else 2, (9.0 if "h.0" in t else 6.0) / r
        ),
        "qwen2": lambda t: (7, 6.0 / 7) if t == "model.layers.0.self_attn.v_proj" else (2, 3.0),
    }[family]  # fmt: skip
    parameters = adapters.parameters()
    for target, layer in adapters.layers.items():
        rank, scale = wanted(target)
        assert (adapters.rank_of(target), adapters.scale_of(target)) == (rank, pytest.approx(scale)), target
        assert (layer.r["default"], layer.scaling["default"]) == (rank, adapters.scale_of(target))
        A, B = parameters[f"{target}.lora_A"], parameters[f"{target}.lora_B"]
        assert len(A) == B.shape[1] == rank and A.requires_grad and not B.any()
        assert float(A.detach().abs().max()) <= A.shape[1] ** -0.5 and A.detach().unique().numel() == A.numel()
    assert len({adapters.rank_of(target) for target in adapters.layers}) > 1
    assert [rank_at(AdapterConfig(r=2), shape) for shape in adapters.shapes()] == [
        adapters.rank_of(target) for target in adapters.layers
    ]


# Forward, fold, folder.


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_fold_and_their_norm_are_those_of_a_naive_sum(family: str) -> None:
    base, adapters = by_layer(family)
    pairs = [random_pair(adapters, f"s{i}", seed=i) for i in range(3)]
    assert all(len(pair.A[t]) == adapters.rank_of(t) for pair in pairs for t in adapters.past)
    for pair in pairs[:2]:
        adapters.fold(pair)
    adapters.show(pairs[2])
    wanted = logits(with_updates(base, naive_updates(adapters, pairs)))
    assert off(logits(adapters.model), wanted) < 1e-5
    assert same_pair(adapters.pair(), pairs[2])
    naive = {target: naive_update(pairs[2], target) for target in adapters.past}
    assert adapters.update_norm() == pytest.approx(math.sqrt(sum(float(d.square().sum()) for d in naive.values())))
    assert all(off(found, naive[target]) < 1e-6 for target, found in adapters.live_update().items())
    adapters.fold_live()
    assert off(logits(adapters.model), wanted) < 1e-5 and adapters.live is None
    assert all(same_pair(a, b) for a, b in zip(adapters.folded, pairs, strict=True))
    for target, past in adapters.past.items():
        assert off(past.sum, sum(naive_update(pair, target) for pair in pairs)) < 1e-6


def test_of_a_pair_that_trains_on_the_norm_is_that_of_the_change() -> None:
    _, adapters = by_layer("t5")
    adapters.show(random_pair(adapters, "one"))
    adapters.keep_live()
    adapters.rename("two")
    before = adapters.live_update()
    for name, parameter in adapters.parameters().items():
        parameter.data += 0.1 if name.endswith("A") else -0.2
    changes = [(update - before[target]).double().square().sum() for target, update in adapters.live_update().items()]
    assert adapters.update_norm() == pytest.approx(float(sum(changes)) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("live", [False, True], ids=["folded", "folded and live"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_answers_in_plain_peft_and_reads_back_to_the_bit(tmp_path: Path, family: str, live: bool) -> None:
    base, adapters = by_layer(family)
    pairs = [random_pair(adapters, f"s{i}", seed=i) for i in range(2)]
    pair = random_pair(adapters, "now", seed=7) if live else None
    for each in pairs:
        adapters.fold(each)
    adapters.show(pair)
    saved = saved_as(tmp_path / "a", adapters, pair)
    saved = Saved.from_json(json.loads(json.dumps(saved.to_json())))
    assert off(logits(plain(copy.deepcopy(base), tmp_path / "a")), logits(adapters.model)) < 1e-5
    whole = [t for t, p in adapters.past.items()
             if (2 + live) * adapters.rank_of(t) * sum(p.base.shape) >= math.prod(p.base.shape)]  # fmt: skip
    assert list(saved.dense) == whole
    if not whole:
        assert saved.own == "adapter"
        read = load_pairs(tmp_path / "a", saved)
        assert all(same_pair(a, b) for a, b in zip(read, [*pairs, *([pair] if pair else [])], strict=True))
    told = adapters.folder_bytes(2 + live, 2, dense=False)
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert told >= size - 4000 and (live or whole or told <= size)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stage_comes_back_to_the_bit_whatever_its_folder_holds(tmp_path: Path, family: str) -> None:
    """Pairs of other scales at one layer do not read back from there: the own pair stands beside the folder."""
    base, adapters = by_layer(family)
    adapters.fold(random_pair(adapters, "s0", seed=0))
    adapters.fold(random_pair(adapters, "s1", scale=0.7, seed=1))
    adapters.show(random_pair(adapters, "s2", seed=2))
    adapters.keep_live()
    held, first = adapters.held(), adapters.folded[0]
    saved, beside = adapters.save(tmp_path / "a", "s2", held)
    assert saved.own == "state"
    again = adapters_of(copy.deepcopy(base), family, **BY_LAYER[family])
    earlier = {"s0": first, "s1": adapters.folded[1]}
    back = again.load(tmp_path / "a", "s2", saved, beside, "s2", earlier.__getitem__, {})
    again.restore(back.folded, back.kept, back.live, sums=back.sums, dense=back.dense)
    assert torch.equal(logits(again.model), logits(adapters.model))
    assert same_pair(again.kept["s2"], adapters.kept["s2"])
    assert off(logits(plain(copy.deepcopy(base), tmp_path / "a")), logits(adapters.model)) < 1e-5


def test_without_patterns_the_record_of_a_pair_is_what_it_was(tmp_path: Path) -> None:
    _, adapters = by_layer("llama", ranks={"q_proj": 2}, alphas={"q_proj": 6.0})  # what all have anyway
    adapters.fold(random_pair(adapters, "s0"))
    assert saved_as(tmp_path / "a", adapters).to_json()["pairs"] == [{"stage": "s0", "rank": 2, "scale": 3.0}]
    old = {"pairs": [{"stage": "s0", "rank": 2, "scale": 3.0}], "dense": [], "dense_stages": [], "own": "adapter"}
    assert Saved.from_json(old).to_json() == old
    assert all(not isinstance(shape, Shape) for shape in adapters.shapes())


def test_groups_are_of_equal_rank_and_grams_are_kept_by_group() -> None:
    """Letting go: only where the folder holds whole matrices and the method reads sums, at each layer's own rank."""
    _, adapters = by_layer("t5", ranks={"encoder.*q": 1, "v": 7})
    pairs = [random_pair(adapters, f"s{i}", seed=i) for i in range(13)]
    for pair in pairs:
        adapters.fold(pair)
    adapters.begin("now", torch.Generator().manual_seed(0))
    adapters.let_go({"A": "gram"})  # 13 rows of the encoder's q are fewer than its 24 dimensions
    assert all(pair.held for pair in adapters.folded)
    for pair in (random_pair(adapters, f"t{i}", seed=20 + i) for i in range(12)):
        adapters.fold(pair)
        pairs.append(pair)
    adapters.let_go({"A": "gram"})
    assert not any(pair.held for pair in adapters.folded)
    adapters.fold(last := random_pair(adapters, "last", seed=99))
    groups = adapters.groups()
    assert sorted((len(group.targets), group.A.shape[1]) for group in groups) == [(2, 1), (4, 2), (6, 7)]
    for group in groups:
        assert group.past is not None
        for at, target in enumerate(group.targets):
            wanted = sum(p.A[target].T @ p.A[target] / len(p.A[target]) for p in [*pairs, last])
            assert off(group.past.gram("A")[at], wanted) < 1e-5


# Another kind that PEFT gives ranks by layer.


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_by_layer(tmp_path: Path, family: str) -> None:
    base, own = base_model(family), dict(BY_LAYER[family])
    settings = {"rank_pattern": own.pop("ranks"), "alpha_pattern": own.pop("alphas"), "target_modules": own["targets"]}
    kind = Dora(Dora.Config(kind="dora", r=2, alpha=6.0, dropout=0.0, **settings))
    adapters: Any = kind.open(Opening(copy.deepcopy(base), "some/base", None, encoder_decoder=False))
    lora = adapters_of(copy.deepcopy(base), family, **BY_LAYER[family])
    adapters.begin("one", torch.Generator().manual_seed(0))
    dice, delta = torch.Generator().manual_seed(1), {}
    for name, parameter in adapters.parameters().items():
        if name.endswith("lora_B.weight"):
            parameter.data.normal_(std=0.3, generator=dice)
    for target, past in adapters.past.items():
        A, B = (adapters.parameters()[f"{target}.lora_{factor}.weight"].detach().double() for factor in "AB")
        assert len(A) == lora.rank_of(target) == adapters.rank_of(target)
        W = past.base.double()
        direction = W + lora.scale_of(target) * B @ A
        delta[target] = W.norm(dim=1, keepdim=True) * direction / direction.norm(dim=1, keepdim=True) - W
    wanted = logits(with_updates(base, [delta]))
    assert off(logits(adapters.model), wanted) < 1e-5
    shapes = dict(zip(adapters.past, kind.shapes(base), strict=True))
    assert kind.trained_count(shapes) == sum(p.numel() for p in adapters.parameters().values())
    adapters.keep_live()
    saved, beside = adapters.save(tmp_path / "kept", "one", adapters.held())
    assert off(logits(plain(copy.deepcopy(base), tmp_path / "kept")), wanted) < 1e-5
    again: Any = kind.open(Opening(copy.deepcopy(base), "some/base", None, encoder_decoder=False))
    back = again.load(tmp_path / "kept", "one", saved, beside, "one", lambda _: pytest.fail("no other stage"), {})
    again.restore(back.folded, back.kept, back.live, sums=back.sums, dense=back.dense)
    assert torch.equal(logits(again.model), logits(adapters.model))
    adapters.show(adapters.kept["one"])
    adapters.fold_live()
    assert off(logits(adapters.model), wanted) < 1e-5
    [pair] = adapters.folded
    assert {t: pair.rank_of(t) for t in pair.A} == {t: len(A) for t, A in pair.A.items()}
    assert all(pair.scale_of(t) == pytest.approx(lora.scale_of(t)) for t in pair.A)


# What is refused.


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"rank_pattern": {"k_proj": 4}}, "adapter.rank_pattern: 'k_proj' matches none of the .* (q_proj, v_proj)"),
        ({"alpha_pattern": {"q_proj": 4, "layers.7.*": 1}}, "adapter.alpha_pattern: 'layers.7.*' matches none of the"),
        (
            {"rank_pattern": {".*_proj": 4, "q_proj": 2}},
            "adapter.rank_pattern: all that 'q_proj' matches is matched by a pattern before it",
        ),
    ],
)
def test_a_pattern_that_decides_nothing_is_refused(patterns: dict[str, Any], message: str) -> None:
    config, found = AdapterConfig(**patterns), message.replace("(", r"\(").replace(")", r"\)")
    model = base_model("llama")
    with pytest.raises(UserError, match=f"^{found}"):
        Lora(config).shapes(model)
    with pytest.raises(UserError, match=f"^{found}"):
        Layers(model, config, name_or_path="x", encoder_decoder=False)
    with pytest.raises(UserError, match=f"^{found}"):
        Dora(Dora.Config(kind="dora", **patterns)).shapes(model)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["adapter.rank_pattern={q: 0}"], "adapter.rank_pattern must be a whole number, 1 or more, at 'q'"),
        (["adapter.rank_pattern={q: 2.5}"], "adapter.rank_pattern must be a whole number, 1 or more, at 'q'"),
        (["adapter.rank_pattern.q=true"], "adapter.rank_pattern must be a whole number, 1 or more, at 'q'"),
        (["adapter.rank_pattern=[q, v]"], "adapter.rank_pattern must be a mapping"),
        (["adapter.alpha_pattern={q: -1}"], "adapter.alpha_pattern must be a number over 0, at 'q'"),
        (["adapter.alpha_pattern={q: .inf}"], "adapter.alpha_pattern must be a number over 0, at 'q'"),
        (["adapter.alpha_pattern={'q(': 1}"], "adapter.alpha_pattern is no regular expression, at 'q('"),
        (["adapter.rank_pattern={wi: 4}"], "'wi' matches none of the layers that are adapted (q, v)"),
        (["adapter.r=auto", "adapter.rank_pattern={q: 4}"], "adapter.rank_pattern: adapter.r=auto chooses one rank"),
        (["adapter.r=auto", "adapter.alpha_pattern={q: 4}"], "adapter.alpha_pattern: adapter.r=auto chooses one rank"),
        (["adapter.kind=vera", "adapter.rank_pattern={q: 4}"], "adapter.rank_pattern: vera has no use for it"),
        (["method.train=full", "method.name=mtl", "adapter.rank_pattern={q: 4}"], "mtl trains no LoRA pair; leave"),
        (["method.name=coso", "adapter.alpha_pattern={q: 4}"], "adapter.alpha_pattern: coso trains no LoRA pair"),
        (["method.name=l2p", "adapter.rank_pattern={q: 4}"], "adapter.rank_pattern: l2p trains no LoRA pair"),
        (["method.name=pego", "adapter.rank_pattern={q: 6}"], "need a multiple of 4, not 'q: 6'"),
        (
            ["method.name=sdlora", "method.rank_decay=[4]", "adapter.rank_pattern={q: 4}"],
            "method.rank_decay: gives all layers one rank, adapter.rank_pattern not; leave one out",
        ),
        (
            ["method.name=sdlora", "method.reference=true", "adapter.alpha_pattern={q: 4}"],
            "adapter.alpha_pattern: sdlora's reference form has one α for all layers",
        ),
        (["method.name=inflora", "adapter.rank_pattern={v: 200}"], "adapter.r: 200 directions of a layer's 192 inputs"),
        (["method.name=grassmann", "adapter.rank_pattern={v: 192}"], "adapter.r: 192 rows of A span all 192 inputs"),
        (["method.name=shared-basis", "adapter.rank_pattern={v: 200}"], "adapter.r: 200 is more than the 192 rows or"),
        (
            ["method.name=seqlora", "method.reorthogonalise={how: hard}", "adapter.rank_pattern={v: 200}"],
            "method.reorthogonalise: of 200 rows in 192 dimensions not all can be orthonormal",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_loaded(tmp_path: Path, words: list[str], says: str) -> None:
    sets = [f"--set={word}" for word in words]
    result = call("train", "--order", "order1", *SMALL, *sets, "--dry-run", cwd=tmp_path)
    assert result.code == 2 and says in result.line


def test_the_order_of_patterns_is_a_setting_too(tmp_path: Path) -> None:
    """The first that matches counts: the same ones in another order are other settings."""
    (tmp_path / "one.yaml").write_text("name: one\ntasks: [agnews]\n")
    words = ("train", "--order", "one.yaml", "--method", "seqlora", *SMALL, "--name", "x")
    first = call(*words, "--set=adapter.rank_pattern={encoder.*: 2, q: 3}", cwd=tmp_path)
    assert first.code == 0, first.err
    other = call(*words, "--set=adapter.rank_pattern={q: 3, encoder.*: 2}", cwd=tmp_path)
    assert other.code == 2 and "was made with other settings (adapter.rank_pattern)" in other.line
    again = call(*words, "--set=adapter.rank_pattern={encoder.*: 2, q: 3}", cwd=tmp_path)
    assert again.code == 0 and "is done already" in again.err
