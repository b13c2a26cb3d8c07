"""Methods that add a penalty on a LoRA pair: the penalty and its gradient against the definition in fp64, whole steps
at accumulation 3, two ranks, bf16, and a restart at every stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from cl_runner.adapters.layers import Layers
from cl_runner.adapters.pairs import Pair
from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.clora.subspaces import leading, orthonormal_columns
from cl_runner.methods.protocol import Progress
from cl_runner.training.stage import StageRun
from tests.adapters.families import adapters_of, base_model, random_pair
from tests.breadth import in_turn, narrowed
from tests.distributed import on_ranks
from tests.methods.moments import moments_by_hand
from tests.methods.orders import learn, order_room
from tests.methods.ranks import FEW, each_learned, two_do_what_one_does
from tests.methods.restarted import DROPPED, restarted
from tests.methods.steps import LR, STEPS, THREE, Values, off, opposed, put, values, vector
from tests.stages import Kind, naive_loss

# Target → its A and B; the past pairs; the share of steps done; the target's W0 → the penalty by its definition.
Factors = dict[str, tuple[Tensor, Tensor]]
Definition = Callable[[Factors, Sequence[Pair], float, dict[str, Tensor]], Tensor]


def sparse_orth(now: Factors, past: Sequence[Pair], share: float, bases: dict[str, Tensor]) -> Tensor:
    total = torch.zeros(())
    for target, (A, B) in now.items():
        total = total + (1 - share) * 3.0 * (B @ A).abs().mean()
        for old in past:
            total = total + share * 2.0 * (old.A[target].to(A) @ A.T).square().mean()
    return total / len(now)


def projector(A: Tensor) -> Tensor:
    return A.T @ torch.linalg.inv(A @ A.T) @ A


def separate(now: Factors, past: Sequence[Pair], share: float, bases: dict[str, Tensor]) -> Tensor:
    """1 − d² / r; half the squared distance of projectors is d²."""
    total = torch.zeros(())
    for target, (A, _) in now.items():
        for old in past:
            distance = 0.5 * (projector(A) - projector(old.A[target].to(A))).square().sum()
            total = total + 0.7 * (1 - distance / len(A))
    return total / len(now)


def align(now: Factors, past: Sequence[Pair], share: float, bases: dict[str, Tensor]) -> Tensor:
    return 0.7 * len(past) - separate(now, past, share, bases)


def clora(now: Factors, past: Sequence[Pair], share: float, bases: dict[str, Tensor]) -> Tensor:
    """What is left of the columns of P one by one."""
    total = torch.zeros(())
    for target, (A, B) in now.items():
        P_in = orthonormal_columns(A.shape[1], 5, f"42/{target}/in").to(A)
        P_out = orthonormal_columns(len(B), 5, f"42/{target}/out").to(A)
        for column in range(5):
            total = total + 0.4 * (A @ P_in[:, column]).square().sum() + 0.4 * (P_out[:, column] @ B).square().sum()
    return total


def pego(N: int) -> Definition:
    def of(now: Factors, past: Sequence[Pair], share: float, bases: dict[str, Tensor]) -> Tensor:
        total = torch.zeros(())
        for target, (A, B) in now.items():
            r = len(A) // N
            each = [B[:, i * r : (i + 1) * r] @ A[i * r : (i + 1) * r] for i in range(N)]
            W0 = bases[target].to(A)
            for D in each:
                total = total + 0.01 * (W0 @ D.T).abs().sum()
            for one, two in combinations(each, 2):
                total = total + 0.01 * (one @ two.T).abs().sum()
        return total

    return of


# Name → settings, definition. What stands after a space tells variants apart.
CASES: dict[str, tuple[dict[str, Any], Definition]] = {
    "sparse-orth": ({"lambda1": 3.0, "lambda2": 2.0}, sparse_orth),
    "grassmann": ({"lambda1": 0.7}, separate),
    "grassmann align": ({"lambda1": 0.7, "goal": "align"}, align),
    "clora": ({"lambda1": 0.8, "k": 5}, clora),
    "pego": ({"lambda1": 0.01, "group": 2}, pego(2)),
    "pego one": ({"lambda1": 0.01, "group": 1}, pego(1)),
}
every_case = pytest.mark.parametrize("name", list(CASES))
# Those without a penalty go through what is the same for all.
OWN: dict[str, dict[str, Any]] = {
    **{name: own for name, (own, _) in CASES.items()},
    "clora data": {"lambda1": 0.1, "k": 5, "subspace": "data"}, "inflora": {"threshold": 0.9},
}  # fmt: skip


def after(stages: int, rank: int = 4, family: str = "qwen2", **more: Any) -> Layers:
    """Adapters at the stage after so many folded ones, with a random live pair."""
    adapters = adapters_of(base_model(family), family, r=rank, **more)
    for i in range(stages):
        adapters.fold(random_pair(adapters, f"s{i}", seed=i))
    adapters.begin("now")
    adapters.show(random_pair(adapters, "now", seed=99))
    return adapters


def method_of(name: str, **own: Any) -> Any:
    settings = {"name": name.split()[0], **CASES[name][0], **own}
    return make_method(RunConfig.model_validate({"adapter": {"r": 3}, "method": settings}))


def stage_of(adapters: Layers, step: int = 1) -> Any:
    bases = {target: past.base for target, past in adapters.past.items()}
    return SimpleNamespace(
        factors=adapters.groups, progress=Progress(step, 4, None), config=RunConfig(), device=torch.device("cpu"),
        base_weight=bases.__getitem__, named=adapters.named, start=adapters.start, index=len(adapters.folded),
    )  # fmt: skip


MIXED = {"ranks": {r"layers\.0\..*q_proj": 2, "v_proj": 6}, "alphas": {"q_proj": 2.0}}


@every_case
@pytest.mark.parametrize("stages", [1, 3, 9])
@pytest.mark.parametrize(
    ("family", "more"),
    [("qwen2", {}), ("t5", {}), ("gpt2", {}), ("qwen2", MIXED)],
    ids=["qwen2", "t5", "gpt2", "ranks by layer"],
)
def test_penalty_and_gradient_are_those_of_the_definition(
    name: str, stages: int, family: str, more: dict[str, Any]
) -> None:
    """Four rows each of nine stages are more than a layer has: sums of squares then come from the Gram matrix."""
    adapters = after(stages, family=family, **more)
    assert {group.A.shape[1] for group in adapters.groups()} == ({2, 4, 6} if more else {4})
    found = method_of(name).penalty(stage_of(adapters))
    assert found is not None and found.dtype == torch.float32 and found.shape == ()
    pair = adapters.pair()
    leaves = {
        t: (pair.A[t].double().requires_grad_(), pair.B[t].double().requires_grad_()) for t in adapters.layers
    }  # fmt: skip
    bases = {t: past.base.double() for t, past in adapters.past.items()}
    wanted = CASES[name][1](leaves, adapters.folded, 0.25, bases)
    assert float(wanted.detach()) > 0.01
    assert off(found.detach(), wanted.detach()) < 5e-6  # a sum of 7,000 absolute values in fp32
    parameters = adapters.parameters()
    ours = torch.autograd.grad(found, list(parameters.values()), allow_unused=True)
    theirs = torch.autograd.grad(wanted, [leaf for two in leaves.values() for leaf in two], allow_unused=True)
    assert any(g is not None for g in theirs)
    for mine, their in zip(ours, theirs, strict=True):
        assert (mine is None or not mine.any()) if their is None else off(mine, their) < 1e-5


@pytest.mark.parametrize(("N", "rank"), [(1, 4), (3, 6), (4, 4), (6, 6)])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_pegos_groups_of_any_size(N: int, rank: int, family: str) -> None:
    adapters = after(1, rank=rank, family=family)
    found = method_of("pego", group=N).penalty(stage_of(adapters))
    pair, parameters = adapters.pair(), adapters.parameters()
    leaves = {
        t: (pair.A[t].double().requires_grad_(), pair.B[t].double().requires_grad_()) for t in adapters.layers
    }  # fmt: skip
    wanted = pego(N)(leaves, [], 0.0, {t: past.base.double() for t, past in adapters.past.items()})
    assert off(found.detach(), wanted.detach()) < 5e-5  # up to 200,000 absolute values, added up in fp32
    ours = torch.autograd.grad(found, list(parameters.values()))
    theirs = torch.autograd.grad(wanted, [leaf for two in leaves.values() for leaf in two])
    assert all(off(mine, their) < 1e-5 for mine, their in zip(ours, theirs, strict=True))


@every_case
def test_without_weight_there_is_no_penalty_and_a_fresh_pair_has_a_finite_gradient(name: str) -> None:
    adapters = after(2)
    weights = [key for key in CASES[name][0] if key.startswith("lambda")]
    assert method_of(name, **dict.fromkeys(weights, 0)).penalty(stage_of(adapters)) is None
    adapters.begin("fresh", torch.Generator().manual_seed(0))
    found = method_of(name).penalty(stage_of(adapters))
    for gradient in torch.autograd.grad(found, list(adapters.parameters().values()), allow_unused=True):
        assert gradient is None or bool(gradient.isfinite().all())


def test_the_gradient_at_equal_spans_is_finite() -> None:
    adapters = after(1)
    adapters.show(Pair("now", 4, 1.0, {t: 2 * A for t, A in adapters.folded[0].A.items()}, adapters.pair().B))
    for name in ("grassmann", "grassmann align"):
        found = method_of(name).penalty(stage_of(adapters))
        assert float(found.detach()) == pytest.approx(0.7 if name == "grassmann" else 0, abs=1e-6)
        gradients = torch.autograd.grad(found, [p for n, p in adapters.parameters().items() if n.endswith("lora_A")])
        assert all(bool(g.isfinite().all()) and float(g.norm()) < 1e-4 for g in gradients)


def test_sparse_orth_moves_from_the_first_term_to_the_second() -> None:
    adapters = after(2)
    found = [float(method_of("sparse-orth").penalty(stage_of(adapters, step)).detach()) for step in range(4)]
    sparse = float(method_of("sparse-orth", lambda2=0).penalty(stage_of(adapters, 0)).detach())
    orthogonal = 4 / 3 * float(method_of("sparse-orth", lambda1=0).penalty(stage_of(adapters, 3)).detach())
    assert found == pytest.approx([sparse + step / 4 * (orthogonal - sparse) for step in range(4)], rel=1e-5)
    assert method_of("sparse-orth", lambda1=0).penalty(stage_of(adapters, 0)) is None


# Whole steps.


def opened(place: Place, name: str, **settings: Any) -> tuple[Any, Any]:
    own = {f"method__{key}": value for key, value in OWN[name].items()}
    return order_room(place, name.split()[0], **{**THREE, **own, **settings})


def _steps(place: Place, name: str, kind: Kind) -> None:
    room, config = opened(place, name, kind=kind)
    hand, _ = order_room(place, "inclora", kind=kind)
    bases = {target: past.base.clone() for target, past in hand.adapters.past.items()}
    for index in range(3):
        stage = StageRun(room, config, index)
        room.method.build(stage)
        stage.close()
        past, begun = list(room.adapters.folded), values(room)
        learn(room, config, index, opposed(index))
        ends: list[Values] = []
        for weight in (1.0, 0.0):
            put(hand, begun)
            hand.adapters.live = None
            hand.adapters._live("hand")
            parameters = hand.adapters.parameters()
            optimizer = torch.optim.AdamW(list(parameters.values()), lr=LR, weight_decay=0.0)
            for step in range(STEPS):
                now = {t: (parameters[f"{t}.lora_A"], parameters[f"{t}.lora_B"]) for t in bases}
                penalty = CASES[name][1](now, past, step / STEPS, bases)
                optimizer.zero_grad()
                (naive_loss(hand.adapters.model, kind, opposed(index).examples) + weight * penalty).backward()
                optimizer.step()
            ends.append(values(hand))
        pair = room.adapters.kept.get("abc"[index]) or room.adapters.folded[-1]
        ours = {f"{t}.lora_{f}": getattr(pair, f)[t] for t in bases for f in "AB"}
        assert off(vector(ours), vector(ends[0])) < 1e-3, index
        if index:
            assert off(vector(ours), vector(ends[1])) > 1e-2  # the penalty is felt
        if room.adapters.folded:
            hand.adapters.fold(room.adapters.folded[-1])


@pytest.mark.parametrize(("name", "kind"), in_turn(CASES, ["t5", "llama"]))
def test_steps_at_accumulation_3(name: str, kind: Kind) -> None:
    on_ranks(1, _steps, name, kind)


def _resumed(place: Place, folder: str, name: str) -> None:
    for _ in restarted(lambda: opened(place, name, **DROPPED), folder):
        pass


# Pairs of the past, what is kept in a state, A that is designed.
@pytest.mark.parametrize("name", narrowed(OWN, ["grassmann", "clora data", "inflora"]))
def test_restarted_at_every_stage_it_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    on_ranks(1, _resumed, str(tmp_path), name)


def _ranks(place: Place) -> dict[str, Tensor]:
    return each_learned(OWN, lambda name, kind: opened(place, name, kind=kind, **FEW))


def test_two_ranks_do_what_one_does() -> None:
    two_do_what_one_does(_ranks)


def _bf16(place: Place) -> None:
    for name in OWN:
        room, config = opened(place, name, bf16=True, training__epochs=3)
        for index in range(2):
            outcome = learn(room, config, index, opposed(index))
        assert outcome.losses[-1] < outcome.losses[0], name
        assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in outcome.parameters.values())


def test_in_bf16_what_trains_is_fp32() -> None:
    on_ranks(1, _bf16)


# Options, and what is refused.


def test_cloras_subspaces_are_orthonormal_and_hang_on_seed_layer_and_side_alone() -> None:
    P = orthonormal_columns(40, 7, "42/a/in")
    assert P.dtype == torch.float32 and P.shape == (40, 7)
    torch.testing.assert_close(P.T @ P, torch.eye(7), atol=1e-6, rtol=0)
    torch.manual_seed(5)
    assert torch.equal(orthonormal_columns(40, 7, "42/a/in"), P)
    for other in ("43/a/in", "42/b/in", "42/a/out"):
        assert float((orthonormal_columns(40, 7, other).T @ P).abs().max()) < 0.7
    flat = torch.stack([orthonormal_columns(6, 1, str(i))[:, 0] for i in range(400)])
    torch.testing.assert_close(flat.T @ flat / 400, torch.eye(6) / 6, atol=0.04, rtol=0)  # no direction is preferred
    assert float(flat.mean(0).abs().max()) < 0.1


def test_what_clora_asks_for_is_an_update_that_leaves_the_subspace_alone() -> None:
    """Where the penalty is 0, ΔW x = 0 for x in span P_in, and P_outᵀ ΔW = 0."""
    adapters = after(0)
    (method, stage), now = (method_of("clora"), stage_of(adapters)), adapters.pair()
    for target in adapters.layers:
        for factor, side in ((now.A[target].mT, "in"), (now.B[target], "out")):
            P = orthonormal_columns(len(factor), 5, f"42/{target}/{side}")
            factor -= P @ (P.T @ factor)
    adapters.show(now)
    assert float(method.penalty(stage).detach()) < 1e-10
    for target in adapters.layers:
        update = now.update(target)
        x, y = (
            orthonormal_columns(d, 5, f"42/{target}/{s}") for d, s in ((update.shape[1], "in"), (len(update), "out"))
        )
        assert float(update.norm()) > 0.1 and max(float((update @ x).norm()), float((y.T @ update).norm())) < 1e-5


def _from_data(place: Place, kind: Kind) -> None:
    """At the third stage: what changed in it, along eigenvectors of both past tasks' inputs, and of W0 times them."""
    room, config = opened(place, "clora data", kind=kind)
    bases = {target: past.base.double() for target, past in room.adapters.past.items()}
    penalty, seen, past = room.method.penalty, [], {target: torch.zeros(()) for target in bases}
    begun: Values = {}

    def spy(stage: Any) -> Any:
        found = penalty(stage)
        if found is None:
            seen.append(None)
            return None
        now, wanted = values(room), torch.zeros((), dtype=torch.float64)
        for target, moment in past.items():
            A, B = (now[name].double() - begun[name].double() for name in (f"{target}.lora_A", f"{target}.lora_B"))
            for factor, C in ((A, moment), (B.T, bases[target] @ moment @ bases[target].T)):
                wanted += 0.05 * (factor @ torch.linalg.eigh(C)[1][:, -5:]).square().sum()
        # At a stage's first step nothing has changed.
        seen.append(off(found.detach(), wanted) if stage.progress.step else float(found.detach()))
        assert not stage.progress.step or float(wanted) > 1e-4
        return found

    room.method.penalty = spy
    for index in range(3):
        begun = values(room)
        learn(room, config, index, opposed(index))
        past = {t: past[t] + moment for t, moment in moments_by_hand(room, kind, opposed(index).examples).items()}
    assert seen[:STEPS] == [None] * STEPS and max(seen[STEPS:]) < 1e-4
    assert len(room.method.moments) < len(bases)  # targets that share an input share its moments


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_cloras_subspace_may_come_from_past_inputs(kind: Kind) -> None:
    on_ranks(1, _from_data, kind)


