"""Adapter kinds: what they offer, what is refused, a pair beside other terms, and a sum that is replaced."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.adapters.kind import OFFERS, Opening, lacking
from cl_runner.adapters.kinds.lora import Lora
from cl_runner.adapters.layers import Layers
from cl_runner.config.schema import RunConfig
from cl_runner.errors import UserError
from cl_runner.methods import METHODS, make_method
from cl_runner.methods.shared.dense import Dense
from cl_runner.registry import KINDS
from cl_runner.training.compatibility import compatibility, fitting_kind, needs
from tests.adapters.families import FAMILIES, adapters_of, base_model, logits, off, random_pair, saved_as, with_updates
from tests.adapters.test_peft_folder import plain
from tests.command_line import call
from tests.stages import tiny_config


class FrozenA(Lora):
    """LoRA-FA (arXiv 2308.03303): A stays as it was drawn."""

    name = "frozen-a"
    title = "a pair whose A is frozen"
    offers = Lora.offers - {"A"}
    trains = ("B",)


def half_terms(adapters: Layers, seed: int = 0) -> dict[str, Tensor]:
    """A pair on the even targets and a dense term on the odd ones; each one's ΔW as entries of the definition."""
    adapters.show(random_pair(adapters, "one", seed=seed))
    odd = list(adapters.past)[1::2]
    adapters.begin_terms("one", {target: Dense(*adapters.past[target].base.shape) for target in odd})
    dice = torch.Generator().manual_seed(seed)
    for name, (_, role) in adapters.roles().items():
        if role == "delta":
            value = adapters.parameters()[name]
            value.data.copy_(0.2 * torch.randn(value.shape, generator=dice))
    pair = adapters.pair()
    assert set(pair.A) == set(adapters.past) - set(odd)
    of_terms = {target: adapters.parameters()[f"{target}.delta"].detach().clone() for target in odd}
    return of_terms | {t: pair.scale * torch.einsum("mr,rn->mn", pair.B[t], pair.A[t]) for t in pair.A}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_trains_beside_terms(family: str, tmp_path: Path) -> None:
    """The pair folds as factors, the terms densely; the folder answers in plain PEFT, and reads back to the bit."""
    base = base_model(family)
    adapters = adapters_of(copy.deepcopy(base), family)
    update = half_terms(adapters)
    odd = list(adapters.past)[1::2]
    wanted = logits(with_updates(base, [update]))
    assert off(logits(adapters.model), wanted) < 1e-5
    roles = {role for _, role in adapters.roles().values()}
    assert roles == {"A", "B", "delta"} and set(adapters.named("A")) == set(adapters.past) - set(odd)
    assert all(parameter.requires_grad for parameter in adapters.parameters().values())
    assert sum(p.requires_grad for p in adapters.model.parameters()) == len(adapters.parameters())
    assert {target for group in adapters.groups() for target in group.targets} == set(adapters.named("A"))
    square = sum(float(delta.double().square().sum()) for delta in update.values())
    assert adapters.update_norm() == pytest.approx(square**0.5, rel=1e-5)
    assert all(off(found, update[target]) < 1e-6 for target, found in adapters.live_update().items())

    shown = adapters.shown()
    adapters.show(None)
    assert off(logits(adapters.model), logits(base.double())) < 1e-5
    base.float()
    adapters.show(random_pair(adapters, "other", seed=9))
    adapters.show(shown)
    assert off(logits(adapters.model), wanted) < 1e-5

    adapters.fold_live()
    assert off(logits(adapters.model), wanted) < 1e-5
    assert [pair.stage for pair in adapters.folded] == adapters.dense == ["one"]
    saved = saved_as(tmp_path / "a", adapters)
    _, beside = adapters.save(tmp_path / "b", "one", adapters.held())
    assert off(logits(plain(copy.deepcopy(base), tmp_path / "a")), wanted) < 1e-5
    again = adapters_of(copy.deepcopy(base), family)
    held = again.load(tmp_path / "b", "one", saved, beside, None, lambda _: pytest.fail("no other stage"), {})
    again.restore(held.folded, held.kept, held.live, sums=held.sums, dense=held.dense)
    assert torch.equal(logits(again.model), logits(adapters.model))
    assert again.folded[0].A.keys() == adapters.folded[0].A.keys() and again.dense == ["one"]
    second = half_terms(again, seed=1)
    assert off(logits(again.model), logits(with_updates(base, [update, second]))) < 1e-5
    past = [group.past for group in again.groups()]
    assert all(found is not None and found.rank == 2 for found in past)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sum_becomes_what_is_given(family: str, tmp_path: Path) -> None:
    """Folding by ``replace``: two past pairs and the live one give way to a matrix; nothing of them is left."""
    base = base_model(family)
    adapters = adapters_of(copy.deepcopy(base), family)
    for i in range(2):
        adapters.fold(random_pair(adapters, f"s{i}", seed=i))
    adapters.show(random_pair(adapters, "now", seed=5))
    merged = {t: torch.randn(past.base.shape, generator=torch.Generator().manual_seed(3)) * 0.1
              for t, past in adapters.past.items()}  # fmt: skip
    adapters.replace("now", merged)
    wanted = logits(with_updates(base, [merged]))
    assert off(logits(adapters.model), wanted) < 1e-5
    assert adapters.folded == [] and adapters.live is None and adapters.dense == ["now"]
    saved = saved_as(tmp_path / "a", adapters)
    assert off(logits(plain(copy.deepcopy(base), tmp_path / "a")), wanted) < 1e-5
    held = adapters.load(tmp_path / "a", "now", saved, {}, None, lambda _: pytest.fail("no other stage"), {})
    again = adapters_of(copy.deepcopy(base), family)
    again.restore(held.folded, held.kept, held.live, sums=held.sums, dense=held.dense)
    assert torch.equal(logits(again.model), logits(adapters.model))
    adapters.begin("next", torch.Generator().manual_seed(0))
    assert all(group.past is None for group in adapters.groups()), "there are no past pairs"
    assert all(torch.equal(past.sum, merged[target]) for target, past in adapters.past.items())  # type: ignore[arg-type]


