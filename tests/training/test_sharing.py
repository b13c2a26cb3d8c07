"""Heads computed once: the gradients of every method, and the answers, are those of whole rows."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_runner.engine.process import Place
from cl_runner.methods import METHODS
from cl_runner.methods.protocol import Source, StagePlan
from cl_runner.models.batch import Example
from cl_runner.models.heads import logits_behind_head, logits_in_one_row
from cl_runner.training.stage import StageRun
from tests.breadth import ONE_OF_EACH_SORT, narrowed
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.stages import END, VOCABULARY, Outcome, distance

HEADS = {"a": [7, 9, 11, 13, 15, 17], "b": [7, 9, 21, 23, 25, 27, 29, 31]}
# Rows with something of their own before the head.
PLAIN = {name: f"{name} conditions each row" for name in ("l2p", "progprompt", "lfpt5", "colora", "gainlora", "sapt")}
WHOLE = "the beginning of a task's prompts is computed for every row: "
SIZES = {"training__global_batch": 6, "training__micro_batch": 3, "training__epochs": 1}


def rows(task: str, count: int = 9) -> Source:
    """Rows that all begin with their task's head, of unequal lengths."""
    dice = random.Random(task)
    examples = []
    for row in range(count):
        text = [dice.randrange(32, VOCABULARY) for _ in range(dice.randint(1, 6))]
        text[0] = 40 + row  # the head ends here
        examples.append(Example([*HEADS[task], *text], [*(dice.randrange(3, 30) for _ in range(row % 3 + 1)), END]))
    return Source(examples, [task] * count)


def of_plan(plan: StagePlan) -> Source:
    """The rows of a stage's tasks, one after the other."""
    parts = [rows(task) for task in plan.tasks]
    return Source([e for part in parts for e in part.examples], [t for part in parts for t in part.tasks])


def learned(
    place: Place, method: str, how: str, resid: float = 0.0, **settings: Any
) -> tuple[list[Outcome], int, list[str]]:
    """What each of two stages leaves, dropout on; how many forwards shared a head; what was said.

    resid: dropout of a module of the base.
    """
    asked = {"adapter__dropout": 0.2, "training__share_prefix": how, **SIZES, **settings}
    room, config = order_room(place, method, ("a", "b"), "llama", **asked)
    if resid:
        room.base.model.model.norm = nn.Sequential(room.base.model.model.norm, nn.Dropout(resid))
    outcomes, shared = [], 0

    def counting(_: Any, __: Any, named: dict[str, Any]) -> None:
        nonlocal shared
        past, mask = named.get("past_key_values"), named.get("attention_mask")
        in_one_row = mask is not None and mask.dim() == 4
        shared += (past is not None or in_one_row) and room.base.model.training

    hook = room.base.model.register_forward_pre_hook(counting, with_kwargs=True)
    for index in range(len(room.order)):
        outcomes.append(learn(room, config, index, of_plan(room.order[index])))
        outcomes[-1].parameters["answer"] = answer(StageRun(room, config, index))
    hook.remove()
    said = [line for outcome in outcomes for line in outcome.trained.said if line.startswith(WHOLE)]
    for outcome in outcomes:
        outcome.stage = None  # type: ignore[assignment]  # nothing that cannot travel from another process
        outcome.trained = None  # type: ignore[assignment]
    return outcomes, shared, said


def answer(stage: StageRun) -> Tensor:
    """Scores of some rows after a stage: what it left, whatever its factors are."""
    some = rows("b", 4)
    with torch.no_grad(), stage.without_dropout():
        scores = stage.forward(stage.make_batch(some.examples, some.tasks, [1.0] * 4)).clone()
    stage.close()
    return scores


@pytest.mark.parametrize("method", narrowed(sorted(METHODS), ONE_OF_EACH_SORT))
def test_every_method_learns_the_same(method: str) -> None:
    own = {"method__group": 2} if method == "pego" else {}
    [(plain, none, _)] = on_ranks(1, learned, method, "off", **own)
    [(ours, shared, said)] = on_ranks(1, learned, method, "auto", **own)
    assert none == 0
    for found, wanted in zip(ours, plain, strict=True):
        assert found.losses == pytest.approx(wanted.losses, rel=1e-5)
        assert found.norms == pytest.approx(wanted.norms, rel=1e-4)
        if method == "osft":  # a singular vector may point either way
            found.parameters, wanted.parameters = ({"answer": o.parameters["answer"]} for o in (found, wanted))
        assert distance(found.parameters, wanted.parameters) < 1e-3
    assert bool(shared) != bool(said)
    assert said == ([WHOLE + PLAIN[method]] if method in PLAIN else [])


