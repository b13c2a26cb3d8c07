"""O-LoRA's penalty and its gradient against a naive loop over stages, layers and entries, in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.adapters.layers import Layers
from cl_runner.adapters.pairs import Pair
from cl_runner.methods import make_method, method_schema
from cl_runner.methods.olora import OLoRA
from cl_runner.settings import resolve
from tests.adapters.families import adapters_of, base_model, off, random_pair

Factors = dict[str, dict[str, Tensor]]  # A and B, target → factor


def after(stages: int, rank: int | None = 2, family: str = "qwen2", **more: Any) -> Layers:
    """Adapters at the stage after so many folded ones (of rank, rank + 1, …), with a random live pair.

    ``rank`` None: the past pairs have the live one's ranks.
    """
    adapters = adapters_of(base_model(family), family, r=3, **more)
    for i in range(stages):
        adapters.fold(random_pair(adapters, f"s{i}", rank=rank and rank + i % 3, seed=i))
    adapters.begin("now")
    adapters.show(random_pair(adapters, "now", seed=99))
    return adapters


def penalty_of(adapters: Layers, **settings: Any) -> Tensor | None:
    method = OLoRA(OLoRA.Config(**settings))
    stage: Any = SimpleNamespace(factors=adapters.groups)
    return method.penalty(stage)


def gradients(adapters: Layers, penalty: Tensor) -> Factors:
    parameters = adapters.parameters()
    found = torch.autograd.grad(penalty, list(parameters.values()), allow_unused=True)
    named = dict(zip(parameters, found, strict=True))
    return {
        factor: {
            t: torch.zeros_like(parameters[f"{t}.lora_{factor}"]) if (g := named[f"{t}.lora_{factor}"]) is None else g
            for t in adapters.layers
        }
        for factor in "AB"
    }


def naive(
    adapters: Layers, past: Sequence[Pair], *, lambda1: float, lambda2: float, on: str, reference: bool
) -> tuple[Tensor, Factors]:
    """The definition, one number at a time, and what autograd makes of it. The paper's form is a mean, not a sum."""
    pair = adapters.pair()
    live = {
        f: {t: getattr(pair, f)[t].double().requires_grad_() for t in adapters.layers} for f in ("A", "B")
    }  # fmt: skip
    total = torch.zeros((), dtype=torch.float64)
    for target in adapters.layers:
        A, B = live["A"][target], live["B"][target]
        for old in past:
            was, now = old.A[target].shape[0], A.shape[0]
            weight = lambda1 if reference else lambda1 / (len(adapters.layers) * was * now)
            for j, k in product(range(was), range(now)):
                of_A = (old.A[target][j].double() * A[k]).sum()
                of_B = (old.B[target][:, j].double() * B[:, k]).sum()
                for factor, overlap in (("A", of_A), ("B", of_B)):
                    if on in (factor, "both"):
                        total = total + (weight * overlap.abs() if reference else weight * overlap**2)
        if lambda2:
            total = total + lambda2 * (A.square().sum().sqrt() + B.square().sum().sqrt())
    if not total.requires_grad:
        return total, live
    leaves = [live[f][t] for f in ("A", "B") for t in adapters.layers]
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    filled = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
    half = len(adapters.layers)
    return total, {"A": dict(zip(adapters.layers, filled[:half], strict=True)),
                   "B": dict(zip(adapters.layers, filled[half:], strict=True))}  # fmt: skip


@pytest.mark.parametrize("on", ["A", "B", "both"])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "paper"])
@pytest.mark.parametrize("lambda2", [0.0, 0.3])
def test_penalty_and_gradient_are_those_of_the_definition(on: str, reference: bool, lambda2: float) -> None:
    adapters = after(3)
    found = penalty_of(adapters, reference=reference, lambda1=0.5, lambda2=lambda2, on=on)
    assert found is not None and found.dtype == torch.float32 and found.shape == ()
    wanted, wanted_gradients = naive(
        adapters, adapters.folded, lambda1=0.5, lambda2=lambda2, on=on, reference=reference
    )  # fmt: skip
    assert float(wanted.detach()) > 0.01
    assert off(found, wanted) < 1e-6
    ours = gradients(adapters, found)
    for factor, target in product("AB", adapters.layers):
        ours_here, theirs = ours[factor][target], wanted_gradients[factor][target]
        if on in (factor, "both") or lambda2:
            assert theirs.any() and off(ours_here, theirs) < 1e-6
        else:
            assert not ours_here.any()


