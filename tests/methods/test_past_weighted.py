"""Methods whose penalty weighs each entry of the new update by what is known of the past there (`ella`, `pslora`,
`ewc-lora`): penalty and gradient entry by entry in fp64, whole steps, ranks, and what becomes of the past."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.adapters.layers import Layers
from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.training.compatibility import check_method
from cl_runner.training.stage import StageRun
from tests.adapters.families import adapters_of, base_model, random_pair
from tests.breadth import narrowed, wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.ranks import FEW, each_learned, two_do_what_one_does
from tests.methods.restarted import DROPPED, restarted
from tests.methods.steps import LR, STEPS, THREE, off, opposed, put, values, vector
from tests.methods.test_carried import same
from tests.stages import Kind, naive_loss

Matrices = dict[str, Tensor]
# Name → settings at a size that is felt on tiny models. What stands after a space tells variants apart.
OWN: dict[str, dict[str, Any]] = {
    "ella": {"lambda1": 30.0},
    "pslora": {"lambda1": 40.0, "a": 8.0},
    "pslora merged": {"lambda1": 40.0, "a": 8.0, "history": "merged"},
    "pslora sum": {"lambda1": 40.0, "a": 8.0, "merge": False},
    "pslora merge": {"loss": False},
    "ewc-lora": {"lambda1": 3.0, "gamma": 0.5, "fisher_samples": 4},
    "ewc-lora batch": {"lambda1": 30.0, "fisher": "batch"},
}
PULLING = [name for name in OWN if name != "pslora merge"]
SHAPES = [(32, 32), (16, 24)]


def entries(name: str, X: Tensor, past: Tensor) -> Tensor:
    """Entry by entry: what one layer's update X (m, n) costs beside ``past`` (P, S or F), without weight."""
    total = torch.zeros((), dtype=torch.float64)
    for x, p in zip(X.flatten(), past.flatten(), strict=True):
        if name.startswith("pslora"):
            a = OWN[name]["a"]
            total = total + x * x * (1 - torch.tanh(a * x) * math.tanh(a * float(p)))
        else:
            total = total + x * x * (p * p if name == "ella" else p)
    return total


def scale_of_penalty(name: str, shapes: list[tuple[int, int]]) -> float:
    """The weight of the sum over layers and entries."""
    of = {"ella": len(shapes), "pslora": sum(m * n for m, n in shapes), "ewc-lora": 2}[name.split()[0]]
    return float(OWN[name]["lambda1"]) / of


def method_of(name: str, **own: Any) -> Any:
    return make_method(RunConfig.model_validate({"method": {"name": name.split()[0], **OWN[name], **own}}))


def after(stages: int, family: str = "t5", **more: Any) -> Layers:
    adapters = adapters_of(base_model(family), family, r=3, **more)
    for i in range(stages):
        adapters.fold(random_pair(adapters, f"s{i}", seed=i))
    adapters.begin("now")
    adapters.show(random_pair(adapters, "now", seed=9))
    return adapters


def stage_of(adapters: Layers) -> Any:
    return SimpleNamespace(
        factors=adapters.groups, scale_of=adapters.scale_of, past_update=lambda target: adapters.past[target].sum,
        index=len(adapters.folded), device=torch.device("cpu"),
    )  # fmt: skip


def known(method: Any, adapters: Layers, name: str) -> Matrices:
    """What the method knows of the past; of S and F something that is not the sum, where it may be another."""
    if name == "ella" or name in ("pslora sum", "pslora merged"):
        return {target: past.sum for target, past in adapters.past.items() if past.sum is not None}
    dice = torch.Generator().manual_seed(4)
    made = {target: torch.randn(shape, generator=dice) for target, shape in adapters.targets().items()}
    if name.startswith("ewc-lora"):
        made = {target: value.square() for target, value in made.items()}
        method.fisher = made
    else:
        method.sums = made
    return made


