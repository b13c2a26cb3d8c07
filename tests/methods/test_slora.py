"""SLoRA: the cut against a whole SVD, c against the overlap direction by direction, and inclora where all is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_runner.adapters.pairs import Pair
from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.slora.cutting import choices, chosen, cut, leading_outputs, spectrum
from cl_runner.training.stage import StageRun
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import LR, STEPS, THREE, off, opposed, put, values, vector
from tests.stages import Kind, naive_loss


def naive_choice(W0: Tensor, D: np.ndarray[Any, Any], rank: int) -> int:
    """Angles one at a time: the mean squared cosine of the kept directions with span U0_r."""
    U0 = np.linalg.svd(W0.double().numpy())[0][:, :rank]
    U = np.linalg.svd(D)[0]
    best = (-1.0, 0)
    for c in {max(1, round(rank * tenths / 10)) for tenths in range(1, 11)}:
        total = 0.0
        for i in range(c):
            for j in range(U0.shape[1]):
                total += float(U[:, i] @ U0[:, j]) ** 2
        best = max(best, (total / c, c))
    return best[1]


def _cut(place: Place, kind: Kind, keep: float | None) -> None:
    room, config = order_room(place, "slora", kind=kind, **THREE, adapter__r=5, method__keep=keep)
    seen: list[Pair] = []
    method, end = room.method, room.method.end_task
    bases = {target: past.base.clone() for target, past in room.adapters.past.items()}

    def spy(stage: Any) -> None:
        seen.append(room.adapters.pair())
        end(stage)

    method.end_task = spy
    for index in range(2):
        stage = learn(room, config, index, opposed(index)).stage
        pair = room.adapters.folded[-1]
        cut = 0
        for target in room.adapters.layers:
            D = (seen[-1].B[target].double() @ seen[-1].A[target].double()).numpy()
            c = naive_choice(bases[target], D, 5) if keep is None else round(5 * keep)
            assert method.kept[target] == c
            ours = (pair.B[target].double() @ pair.A[target].double()).numpy()
            sizes = np.linalg.svd(D, compute_uv=False)
            # Eckart and Young: no matrix of rank c is nearer, and the distance is what was left out.
            assert np.linalg.matrix_rank(ours, tol=1e-6 * sizes[0]) == c
            assert np.linalg.norm(D - ours) == pytest.approx(np.sqrt((sizes[c:] ** 2).sum()), rel=1e-4, abs=1e-6)
            assert pair.A[target].shape == seen[-1].A[target].shape
            if c == 5:
                assert torch.equal(pair.A[target], seen[-1].A[target])
            else:
                cut += 1
                assert not pair.A[target][c:].any() and not pair.B[target][:, c:].any()
        assert cut > 0
        each = list(method.kept.values())
        mean = sum(each) / len(each)
        assert method.said(stage) == f"updates cut to rank {mean:.1f} (mean over layers; {min(each)} to {max(each)})"


@pytest.mark.parametrize(("kind", "keep"), [("t5", None), ("llama", None), ("t5", 0.4)])
def test_the_nearest_of_the_chosen_rank(kind: Kind, keep: float | None) -> None:
    on_ranks(1, _cut, kind, keep)


def _steps(place: Place) -> None:
    """Steps are inclora's, on what the cut has left: by hand."""
    room, config = order_room(place, "slora", kind="llama", **THREE, method__keep=0.5)
    hand, _ = order_room(place, "inclora", kind="llama")
    for index in range(2):
        stage = StageRun(room, config, index)
        room.method.build(stage)
        stage.close()
        start = values(room)
        if index:
            hand.adapters.live = None
            hand.adapters.replace("cut", {target: past.sum.clone() for target, past in room.adapters.past.items()})
            hand.adapters.begin("hand")
        learn(room, config, index, opposed(index))
        put(hand, start)
        parameters = hand.adapters.parameters()
        optimizer = torch.optim.AdamW(list(parameters.values()), lr=LR, weight_decay=0.0)
        for _ in range(STEPS):
            optimizer.zero_grad()
            naive_loss(hand.adapters.model, "llama", opposed(index).examples).backward()
            optimizer.step()
        for target in room.adapters.layers:
            D = parameters[f"{target}.lora_B"].detach().double() @ parameters[f"{target}.lora_A"].detach().double()
            U, S, V = torch.linalg.svd(D)
            pair = room.adapters.folded[index]
            assert off(pair.B[target] @ pair.A[target], S[0] * U[:, :1] @ V[:1]) < 5e-3
    assert len(room.adapters.folded) == 2


def test_steps_by_hand_and_then_the_cut() -> None:
    on_ranks(1, _steps)


def _all_kept(place: Place) -> None:
    ends = []
    for name, own in (("slora", {"method__keep": 1.0}), ("inclora", {})):
        room, config = order_room(place, name, **THREE, **own)
        for index in range(3):
            stage = learn(room, config, index, opposed(index)).stage
        assert room.method.said(stage) == ""
        ends.append(vector({target: past.sum for target, past in room.adapters.past.items()}))
    assert torch.equal(*ends)


def test_with_the_whole_rank_it_is_inclora_to_the_bit() -> None:
    on_ranks(1, _all_kept)


def _nothing(place: Place) -> None:
    room, config = order_room(place, "slora", training__epochs=0)
    learn(room, config, 0)
    assert all(not past.sum.any() for past in room.adapters.past.values())


def test_a_stage_without_a_step_has_nothing_to_cut() -> None:
    on_ranks(1, _nothing)


def test_an_update_of_less_than_a_tenth_of_its_rank() -> None:
    dice = torch.Generator().manual_seed(0)
    A, B = torch.randn(40, 50, generator=dice), torch.zeros(60, 40)
    B[:, :2] = torch.randn(60, 2, generator=dice)
    found = spectrum(A, B)
    c = chosen(found[0], leading_outputs(torch.randn(60, 50, generator=dice), 40), 40)
    assert len(found[1]) == c == 2
    less_A, less_B = cut(A, B, found, c)
    assert off(less_B @ less_A, B @ A) < 1e-5


def test_shares_of_the_rank() -> None:
    assert choices(1) == [1] and choices(3) == [1, 2, 3] and choices(8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert choices(64) == [6, 13, 19, 26, 32, 38, 45, 51, 58, 64]


def test_what_cannot_work_is_refused_before_the_start() -> None:
    made = RunConfig.model_validate({"adapter": {"init": "pissa"}, "method": {"name": "slora"}})
    with pytest.raises(UserError) as refused:
        make_method(made).check(made)
    assert str(refused.value) == (
        "adapter.init=pissa: the pair begins with a part of the weight, and slora cuts B A, which is no update then; "
        "leave it out"
    )


@pytest.mark.parametrize("keep", [0, 1.1, -0.5])
def test_settings_have_bounds(keep: float) -> None:
    with pytest.raises(ValueError, match="keep"):
        make_method(RunConfig.model_validate({"method": {"name": "slora", "keep": keep}}))
