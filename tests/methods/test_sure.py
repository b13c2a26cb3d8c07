"""SuRe: surprise row by row, what the memory keeps by it, whole steps against a loop; the slow copy beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.protocol import Source
from cl_runner.methods.sure import surprise
from cl_runner.models.batch import Example
from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.training.checkpoint import restore_stage, save_stage
from cl_runner.training.compatibility import check_method
from cl_runner.training.options import answering
from cl_runner.training.stage import StageRun
from tests.breadth import narrowed, wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import LR, STEPS, THREE, Values, label_logits, off, opposed, put, values, vector
from tests.stages import Kind, naive_loss, open_stage, some_rows


def by_loop(model: Any, kind: Kind, example: Example, of: str) -> float:
    """Mean −log p of each token of one example alone, in fp64."""
    scores, tokens = label_logits(model, kind, example), example.target
    if of == "sequence" and kind == "llama":
        ids = [*example.source, *example.target]
        scores, tokens = model(input_ids=torch.tensor([ids])).logits[0, :-1], ids[1:]
    odds = scores.double().softmax(1)
    losses = [-float(odds[place, token].log()) for place, token in enumerate(tokens)]
    return sum(losses) / len(losses)


def _scores(place: Place, kind: Kind, of: str) -> list[float]:
    room, config = order_room(place, "sure", kind=kind, dropout=0.3, adapter__dropout=0.3)
    stage = open_stage(room, config)
    room.adapters.model.eval()
    examples = some_rows(7).examples
    found = surprise(stage, examples, of)  # type: ignore[arg-type]
    with torch.no_grad():
        wanted = [by_loop(room.adapters.model, kind, example, of) for example in examples]
    assert found.tolist() == pytest.approx(wanted, rel=1e-4)
    stage.close()
    return found.tolist()


@pytest.mark.parametrize(("kind", "of"), [("t5", "sequence"), ("llama", "sequence"), ("llama", "labels")])
def test_surprise_is_the_mean_loss_per_token_of_each_row(kind: Kind, of: str) -> None:
    (alone,) = on_ranks(1, _scores, kind, of)
    assert on_ranks(2, _scores, kind, of) == [alone, alone]


N = 7  # of three tasks with six rows each: all of the first one, then 3 of each, then 2


def _whole_steps(place: Place, kind: Kind, score: str) -> None:
    """The memory by naive scores, and steps on (L_new + L_replay) / 2 every second time, clipped as one loss."""
    own: dict[str, Any] = {"method__memory_size": N, "method__memory_batch": 100, "method__score": score}
    clip = 0.01
    room, config = order_room(place, "sure", kind=kind, **THREE, **own, training__clip=clip)
    hand, _ = order_room(place, "seqlora", kind=kind)
    memory: dict[str, list[tuple[float, Example]]] = {}
    replayed = 0
    for index, name in enumerate("abc"):
        stage = StageRun(room, config, index)
        room.method.build(stage)
        stage.close()
        put(hand, values(room))
        examples = opposed(index).examples
        scored = scores_of(hand, kind, examples) if score == "before" else None
        parameters = hand.adapters.parameters()
        optimizer = torch.optim.AdamW(list(parameters.values()), lr=LR, weight_decay=0.0)
        for step in range(STEPS):
            loss = naive_loss(hand.adapters.model, kind, examples)
            if memory and step % 2:
                rows = [example for kept in memory.values() for _, example in kept]
                loss = (loss + naive_loss(hand.adapters.model, kind, rows)) / 2
                replayed += 1
            optimizer.zero_grad()
            loss.backward()
            assert float(torch.nn.utils.clip_grad_norm_(parameters.values(), clip)) > clip
            optimizer.step()
        learn(room, config, index, opposed(index))
        assert off(vector(values(room)), vector(values(hand))) < 2e-3
        scored = scored or scores_of(hand, kind, examples)
        quota = N // (index + 1)
        memory = {task: kept[:quota] for task, kept in memory.items()}
        ranked = sorted(zip(scored, examples, strict=True), key=lambda pair: -pair[0])
        memory[name] = ranked[:quota]
        found = room.method.memory.tasks
        assert list(found) == list(memory) and [len(kept) for kept in found.values()] == [min(quota, 6)] * (index + 1)
        for task, kept in memory.items():
            assert [e.source + e.target for e in found[task]] == [e.source + e.target for _, e in kept]
    assert replayed == 2 * STEPS // 2


def scores_of(room: Any, kind: Kind, examples: Any) -> list[float]:
    with torch.no_grad():
        return [by_loop(room.adapters.model, kind, example, "sequence") for example in examples]


@pytest.mark.parametrize(
    ("kind", "score", "ranks"),
    [
        ("t5", "before", 1),
        pytest.param("t5", "after", 2, marks=wide),
        ("llama", "after", 1),
        pytest.param("llama", "before", 2, marks=wide),
    ],
)
def test_memory_and_steps_at_accumulation_3(kind: Kind, score: str, ranks: int) -> None:
    on_ranks(ranks, _whole_steps, kind, score)


def _replayed(place: Place, size: int | None) -> list[int]:
    """How many rows of the memory a step takes, those that fill a rank's share not counted."""
    from cl_runner.methods import sure

    room, config = order_room(place, "sure", **THREE, method__memory_size=N, method__memory_batch=size)
    learn(room, config, 0, opposed(0))
    counts: list[int] = []
    real = sure.memory_gradient

    def spy(method: Any, stage: Any, source: Source) -> Values:
        counts.append(len(source.examples))
        return real(method, stage, source)

    sure.memory_gradient = spy  # type: ignore[assignment]
    try:
        learn(room, config, 1, opposed(1))
    finally:
        sure.memory_gradient = real
    return counts