def _kept(place: Place, kind: Kind) -> None:
    """Labels that contradict those of the task before, for the same inputs: the more is kept, the smaller the loss."""
    losses = []
    own: dict[str, Any] = {"method__k": 24, "training__epochs": 20, "training__lr": 0.03}
    for weight in (0.0, 30.0):
        room, config = opened(place, "clora data", kind=kind, method__lambda1=weight, **own)
        for index in range(2):
            learn(room, config, index, opposed(index))
            with torch.no_grad():
                losses.append(float(naive_loss(room.adapters.model, kind, opposed(0).examples)))
    learned, forgotten, again, kept = losses
    assert learned == again  # the first task has no penalty
    assert forgotten - learned > 0.1 and abs(kept - learned) < (forgotten - learned) / 5


@pytest.mark.parametrize("kind", narrowed(["t5", "llama"], ["llama"]))
def test_a_past_task_is_kept_by_cloras_penalty_from_data(kind: Kind) -> None:
    on_ranks(1, _kept, kind)


def test_leading_directions_without_energy_are_zero() -> None:
    x = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    P = leading((x.T @ x)[None], 5)[0]
    torch.testing.assert_close(P.T @ P, torch.diag(torch.tensor([1.0, 1, 1, 0, 0])), atol=1e-5, rtol=0)
    torch.testing.assert_close(x @ P @ P.T, x, atol=1e-5, rtol=1e-5)


