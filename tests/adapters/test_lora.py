"""The live pair, which layers take one, and the factor groups that methods see."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from cl_runner.adapters.layers import Layers
from cl_runner.adapters.pairs import Pair
from cl_runner.adapters.targets import default_targets
from cl_runner.errors import UserError
from tests.adapters.families import (
    FAMILIES,
    TARGETS,
    adapters_of,
    base_model,
    logits,
    naive_updates,
    off,
    random_pair,
    with_updates,
)

BF16 = torch.bfloat16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The live pair.


def test_a_new_pair_is_kaiming_uniform_from_the_generator_and_changes_nothing() -> None:
    base = base_model("t5")
    before = logits(base)
    adapters = adapters_of(base, r=8)
    adapters.begin("one", generator(5))
    assert torch.equal(logits(adapters.model), before)
    pair = adapters.pair()
    assert pair.stage == adapters.live == "one" and (pair.rank, pair.scale) == (8, 0.75)
    A = torch.stack(list(pair.A.values()))
    n = A.shape[-1]
    # kaiming_uniform(a=√5) is uniform within ±1/√n: mean 0, variance 1/3n.
    assert float(A.abs().max()) <= n**-0.5
    assert float(A.abs().max()) > 0.99 * n**-0.5
    assert float(A.var()) == pytest.approx(1 / (3 * n), rel=0.1)
    assert len({tuple(a.flatten().tolist()) for a in pair.A.values()}) == len(pair.A)
    assert all(not b.any() for b in pair.B.values())
    adapters.begin("two", generator(5))
    assert all(torch.equal(a, pair.A[t]) for t, a in adapters.pair().A.items())
    adapters.begin("two", generator(6))
    assert not any(torch.equal(a, pair.A[t]) for t, a in adapters.pair().A.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_live_pair_trains_and_in_fp32(family: str) -> None:
    adapters = adapters_of(base_model(family).to(BF16), family)
    assert not any(p.requires_grad for p in adapters.model.parameters())
    adapters.begin("one", generator())
    training = {id(p) for p in adapters.model.parameters() if p.requires_grad}
    assert training == {id(p) for p in adapters.parameters().values()}
    assert list(adapters.parameters()) == [f"{t}.lora_{f}" for t in adapters.layers for f in "AB"]
    assert {p.dtype for p in adapters.parameters().values()} == {torch.float32}
    adapters.train(False)
    assert not any(p.requires_grad for p in adapters.model.parameters())


def test_a_pair_is_a_copy_and_shows_again_to_the_bit() -> None:
    adapters = adapters_of(base_model("t5"))
    base = logits(adapters.model)
    shown = random_pair(adapters, "one")
    adapters.show(shown)
    answers = logits(adapters.model)
    taken = adapters.pair()
    adapters.show(None)
    assert adapters.live is None and torch.equal(logits(adapters.model), base) and not torch.equal(base, answers)
    assert all(torch.equal(taken.A[t], shown.A[t]) and torch.equal(taken.B[t], shown.B[t]) for t in adapters.layers)
    adapters.show(taken)
    assert adapters.live == "one" and torch.equal(logits(adapters.model), answers)


def test_kept_pairs_answer_by_name_and_renaming_moves_the_pair_on() -> None:
    adapters = adapters_of(base_model("t5"))
    adapters.show(random_pair(adapters, "one"))
    adapters.keep_live()
    adapters.rename("two")
    assert adapters.live == "two" and adapters.kept == {}
    assert adapters.update_norm() == pytest.approx(0, abs=1e-6)
    before = adapters.live_update()
    for name, parameter in adapters.parameters().items():
        parameter.data += 0.1 if name.endswith("A") else -0.2
    changes = [(update - before[target]).double().square().sum() for target, update in adapters.live_update().items()]
    assert adapters.update_norm() == pytest.approx(float(sum(changes)) ** 0.5, rel=1e-4)  # what "two" has learned
    adapters.keep_live()
    assert list(adapters.kept) == ["two"] and adapters.kept["two"].stage == "two"
    assert adapters.folded == [] and all(past.sum is None for past in adapters.past.values())


@pytest.mark.parametrize("family", ["t5", "qwen2"])
def test_restore_puts_folded_kept_and_live_back(family: str) -> None:
    base = base_model(family)
    plain = copy.deepcopy(base)
    adapters = adapters_of(base, family)
    pairs = [random_pair(adapters, f"s{i}", seed=i) for i in range(4)]
    adapters.fold(random_pair(adapters, "other", seed=9))
    adapters.restore(pairs[:2], {"s2": pairs[2], "s3": pairs[3]}, "s3")
    assert adapters.live == "s3" and list(adapters.kept) == ["s2", "s3"] and adapters.folded == pairs[:2]
    wanted = with_updates(plain, naive_updates(adapters, [pairs[0], pairs[1], pairs[3]]))
    assert off(logits(adapters.model), logits(wanted)) < 1e-5


# An update without factors.


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_dense_update_is_folded_in_place_of_the_live_pair(family: str) -> None:
    base = base_model(family)
    plain = copy.deepcopy(base)
    adapters = adapters_of(base, family)
    first, live = random_pair(adapters, "s0", seed=0), random_pair(adapters, "s1", seed=1)
    adapters.fold(first)
    adapters.show(live)
    naive = naive_updates(adapters, [first, live])
    found = adapters.live_update()
    assert all(off(found[t], naive[1][t]) < 1e-6 and found[t].dtype == torch.float32 for t in adapters.past)
    dense = {t: torch.where(d.abs() > d.abs().median(), d, 0.0).float() for t, d in naive[1].items()}
    adapters.fold_dense("s1", dense)
    assert adapters.live is None and adapters.dense == ["s1"] and adapters.folded == [first]
    assert off(logits(adapters.model), logits(with_updates(plain, [naive[0], dense]))) < 1e-5
    sums = {t: past.sum.clone() for t, past in adapters.past.items()}
    answers = logits(adapters.model)
    adapters.restore([], {}, None)
    adapters.restore([first], {}, None, sums=sums, dense=["s1"])
    assert torch.equal(logits(adapters.model), answers) and adapters.dense == ["s1"]


# Which layers.


@pytest.mark.parametrize("family", FAMILIES)
def test_query_and_value_by_default(family: str) -> None:
    adapters = adapters_of(base_model(family), family)
    assert sorted(adapters.target_modules) == TARGETS[family]
    assert {target.rsplit(".", 1)[-1] for target in adapters.layers} == set(TARGETS[family])
    # T5: two layers, in the decoder twice (self and cross); the others have two layers.
    assert len(adapters.layers) == {"t5": 12, "gpt2": 2}.get(family, 4)


def test_a_family_that_peft_does_not_know_is_looked_at() -> None:
    class Unknown(torch.nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            self.attention = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in names})

    assert default_targets(Unknown("query", "key", "value")) == ["query", "value"]
    assert default_targets(Unknown("c_attn", "c_proj")) == ["c_attn"]
    with pytest.raises(UserError, match=r"adapter.target_modules: cannot tell query and value .*name the layers"):
        default_targets(Unknown("left", "right"))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q", "query"], r"the model has no layer 'query' \(there are .*q, v.*, and the sets qv, attention, mlp, .*\)"),
        (["all_linear"], r"the model has no layer 'all_linear'; did you mean 'all-linear'\?"),
        (["wii"], r"the model has no layer 'wii'; did you mean 'wi'\?"),
        (["q", "shared"], "'shared' is no linear layer"),
        (["SelfAttention"], "'SelfAttention' is no linear layer"),
        (["lm_head"], "'lm_head' shares its weight with decoder.embed_tokens, .* leave it out"),
    ],
)
def test_targets_that_cannot_work_are_refused_by_name(targets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=rf"^adapter.target_modules: {message}"):
        adapters_of(base_model("t5"), targets=targets)


def test_an_untied_head_is_a_target_like_any_other_also_beside_conv1d() -> None:
    """GPT-2's layers are stored in by out, its head out by in: each is folded the right way round."""
    base = base_model("gpt2", tie_word_embeddings=False)
    plain = copy.deepcopy(base)
    adapters = adapters_of(base, "gpt2", targets=["attn.c_proj", "lm_head"])
    assert [past.transposed for past in adapters.past.values()] == [True, True, False]
    pairs = [random_pair(adapters, f"s{i}", seed=i) for i in range(2)]
    adapters.fold(pairs[0])
    adapters.show(pairs[1])
    assert off(logits(adapters.model), logits(with_updates(plain, naive_updates(adapters, pairs)))) < 1e-5


