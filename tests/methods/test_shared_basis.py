"""Shared basis: its forward by the formula, what of it moves when, and how tasks are mixed, against naive sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from cl_runner.adapters.shared import Mixture, SharedBasis
from cl_runner.config import RunConfig
from cl_runner.errors import UserError
from cl_runner.maths.mixing import nearness, principal, shares
from cl_runner.methods import make_method
from cl_runner.place import Place
from cl_runner.plan import check_method
from cl_runner.stage import StageRun
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import LR, THREE, opposed
from tests.methods.test_terms import learned
from tests.stages import tiny_model

M, N, R, S = 5, 7, 2, 1.5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(term: SharedBasis) -> SharedBasis:
    """Every parameter random."""
    for number, parameter in enumerate(term.parameters()):
        parameter.data = drawn(*parameter.shape, seed=10 + number) + 0.5
    return term


X = drawn(3, 4, N, seed=1)


def test_forward_is_the_formula_in_every_form() -> None:
    U, A, mask = drawn(M, R), drawn(R, N, seed=2), (drawn(M, N, seed=3) > 0).float()
    C = drawn(6, N, seed=4)
    plain = filled(SharedBasis(A, M, S, basis=U, mixing=True))
    assert plain.B is not None and plain.alpha is not None and plain.U is not None
    whole = S * (plain.alpha * plain.U + plain.B) @ plain.A
    block = filled(SharedBasis(torch.cat([A, A]), M, S, basis=U, shared_trains=False))
    assert block.B is not None
    halves = S * (U @ block.A[:R] + block.B @ block.A[R:])
    first = filled(SharedBasis(A, M, S, basis=U, own=False))
    sparse = filled(SharedBasis(drawn(R, 6), M, S, basis=U, dictionary=C, own=False))
    masked = filled(SharedBasis(A, M, S, basis=U, mask=mask, shared_trains=False))
    assert masked.B is not None and first.U is not None and sparse.U is not None and sparse.C is not None
    wanted = {
        plain: whole,
        block: halves,
        first: S * first.U @ first.A,
        sparse: S * sparse.U @ (sparse.A @ sparse.C),
        masked: S * (mask * (U @ masked.A) + masked.B @ masked.A),
    }
    for term, update in wanted.items():
        assert torch.allclose(term(X, {}), X @ update.mT, atol=1e-5)
        assert torch.allclose(term.update(), update, atol=1e-5)
        pair = term.factors()
        assert (pair is None) == (term is masked)
        if pair is not None:
            assert torch.allclose(pair[1] @ pair[0], update, atol=1e-5)


def test_mixture_weighs_each_row() -> None:
    A, B = [drawn(R, N, seed=i) for i in (1, 2, 3)], [drawn(M, R, seed=i) for i in (4, 5, 6)]
    weights = torch.tensor([[1.0, 0.2, 0.8], [0.5, 1.0, 0.5], [0.0, 0.0, 1.0]])
    past = Mixture(A, B)
    naive = torch.stack([x @ sum(w * b @ a for w, a, b in zip(ws, A, B, strict=True)).mT for x, ws in zip(X, weights, strict=True)])  # type: ignore[union-attr]  # noqa: E501  # fmt: skip
    assert torch.allclose(past(X, {"mix": weights}), naive, atol=1e-5)
    assert torch.allclose(past(X, {}), X @ sum(b @ a for a, b in zip(A, B, strict=True)).mT, atol=1e-5)  # type: ignore[union-attr]
    term = filled(SharedBasis(drawn(R, N), M, S, past=past))
    assert torch.allclose(term(X, {"mix": weights}), X @ term.own().mT + naive, atol=1e-5)
    assert torch.allclose(term.update(), term.own() + past.update(), atol=1e-6)


def test_nearness_is_that_of_scipys_angles() -> None:
    tasks = [{f"A.{t}": drawn(R, N, seed=9 * i + j) for j, t in enumerate("xy")} for i in range(3)]
    found = nearness(tasks[0], tasks[1:])
    for value, other in zip(found, tasks[1:], strict=True):
        sizes = []
        for name in tasks[0]:
            angles = subspace_angles(tasks[0][name].double().numpy().T, other[name].double().numpy().T)
            sizes.append(1 - np.sqrt((np.sin(angles) ** 2).sum()) / np.sqrt(R))
        assert value == pytest.approx(np.mean(sizes), abs=1e-9)
    assert nearness(tasks[0], [{k: 3 * v for k, v in tasks[0].items()}]) == pytest.approx([1.0], abs=1e-6)
    assert shares([3.0, 1.0]).tolist() == [0.75, 0.25]
    assert shares([0.0, 0.0]).tolist() == [0.5, 0.5] and shares([]).tolist() == []


def test_principal_components() -> None:
    bases = [drawn(M, R, seed=i) for i in range(3)]
    U = principal(bases, R).double().numpy()
    both = np.concatenate([b.double().numpy() for b in bases], 1)
    values, vectors = np.linalg.eigh(both @ both.T)
    naive = vectors[:, ::-1][:, :R] * np.sqrt(values[::-1][:R] / 3)
    assert np.allclose(np.abs(U), np.abs(naive), atol=1e-5)


def _moves(place: Place, **own: Any) -> list[tuple[dict[str, Tensor], list[float]]]:
    """After each of three stages: what is shared, and the loss of each step."""
    room, config = order_room(place, "shared-basis", **{**THREE, "training__clip": 0.0, **own})
    found = []
    for index in range(3):
        outcome = learn(room, config, index, opposed(index))
        found.append((dict(room.method.shared), outcome.losses))
    return found


def test_the_basis_learns_at_first_and_slowly_later() -> None:
    (slow,) = on_ranks(1, _moves)
    (frozen,) = on_ranks(1, _moves, method__shared_lr=0.0)
    for name in frozen[0][0]:
        assert bool(frozen[0][0][name].any())
        assert torch.equal(frozen[0][0][name], frozen[2][0][name])
        step = (slow[1][0][name] - slow[0][0][name]).abs().max()  # Adam: at most about a rate a step
        assert 0 < step < 2 * 0.1 * LR * THREE["training__epochs"]
        assert step < 0.5 * slow[0][0][name].abs().max()
    assert slow[0][1] == frozen[0][1] != slow[1][1]
    for _, losses in slow:
        assert losses[-1] < losses[0]


def _begins(place: Place, **own: Any) -> list[float]:
    """The largest entry of a new stage's own update before its first step."""
    room, config = order_room(place, "shared-basis", **{**THREE, **own})
    found = []
    for index in range(3):
        if index:
            stage = StageRun(room, config, index)
            room.method.build(stage)
            terms = room.adapters.terms.of  # type: ignore[union-attr]
            found.append(max(float(term.own().detach().abs().max()) for term in terms.values()))
            stage.close()
        learn(room, config, index, opposed(index))
    return found