def _stiefel(place: Place) -> None:
    room, config = opened(place, "grassmann", method__stiefel=True)
    seen = []
    after_step = room.method.after_step

    def spy(stage: Any) -> None:
        before = {name: p.detach().clone() for name, p in stage.parameters().items()}
        after_step(stage)
        for name, parameter in stage.parameters().items():
            if name.endswith("lora_B"):
                assert torch.equal(parameter, before[name])
                continue
            eye = torch.eye(len(parameter))
            torch.testing.assert_close(parameter @ parameter.T, eye, atol=1e-5, rtol=0)
            spanned = torch.linalg.lstsq(before[name].T.double(), parameter.detach().T.double())
            assert off(before[name].T.double() @ spanned.solution, parameter.detach().T) < 1e-5  # the same span
            seen.append(off(before[name], parameter.detach()))

    room.method.after_step = spy
    for index in range(2):
        learn(room, config, index, opposed(index))
    assert max(seen) > 1e-3 and len(seen) == 2 * (STEPS + 1) * len(room.adapters.layers)


def test_stiefel_keeps_the_rows_of_a_orthonormal_and_their_span() -> None:
    on_ranks(1, _stiefel)


def _angles(place: Place, **own: Any) -> list[tuple[dict[str, Any], list[float]]]:
    """Of each stage: the last row of the log, and SciPy's angles in degrees between its A and past ones."""
    room, config = opened(place, "grassmann", kind="llama", **own)
    found = []
    for index in range(3):
        row = learn(room, config, index, opposed(index)).rows[-1]
        *past, now = room.adapters.folded
        angles = [
            subspace_angles(now.A[target].double().numpy().T, old.A[target].double().numpy().T)
            for target in room.adapters.layers
            for old in past
        ]
        found.append((row, np.degrees(np.concatenate(angles)).tolist() if past else []))
    return found