MIXED = {"ranks": {r"layers\.0\..*q_proj": 1, "v_proj": 5}, "alphas": {"v_proj": 2.0}}


@pytest.mark.parametrize("on", ["A", "B", "both"])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "paper"])
@pytest.mark.parametrize("stages", [3, 6])
def test_layers_of_other_ranks_count_by_their_own(on: str, reference: bool, stages: int) -> None:
    """Ranks 1, 3 and 5: six stages of 5 rows are more than v's 12 and 24 dimensions, 6 and 18 of the others are not."""
    adapters = after(stages, rank=None, **MIXED)
    assert sorted((len(g.targets), g.A.shape[1]) for g in adapters.groups()) == [(1, 1), (1, 3), (2, 5)]
    assert [g.past.ranks for g in adapters.groups() if g.past] == [[g.A.shape[1]] * stages for g in adapters.groups()]
    found = penalty_of(adapters, reference=reference, lambda1=0.5, lambda2=0.1, on=on)
    wanted, wanted_gradients = naive(adapters, adapters.folded, lambda1=0.5, lambda2=0.1, on=on, reference=reference)
    assert found is not None and off(found, wanted) < 1e-6
    ours = gradients(adapters, found)
    for factor, target in product("AB", adapters.layers):
        assert off(ours[factor][target], wanted_gradients[factor][target]) < 1e-6


@pytest.mark.parametrize("on", ["A", "B", "both"])
def test_squares_of_many_rows_come_from_the_gram_matrix_alone(on: str) -> None:
    """27 past rows in spaces of 24 and 12: the rows are never stacked, the sum and its gradient are the same."""
    adapters = after(9)
    found = penalty_of(adapters, reference=False, lambda1=0.5, on=on)
    assert found is not None
    for group in adapters.groups():
        assert group.past is not None and group.past.rank == 27
        made = {name for name in vars(group.past) if name.startswith("_")}
        assert made == {f"_gram_{factor}" for factor in "AB" if on in (factor, "both")}
        side = {"A": group.A.shape[2], "B": group.B.shape[1]}
        assert all(getattr(group.past, name).shape == (2, side[name[-1]], side[name[-1]]) for name in made)
    wanted, wanted_gradients = naive(adapters, adapters.folded, lambda1=0.5, lambda2=0, on=on, reference=False)
    assert off(found, wanted) < 1e-6
    ours = gradients(adapters, found)
    for factor, target in product("AB", adapters.layers):
        if on in (factor, "both"):
            assert off(ours[factor][target], wanted_gradients[factor][target]) < 1e-6


def test_few_rows_are_stacked_instead() -> None:
    adapters = after(3)
    penalty_of(adapters, reference=False, on="A")
    assert all(
        {n for n in vars(g.past) if n.startswith("_")} == {"_rows_A"} for g in adapters.groups()
    )  # fmt: skip
    many = after(9)
    penalty_of(many, reference=True, on="A")
    assert all({n for n in vars(g.past) if n.startswith("_")} == {"_rows_A"} for g in many.groups())


@pytest.mark.parametrize("reference", [True, False])
def test_nothing_at_the_first_stage(reference: bool) -> None:
    adapters = after(0)
    assert penalty_of(adapters, reference=reference, on="both") is None
    found = penalty_of(adapters, reference=reference, on="both", lambda2=0.1)
    wanted, _ = naive(adapters, [], lambda1=0.5, lambda2=0.1, on="both", reference=reference)
    assert found is not None and off(found, wanted) < 1e-6


def test_no_weight_no_penalty() -> None:
    assert penalty_of(after(2), lambda1=0.0, lambda2=0.0) is None