@pytest.mark.parametrize(
    "method", narrowed(["olora", "ewc", "lwf", "replay", "seqft", "osft", "mtl"], ["ewc", "lwf", "seqft"])
)
def test_rows_in_one_row_learn_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens are read in one row, behind their head; more go on from its keys and values."""
    in_one_row = []

    def spied(*given: Any) -> Tensor:
        in_one_row.append(given)
        return logits_in_one_row(*given)

    monkeypatch.setattr("cl_runner.training.sharing.logits_in_one_row", spied)
    monkeypatch.setattr("cl_runner.models.heads.PACKED", 1000.0)
    [(ours, shared, _)] = on_ranks(1, learned, method, "auto")
    assert len(in_one_row) >= shared > 0
    in_one_row.clear()
    monkeypatch.setattr("cl_runner.models.heads.PACKED", 0.0)
    [(others, calls, _)] = on_ranks(1, learned, method, "auto")
    assert calls == shared and not in_one_row
    for found, wanted in zip(ours, others, strict=True):
        assert found.losses == pytest.approx(wanted.losses, rel=1e-5)
        assert found.norms == pytest.approx(wanted.norms, rel=1e-4)
        assert distance({"answer": found.parameters["answer"]}, {"answer": wanted.parameters["answer"]}) < 1e-3


def test_an_adapted_head_of_the_model_learns_the_same() -> None:
    own = {"adapter__target_modules": ["q_proj", "lm_head"]}
    [(plain, _, _)] = on_ranks(1, learned, "inclora", "off", **own)
    [(ours, shared, _)] = on_ranks(1, learned, "inclora", "auto", **own)
    assert shared > 0
    for found, wanted in zip(ours, plain, strict=True):
        assert found.losses == pytest.approx(wanted.losses, rel=1e-5)
        assert distance(found.parameters, wanted.parameters) < 1e-3


def _seen(how: str, of_weight_0: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each target Σ x xᵀ and Σ 1 over what it reads of rows of two tasks, some of no weight."""
    room, config = order_room(Place(), "inclora", ("a",), "llama", training__share_prefix=how)
    stage = StageRun(room, config, 0)
    room.method.build(stage)
    parts = [rows("a", 5), rows("b", 4)]
    examples, tasks = [e for part in parts for e in part.examples], [t for part in parts for t in part.tasks]
    stage.sharing.learn(examples, tasks)
    weights = [1.0] * len(tasks)
    weights[:of_weight_0] = [0.0] * of_weight_0
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def see(target: str, x: Tensor, counts: Tensor | None) -> None:
        assert counts is not None and counts.shape == x.shape[:2] and counts.dtype == torch.int64
        moment, count = found.get(target, (torch.zeros(()), torch.zeros(())))
        found[target] = moment + torch.einsum("bsd,bse,bs->de", x, x, counts.float()), count + counts.sum()

    with torch.no_grad(), stage.observe("inputs", see):
        stage.forward(stage.make_batch(examples, tasks, weights))
    stage.close()
    return found


@pytest.mark.parametrize("of_weight_0", [0, 2])
@pytest.mark.parametrize("packed", [1000.0, 0.0])
def test_who_looks_at_layers_sees_the_head_once_for_every_row(
    packed: float, of_weight_0: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cl_runner.models.heads.PACKED", packed)
    ways: list[str] = []
    for way in (logits_in_one_row, logits_behind_head):

        def spied(*given: Any, way: Any = way) -> Tensor:
            ways.append(way.__name__)
            found: Tensor = way(*given)
            return found

        monkeypatch.setattr(f"cl_runner.training.sharing.{way.__name__}", spied)
    plain = _seen("off", of_weight_0)
    assert not ways
    ours = _seen("auto", of_weight_0)
    assert ways == 2 * ["logits_in_one_row" if packed else "logits_behind_head"], "once a task"
    assert list(ours) == list(plain)
    counted = [*rows("a", 5).examples[of_weight_0:], *rows("b", 4).examples]
    tokens = sum(len(example.source) + len(example.target) - 1 for example in counted)
    for target, (moment, count) in plain.items():
        assert int(ours[target][1]) == int(count) == tokens
        torch.testing.assert_close(ours[target][0], moment, rtol=1e-4, atol=1e-4)


def _by_update(how: str) -> dict[str, Tensor]:
    """Gradients by the update of each layer, of the first rows that a stage sees: it was left at its end."""
    room, config = order_room(Place(), "ewc-lora", ("a",), "llama", training__share_prefix=how)
    stage = StageRun(room, config, 0)
    room.method.build(stage)
    own = rows("a", 6)
    stage.sharing.learn(own.examples, own.tasks)
    [found] = stage.update_gradients(lambda batch: room.method.loss(stage, batch), stage.batches(own))
    stage.close()
    return found


def test_gradients_by_an_update_are_the_same_even_where_nothing_was_read_before() -> None:
    plain, ours = _by_update("off"), _by_update("auto")
    assert any(g.abs().max() > 0 for g in plain.values()) and distance(ours, plain) < 1e-5


def test_an_output_layer_that_is_looked_at_reads_whole_rows() -> None:
    own = {"adapter__target_modules": ["q_proj", "lm_head"]}
    [(plain, _, _)] = on_ranks(1, learned, "migu", "off", **own)
    [(ours, shared, said)] = on_ranks(1, learned, "migu", "auto", **own)
    assert shared > 0 and said == [f"{WHOLE}migu looks at what the output layer reads"]  # in the second stage
    for found, wanted in zip(ours, plain, strict=True):
        assert found.losses == pytest.approx(wanted.losses, rel=1e-5)
        assert distance(found.parameters, wanted.parameters) < 1e-3


@pytest.mark.parametrize("where", ["adapter", "base"])
def test_torchs_own_dropout_falls_otherwise_in_each_row(where: str) -> None:
    """Under ``dropout_by: micro`` heads are shared where nothing drops, neither adapters nor modules of the base."""
    own = {"training__dropout_by": "micro", "adapter__dropout": 0.2 if where == "adapter" else 0.0}
    [(_, shared, said)] = on_ranks(1, learned, "inclora", "auto", resid=0.2 if where == "base" else 0.0, **own)
    assert shared == 0 and said == [f"{WHOLE}training.dropout_by: micro drops otherwise in each row's"]
    [(_, shared, said)] = on_ranks(1, learned, "inclora", "auto", **{**own, "adapter__dropout": 0.0})
    assert shared > 0 and not said