def test_grassmann_logs_the_angles_to_past_spans() -> None:
    ((first, *later),) = on_ranks(1, _angles)
    ((*unweighted,),) = on_ranks(1, _angles, method__lambda1=0)  # past factors need not be there
    for row, _ in (first, *unweighted):
        assert not {"smallest_angle", "mean_angle"} & row.keys()
    for row, angles in later:
        assert row["smallest_angle"] == pytest.approx(min(angles), abs=1e-2)
        assert row["mean_angle"] == pytest.approx(sum(angles) / len(angles), abs=1e-2)
        assert 0 < row["smallest_angle"] < row["mean_angle"] < 90


def _spans_kept(place: Place) -> None:
    """Once, after the last step: another A, of the same span."""
    plain, config = opened(place, "grassmann")
    room, turned = opened(place, "grassmann", method__reorthogonalise={"how": "hard", "every": STEPS})
    for index in range(2):
        learn(plain, config, index, opposed(index))
        rows = learn(room, turned, index, opposed(index)).rows
        assert [row["step"] for row in rows if "reorthogonalised" in row] == [STEPS]
        if index == 0:
            for target, A in room.adapters.folded[0].A.items():
                torch.testing.assert_close(A @ A.T, torch.eye(len(A)), atol=1e-5, rtol=0)
                was = plain.adapters.folded[0].A[target]
                assert off(projector(A), projector(was)) < 1e-5 < 1e-2 < off(A, was)


