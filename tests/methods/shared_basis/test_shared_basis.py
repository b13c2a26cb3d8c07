"""Shared basis: its forward by the formula, what of it moves when, and how tasks are mixed, against naive sums."""

from __future__ import annotations

import json
import re
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from scipy.linalg import subspace_angles
from torch import Tensor

from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.shared.limits import size
from cl_runner.methods.shared_basis import mixing
from cl_runner.methods.shared_basis.mixing import nearness, principal, shares, spans
from cl_runner.methods.shared_basis.terms import Mixture, SharedBasis
from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.training.checkpoint import save_stage
from cl_runner.training.compatibility import check_method
from cl_runner.training.stage import StageRun
from tests.breadth import wide
from tests.distributed import on_ranks
from tests.methods.orders import BY_LAYER, learn, order_room
from tests.methods.steps import LR, STEPS, THREE, off, opposed
from tests.methods.test_terms import learned
from tests.stages import Kind, naive_loss, tiny_model

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


def naive_nearness(mine: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """By A of each target, (r, n)."""
    sizes = []
    for name, A in mine.items():
        angles = subspace_angles(A.double().numpy().T, other[name].double().numpy().T)
        sizes.append(1 - np.sqrt((np.sin(angles) ** 2).sum()) / np.sqrt(len(angles)))
    return float(np.mean(sizes))


def test_nearness_is_that_of_scipys_angles() -> None:
    tasks = [{f"A.{t}": drawn(R, N, seed=9 * i + j) for j, t in enumerate("xy")} for i in range(3)]
    found = nearness(spans(tasks[0]), [spans(one) for one in tasks[1:]])
    assert found == pytest.approx([naive_nearness(tasks[0], other) for other in tasks[1:]], abs=1e-9)
    scaled = {k: 3 * v for k, v in tasks[0].items()}
    assert nearness(spans(tasks[0]), [spans(scaled)]) == pytest.approx([1.0], abs=1e-6)
    assert list(spans({"B.x": drawn(M, R), "A.y": drawn(R, N), "A.x": drawn(R, N)})) == ["A.x", "A.y"]
    assert shares([3.0, 1.0]).tolist() == [0.75, 0.25]
    assert shares([0.0, 0.0]).tolist() == [0.5, 0.5] and shares([]).tolist() == []


def test_principal_components() -> None:
    bases = [drawn(M, R, seed=i) for i in range(3)]
    U = principal(bases, R).double().numpy()
    both = np.concatenate([b.double().numpy() for b in bases], 1)
    values, vectors = np.linalg.eigh(both @ both.T)
    naive = vectors[:, ::-1][:, :R] * np.sqrt(values[::-1][:R] / 3)
    naive *= np.where(naive.sum(0) < 0, -1, 1)
    assert np.allclose(U, naive, atol=1e-5)
    assert torch.allclose(principal([-b for b in bases], R), torch.from_numpy(U).float(), atol=1e-5)


def test_the_leading_component_of_what_is_not_negative_is_not() -> None:
    for seed in range(20):
        U = principal([drawn(M, R, seed=10 * seed + i).abs() for i in range(3)], R)
        assert float(U[:, 0].min()) > 0  # Perron


def _pca(place: Place, **own: Any) -> list[dict[str, Tensor]]:
    """U after the second of three stages, the principal basis of the two B by hand, and U after the third stage."""
    room, config = order_room(place, "shared-basis", **{**THREE, "method__pca": 2, **own})
    found = []
    for index in range(3):
        learn(room, config, index, opposed(index))
        if index:
            found.append({key[2:]: U for key, U in room.method.past.shared.items() if key.startswith("U.")})  # type: ignore[attr-defined]
        else:
            assert not any(key.startswith("U.") for key in room.method.past.shared)  # type: ignore[attr-defined]
    naive = {}
    for target in room.adapters.past:
        both = np.concatenate([pair.B[target].double().numpy() for pair in room.adapters.folded[:2]], 1)
        values, vectors = np.linalg.eigh(both @ both.T)
        rank = room.adapters.rank_of(target)
        made = vectors[:, ::-1][:, :rank] * np.sqrt(values[::-1][:rank] / 2)
        naive[target] = torch.from_numpy(made * np.where(made.sum(0) < 0, -1, 1)).float()
    return [found[0], naive, found[1]]


@pytest.mark.parametrize(("sign", "more"), [pytest.param(False, {}, marks=wide), (True, {}), (False, BY_LAYER)])
def test_after_stage_pca_the_basis_is_the_principal_one(sign: bool, more: dict[str, Any]) -> None:
    ((U, naive, later),) = on_ranks(1, _pca, method__shared_lr=0.0, method__non_negative=sign, **more)
    assert list(U) == list(naive) and U
    for target, found in U.items():
        assert torch.allclose(found, naive[target].clamp(min=0) if sign else naive[target], atol=1e-4)
        assert float(found[:, 0].norm()) > 0.1  # the leading component is there
        assert torch.equal(later[target], found)
    ((U, _, later),) = on_ranks(1, _pca, method__shared_lr=0.1)
    assert not any(torch.equal(later[target], found) for target, found in U.items())


def _dictionary(place: Place, **own: Any) -> list[dict[str, Tensor]]:
    """C as it was drawn, and after each of three stages."""
    room, config = order_room(place, "shared-basis", **{**THREE, "method__sparse": 0.1, **own})
    stage = StageRun(room, config, 0)
    room.method.build(stage)
    stage.close()
    terms: Any = room.adapters.terms
    found = [{f"C.{target}": term.C.detach().clone() for target, term in terms.of.items()}]
    for index in range(3):
        learn(room, config, index, opposed(index))
        shared = room.method.past.shared  # type: ignore[attr-defined]
        found.append({key: C for key, C in shared.items() if key.startswith("C.")})
    return found


@pytest.mark.parametrize("pca", [0, 2])
def test_the_dictionary_learns_at_the_first_task_whatever_comes_later(pca: int) -> None:
    ((drawn_, *after),) = on_ranks(1, _dictionary, method__shared_lr=0.0, method__pca=pca)
    for name, C in drawn_.items():
        assert not torch.equal(after[0][name], C)
        assert torch.equal(after[0][name], after[1][name]) and torch.equal(after[0][name], after[2][name])


def _moves(place: Place, **own: Any) -> list[tuple[dict[str, Tensor], list[float]]]:
    """After each of three stages: what is shared, and the loss of each step."""
    room, config = order_room(place, "shared-basis", **{**THREE, "training__clip": 0.0, **own})
    found = []
    for index in range(3):
        outcome = learn(room, config, index, opposed(index))
        found.append((dict(room.method.past.shared), outcome.losses))
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
    [
        {},
        pytest.param({"method__form": "block"}, marks=wide),
        {"method__mixing": "similarity"},
        pytest.param({"method__sparse": 0.1}, marks=wide),
        {"method__pca": 2},
    ],
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
    assert method.past.tasks == ["a", "b", "c"] and len(room.adapters.folded) == 0
    updates = [{t: pair[f"B.{t}"] @ pair[f"A.{t}"] for t in room.adapters.past} for pair in method.past.pairs]
    answers = []
    for i, task in enumerate(method.past.tasks):
        rows = [{key: A for key, A in pair.items() if key.startswith("A.")} for pair in method.past.pairs]
        near = [naive_nearness(rows[i], rows[j]) for j in range(3) if j != i]
        assert sum(near) > 0
        weights = [s / sum(near) for s in near]
        weights.insert(i, 1.0)
        assert method.past.weights(task).tolist() == pytest.approx(weights, abs=1e-6)
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


class OfLooks:
    """The third stage by hand: explicit weights, the others' updates by the spans at the last look."""

    def __init__(self, room: Any, every: int) -> None:
        self.pairs, self.U = room.method.past.pairs, room.method.past.shared
        self.targets, self.scale, self.every = list(room.adapters.past), room.adapters.scale, every
        self.seen = [[0.5, 0.5]]  # β of each step, and after the last one

    def train(self) -> dict[str, Tensor]:
        """A and B of the new task afterwards, s in B."""
        now = {}
        for t in self.targets:
            U = self.U[f"U.{t}"]
            now[t] = [U.clone(), U.new_zeros(U.shape[1], self.pairs[0][f"A.{t}"].shape[1]), torch.zeros_like(U)]
        for of in now.values():
            for value in of:
                value.requires_grad_()
        slow, own = [of[0] for of in now.values()], [value for of in now.values() for value in of[1:]]
        optimizer = torch.optim.AdamW([{"params": slow, "lr": 0.1 * LR}, {"params": own}], lr=LR, weight_decay=0.0)
        model = tiny_model("t5")
        for step in range(1, STEPS + 1):
            weights = {}
            for t, (U, A, B) in now.items():
                W = model.get_submodule(t).weight + self.scale * (U + B) @ A
                for beta, pair in zip(self.seen[-1], self.pairs[:2], strict=True):
                    W = W + beta * pair[f"B.{t}"] @ pair[f"A.{t}"]
                weights[f"{t}.weight"] = W

            def answer(weights: dict[str, Tensor] = weights, **inputs: Any) -> Any:
                return torch.func.functional_call(model, weights, (), inputs)

            optimizer.zero_grad()
            naive_loss(answer, "t5", opposed(2).examples).backward()
            optimizer.step()
            if self.every and step % self.every == 0:
                mine = {f"A.{t}": A.detach() for t, (_, A, _) in now.items()}
                near = [naive_nearness(mine, pair) for pair in self.pairs[:2]]
                self.seen.append([each / sum(near) for each in near])
            else:
                self.seen.append(self.seen[-1])
        factors = {f"A.{t}": A.detach() for t, (_, A, _) in now.items()}
        return {**factors, **{f"B.{t}": self.scale * (U + B).detach() for t, (U, _, B) in now.items()}}


def _looks(place: Place) -> None:
    room, config = order_room(place, "shared-basis", **{**THREE, "method__mixing": "similarity", "method__every": 2})
    method: Any = room.method
    for index in range(2):
        learn(room, config, index, opposed(index))
    hand, blind = OfLooks(room, 2), OfLooks(room, 0)
    wanted, unlike = hand.train(), blind.train()
    used, of_whom, real, condition = [], [], mixing.spans, method.condition

    def spy(stage: Any, batch: Any, task: str | None) -> Any:
        found = condition(stage, batch, task)
        used.append(found["mix"].tolist())
        return found

    def counted(factors: Any) -> dict[str, Tensor]:
        of_whom.extend(i for i, pair in enumerate(method.past.pairs) if pair is factors)
        return real(factors)

    method.load_state(method.state())  # as if restarted
    method.condition, mixing.spans = spy, counted
    try:
        learn(room, config, 2, opposed(2))
    finally:
        method.condition, mixing.spans = condition, real
    assert of_whom == [0, 1]  # what is constant is made once
    assert len(used) == 3 * STEPS
    for number, mix in enumerate(used):
        assert mix == [pytest.approx(hand.seen[number // 3], abs=1e-4)] * 2, number
    assert max(abs(beta - 0.5) for beta in hand.seen[-1]) > 1e-3  # the looks are seen
    ours, theirs, others = (
        torch.cat([of[key].flatten() for key in wanted]) for of in (method.past.pairs[2], wanted, unlike)
    )
    assert off(ours, theirs) < 1e-3 < 5e-3 < off(others, theirs)


def test_while_it_learns_others_count_by_how_near_it_is() -> None:
    on_ranks(1, _looks)


def test_what_is_broadcast_is_where_the_process_group_is() -> None:
    config = RunConfig.model_validate({"method": {"name": "shared-basis", "mixing": "similarity", "every": 1}})
    method: Any = make_method(config)
    method.past.pairs, seen = [{"A.x": drawn(R, N)}], []
    term = SharedBasis(drawn(R, N, seed=1), M, S)
    stage = SimpleNamespace(
        progress=SimpleNamespace(step=1), device=torch.device("meta"), broadcast=lambda sent: seen.append(sent) or sent,
        terms=lambda: {"x": term},
    )  # fmt: skip
    method.after_step(stage)
    assert [sent.device.type for sent in seen] == ["meta"] and method._mix is seen[0]


def _each_folder(place: Place, folder: str, kind: Kind) -> None:
    """``answers.json`` names a plain PEFT folder for each task, which answers as the run does, unlike ``adapter/``."""
    room, config = order_room(place, "shared-basis", kind=kind, **{**THREE, "method__mixing": "similarity"})
    rundir = RunDir(Path(folder))
    for index in range(3):
        stage = learn(room, config, index, opposed(index)).stage
        commit(rundir, index, stage.plan.name, partial(save_stage, stage=stage))
        where = rundir.stage_dir(index, stage.plan.name)
        seen = "abc"[: index + 1]
        answers = json.loads((where / "answers.json").read_text())
        assert answers == {task: f"adapters/{task}" for task in seen}
        stage = StageRun(room, config, index)
        batch = stage.padded(opposed(0).examples, [1.0] * 6)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if kind == "t5":
            inputs["decoder_input_ids"] = batch.decoder_input_ids

        def logits(name: str, where: Path = where, inputs: dict[str, Any] = inputs) -> Tensor:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
                found: Tensor = PeftModel.from_pretrained(tiny_model(kind), where / name).eval()(**inputs).logits
                return found

        for task in seen:
            room.adapters.condition = room.method.condition(stage, batch, task) or {}
            with torch.no_grad():
                ours = room.adapters.model(**inputs).logits
            assert off(logits(answers[task]), ours) < 1e-5, task
            assert (off(logits("adapter"), ours) > 1e-2) == (index > 1)  # of two tasks the other counts in full
        room.adapters.condition = {}
        with torch.no_grad():
            assert off(logits("adapter"), room.adapters.model(**inputs).logits) < 1e-5  # where no task is known
        shapes, files = room.adapters.shapes(), [where / "state.safetensors", *where.glob("adapters/*/*.safetensors")]
        held = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
        told = room.method.state_bytes(shapes, config.adapter.largest * sum(map(sum, shapes)), index + 1)
        assert len(files) == index + 2 and 0.85 * held < told < 1.3 * held


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_each_task_has_a_plain_peft_folder(kind: Kind, tmp_path: Path) -> None:
    on_ranks(1, _each_folder, str(tmp_path), kind)


def _free(place: Place, **own: Any) -> tuple[float | None, list[float]]:
    """What is said after two stages, and of each layer the share of directions that no update reads."""
    room, config = order_room(place, "shared-basis", **{**THREE, **own})
    for index in range(2):
        stage = learn(room, config, index, opposed(index)).stage
    method: Any = room.method
    read = {
        t: [pair[f"B.{t}"] @ pair[f"A.{t}"] for pair in method.past.pairs]
        for t in room.adapters.past
        if method.past.pairs
    }
    values = [torch.linalg.svdvals(torch.cat(updates).double()) for updates in read.values()]
    return method.free_share(stage), [1 - int((each > 1e-5 * each.max()).sum()) / 32 for each in values]


def test_what_is_left_to_later_tasks() -> None:
    ((said, layers),) = on_ranks(1, _free, method__mixing="similarity")
    assert said == pytest.approx(np.mean(layers)) and 0.5 < np.mean(layers) < 1
    assert on_ranks(1, _free) == [(None, [])]  # folded pairs: their folders say it


def _forgetful(place: Place, forget: bool) -> dict[str, Tensor]:
    """ΔW of all three stages, the folded pairs let go of before the last one or not."""
    room, config = order_room(place, "shared-basis", **{**THREE, "adapter__r": 8})
    for index in range(3):
        if index == 2 and forget:
            assert all(pair.held for pair in room.adapters.folded)
            room.adapters.let_go(room.method.reads_past())
            assert not any(pair.held for pair in room.adapters.folded)
        learn(room, config, index, opposed(index))
    return learned(room)


def test_past_pairs_need_no_memory() -> None:
    (held,), (gone,) = on_ranks(1, _forgetful, False), on_ranks(1, _forgetful, True)
    assert all(torch.equal(gone[target], update) for target, update in held.items())


def test_equal_entries_do_not_widen_the_support() -> None:
    method: Any = make_method(RunConfig.model_validate({"method": {"name": "shared-basis", "support": 0.25}}))
    method.past.large["x"] = torch.zeros(8, 8)
    method.past.large["x"][2, :4] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    mask = method.past.mask("x", method.config.support)
    assert mask.shape == (8, 8) and sorted(mask.unique().tolist()) == [0, 1]
    assert int(mask.sum()) == 16 and mask[2, :4].tolist() == [1] * 4


def _carried(place: Place, **own: Any) -> tuple[str, int, int]:
    """What is said to grow, and the bytes carried after three stages: of the masks, of the pairs."""
    room, config = order_room(place, "shared-basis", **{**THREE, "training__epochs": 1, **own})
    for index in range(3):
        learn(room, config, index, opposed(index))
    state = room.method.state().tensors
    large = sum(value.nbytes for key, value in state.items() if key.startswith("large."))
    pairs = sum(value.nbytes for key, value in state.items() if key[0].isdigit())
    return room.method.grows(config, room.adapters.shapes()), large, pairs


def test_how_much_is_carried_is_said() -> None:
    ((said, large, _),) = on_ranks(1, _carried, method__support=0.5)
    assert said.startswith(f"carries {size(large)}: ") and large > 0
    ((said, _, pairs),) = on_ranks(1, _carried, method__mixing="similarity", adapter__r=7)
    assert said == f"carries {size(pairs / 3)} a task, {size(pairs)} in all: pairs of 6 layers"
    assert on_ranks(1, _carried, method__pca=1) == [("", 0, 0)]


def _options(place: Place) -> None:
    room, config = order_room(place, "shared-basis", **{**THREE, "method__non_negative": True})
    for index in range(2):
        learn(room, config, index, opposed(index))
    assert all(bool((U >= 0).all()) and bool(U.any()) for U in room.method.past.shared.values())  # type: ignore[attr-defined]
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
        ({"pca": 2}, "method.pca: a basis by 2 tasks would come after the last of 2; set it to 1 or less"),
        ({"pca": 5}, "method.pca: a basis by 5 tasks would come after the last of 2; set it to 1 or less"),
        (
            {"support": 0.5, "max_gb": 0.03},
            "method.support: masks and updates of 3 layers take 48 MB, over method.max_gb 0.03; name fewer "
            "adapter.target_modules, or set a larger max_gb",
        ),
    ],
)
def test_refused(own: dict[str, Any], word: str) -> None:
    config = RunConfig.model_validate({"method": {"name": "shared-basis", **own}})
    with pytest.raises(UserError, match=re.escape(word)):
        check_method(config, make_method(config).plan(["a", "b"]), [(1000, 2000)] * 3)
    fits = RunConfig.model_validate({"method": {"name": "shared-basis", "support": 0.5, "max_gb": 0.05, "pca": 1}})
    check_method(fits, make_method(fits).plan(["a", "b"]), [(1000, 2000)] * 3)
    wide = RunConfig.model_validate({"method": {"name": "shared-basis"}, "adapter": {"r": 33}})
    with pytest.raises(UserError, match=r"adapter\.r: 33 is more than the 32"):
        check_method(wide, make_method(wide).plan(["a"]), [(32, 64)])