def test_a_step_replays_as_many_rows_as_are_set_or_half_of_its_own() -> None:
    assert on_ranks(1, _replayed, 2) == [[2, 2]] and on_ranks(1, _replayed, None) == [[3, 3]]


def _first_task(place: Place) -> None:
    """At the first stage it is seqlora, whatever the memory; the next one, without replay, too, and that is said."""
    ends = []
    for name, own in (("seqlora", {}), ("sure", {"method__memory_size": N, "method__every": 100})):
        room, config = order_room(place, name, **THREE, **own, dropout=0.1)
        said = ["".join(learn(room, config, index, opposed(index)).trained.said) for index in range(2)]
        ends.append(vector(values(room)))
    assert torch.equal(*ends)
    told = f"warning: nothing is replayed in a stage of {STEPS} steps; set method.every smaller than 100"
    assert [told in text for text in said] == [False, True]


def test_without_replay_it_is_seqlora() -> None:
    on_ranks(1, _first_task)


# The slow copy that goes on beside the fast one: the option, under this method.


def _slow(place: Place, folder: str, beta: float) -> None:
    """``βⁿ slow_0 + (1 − β) Σ β^(n−i) fast_i`` over the steps of all stages, restarted at each to the bit."""
    own: dict[str, Any] = {**THREE, "method__memory_size": N, "options__slow_copy": {"beta": beta, "next": "both"}}
    straight, config = order_room(place, "sure", **own)
    rundir, fast = RunDir(Path(folder)), []
    slow_0: Values = {}
    for index in range(3):
        room, _ = order_room(place, "sure", **own)
        if index:
            restored = StageRun(room, config, index - 1)
            restore_stage(rundir, restored, index - 1)
            restored.close()
        else:
            stage = StageRun(straight, config, 0)
            straight.method.build(stage)
            slow_0 = values(straight)
            stage.close()
        after: Any = straight.method.after_step
        straight.method.after_step = lambda stage: fast.append(values(straight))
        done = learn(straight, config, index, opposed(index))
        straight.method.after_step = after
        found = answering(done.stage)
        n = len(fast)
        assert found is not None and n == STEPS * (index + 1)
        wanted = beta**n * vector(slow_0).double()
        for i, each in enumerate(fast, 1):
            wanted = wanted + (1 - beta) * beta ** (n - i) * vector(each).double()
        assert off(vector(found), wanted) < 1e-6
        assert (off(vector(found), vector(fast[-1])) > 1e-2) == (beta > 0)  # β = 0 is replay alone
        again = learn(room, config, index, opposed(index)).stage
        assert torch.equal(vector(answering(again) or {}), vector(found))
        assert torch.equal(vector(values(room)), vector(fast[-1]))  # what trains goes on as it is
        commit(rundir, index, again.plan.name, lambda draft: save_stage(draft, again))  # noqa: B023


@pytest.mark.parametrize("beta", narrowed([0.0, 0.9], [0.9]))
def test_the_slow_copy_goes_on_over_all_stages(beta: float, tmp_path: Path) -> None:
    on_ranks(1, _slow, str(tmp_path), beta)


def test_both_copies_go_on_only_where_one_parameter_set_does() -> None:
    def check(name: str) -> None:
        config = RunConfig.model_validate({"method": {"name": name}, "options": {"slow_copy": {"next": "both"}}})
        check_method(config, make_method(config).plan(["a", "b"]))

    check("sure")
    check("seqft")
    for name in ("inclora", "pertask"):
        with pytest.raises(UserError) as refused:
            check(name)
        assert str(refused.value) == (
            f"options.slow_copy.next=both: {name} begins each stage with other parameters, and the slow copy is of "
            "those before; set fast or slow"
        )


# What is said, and refused.


def test_a_stage_says_what_its_memory_holds() -> None:
    room, config = order_room(Place(), "sure", method__memory_size=2)
    stage = StageRun(room, config, 0)
    stage.own = Source([Example([5], [6]), Example([5], [7], weight=0.0), Example([5], [8])], ["a", "a", "b"])
    room.method.scores = torch.tensor([1.0, 9.0, 2.0])
    room.method.end_task(stage)
    stage.close()
    assert {task: [e.target for e in kept] for task, kept in room.method.memory.tasks.items()} == {
        "a": [[6]],
        "b": [[8]],
    }
    assert room.method.said(None) == (
        "memory: 1 a task at most; mean surprise 1.5 of the 2 rows kept of this stage's 3, of all of these 4"
    )


def test_a_memory_without_a_row_of_each_task_is_refused() -> None:
    def check(size: int) -> None:
        config = RunConfig.model_validate({"method": {"name": "sure", "memory_size": size}})
        method = make_method(config)
        method.plan(["a", "b", "c"])
        method.check(config)

    check(3)
    with pytest.raises(UserError) as refused:
        check(2)
    assert str(refused.value) == ("method.memory_size: 2 examples are less than one of each of 3 tasks; set 3 or more")


@pytest.mark.parametrize(
    "own", [{"memory_size": 0}, {"score": "never"}, {"of": "source"}, {"every": 0}, {"memory_batch": 0}]
)
def test_settings_have_bounds(own: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(own))):
        make_method(RunConfig.model_validate({"method": {"name": "sure", **own}}))
    with pytest.raises(ValueError, match="beta"):
        RunConfig.model_validate({"options": {"slow_copy": {"beta": 1.0}}})