def test_the_norm_of_a_fresh_b_has_a_finite_gradient() -> None:
    """‖B‖ at B = 0: torch gives the gradient 0 to a norm, and nan to a square root."""
    adapters = adapters_of(base_model("t5"))
    adapters.fold(random_pair(adapters, "s0"))
    adapters.begin("now", torch.Generator().manual_seed(0))
    found = penalty_of(adapters, lambda2=0.3, on="both")
    assert found is not None
    ours = gradients(adapters, found)
    assert all(not g.any() for g in ours["B"].values())
    assert all(bool(g.isfinite().all()) and g.any() for g in ours["A"].values())


def test_the_norm_is_not_squared() -> None:
    adapters = after(0)
    pair = adapters.pair()
    once = penalty_of(adapters, lambda1=0, lambda2=1.0)
    doubled = Pair("now", pair.rank, pair.scale, {t: 2 * a for t, a in pair.A.items()}, dict(pair.B))
    adapters.show(doubled)
    more = penalty_of(adapters, lambda1=0, lambda2=1.0)
    assert once is not None and more is not None
    assert float((more - once).detach()) == pytest.approx(float(sum(a.norm() for a in pair.A.values())), rel=1e-5)


def test_the_scale_is_in_no_penalty() -> None:
    one, other = (adapters_of(base_model("t5"), r=3, alpha=alpha) for alpha in (3.0, 30.0))
    for adapters in (one, other):
        adapters.fold(random_pair(adapters, "s0", seed=0))
        adapters.show(random_pair(adapters, "now", seed=1))
    assert torch.equal(penalty_of(one), penalty_of(other))  # type: ignore[arg-type]


def test_the_paper_form_does_not_grow_with_layers_or_rank_and_the_reference_form_is_a_sum() -> None:
    """The same distribution of entries: a mean carries over sizes, a published sum does not."""

    def random(layers: int, rank: int, reference: bool, before: int | None = None) -> float:
        dice = torch.Generator().manual_seed(0)
        A, old = (torch.randn(layers, r, 64, generator=dice) for r in (rank, before or rank))
        weights = torch.full((before or rank,), 1 / (before or rank))
        past = SimpleNamespace(rank=before or rank, rows=lambda factor: old, row_weights=weights)
        group = SimpleNamespace(targets=range(layers), A=A, B=A.mT, past=past)
        method, stage = OLoRA(OLoRA.Config(reference=reference, lambda1=1.0)), SimpleNamespace(factors=lambda: [group])
        return float(method.penalty(stage))  # type: ignore[arg-type]

    paper, reference = random(20, 8, False), random(20, 8, True)
    assert random(80, 8, False) == pytest.approx(paper, rel=0.05)
    assert random(20, 16, False) == pytest.approx(paper, rel=0.05)
    assert random(20, 16, False, before=4) == pytest.approx(paper, rel=0.05)  # adapter.r=auto
    assert random(80, 8, True) == pytest.approx(4 * reference, rel=0.05)
    assert random(20, 16, True) == pytest.approx(4 * reference, rel=0.05)


def test_the_weight_of_the_paper_form_is_its_own_unless_given() -> None:
    assert OLoRA.Config(reference=False).weight == 2e4 and OLoRA.Config(reference=True).weight == 0.5
    assert OLoRA.Config(reference=False, lambda1=3).weight == 3 and OLoRA.Config(lambda1=0).weight == 0
    again = OLoRA.Config.model_validate(OLoRA.Config().model_dump())
    assert OLoRA.Config.model_validate({**again.model_dump(), "reference": False}).weight == 2e4


def test_a_task_of_the_other_form_has_that_forms_weight() -> None:
    sets = ["tasks.amazon.method.reference=false"]
    flags = {"method.name": "olora", "model.name": "google-t5/t5-base"}
    config = resolve(order="order1", flags=flags, sets=sets, method_schema=method_schema).config
    weights = [make_method(config.at(i, task)).config.weight for i, task in enumerate(("dbpedia", "amazon"), 1)]
    assert weights == [0.5, 2e4]


def test_published_defaults_and_names() -> None:
    config = OLoRA.Config()
    assert (config.reference, config.weight, config.lambda2, config.on) == (True, 0.5, 0.0, "A")
    assert OLoRA(config).form == "reference" and OLoRA(OLoRA.Config(reference=False)).form == "paper"
