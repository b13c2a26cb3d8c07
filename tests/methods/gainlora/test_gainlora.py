"""GainLoRA: gates against a loop over rows, what past prompts find, and whole steps against written-out weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.gainlora.gating import of_length, off_past, openness, path
from cl_runner.methods.protocol import Source
from cl_runner.methods.shared.gpm import Memory
from cl_runner.training.compatibility import check_method
from tests.breadth import wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import LR, THREE, Values, off, opposed, values
from tests.stages import Kind, naive_loss, tiny_config, tiny_model

GATE = ("G1", "G2", "k")


def watched(room: Any, config: Any, index: int) -> tuple[list[Values], list[float]]:
    """A stage of opposed rows: parameters as its task has begun and after each step, and its losses."""
    method, found = room.method, []

    def spying(hook: Any) -> Any:
        def spy(stage: Any) -> None:
            hook(stage)
            found.append(values(room))

        return spy

    names = ("begin_task", "after_step")
    for name in names:
        setattr(method, name, spying(getattr(method, name)))
    losses = learn(room, config, index, opposed(index)).losses
    for name in names:
        delattr(method, name)
    return found, losses


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def one_gate(gate: Any, p0: Tensor, output: str) -> Tensor:
    """a of one gate for one prompt."""
    p2 = silu(gate["G2"] @ silu(gate["G1"] @ p0))
    dot = (gate["k"] * p2).sum()
    c = 4 * dot / (gate["k"].square().sum().sqrt() * p2.square().sum().sqrt()) if output == "cosine" else dot
    return (2 / (1 + torch.exp(-c)) - 1).abs()


def some_gate(T: int, d: int = 6, h: int = 5) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(0)
    shapes = {"G1": (T, h, d), "G2": (T, d, h), "k": (T, d)}
    return {name: torch.randn(*shape, generator=dice, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("output", ["cosine", "linear"])
def test_gates_and_their_gradients_are_those_of_a_loop(output: Any) -> None:
    gate = {name: value.requires_grad_() for name, value in some_gate(3).items()}
    p0 = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = openness(gate, p0, output)
    wanted = torch.stack(
        [torch.stack([one_gate({n: v[t] for n, v in gate.items()}, row, output) for t in range(3)]) for row in p0]
    )
    torch.testing.assert_close(found, wanted)
    assert found.shape == (4, 3) and bool(((found >= 0) & (found < 1)).all())
    g = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours, theirs = (torch.autograd.grad((a * g).sum(), list(gate.values())) for a in (found, wanted))
    for mine, naive in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, naive)


def _shut(place: Place, renormalise: bool) -> list[float]:
    """How open the second gate is to what lies in the memories: as it begins, and after its steps."""
    settings = {"method__renormalise": renormalise, "method__threshold": 0.9, "training__weight_decay": 0.1}
    room, config = order_room(place, "gainlora", **{**THREE, **settings})
    learn(room, config, 0, opposed(0))
    memories, method = dict(room.method.memories), room.method
    M = {name: _dense(memories[name]) for name in GATE}
    seen, _ = watched(room, config, 1)
    assert len(seen) == 5
    dice = torch.Generator().manual_seed(3)
    x = torch.randn(50, 32, generator=dice, dtype=torch.float64) @ M["G1"]
    first = {name: method.router[name][:1].double() for name in GATE}
    found = []
    for at in seen:
        gate = {name: at[name][None].double() for name in GATE}
        # p1 of such inputs is as the last gate has it; what of it is in M2 goes on, and so for p2.
        changes = [gate["G1"] - first["G1"], gate["G2"] - first["G2"]]
        p1 = path(first, x)[0] @ M["G2"]
        p2 = silu(p1 @ first["G2"].mT) @ M["k"]
        moved = [float((changes[0] @ x.mT).norm() / x.norm()), float((p1 @ changes[1].mT).norm() / p1.norm())]
        shut = float(torch.nn.functional.cosine_similarity(gate["k"], p2[0], dim=-1).abs().max())
        found.append(max(*moved, shut))
        for name, change in (("G1", changes[0]), ("G2", changes[1])):
            assert at is seen[0] or float(change.norm()) > 1e-2, name
    return found


def _dense(memory: Memory) -> Tensor:
    """M Mᵀ."""
    inside = memory.basis @ memory.basis.mT
    return torch.eye(len(inside), dtype=inside.dtype) - inside if memory.free else inside


def test_past_prompts_find_a_new_gate_shut_after_any_steps() -> None:
    [found] = on_ranks(1, _shut, False)
    assert max(found) < 1e-5
    [found] = on_ranks(1, _shut, True)
    assert found[0] < 1e-5 < 1e-2 < found[-1]  # which the official code's rows of their former length give up


# Real rows, with nothing of the method's but what it leaves: prompts' embeddings by hand, spans by SVD.


def prompts(index: int, kind: Kind = "t5") -> Tensor:
    """The mean embedding of each row's prompt (b, d), fp64."""
    table = tiny_model(kind).get_input_embeddings().weight.detach().double()
    return torch.stack([table[torch.tensor(e.source)].mean(0) for e in opposed(index).examples])