def test_a_target_is_a_whole_name_not_a_tail_of_one() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.xq, self.block = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Module()
            self.block.q = torch.nn.Linear(4, 4)
            self.block.c_attn = transformers.pytorch_utils.Conv1D(4, 4)
            self.config = transformers.PretrainedConfig()

        def prepare_inputs_for_generation(self) -> None: ...

    adapters = adapters_of(Model(), targets=["q"])
    assert list(adapters.layers) == ["q", "block.q"]
    with pytest.raises(UserError, match="no layer 'attn'"):
        adapters_of(Model(), targets=["attn"])


# Factor groups.


def folded(family: str = "qwen2", stages: int = 3) -> tuple[Layers, list[Pair]]:
    adapters = adapters_of(base_model(family, layers=3), family)
    pairs = [random_pair(adapters, f"s{i}", rank=i + 1, seed=i) for i in range(stages)]
    for pair in pairs:
        adapters.fold(pair)
    adapters.begin("now", generator())
    return adapters, pairs


def test_groups_hold_layers_of_equal_shape_and_are_part_of_the_graph() -> None:
    adapters, _ = folded()
    groups = adapters.groups()
    assert [(g.A.shape, g.B.shape) for g in groups] == [((3, 2, 24), (3, 24, 2)), ((3, 2, 24), (3, 12, 2))]
    assert sorted(t for g in groups for t in g.targets) == sorted(adapters.layers)
    parameters = adapters.parameters()
    for group in groups:
        for at, target in enumerate(group.targets):
            assert torch.equal(group.A[at], parameters[f"{target}.lora_A"])
            assert torch.equal(group.B[at], parameters[f"{target}.lora_B"])
    sum((g.A.sum() + 2 * g.B.sum() for g in groups), torch.zeros(())).backward()
    wanted = {"lora_A": 1.0, "lora_B": 2.0}
    assert all(bool((p.grad == wanted[name.rsplit(".", 1)[-1]]).all()) for name, p in parameters.items())