@pytest.mark.parametrize(
    "own",
    [{}, {"method__form": "block"}, {"method__mixing": "similarity"}, {"method__sparse": 0.1}, {"method__pca": 2}],
    ids=str,
)
def test_every_task_begins_at_what_was_there(own: dict[str, Any]) -> None:
    assert on_ranks(1, _begins, **own) == [[0.0, 0.0]]


def _mixed(place: Place) -> None:
    """Each task's logits are those of the base with the weighted sum written into its weights."""
    room, config = order_room(place, "shared-basis", **{**THREE, "method__mixing": "similarity", "method__every": 2})
    method: Any = room.method
    for index in range(3):
        stage = learn(room, config, index, opposed(index)).stage
    assert method.tasks == ["a", "b", "c"] and len(room.adapters.folded) == 0
    updates = [{t: pair[f"B.{t}"] @ pair[f"A.{t}"] for t in room.adapters.past} for pair in method.pairs]
    answers = []
    for i, task in enumerate(method.tasks):
        near = nearness(method.pairs[i], [method.pairs[j] for j in range(3) if j != i])
        assert sum(near) > 0
        weights = [s / sum(near) for s in near]
        weights.insert(i, 1.0)
        assert method.weights(task).tolist() == pytest.approx(weights, abs=1e-6)
        model = tiny_model("t5")
        for target in room.adapters.past:
            total = sum(w * one[target] for w, one in zip(weights, updates, strict=True))
            model.get_submodule(target).weight.data += total
        batch = stage.make_batch(opposed(i).examples, [task] * 6, [1.0] * 6)
        with torch.no_grad():
            ours = stage.forward(batch)
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            naive = model(**inputs, decoder_input_ids=batch.decoder_input_ids).logits
        assert torch.allclose(ours, naive, atol=1e-4)
        answers.append(ours)
    assert not torch.allclose(answers[0][:, 0], answers[1][:, 0], atol=1e-2)  # the same inputs, other tasks


def test_each_task_is_answered_by_its_own_mixture() -> None:
    on_ranks(1, _mixed)


def _options(place: Place) -> None:
    room, config = order_room(place, "shared-basis", **{**THREE, "method__non_negative": True})
    for index in range(2):
        learn(room, config, index, opposed(index))
    assert all(bool((U >= 0).all()) and bool(U.any()) for U in room.method.shared.values())  # type: ignore[attr-defined]
    assert all(bool((update >= 0).all()) for update in learned(room).values())

    room, config = order_room(place, "shared-basis", **{**THREE, "method__support": 0.25})
    sizes: dict[str, Tensor] = {}
    for index in range(2):
        before = {t: 0 if past.sum is None else past.sum.clone() for t, past in room.adapters.past.items()}
        learn(room, config, index, opposed(index))
        for target, total in learned(room).items():
            update = (total - before[target]).abs()
            size = update / update.norm()
            sizes[target] = size if target not in sizes else sizes[target].minimum(size)
    stage = StageRun(room, config, 2)
    room.method.build(stage)
    assert room.adapters.terms is not None
    for target, term in room.adapters.terms.of.items():
        mask: Any = term.mask
        assert int(mask.sum()) == round(0.25 * mask.numel())
        assert float(sizes[target][mask > 0].min()) >= float(sizes[target][mask == 0].max()) - 1e-6
    stage.close()

    room, config = order_room(place, "shared-basis", **{**THREE, "method__sparse": 0.3})
    stage = StageRun(room, config, 0)
    room.method.build(stage)
    terms: Any = room.adapters.terms
    both = [getattr(term, name).detach().abs().mean() for term in terms.of.values() for name in "AC"]
    assert float(room.method.penalty(stage).detach()) == pytest.approx(0.3 * float(torch.stack(both).mean()), rel=1e-6)  # type: ignore[union-attr]
    stage.close()


def test_options() -> None:
    on_ranks(1, _options)


@pytest.mark.parametrize(
    ("own", "word"),
    [
        ({"mixing": "similarity", "support": 0.5}, "method.support"),
        ({"sparse": 0.1, "form": "block"}, "method.sparse"),
    ],
)
def test_refused(own: dict[str, Any], word: str) -> None:
    config = RunConfig.model_validate({"method": {"name": "shared-basis", **own}})
    with pytest.raises(UserError, match=word):
        check_method(config, make_method(config).plan(["a"]))
    wide = RunConfig.model_validate({"method": {"name": "shared-basis"}, "adapter": {"r": 33}})
    with pytest.raises(UserError, match=r"adapter\.r: 33 is more than the 32"):
        check_method(wide, make_method(wide).plan(["a"]), [(32, 64)])