def test_the_sum_has_all_past_updates_however_they_were_folded() -> None:
    """Beside the factors of some."""
    adapters = adapters_of(base_model("qwen2"), "qwen2")
    adapters.begin("a", torch.Generator())
    assert all(past.sum is None for past in adapters.past.values())
    pairs = [random_pair(adapters, f"s{i}", seed=i) for i in range(2)]
    adapters.fold(pairs[0])
    dense = {t: torch.full(past.base.shape, 0.01) for t, past in adapters.past.items()}
    adapters.fold_dense("merge", dense)
    adapters.fold(pairs[1])
    adapters.begin("now", torch.Generator())
    assert all(group.past is not None and group.past.rank == 4 for group in adapters.groups())
    for target, past in adapters.past.items():
        wanted = dense[target] + sum(p.scale * p.B[target] @ p.A[target] for p in pairs)
        assert past.sum is not None and off(past.sum, wanted) < 1e-6


def test_what_a_kind_freezes_gets_no_gradient() -> None:
    model = base_model("llama")
    opening = Opening(model, "x", None, encoder_decoder=False)
    adapters = FrozenA(tiny_config().adapter).open(opening)
    adapters.begin("one", torch.Generator().manual_seed(0))
    asks = {
        role: {adapters.parameters()[name].requires_grad for name in adapters.named(role).values()} for role in "AB"
    }
    assert asks == {"A": {False}, "B": {True}}
    adapters.train(False)
    adapters.train(True)
    assert sum(p.requires_grad for p in adapters.model.parameters()) == len(adapters.past)