def read_by(gate: Any, p0: Tensor) -> dict[str, Tensor]:
    """What G1, G2 and k of one gate read of prompts (b, ·)."""
    p1 = silu(p0 @ gate["G1"].double().T)
    return {"G1": p0, "G2": p1, "k": silu(p1 @ gate["G2"].double().T)}


def _real(place: Place) -> None:
    """At ε 1 real past prompts find each new gate shut; k begins as the first direction of the rows off the past."""
    room, config = order_room(place, "gainlora", **THREE, method__threshold=1.0)
    learn(room, config, 0, Source(opposed(0).examples[:3], ["a"] * 3))
    router = {name: value[0].clone() for name, value in room.method.router.items()}
    past, own = prompts(0)[:3], prompts(1)
    seen, _ = watched(room, config, 1)
    for at in seen:
        assert max(float(one_gate({n: at[n].double() for n in GATE}, p, "cosine")) for p in past) < 1e-5
    assert min(float(one_gate({n: seen[-1][n].double() for n in GATE}, p, "cosine")) for p in own[3:]) > 0.1
    held = torch.linalg.svd(read_by(router, past)["k"].T)[0][:, :3]
    mine = read_by(router, own)["k"]
    moment = mine.T @ mine / len(mine)
    first = torch.linalg.svd(moment - held @ (held.T @ moment))[0][:, 0]
    k = seen[0]["k"].double()
    assert float((k @ first).abs() / k.norm()) > 1 - 1e-5


def test_real_past_prompts_find_a_new_gate_shut_and_k_begins_with_what_is_new() -> None:
    on_ranks(1, _real)


def _rank(moment: Tensor, held: Tensor, share: float) -> Tensor:
    """``held`` (n, k) and the fewest leading directions off it that leave 1 − share of the moment's squares."""
    rest = moment - held @ (held.T @ moment)
    U, S, _ = torch.linalg.svd(rest)
    count = 0
    while float(S[count:].square().sum() / moment.square().sum()) > 1 - share:
        count += 1
    return torch.cat([held, U[:, :count]], 1)


def _memories(place: Place) -> None:
    """What is remembered after two tasks, its ε on the way to 1; of the first layers' input by an ε of its own."""
    first = {"G1": 0.9, "G2": 0.9, "k": 0.9, "x": 0.6}
    room, config = order_room(place, "gainlora", **THREE, method__threshold=0.9, method__input_threshold=0.6)
    model = tiny_model("t5")
    norm, table = model.encoder.block[0].layer[0].layer_norm, model.get_input_embeddings()
    held: dict[str, Tensor] = {}
    ranks = []
    for index in range(2):
        own = opposed(index).examples[3 * index :]
        learn(room, config, index, Source(own, ["ab"[index]] * len(own)))
        gate = {name: value[index] for name, value in room.method.router.items()}
        rows = read_by(gate, prompts(index)[3 * index :])
        with torch.no_grad():
            rows["x"] = torch.cat([norm(table(torch.tensor(e.source))) for e in own]).double()
        for name, x in rows.items():
            before = held.get(name, torch.zeros(x.shape[1], 0, dtype=torch.float64))
            held[name] = _rank(x.T @ x / len(x), before, first[name] + (1 - first[name]) * index / 3)
        ours = {**room.method.memories, "x": room.method.memories["encoder.block.0.layer.0.SelfAttention.q"]}
        for name, basis in held.items():
            torch.testing.assert_close(_dense(ours[name]), basis @ basis.T, rtol=1e-4, atol=1e-4)
        ranks.append({name: basis.shape[1] for name, basis in held.items()})
    assert all(ranks[1][name] > ranks[0][name] for name in held), ranks


