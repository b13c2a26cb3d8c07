"""What methods with a router share: the term, a prompt as one vector, a folder for what no one matrix answers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods.shared.pooling import largest_embedding, largest_embeddings, mean_embedding
from cl_runner.methods.shared.routed_pairs import WEIGHTS, RoutedPairs
from cl_runner.models.batch import Example, collate_prompts
from cl_runner.training.compatibility import check_method
from cl_runner.training.stage import StageRun
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import THREE, opposed
from tests.stages import END, VOCABULARY, Kind

ROUTED = ["gainlora", "sapt"]
OWN: dict[str, dict[str, Any]] = {"gainlora": {}, "sapt": {"method__pseudo": 2, "method__pseudo_tokens": 4}}


def test_the_term_is_its_formula() -> None:
    """Each row's pairs by its own weights, and every gradient, the weights' too: against whole matrices in fp64."""
    dice = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice)

    A, B, share, pair = some(5, 6), some(4, 5), some(2).abs(), (some(2, 6), some(4, 2), 1.5)
    term = RoutedPairs(A, B, [2, 3], share, pair, dropout=0.5).eval()
    x, w, g = some(3, 2, 6), some(3, 3).requires_grad_(), some(3, 2, 4)
    mine = term(x, {WEIGHTS: w})
    assert term.A is not None and term.B is not None
    ours = torch.autograd.grad((mine * g).sum(), [w, term.A, term.B])
    exact = [each.detach().double().requires_grad_() for each in (w, term.A, term.B)]

    def delta(weights: Tensor) -> Tensor:
        first, second = B[:, :2].double() @ A[:2].double(), B[:, 2:].double() @ A[2:].double()
        return weights[0] * first + weights[1] * second + 1.5 * weights[2] * exact[2] @ exact[1]

    rows = [[delta(exact[0][row]) @ x[row, t].double() for t in range(2)] for row in range(3)]
    naive = torch.stack([torch.stack(row) for row in rows])
    torch.testing.assert_close(mine.double(), naive, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(ours, torch.autograd.grad((naive * g).sum(), exact), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)

    one = torch.cat([share, torch.ones(1)])
    whole = delta(one.double()).float()
    torch.testing.assert_close(term.update(), whole)
    torch.testing.assert_close(term(x, {}), x @ whole.mT)
    torch.testing.assert_close(term.own(), 1.5 * pair[1] @ pair[0])
    # Every weight 1: what inclora has, and what is carried on.
    learned_A, learned_B = term.learned()
    finished = RoutedPairs(learned_A, learned_B, [2, 3, 2], one)
    torch.testing.assert_close(finished(x, {WEIGHTS: torch.ones(3, 3)}), x @ (learned_B @ learned_A).mT)
    torch.testing.assert_close(finished(x, {WEIGHTS: w}), mine)
    # Only the new pair's input is dropped.
    new = torch.tensor([[0.0, 0.0, 1.0]]).expand(3, -1)
    torch.manual_seed(0)
    kept = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(term.train()(x, {WEIGHTS: new}), 1.5 * kept @ pair[0].mT @ pair[1].mT)
    past = torch.tensor([[2.0, -1.0, 0.0]]).expand(3, -1)
    torch.testing.assert_close(term(x, {WEIGHTS: past}), term.eval()(x, {WEIGHTS: past}))


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_prompt_is_one_vector_however_it_is_padded(kind: Kind) -> None:
    """Of its own tokens: beside longer rows, beside its label tokens, by itself."""
    room, config = order_room(Place(), "gainlora", kind=kind)
    stage = StageRun(room, config, 0)
    dice = random.Random(1)
    sources = [[dice.randrange(3, VOCABULARY) for _ in range(length)] for length in (1, 7, 3)]
    examples = [Example(source, [9] * (3 - row) + [END]) for row, source in enumerate(sources)]
    table = room.base.model.get_input_embeddings().weight
    means = torch.stack([sum((table[i] for i in source), torch.zeros(32)) / len(source) for source in sources])
    largest = torch.stack([torch.stack([max(table[i][j] for i in source) for j in range(32)]) for source in sources])
    prompts = collate_prompts(examples, room.base.layout)
    for batch in (stage.make_batch(examples, ["a"] * 3, [1.0] * 3), prompts):
        torch.testing.assert_close(mean_embedding(stage, batch), means)
        assert torch.equal(largest_embedding(stage, batch), largest)
    assert torch.equal(largest_embeddings(stage, sources), largest)
    assert stage.embedding_width == 32
    stage.close()


def _whatever_stands_beside(place: Place, name: str, kind: Kind) -> None:
    """A row's weights, and its answer, are its own."""
    room, config = order_room(place, name, kind=kind, **{**THREE, **OWN[name]})
    for index in range(2):
        learn(room, config, index, opposed(index))
    stage = StageRun(room, config, 1)
    own = opposed(1)
    together = stage.make_batch(own.examples, own.tasks, [1.0] * 6).condition[WEIGHTS]
    assert together.shape == (6, 2) and together.std(0).min() > 0
    for row, example in enumerate(own.examples):
        alone = stage.make_batch([example], ["b"], [1.0]).condition[WEIGHTS]
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-6)
    assert stage.generate(own.examples) == [stage.generate([example])[0] for example in own.examples]
    stage.close()