def test_past_factors_stand_in_stage_order_and_their_grams_are_means_over_rows() -> None:
    adapters, pairs = folded()
    for group in adapters.groups():
        assert group.past is not None and group.past.rank == 6
        rows_A, rows_B = group.past.rows("A"), group.past.rows("B")
        assert not rows_A.requires_grad and rows_A.shape[1:] == (6, 24)
        assert group.past.row_weights.tolist() == pytest.approx([1, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])
        for at, target in enumerate(group.targets):
            assert torch.equal(rows_A[at], torch.cat([pair.A[target] for pair in pairs]))
            assert torch.equal(rows_B[at], torch.cat([pair.B[target].T for pair in pairs]))
            grams = {
                "A": [p.A[target].T @ p.A[target] / p.rank for p in pairs],
                "B": [p.B[target] @ p.B[target].T / p.rank for p in pairs],
            }
            for factor, naive in grams.items():
                assert off(group.past.gram(factor)[at], sum(naive)) < 1e-6


def test_past_factors_are_stacked_once_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, pairs = folded()
    first = adapters.groups()
    for a, b in zip(first, adapters.groups(), strict=True):
        assert a.past is not None and b.past is a.past and b.past.rows("A") is a.past.rows("A")
    adapters.fold(random_pair(adapters, "s3", rank=4))
    assert [g.past.rank for g in adapters.groups() if g.past] == [10, 10]
    adapters.restore(pairs[:1], {}, None)
    assert [g.past.rank for g in adapters.groups() if g.past] == [1, 1]
    adapters.restore([], {}, None)
    assert [g.past for g in adapters.groups()] == [None] * 2


def test_pairs_lie_on_the_cpu_and_nothing_of_the_graph_is_kept() -> None:
    adapters, _ = folded()
    pair: Any = adapters.pair()
    assert all(t.device.type == "cpu" and not t.requires_grad for f in (pair.A, pair.B) for t in f.values())


def test_under_bf16_autocast_inputs_are_not_cast_up_and_down_again() -> None:
    """Same answer, to the bit, as with PEFT's cast to fp32."""
    seen: dict[str, torch.dtype] = {}
    answers = []
    for compute in (None, BF16):
        adapters = adapters_of(base_model("t5").to(BF16), compute=compute)
        adapters.begin("now", torch.Generator().manual_seed(1))
        adapters.show(random_pair(adapters, "now"))
        for layer in adapters.layers.values():
            layer.lora_dropout["default"].register_forward_hook(
                lambda _m, inputs, _o, key=str(compute): seen.update({key: inputs[0].dtype})
            )
        with torch.autocast("cpu", BF16, cache_enabled=False):
            answers.append(logits(adapters.model))
    assert seen == {"None": torch.float32, str(BF16): BF16}
    assert torch.equal(*answers)


def test_layers_without_a_pair_skip_it_and_nothing_changes() -> None:
    adapters = adapters_of(base_model("t5"))
    adapters.begin("now", torch.Generator().manual_seed(1))
    adapters.show(random_pair(adapters, "now"))
    with_pair = logits(adapters.model)
    adapters.fold_live()
    calls: list[int] = []
    for layer in adapters.layers.values():
        layer.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
    skipped = logits(adapters.model)
    assert not calls and off(skipped, with_pair) < 1e-5
    for layer in adapters.layers.values():
        layer.enable_adapters(True)  # B is zero
    assert torch.equal(logits(adapters.model), skipped) and calls
    adapters.begin("next", torch.Generator().manual_seed(2))
    calls.clear()
    logits(adapters.model)
    assert calls and all(parameter.requires_grad for parameter in adapters.parameters().values())