def test_memories_are_those_of_real_rows_by_hand() -> None:
    on_ranks(1, _memories)


def test_a_change_off_the_past_and_a_length() -> None:
    dice = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 2, generator=dice))[0]
    start, now = torch.randn(4, 6, generator=dice), torch.randn(4, 6, generator=dice)
    for memory in (Memory(basis), Memory(torch.linalg.qr(basis, mode="complete")[0][:, 2:], free=True)):
        found = off_past(start, now, memory)
        assert float(((found - start) @ basis).abs().max()) < 1e-6
        kept = torch.eye(6) - basis @ basis.mT
        torch.testing.assert_close(found, start + (now - start) @ kept)
        torch.testing.assert_close(off_past(start[0], now[0], memory), found[0])
    torch.testing.assert_close(of_length(start, now).norm(dim=1), now.norm(dim=1))
    torch.testing.assert_close(of_length(start[0], now[0]) / now[0].norm(), start[0] / start[0].norm())


# Whole steps.

CASES: dict[str, dict[str, Any]] = {
    "inflora": {"method__input_threshold": 0.9},
    "olora": {"method__branch": "olora", "method__lambda1": 0.02, "method__gate": "linear", "method__hidden": 7},
    "renormalised": {"method__renormalise": True, "method__branch": "olora", "method__lambda1": 0.0},
    "centred": {"method__centred": True, "method__input_threshold": 0.9},
}


def by_hand(kind: Kind, method: Any, start: Values, index: int, scales: dict[str, float], count: int) -> Values:
    """A stage's parameters at its end: each row by a model whose weights are written out for it, torch's AdamW.

    ``method`` is as it was before the stage; ``start`` has what trains as the stage began.
    """
    model, config = tiny_model(kind), method.config
    W0 = {t: model.get_submodule(t).weight.detach().clone() for t in scales}
    table = model.get_input_embeddings().weight.detach()
    now = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    trains = {n: p for n, p in now.items() if not (config.branch == "inflora" and n.endswith(".A"))}
    optimizer = torch.optim.AdamW(list(trains.values()), lr=LR, weight_decay=0.0)
    own = opposed(index).examples
    centre = prompts(0, kind).mean(0).float() if config.centred else 0.0
    tokens = sum(len(example.target) for example in own)
    before = dict(start)
    for _ in range(count):
        total = torch.zeros(())
        for example in own:
            p0 = torch.stack([table[i] for i in example.source]).mean(0) - centre
            gates = [{n: method.router[n][i] for n in GATE} for i in range(index)] + [{n: now[n] for n in GATE}]
            a = [one_gate(gate, p0, config.gate) for gate in gates]
            weights = {}
            for t, W in W0.items():
                delta = a[-1] * scales[t] * now[f"{t}.B"] @ now[f"{t}.A"]
                for i in range(index):
                    A, B = method.pairs[t]
                    delta = delta + a[i] * B[:, 2 * i : 2 * i + 2] @ A[2 * i : 2 * i + 2]
                weights[f"{t}.weight"] = W + delta

            def answer(weights: Any = weights, **inputs: Any) -> Any:
                return torch.func.functional_call(model, weights, (), inputs)

            total = total + naive_loss(answer, kind, [example]) * len(example.target) / tokens
        if config.branch == "olora":
            for t in W0:
                for old in method.pairs[t][0] if index else ():
                    total = total + config.lambda1 * (now[f"{t}.A"] @ old).abs().sum()
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for name in GATE if index else ():
                stepped = now[name].clone()
                off_it = torch.eye(stepped.shape[-1]) - _dense(method.memories[name]).float()
                now[name].copy_(before[name] + (stepped - before[name]) @ off_it)
                if config.renormalise:
                    for row, like in zip(torch.atleast_2d(now[name]), torch.atleast_2d(stepped), strict=True):
                        row.mul_(like.norm() / row.norm())
        before = {name: value.detach().clone() for name, value in now.items()}
    return {name: value.detach() for name, value in now.items()}