@pytest.mark.parametrize(("name", "kind"), [("gainlora", "t5"), ("sapt", "llama")])
def test_a_row_is_weighed_by_itself(name: str, kind: Kind) -> None:
    on_ranks(1, _whatever_stands_beside, name, kind)


def _untouched(place: Place, name: str) -> None:
    """Past pairs stay to the bit, and what they counted for is the mean over rows."""
    room, config = order_room(place, name, **{**THREE, **OWN[name]})
    held: dict[str, tuple[Tensor, Tensor]] = {}
    for index in range(3):
        stage = learn(room, config, index, opposed(index)).stage
        for target, (A, B) in held.items():
            now = room.method.pairs[target]
            assert torch.equal(now[0][: len(A)], A) and torch.equal(now[1][:, : B.shape[1]], B)
        held = {target: (A.clone(), B.clone()) for target, (A, B) in room.method.pairs.items()}
        own = opposed(index)
        weights = stage.make_batch(own.examples, own.tasks, [1.0] * 6).condition[WEIGHTS]
        assert room.method.shares["abc"[index]] == pytest.approx(weights.mean(0).tolist(), rel=1e-5)
    shares = [[*of, 0.0, 0.0][:3] for of in room.method.shares.values()]
    term = next(iter(stage.terms().values()))
    assert term.share.tolist() == pytest.approx([sum(column) / 3 for column in zip(*shares, strict=True)], rel=1e-6)


@pytest.mark.parametrize("name", ROUTED)
def test_past_pairs_stay_and_a_folder_has_their_mean_weights(name: str) -> None:
    on_ranks(1, _untouched, name)


@pytest.mark.parametrize("name", ROUTED)
def test_what_cannot_work_is_refused(name: str) -> None:
    def check(shapes: Any = None, **settings: Any) -> None:
        room, config = order_room(Place(), name, "abcdefghijklmno", **settings)
        check_method(config, room.order)
        check_method(config, room.order, shapes)

    check([(1024, 1024)] * 144)
    # 15 · 64 · 224 · 8192 floats
    large = r"^adapter.r: pairs of 224 layers over 15 tasks take 7.05 GB, over method.max_gb 4; set a smaller rank, or"
    with pytest.raises(UserError, match=large):
        check([(4096, 4096)] * 224, adapter__r=64, method__max_gb=4)
    room, config = order_room(Place(), name, "abc", adapter__r=8)
    config.stages = {2: {"method.hidden": 10}}
    with pytest.raises(UserError, match=r"^method.hidden: the same for all tasks; set it once$"):
        check_method(config, room.order)
    config.stages = {}
    assert room.method.grows(config, [(1024, 512)] * 10) == (
        "carries 0.492 MB a task, 1.47 MB in all: pairs of 10 layers"
    )


def _logged(place: Place, method: str) -> None:
    """Stages of one step: each logs what the new pair counts for with its own rows, and nothing of the stage before."""
    room, config = order_room(place, method, **{**THREE, "training__epochs": 1}, **OWN[method])
    for index in range(2):
        seen: list[Tensor] = []
        weigh = room.method.weights

        def spy(stage: Any, batch: Any, weigh: Any = weigh, seen: Any = seen) -> Tensor:
            found: Tensor = weigh(stage, batch)
            if batch.places is not None:
                seen.append(found.detach()[:, -1])
            return found

        room.method.weights = spy  # type: ignore[attr-defined]
        rows = learn(room, config, index, opposed(index)).rows
        del room.method.weights  # type: ignore[attr-defined]
        of_last = torch.cat(seen)[-6:]  # sapt has a row twice, and so two steps
        assert rows[-1]["new_weight"] == pytest.approx(float(of_last.mean()), rel=1e-5)


@pytest.mark.parametrize("method", ROUTED)
def test_what_a_stage_of_one_step_logs_is_its_own(method: str) -> None:
    on_ranks(1, _logged, method)
