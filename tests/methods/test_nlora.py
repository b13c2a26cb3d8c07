"""N-LoRA's three penalties and their gradients against their definitions, in fp64; what is refused, and where."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.adapters.layers import Layers
from cl_runner.config.schema import RunConfig
from cl_runner.errors import UserError
from cl_runner.methods import make_method, method_schema
from cl_runner.methods.nlora.method import NLoRA
from cl_runner.settings import resolve
from tests.adapters.families import adapters_of, base_model, off, random_pair


def live(family: str) -> Layers:
    adapters = adapters_of(base_model(family), family, r=3)
    adapters.fold(random_pair(adapters, "s0"))  # past pairs do not matter
    adapters.begin("now")
    adapters.show(random_pair(adapters, "now", seed=1))
    return adapters


def penalty_of(adapters: Layers, **settings: Any) -> Tensor | None:
    stage: Any = SimpleNamespace(factors=adapters.groups)
    return NLoRA(NLoRA.Config(**settings)).penalty(stage)


def naive(adapters: Layers, of: str, weight: float) -> tuple[Tensor, list[Tensor]]:
    """Row by row or entry by entry, layer by layer; all but the reference form are means over layers too."""
    pair = adapters.pair()
    leaves = [factor[t].double().requires_grad_() for t in adapters.layers for factor in (pair.A, pair.B)]
    total = torch.zeros((), dtype=torch.float64)
    for A, B in zip(leaves[::2], leaves[1::2], strict=True):
        (r, n), m = A.shape, B.shape[0]
        if of == "product":
            rows = [sum((B[i, k] * A[k] for k in range(r)), torch.zeros(n)).abs().sum() for i in range(m)]
            total = total + weight * sum(rows) / (m * n)
        elif of == "reference":
            entries = [(A[j] * B[:, k]).sum().abs() for j in range(r) for k in range(r)]
            total = total + weight * sum(entries)
        else:
            total = total + weight * (A.abs().sum() / (r * n) + B.abs().sum() / (m * r))
    total = total if of == "reference" else total / len(adapters.layers)
    return total, list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize(
    ("of", "family"),
    [("product", "qwen2"), ("product", "t5"), ("reference", "t5"), ("factors", "qwen2"), ("factors", "gpt2")],
)
def test_penalty_and_gradient_are_those_of_the_definition(of: str, family: str) -> None:
    adapters = live(family)
    found = penalty_of(adapters, of=of, lambda1=0.7)
    assert found is not None and found.dtype == torch.float32 and found.shape == ()
    wanted, gradients = naive(adapters, of, 0.7)
    assert off(found, wanted) < 1e-6
    ours = torch.autograd.grad(found, list(adapters.parameters().values()))
    assert all(off(a, b) < 1e-6 and b.any() for a, b in zip(ours, gradients, strict=True))


def test_per_entry_forms_do_not_grow_with_the_matrix_and_the_reference_form_is_a_sum() -> None:
    """The same distribution of entries: a mean over entries carries over sizes, a published sum does not."""

    def one_layer(n: int, of: str) -> float:
        dice = torch.Generator().manual_seed(0)
        A, B = torch.rand(1, 4, n, generator=dice), torch.rand(1, n, 4, generator=dice)
        stage: Any = SimpleNamespace(factors=lambda: [SimpleNamespace(targets=("one",), A=A, B=B)])
        return float(NLoRA(NLoRA.Config(of=of)).penalty(stage))  # type: ignore[arg-type]

    for of in ("product", "factors"):
        assert one_layer(256, of) == pytest.approx(one_layer(64, of), rel=0.05)
    assert one_layer(256, "reference") == pytest.approx(4 * one_layer(64, "reference"), rel=0.05)


def test_nothing_without_weight() -> None:
    assert penalty_of(live("t5"), lambda1=0) is None


def test_the_gradient_of_a_fresh_pair_is_finite() -> None:
    adapters = adapters_of(base_model("t5"))
    adapters.begin("now", torch.Generator().manual_seed(0))
    for of in ("product", "reference", "factors"):
        found = penalty_of(adapters, of=of)
        assert found is not None
        gradients = torch.autograd.grad(found, list(adapters.parameters().values()))
        assert all(bool(g.isfinite().all()) for g in gradients)


# Settings.


def test_reference_is_short_for_of_reference() -> None:
    assert NLoRA.Config(reference=True).what == "reference"
    assert NLoRA.Config(reference=True, of="reference").what == "reference"
    assert NLoRA.Config().what == "product" and NLoRA.Config(reference=False, of="reference").what == "reference"
    again = NLoRA.Config.model_validate(NLoRA.Config(reference=True).model_dump())
    assert (again.reference, again.what) == (True, "reference")
    forms = {of: NLoRA(NLoRA.Config(of=of)).form for of in ("product", "reference", "factors")}
    assert forms == {"product": "paper", "reference": "reference", "factors": "factors"}


def settings(*sets: str) -> RunConfig:
    flags = {"method.name": "nlora"}
    return resolve(order="order1", flags=flags, sets=list(sets), method_schema=method_schema).config


@pytest.mark.parametrize("of", ["product", "factors"])
def test_contradicting_forms_are_refused_in_one_line(of: str) -> None:
    with pytest.raises(UserError) as refused:
        settings("method.reference=true", f"method.of={of}")
    assert str(refused.value) == (
        f"--set method.of={of}: method.of does not fit: of: {of} contradicts reference: true; leave one of them out"
    )
    with pytest.raises(UserError, match=f"^--set tasks.agnews.method.of={of}: .* contradicts reference: true"):
        settings("method.reference=true", f"tasks.agnews.method.of={of}")


def test_the_resolved_settings_say_the_form() -> None:
    own = settings("method.reference=true").method.own()
    assert (own["reference"], own["of"]) == (True, None)
    again = RunConfig.model_validate(settings("method.reference=true").model_dump(mode="json"))
    assert make_method(again).form == "reference" and make_method(settings()).form == "paper"


@pytest.mark.parametrize(
    ("given", "key"), [({"reference": True}, "method.reference"), ({"of": "reference"}, "method.of")]
)
def test_the_reference_form_is_refused_where_a_layer_is_not_square(given: dict[str, Any], key: str) -> None:
    config = RunConfig.model_validate({"method": {"name": "nlora", **given}})
    method = make_method(config)
    method.check(config)
    method.check(config, [(8, 8), (8, 8)])
    with pytest.raises(UserError, match=rf"^{key}: nlora's reference form .* square layers, and one is 4 × 8; use "):
        method.check(config, [(8, 8), (4, 8)])
    for of in ("product", "factors"):
        NLoRA(NLoRA.Config(of=of)).check(config, [(4, 8)])


def test_a_task_of_another_form_has_that_forms_weight() -> None:
    big = "model.name=google-t5/t5-base"
    for run, task, wanted in (
        ([], "method.reference=true", [("product", 300.0), ("reference", 0.4)]),
        (["method.reference=true"], "method.reference=false", [("reference", 0.4), ("product", 300.0)]),
        ([], "method.of=factors", [("product", 300.0), ("factors", 300.0)]),
    ):
        config = settings(big, *run, f"tasks.amazon.{task}")
        made = [make_method(config.at(i, name)).config for i, name in enumerate(("dbpedia", "amazon"), 1)]
        assert [(one.what, one.weight) for one in made] == wanted