@pytest.mark.parametrize("name", narrowed(PULLING, ["ella", "pslora", "ewc-lora"]))
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("t5", {}),
        pytest.param("gpt2", {}, marks=wide),
        ("qwen2", {"ranks": {r"layers\.0\..*q_proj": 2}, "alphas": {"v_proj": 2.0}}),
    ],
    ids=["t5", "gpt2", "ranks by layer"],
)
def test_penalty_and_gradient_entry_by_entry(name: str, family: str, more: dict[str, Any]) -> None:
    adapters, method = after(2, family, **more), method_of(name)
    past = known(method, adapters, name)
    found = method.penalty(stage_of(adapters))
    assert found.dtype == torch.float32 and found.shape == ()
    pair = adapters.pair()
    leaves = [f[t].double().requires_grad_() for t in adapters.layers for f in (pair.A, pair.B)]
    total = torch.zeros((), dtype=torch.float64)
    for target, A, B in zip(adapters.layers, leaves[::2], leaves[1::2], strict=True):
        scale = 1.0 if name.startswith("ewc-lora") else adapters.scale_of(target)
        total = total + entries(name, scale * B @ A, past[target].double())
    wanted = scale_of_penalty(name, list(adapters.targets().values())) * total
    assert float(wanted.detach()) > 1e-3 and off(found.detach(), wanted.detach()) < 1e-6
    ours = torch.autograd.grad(found, list(adapters.parameters().values()))
    theirs = torch.autograd.grad(wanted, leaves)
    assert all(off(mine, their) < 1e-5 and their.any() for mine, their in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", PULLING)
def test_none_at_the_first_stage_none_without_weight_and_no_gradient_at_zero(name: str) -> None:
    assert method_of(name).penalty(stage_of(after(0))) is None
    adapters, method = after(2), method_of(name)
    known(method, adapters, name)
    adapters.begin("fresh", torch.Generator().manual_seed(0))
    found = method.penalty(stage_of(adapters))
    assert float(found.detach()) == 0
    assert not any(g.any() for g in torch.autograd.grad(found, list(adapters.parameters().values())))
    weightless = method_of(name, lambda1=0)
    known(weightless, adapters, name)
    assert weightless.penalty(stage_of(adapters)) is None


def test_pslora_costs_the_plain_square_beside_no_past_and_at_most_twice_that() -> None:
    adapters = after(2)
    X = {t: adapters.scale_of(t) * adapters.pair().B[t] @ adapters.pair().A[t] for t in adapters.layers}

    def cost(S: Matrices, a: float) -> float:
        method = method_of("pslora", lambda1=1.0, a=a)
        method.sums = S
        return float(method.penalty(stage_of(adapters)).detach())

    mean = float(sum(x.square().sum() for x in X.values()) / sum(x.numel() for x in X.values()))
    assert cost({t: torch.zeros_like(x) for t, x in X.items()}, 8.0) == pytest.approx(mean, rel=1e-5)
    assert cost({t: -1e6 * x for t, x in X.items()}, 1e6) == pytest.approx(2 * mean, rel=1e-3)
    assert cost({t: 1e6 * x for t, x in X.items()}, 1e6) == pytest.approx(0, abs=1e-3 * mean)


def test_ewc_lora_by_the_squared_sum_is_ella() -> None:
    """λ of ewc-lora is then 2 s²/L times ella's: its penalty has no s, and is no mean over layers."""
    adapters = after(2)
    scales = {adapters.scale_of(t) for t in adapters.layers}
    [s] = scales
    ewc = method_of("ewc-lora", lambda1=30.0 * 2 * s**2 / len(adapters.layers))
    ewc.fisher = {target: past.sum.square() for target, past in adapters.past.items() if past.sum is not None}
    ours, theirs = (method.penalty(stage_of(adapters)) for method in (ewc, method_of("ella")))
    assert off(ours.detach(), theirs.detach()) < 1e-6


def test_where_the_best_update_is_known_ella_reaches_it() -> None:
    """½‖D − G‖² + λ/2 ‖P ∘ D‖² is least at D = G / (1 + λ P²), with B A of full rank."""
    from cl_runner.maths.product import weighted_squares

    dice = torch.Generator().manual_seed(0)
    G, P = torch.randn(4, 3, generator=dice), torch.randn(4, 3, generator=dice)
    B = torch.randn(1, 4, 3, generator=dice).requires_grad_()
    A = torch.randn(1, 3, 3, generator=dice).requires_grad_()
    optimizer = torch.optim.LBFGS([A, B], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ((B @ A)[0] - G).square().sum() / 2 + weighted_squares(B, A, [P], squared=True)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    torch.testing.assert_close((B @ A)[0].detach(), G / (1 + 2 * P.square()), atol=1e-3, rtol=1e-3)


# Whole steps.


def opened(place: Place, name: str, **settings: Any) -> tuple[Any, Any]:
    own = {f"method__{key}": value for key, value in OWN[name].items()}
    return order_room(place, name.split()[0], **{**THREE, **own, **settings})


def fisher_by_loop(room: Any, kind: Kind, chunks: list[list[Any]], summed: bool) -> Matrices:
    """The mean over chunks of the squared gradient by each target's whole weight, the update written into it."""
    model, total = room.adapters.model, {}
    weights = {t: room.adapters.past[t].weight.requires_grad_() for t in room.adapters.layers}
    for examples in chunks:
        loss = naive_loss(model, kind, examples)
        loss = loss * sum(len(e.target) for e in examples) if summed else loss
        for target, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            g = g.T if room.adapters.past[target].transposed else g
            total[target] = total.get(target, torch.zeros_like(g)) + g.square() / len(chunks)
    return total


def _steps(place: Place, name: str, kind: Kind) -> None:
    room, config = opened(place, name, kind=kind)
    hand, _ = order_room(place, "inclora", kind=kind)
    sums: Matrices = {}
    merged: Matrices = {}
    fisher: Matrices = {}
    shapes = list(room.adapters.targets().values())
    for index in range(3):
        stage = StageRun(room, config, index)
        room.method.build(stage)
        stage.close()
        begun = values(room)
        learn(room, config, index, opposed(index))
        past = fisher if name.startswith("ewc-lora") else sums
        past = merged if name in ("pslora merged",) else past
        put(hand, begun)
        parameters = hand.adapters.parameters()
        optimizer = torch.optim.AdamW(list(parameters.values()), lr=LR, weight_decay=0.0)
        for _ in range(STEPS):
            loss = naive_loss(hand.adapters.model, kind, opposed(index).examples)
            for target in past if name in PULLING else ():
                scale = 1.0 if name.startswith("ewc-lora") else hand.adapters.scale_of(target)
                X = scale * parameters[f"{target}.lora_B"] @ parameters[f"{target}.lora_A"]
                loss = loss + scale_of_penalty(name, shapes) * penalised(name, X, past[target])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        X = {t: hand.adapters.scale_of(t) * parameters[f"{t}.lora_B"].detach() @ parameters[f"{t}.lora_A"].detach()
             for t in hand.adapters.layers}  # fmt: skip
        if name.startswith("ewc-lora"):
            hand.adapters.live = None
            hand.adapters.replace("hand", {t: sums.get(t, 0) + x for t, x in X.items()})
            drawn = sampled_rows(stage, opposed(index).examples, OWN[name].get("fisher_samples"))
            batch = name.endswith("batch")
            new = fisher_by_loop(hand, kind, [opposed(index).examples] if batch else [[e] for e in drawn], not batch)
            gamma = OWN[name].get("gamma", 1.0)
            fisher = {t: gamma * fisher[t] + F if fisher else F for t, F in new.items()}
            assert max(off(room.method.fisher[t], F) for t, F in fisher.items()) < 2e-2
        sums = {t: sums[t] + x if sums else x for t, x in X.items()}
        merged = {t: torch.where(merged[t].abs() >= x.abs(), merged[t], x) if merged else x for t, x in X.items()}
        wanted = merged if name in ("pslora", "pslora merged", "pslora merge") else sums
        for target, accumulator in room.adapters.past.items():
            assert off(accumulator.sum, wanted[target]) < 5e-3, (index, target)
        hand.adapters.live = None
        hand.adapters.replace(f"hand{index}", {t: w.clone() for t, w in wanted.items()})
        hand.adapters.begin("hand")


def penalised(name: str, X: Tensor, past: Tensor) -> Tensor:
    if name.startswith("pslora"):
        a = OWN[name]["a"]
        return (X.square() * (1 - (a * X).tanh() * (a * past).tanh())).sum()
    return (X.square() * (past.square() if name == "ella" else past)).sum()


def sampled_rows(stage: StageRun, examples: Any, count: int | None) -> list[Any]:
    order = torch.randperm(len(examples), generator=stage.rng("fisher")).tolist()
    return [examples[i] for i in sorted(order[:count])]


@pytest.mark.parametrize("name", narrowed(OWN, ["ella", "pslora", "pslora sum", "ewc-lora"]))
@pytest.mark.parametrize("kind", narrowed(["t5", "llama"], ["t5"]))
def test_three_stages_at_accumulation_3(name: str, kind: Kind) -> None:
    on_ranks(1, _steps, name, kind)


def _ranks(place: Place) -> dict[str, Tensor]:
    return each_learned(
        OWN,
        lambda name, kind: opened(place, name, kind=kind, **FEW),
        lambda room, outcome: vector({**outcome.parameters, **room.method.state().tensors}),
    )


@wide
def _chunks(place: Place) -> None:
    room, config = order_room(place, "ewc-lora", **{**THREE, "training__global_batch": 4}, method__fisher="batch")
    rows = opposed(0, rows=10)
    learn(room, config, 0, rows)
    hand, _ = order_room(place, "inclora")
    hand.adapters.live = None
    hand.adapters.replace("hand", {target: past.sum.clone() for target, past in room.adapters.past.items()})
    chunks = [rows.examples[first : first + 4] for first in (0, 4, 8)]
    for target, F in fisher_by_loop(hand, "t5", chunks, summed=False).items():  # type: ignore[arg-type]
        assert off(room.method.fisher[target], F) < 1e-3


def test_the_fisher_of_batches_is_a_mean_over_them_a_short_last_one_too() -> None:
    on_ranks(1, _chunks)


def test_a_slow_copy_that_would_answer_without_the_merge_is_refused() -> None:
    def check(**own: Any) -> None:
        config = RunConfig.model_validate({"method": {"name": "pslora", **own}, "options": {"slow_copy": {}}})
        check_method(config, make_method(config).plan(["a", "b"]))

    check(merge=False)
    with pytest.raises(UserError) as refused:
        check()
    assert str(refused.value) == (
        "options.slow_copy: pslora changes an update as it is folded, and the copy would answer without that; leave it "
        "out"
    )


def test_two_ranks_do_what_one_does() -> None:
    two_do_what_one_does(_ranks)


def _bf16(place: Place) -> None:
    for name in OWN:
        room, config = opened(place, name, bf16=True, training__epochs=3)
        for index in range(2):
            outcome = learn(room, config, index, opposed(index))
        assert outcome.losses[-1] < outcome.losses[0], name
        carried = [*outcome.parameters.values(), *room.method.state().tensors.values()]
        assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in carried)


@wide
def test_in_bf16_what_trains_and_is_carried_is_fp32() -> None:
    on_ranks(1, _bf16)


def _resumed(place: Place, folder: str, name: str) -> None:
    for straight, room, _ in restarted(lambda: opened(place, name, **DROPPED), folder):
        assert same(room.method.state(), straight.method.state())


@pytest.mark.parametrize("name", narrowed(OWN, ["pslora", "ewc-lora"]))
def test_restarted_at_every_stage_it_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    on_ranks(1, _resumed, str(tmp_path), name)


def _said(place: Place) -> list[str]:
    found = []
    for a in (1e-4, 8.0):
        room, config = order_room(place, "pslora", **THREE, method__a=a)
        for index in range(2):
            learn(room, config, index, opposed(index))
        found.append(room.method.said(None))
    return found


def test_pslora_says_where_signs_count_for_nothing() -> None:
    [[idle, fine]] = on_ranks(1, _said)
    assert idle.startswith("warning: a·|X| is at most ") and idle.endswith("set a larger method.a") and fine == ""


@pytest.mark.parametrize(
    ("name", "own", "said"),
    [
        (
            "pslora",
            {"max_gb": 5e-6},  # 4 (32 · 32 + 16 · 24) = 5632 bytes
            "adapter.target_modules: sums of past updates of 2 layers take 0.00563 MB, over method.max_gb 5e-06; name "
            "fewer layers, or set method.history=merged, or set a larger max_gb",
        ),
        (
            "ewc-lora",
            {"max_gb": 1.6e-5},
            "adapter.target_modules: F and gradients of 2 layers take 0.0169 MB, over method.max_gb 1.6e-05; name "
            "fewer layers, or set a larger max_gb",
        ),
    ],
)
def test_what_is_too_large_is_refused_before_the_start(name: str, own: dict[str, Any], said: str) -> None:
    made = RunConfig.model_validate({"method": {"name": name, **own}})
    method = make_method(made)
    assert method.check(made) is None
    with pytest.raises(UserError) as refused:
        method.check(made, SHAPES)
    assert str(refused.value) == said
    if name == "pslora":
        merged = RunConfig.model_validate({"method": {"name": name, **own, "history": "merged"}})
        assert make_method(merged).check(merged, SHAPES) is None and make_method(merged).grows(merged, SHAPES) == ""


def test_of_entries_of_equal_size_pslora_keeps_the_older() -> None:
    method, past = method_of("pslora"), torch.tensor([[1.0, -2.0, 3.0]])
    stage: Any = SimpleNamespace(
        live_update=lambda: {"a": torch.tensor([[-1.0, 2.5, -3.0]])}, past_update=lambda target: past
    )
    assert method.replacement(stage)["a"].tolist() == [[1.0, 2.5, 3.0]]
    stage.past_update = lambda target: None
    assert method.replacement(stage)["a"].tolist() == [[-1.0, 2.5, -3.0]]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("pslora", "loss", False),
        ("pslora", "merge", False),
        ("pslora", "history", "merged"),
        ("oliera", "order", 1),
        ("gorp", "full", ["q"]),
        ("slao", "fisher_beta", 0.5),
        ("ewc-lora", "fisher", "batch"),
        ("doc", "components", 3),
    ],
)
def test_what_holds_for_all_tasks_is_refused_for_one(name: str, key: str, value: Any) -> None:
    config = RunConfig.model_validate({"method": {"name": name}, "tasks": {"b": {f"method.{key}": value}}})
    with pytest.raises(UserError, match=f"^method.{key}: the same for all tasks; set it once$"):
        make_method(config).check(config)


@pytest.mark.parametrize("name", ["ella", "pslora", "ewc-lora"])
def test_a_pair_that_borrows_of_the_weight_is_refused(name: str) -> None:
    config = RunConfig.model_validate({"method": {"name": name}, "adapter": {"init": "pissa"}})
    with pytest.raises(UserError, match=f"^adapter.init=pissa: the pair begins .*{name} penalises B A as the update"):
        check_method(config, make_method(config).plan(["a", "b"]))


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("ella", {"lambda1": -1}), ("ella", {"lambda1": math.inf}), ("pslora", {"lambda1": -1}), ("pslora", {"a": 0}),
        ("pslora", {"a": math.nan}), ("pslora", {"history": "all"}), ("ewc-lora", {"lambda1": -1}),
        ("ewc-lora", {"gamma": 1.1}), ("ewc-lora", {"fisher_samples": 0}), ("ewc-lora", {"fisher": "row"}),
    ],
)  # fmt: skip
def test_settings_have_bounds(name: str, own: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(own))):
        make_method(RunConfig.model_validate({"method": {"name": name, **own}}))