def _steps(place: Place, kind: Kind, case: str) -> list[float]:
    room, config = order_room(place, "gainlora", kind=kind, **{**THREE, **CASES[case]})
    found = []
    for index in range(3 if kind == "t5" else 2):
        before = make_method(config)
        before.load_state(_copied(room.method.state()))
        (start, *_, ours), _ = watched(room, config, index)
        scales = dict.fromkeys(room.adapters.past, 2.0)
        wanted = by_hand(kind, before, start, index, scales, 4)
        assert any(off(ours[name], start[name]) > 0.1 for name in wanted)
        found.append(max(off(ours[name], wanted[name]) for name in wanted))
        fixed = [off(ours[n], start[n]) for n in ours if n.endswith(".A")]
        assert (max(fixed) == 0) == (before.config.branch == "inflora")
    return found


def _copied(state: Any) -> Any:
    return type(state)({name: value.clone() for name, value in state.tensors.items()}, state.json)


@pytest.mark.parametrize(
    ("kind", "case", "ranks"),
    [
        ("t5", "inflora", 1),
        ("llama", "olora", 2),
        ("t5", "centred", 2),
        pytest.param("t5", "renormalised", 1, marks=wide),
    ],
)
def test_steps_against_a_loop(kind: Kind, case: str, ranks: int) -> None:
    found = on_ranks(ranks, _steps, kind, case)[0]
    assert len(found) > 1 and max(found) < 5e-3, found


def _begins(place: Place) -> None:
    room, config = order_room(place, "gainlora", **THREE)
    starts = []
    for index in range(2):
        before = dict(room.method.memories)
        starts.append(watched(room, config, index)[0][0])
        for group in ("encoder.block.0.layer.0.SelfAttention.q",) if index else ():
            A = starts[-1][f"{group}.A"].double()
            assert float((A @ _dense(before[group])).abs().max()) < 1e-6  # off past inputs
            torch.testing.assert_close(A @ A.mT, torch.eye(2, dtype=torch.float64) / 3)
    router = room.method.router
    for name in ("G1", "G2"):
        assert torch.equal(starts[1][name], router[name][0])
    k = starts[1]["k"]
    assert math.isclose(float(k.norm()), (32 / 3) ** 0.5, rel_tol=0.3)  # of a draw from U(-1, 1)
    assert {name: tuple(value.shape) for name, value in router.items()} == {
        "G1": (2, 100, 32), "G2": (2, 32, 100), "k": (2, 32),
    }  # fmt: skip


def test_a_gate_begins_where_the_last_one_ended_and_off_past_prompts() -> None:
    on_ranks(1, _begins)


def _without_room(place: Place) -> None:
    """Past prompts have left no direction: k stays as drawn, and the stage learns all the same."""
    room, config = order_room(place, "gainlora", **THREE)
    learn(room, config, 0, opposed(0))
    room.method.memories["k"] = Memory(torch.zeros(32, 0, dtype=torch.float64), free=True)
    (start, *_, end), losses = watched(room, config, 1)
    assert losses[-1] < losses[0] and bool(start["k"].any())
    torch.testing.assert_close(end["k"], start["k"])


def test_where_no_direction_is_left() -> None:
    on_ranks(1, _without_room)


def test_what_cannot_work_is_refused() -> None:
    def check(shapes: Any = None, **settings: Any) -> None:
        room, config = order_room(Place(), "gainlora", "abc", **settings)
        check_method(config, room.order, shapes)

    with pytest.raises(UserError, match=r"^adapter.r: 65 directions of a layer's 64 inputs; set 64 or less$"):
        check([(128, 64)], adapter__r=65)
    check([(128, 64)], adapter__r=65, method__branch="olora")
    moments = r"^adapter.target_modules: second moments and bases of 100 layers take 20.1 GB, over method.max_gb"
    with pytest.raises(UserError, match=moments):
        check([(4096, 4096)] * 100)
    for key, value in {"threshold": 0.0, "input_threshold": 1.1, "hidden": 0, "lambda1": -1, "branch": "x"}.items():
        with pytest.raises(ValueError, match=key):
            make_method(tiny_config(method__name="gainlora", **{f"method__{key}": value}))
    room, config = order_room(Place(), "gainlora")
    config.tasks = {"a": {"method.branch": "olora"}}
    with pytest.raises(UserError, match=r"^method.branch: the same for all tasks; set it once$"):
        check_method(config, room.order)