def test_grassmann_may_be_put_back_to_orthonormal_rows_of_the_same_span() -> None:
    on_ranks(1, _spans_kept)
    both = {"name": "grassmann", "stiefel": True, "reorthogonalise": {"how": "hard"}}
    made = RunConfig.model_validate({"method": both})
    with pytest.raises(UserError) as refused:
        make_method(made).check(made)
    said = "method.reorthogonalise: method.stiefel=true puts A back after each step; leave one out"
    assert str(refused.value) == said


SHAPES = [(32, 32), (16, 24)]


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        (
            "grassmann",
            {"adapter": {"r": 24}},
            "adapter.r: 24 rows of A span all 24 inputs of a layer, and grassmann has no angle between such spans; set "
            "it smaller",
        ),
        (
            "clora",
            {"method": {"k": 16}},
            "method.k: 16 orthonormal columns leave nothing of a layer's 16 dimensions to learn in; set k to 15 or "
            "less",
        ),
        (
            "clora",
            {"method": {"k": 15, "max_gb": 6e-6}},
            # 15 (32 + 32 + 16 + 24) floats
            "method.k: P of 2 layers take 0.00624 MB, over method.max_gb 6e-06; set k smaller, or set a larger max_gb",
        ),
        (
            "clora",
            {"method": {"k": 4, "subspace": "data", "max_gb": 7e-6}},
            "method.subspace: moments and P of 2 layers take 0.00806 MB, over method.max_gb 7e-06; name fewer "
            "adapter.target_modules, or set a larger max_gb",
        ),
        (
            "pego",
            {"adapter": {"r": 6}},
            "method.group: 4 LoRAs of equal rank need an adapter.r that is a multiple of 4, not 6",
        ),
        (
            "inflora",
            {"adapter": {"r": 25}},
            "adapter.r: 25 directions of a layer's 24 inputs; set 24 or less",
        ),
        (
            "inflora",
            {"method": {"max_gb": 9e-6}},
            "adapter.target_modules: second moments and bases of 2 layers take 0.0192 MB, over method.max_gb 9e-06; "
            "name fewer layers, or set a larger max_gb",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_start(name: str, config: dict[str, Any], said: str) -> None:
    made = RunConfig.model_validate({**config, "method": {"name": name, **config.get("method", {})}})
    with pytest.raises(UserError) as refused:
        make_method(made).check(made, SHAPES)
    assert str(refused.value) == said
    if name != "pego":
        assert make_method(made).check(made) is None  # nothing to say before the shapes are known


def test_clora_may_take_all_dimensions_but_one_and_puts_no_other_factors_in_place_of_those_it_keeps() -> None:
    def check(**own: Any) -> None:
        made = RunConfig.model_validate({"method": {"name": "clora", **own}})
        make_method(made).check(made)
        make_method(made).check(made, SHAPES)

    check(k=15)
    check(k=4, reorthogonalise={"how": "hard"})
    with pytest.raises(UserError, match=r"^method.reorthogonalise: .* leave it out, or set subspace=random$"):
        check(k=4, reorthogonalise={"how": "hard"}, subspace="data")


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("sparse-orth", {"lambda1": -1}), ("sparse-orth", {"lambda2": -1}),
        ("grassmann", {"lambda1": -1}), ("grassmann", {"goal": "apart"}), ("grassmann", {"stiefel": 3}),
        ("clora", {"k": 0}), ("clora", {"lambda1": -1}), ("clora", {"subspace": "both"}), ("clora", {"max_gb": 0}),
        ("inflora", {"threshold": 0}), ("inflora", {"threshold": 1.1}), ("inflora", {"last_threshold": 0}),
        ("inflora", {"max_gb": 0}), ("pego", {"group": 0}), ("pego", {"lambda1": -1}),
        ("pego", {"reorthogonalise": {"how": "hard"}}),  # its blocks would mix
    ],
)  # fmt: skip
def test_settings_have_bounds(name: str, own: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(own))):
        make_method(RunConfig.model_validate({"method": {"name": name, **own}}))