@pytest.mark.parametrize("name", METHODS.ours)
def test_a_method_is_never_silently_without_what_it_needs(name: str) -> None:
    """A penalty on A is refused where A is frozen, whatever reads only B, or the update, is not."""
    method = make_method(tiny_config(method__name=name))
    wants_A = ("A",) in needs(method)
    assert bool(lacking(FrozenA, needs(method))) == (wants_A or method.kind(tiny_config()) != "lora")
    assert all(offer in OFFERS for need in needs(method) for offer in need)


def test_the_table_says_what_is_refused(tmp_path: Path) -> None:
    """Each pair of method and kind: as ``list compatibility`` has it, with the kinds that would do."""
    table = {row["method"]: row for row in compatibility()}
    assert set(table) >= set(METHODS.ours)
    for name in METHODS.ours:
        for kind in KINDS.ours:
            config: Any = RunConfig.model_validate({"method": {"name": name}, "adapter": {"kind": kind}})
            method = make_method(config)
            chosen = method.kind(tiny_config(method__name=name))
            fits = table[name][kind] == "yes" and kind not in ("full", "prompts")  # these are the methods' to choose
            if fits or kind in ("lora", chosen):  # or the setting's default
                assert fitting_kind(config, method).name == (kind if fits else chosen)
            else:
                with pytest.raises(UserError, match=r"^adapter\.kind: "):
                    fitting_kind(config, method)
            if kind == chosen:
                assert table[name][kind] == "yes"
    assert table["olora"]["lora"] == "yes" and table["olora"]["full"] == "no: a factor A that trains"
    assert table["hard-orth"]["full"].endswith("to be written, a factor A that trains")
    assert (table["olora"]["dora"], table["seqlora"]["oft"], table["pego"]["tied-lora"]) == ("yes",) * 3
    assert table["inflora"]["dora"] == "no: an update that is the product of its factors"
    assert table["inflora"]["vblora"] == "no: factors A and B that are parameters, to be written"
    assert call("list", "compatibility", "--json", cwd=tmp_path).json["compatibility"] == list(table.values())


TUNED = [name for name in KINDS.ours if name not in ("lora", "full", "prompts")]
ANY_UPDATE = {"seqlora", "inclora", "pertask", "mtl", "replay", "ewc", "lwf", "agem", "gem", "ogd", "sure", "rkif"}
A_ALONE = {"olora", "grassmann", "treelora"}
FACTORS_THAT_TRAIN = A_ALONE | {"nlora", "sparse-orth", "clora", "pego", "ella", "pslora", "ewc-lora"}


@pytest.mark.parametrize("kind", TUNED)
def test_each_kind_goes_with_what_it_can_do(kind: str) -> None:
    """Penalties on factors only where these train, and for the update only where it is their product; rules on rows of
    A and B only where a pair is one's own.
    """
    fits = {row["method"] for row in compatibility() if row[kind] == "yes"} & set(METHODS.ours)
    more = {"dora": A_ALONE | {"hard-orth", "soft-orth"}, "vblora": FACTORS_THAT_TRAIN, "tied-lora": FACTORS_THAT_TRAIN}
    assert fits == ANY_UPDATE | more.get(kind, set())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("olora", "adapter.kind=prompts"),
            "olora needs a factor A that trains, which prompts does not offer; lora, dora, vblora, tied-lora would do",
        ),
        (("l2p", "adapter.kind=full"), "full, and l2p trains vectors before the input"),
        (("ewc", "adapter.kind=full"), "full is what method.train=full chooses; set that for ewc"),
        (("olora", "adapter.kind=lorra"), "there is no adapter kind 'lorra'; did you mean"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    words: tuple[str, str], says: str, tmp_path: Path
) -> None:
    result = call("train", "--order", "order1", "--method", words[0], "--set", words[1], "--dry-run", cwd=tmp_path)
    assert result.code == 2 and says in result.line and not (tmp_path / "runs").exists()


def test_kinds_are_listed_without_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from cl_runner.registry import KINDS;"
        "print([KINDS.get(name).title for name in KINDS.ours]); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "pair" in done.stdout, done.stderr
