"""CoLoRA: every step against plain matrices, rounds, routing, what is logged, kept and folded."""

from __future__ import annotations

import json
import warnings
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.colora.method import CoLoRA
from cl_runner.methods.colora.rounds import LiveRound, PastRound
from cl_runner.methods.protocol import Source
from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.tasks.task import Row, Task
from cl_runner.training import evaluation as scoring
from cl_runner.training.checkpoint import restore_stage, save_stage
from cl_runner.training.stage import StageRun
from tests.breadth import narrowed, paired, wide
from tests.command_line import NANO, call
from tests.distributed import on_ranks
from tests.methods.orders import BY_LAYER, learn, order_room
from tests.methods.steps import THREE, off, opposed
from tests.methods.test_carried import same
from tests.stages import Kind, naive_loss, tiny_model

TASKS = ("a", "b", "c")
LR, STEPS = 0.02, 3
# Six rows of three tasks, all in every step, in three micro-batches.
SETTINGS: dict[str, Any] = {**THREE, "training__lr": LR, "training__epochs": STEPS, "method__temperature": 1.0}
LAMBDAS = {"method__lambda1": 0.7, "method__lambda2": 0.9, "method__growth": 2.0, "method__mix_lr": 5.0}


def opened(place: Place, kind: Kind = "t5", **settings: Any) -> tuple[Any, Any]:
    return order_room(place, "colora", tasks=TASKS, kind=kind, **{**SETTINGS, **settings})


def mixed(rows: str = "aaabbc") -> Source:
    """The same inputs for every task in turn, other labels."""
    examples = [opposed("abc".index(task), rows=len(rows)).examples[i] for i, task in enumerate(rows)]
    return Source(examples, list(rows))


def learned(room: Any, name: str) -> dict[str, dict[str, Tensor]]:
    """Factors of a live round by target."""
    return {target: term.of[name].values() for target, term in room.adapters.terms.of.items()}


def flat(factors: dict[str, dict[str, Tensor]]) -> Tensor:
    return torch.cat([value.flatten() for of in factors.values() for value in of.values()])


# Every step, by hand.


def naive_penalty(factors: dict[str, dict[str, Tensor]]) -> Tensor:
    """One number at a time: λ1 · mean (A Aᵀ − I)², and λ2 · (1 + growth · r · C) · C, C the mean cos² of a layer."""
    total = torch.zeros((), dtype=torch.float64)
    for of in factors.values():
        adapters = [of["shared_A"].double(), *of["A"].double()]
        r = adapters[0].shape[0]
        gap = sum(((A[i] * A[j]).sum() - float(i == j)) ** 2 for A in adapters for i, j in product(range(r), range(r)))
        cosines = [
            (one[i] @ other[j]) ** 2 / (one[i].square().sum() * other[j].square().sum())
            for one, other in product(adapters[1:], adapters[1:])
            if one is not other
            for i, j in product(range(r), range(r))
        ]
        alike = sum(cosines[1:], cosines[0]) / len(cosines)
        growing = 1 + 2.0 * r * float(alike.detach())
        total = total + 0.7 * gap / (len(adapters) * r * r) + 0.9 * growing * alike
    return total / len(factors)


def plain(
    kind: Kind,
    rounds: list[dict[str, dict[str, Tensor]]],
    own: Source,
    adapters: Any,
    tokens: int,
) -> Tensor:
    """Mean loss per label token, each row by a model whose weights are written out for its task."""
    model, total = tiny_model(kind), torch.zeros(())
    for example, task in zip(own.examples, own.tasks, strict=True):
        k, weights = TASKS.index(task), {}
        for target in rounds[0]:
            weight = model.get_submodule(target).weight
            for of in (factors[target] for factors in rounds):
                c = 1 / (1 + torch.exp(-of["mix"][k]))
                s = adapters.scale_of(target)
                weight = weight + s * (c * of["shared_B"] @ of["shared_A"] + (1 - c) * of["B"][k] @ of["A"][k])
            weights[f"{target}.weight"] = weight

        def answer(weights: dict[str, Tensor] = weights, **inputs: Any) -> Any:
            return torch.func.functional_call(model, weights, (), inputs)

        total = total + naive_loss(answer, kind, [example]) * len(example.target)
    return total / tokens


def _steps(place: Place, kind: Kind, more: dict[str, Any]) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Our factors after each round, the same by hand, and the last row of the log."""
    own, found = mixed(), []
    tokens = sum(len(example.target) for example in own.examples)
    room, config = opened(place, kind, **LAMBDAS, **more)
    past: list[dict[str, dict[str, Tensor]]] = []
    for index in range(2):
        twin, _ = opened(place, kind, **LAMBDAS, **more)
        twin.method.build(StageRun(twin, config, index))
        name = f"round{index + 1}"
        values = {t: {n: v.requires_grad_() for n, v in of.items()} for t, of in learned(twin, name).items()}
        mixes = [of["mix"] for of in values.values()]
        others = [of[n] for of in values.values() for n in of if n != "mix"]
        optimizer = torch.optim.AdamW([{"params": others}, {"params": mixes, "lr": 5 * LR}], lr=LR, weight_decay=0.0)
        for _ in range(STEPS):
            optimizer.zero_grad()
            (plain(kind, [*past, values], own, room.adapters, tokens) + naive_penalty(values)).backward()
            optimizer.step()
        outcome = learn(room, config, index, own)
        found.append((flat(learned(room, name)), flat(values).detach(), outcome.rows))
        past.append(learned(room, name))
        assert twin.adapters.scale == room.adapters.scale == 2.0
    return found


@pytest.mark.parametrize(
    ("kind", "ranks", "more"),
    [("t5", 1, {}), ("llama", 1, {}), pytest.param("t5", 2, {}, marks=wide), ("t5", 1, BY_LAYER)],
)
def test_every_step_is_that_of_plain_matrices(kind: Kind, ranks: int, more: dict[str, Any]) -> None:
    """Two rounds, three micro-batches; every row by its own task's weights, the past round frozen under the next."""
    for ours, theirs, _ in on_ranks(ranks, _steps, kind, more)[0]:
        assert off(ours, theirs) < 1e-4


def test_two_ranks_do_what_one_does_and_log_the_same() -> None:
    """Five rows in micro-batches of one: one rank takes a row that does not count."""
    (alone,) = on_ranks(1, _ranks)
    first, second = on_ranks(2, _ranks)
    assert torch.equal(first["factors"], second["factors"])
    assert off(first["factors"], alone["factors"]) < 1e-3
    for name, value in alone["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        assert off(first["state"][name], value) < 1e-2, name
    for key in ("orth_loss", "collab_loss"):
        assert first["row"][key] == second["row"][key] == pytest.approx(alone["row"][key], rel=1e-3)
    assert first["row"]["losses"] == second["row"]["losses"] == pytest.approx(alone["row"]["losses"], rel=1e-3)


def _ranks(place: Place) -> dict[str, Any]:
    room, config = opened(place, training__micro_batch=1, method__temperature=3.0)
    for index in range(2):
        outcome = learn(room, config, index, mixed("aaabc"))
    return {
        "factors": flat(learned(room, "round2")), "row": outcome.rows[-1], "state": room.method.state().tensors,
    }  # fmt: skip


# The log.


def _logged(place: Place) -> tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, float]]]:
    own = mixed()
    room, config = opened(place, **LAMBDAS)
    twin, _ = opened(place, **LAMBDAS)
    twin.method.build(StageRun(twin, config, 0))
    values, by_task = learned(twin, "round1"), {}
    for task in "abc":
        rows = [i for i, its in enumerate(own.tasks) if its == task]
        part = Source([own.examples[i] for i in rows], [task] * len(rows))
        tokens = sum(len(example.target) for example in part.examples)
        by_task[task] = float(plain("t5", [values], part, room.adapters, tokens))
    outcome = learn(room, config, 0, own)
    return outcome.rows, room.method.history["round1"], [by_task, {"penalty": float(naive_penalty(values))}]


def test_the_log_has_the_loss_of_each_task_and_the_parts_of_the_penalty() -> None:
    ((rows, history, (by_task, penalty)),) = on_ranks(1, _logged)
    assert rows[0]["losses"] == pytest.approx(by_task, rel=1e-5)
    assert rows[0]["penalty"] == pytest.approx(penalty["penalty"], rel=1e-5)
    for row in rows:
        least = 0.7 * row["orth_loss"] + 0.9 * row["collab_loss"]  # what grows with likeness comes on top
        assert least <= row["penalty"] <= least * 1.5
    assert history["rows"] == {"a": 3, "b": 2, "c": 1}
    assert history["loss_at_first"] == pytest.approx(by_task, rel=1e-5)
    assert history["loss_at_last"] == pytest.approx(rows[-1]["losses"], rel=1e-5)
    assert all(0 < c < 1 and c != 0.5 for c in history["collaboration"].values())


# Rounds.


def planned(rounds: Any, order: tuple[str, ...] = TASKS) -> list[tuple[str, tuple[str, ...]]]:
    method = CoLoRA(CoLoRA.Config(rounds=rounds))
    return [(plan.name, plan.tasks) for plan in method.plan(order)]


def test_rounds_are_stages_over_all_tasks_or_those_given() -> None:
    assert planned(2) == [("round1", TASKS), ("round2", TASKS)]
    assert planned([["b", "a"], ["c", "a"]]) == [("round1", ("b", "a")), ("round2", ("c", "a"))]
    assert CoLoRA.Config().rounds == 2


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ([["a", "b"], ["d"]], "round 2 has a task 'd' that the order has not"),
        ([["a", "b"], []], "round 2 has no task"),
        ([["a", "b", "a"], ["c"]], "round 1 has a task twice"),
        ([["a"], ["b"]], "no round has c"),
        ([], "no round has a, b, c"),
    ],
)
def test_rounds_that_do_not_fit_the_order_are_refused(rounds: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"^method.rounds: {said}"):
        planned(rounds)


@pytest.mark.parametrize("own", [{"rounds": 0}, {"rounds": True}, {"temperature": 0.5}, {"mix_lr": 0}, {"fold": "x"}])
def test_settings_have_bounds(own: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(own))):
        CoLoRA.Config(**own)


def test_what_will_be_carried_is_said() -> None:
    config = RunConfig.model_validate({"method": {"name": "colora", "rounds": 2}, "adapter": {"r": 8}})
    method, shapes = make_method(config), [(1024, 1024)] * 144
    method.plan(["a", "b", "c"])
    pairs = "8 LoRA pairs, shared ones and experts"  # 8 · 8 · 2048 · 144 numbers
    assert method.grows(config, shapes) == f"carries 75.5 MB after the last round: {pairs}"
    assert method.grows(config, shapes * 20) == f"carries 1.51 GB after the last round: {pairs}"


def test_what_cannot_work_is_refused() -> None:
    values: dict[str, Any] = {"method": {"name": "colora"}}
    for more, said in (
        ({"training": {"optimizer": "muon"}}, r"^training.optimizer: muon"),
        ({"stages": {2: {"method.fold": "mean"}}}, r"^method.fold: the same for all rounds"),
        ({"stages": {2: {"method.rounds": 3}}}, r"^method.rounds: the same for all rounds"),
    ):
        config = RunConfig.model_validate({**values, **more})
        with pytest.raises(UserError, match=said):
            make_method(config).check(config)


def _shares(place: Place) -> None:
    room, config = opened(place, method__temperature=2.0)
    own = mixed("a" * 18 + "b" * 2)
    room.order = tuple(room.method.plan(["a", "b"]))
    stage = StageRun(room, config, 0)
    room.method.build(stage)
    [source] = room.method.training_data(stage, own)
    assert [source.tasks.count(task) for task in "ab"] == [15, 5]  # √9 : 1
    assert all(example in own.examples for example in source.examples)
    again = room.method.training_data(stage, own)[0]
    assert again.examples == source.examples and again.tasks == source.tasks
    other = StageRun(room, config, 1)
    room.method.build(other)
    assert room.method.training_data(other, own)[0].examples != source.examples  # drawn anew in each round
    share = next(iter(room.adapters.terms.of.values())).of["round2"].share
    assert share.tolist() == [0.75, 0.25]


def test_a_round_deals_its_rows_by_temperature() -> None:
    on_ranks(1, _shares)


# Routing.


def routes(stage: StageRun, tasks: list[str], task: str | None = None) -> dict[str, Tensor]:
    """As a training batch of these tasks is routed, or prompts of one task."""
    own = mixed("aabbcc")
    if tasks:
        return stage.make_batch(own.examples[: len(tasks)], tasks, [1.0] * len(tasks)).condition
    prompts = stage.padded([example._replace(target=[]) for example in own.examples], [1.0] * 6)
    found: dict[str, Tensor] = stage.room.method.condition(stage, prompts, task)
    return found


def _routed(place: Place, routing: str) -> None:
    room, config = opened(place, method__rounds=[["a", "b"], ["b", "c"]], method__routing=routing)
    learn(room, config, 0, mixed("aaabbb"))
    second = StageRun(room, config, 1)
    room.method.build(second)
    found = routes(second, ["b", "c", "c"])
    assert found["round1"][0].tolist() == [0, 1] and found["round2"].tolist() == [[1, 0], [0, 1], [0, 1]]
    # c is new: the first round's gate says whose expert it is most like; without gates there is none.
    if routing == "hard":
        assert not found["round1"][1:].any()
    else:
        assert torch.allclose(found["round1"].sum(1), torch.ones(3)) and (found["round1"][1:] > 0).all()
    second.close()
    room.method.load_state(room.method.state())
    stage = learn(room, config, 1, mixed("bbbccc")).stage
    stage = StageRun(room, config, 1)
    of_a, of_c, new = (routes(stage, [], task) for task in ("a", "c", "z"))
    unknown = routes(stage, [], None)
    assert of_a["round1"].tolist() == [[1, 0]] * 6 and not of_a["round2"].any()
    assert of_c["round2"].tolist() == [[0, 1]] * 6
    if routing == "hard":
        assert not any(route.any() for found in (new, unknown) for route in found.values())
        return
    assert room.method.knows_task == (routing != "soft")
    for found in (new, unknown):
        assert torch.allclose(found["round1"].sum(1), torch.ones(6))
        gate = room.method.gates.of["round2"]
        assert gate.tasks == ["a", "b", "c"]
        whole = gate(stage.features(stage.padded(mixed("aabbcc").examples, [1.0] * 6)))
        assert torch.allclose(whole.sum(1), torch.ones(6)) and torch.allclose(found["round2"], whole[:, 1:], atol=1e-5)
        assert float(found["round2"].sum(1).min()) < 0.9  # the rest is a's, of whom the second round has no expert
    assert all(torch.equal(unknown[name], new[name]) for name in unknown)


@pytest.mark.parametrize("routing", ["auto", "hard", "soft"])
def test_a_known_task_is_its_experts_and_an_unknown_one_the_gates(routing: str) -> None:
    on_ranks(1, _routed, routing)


def _before_the_fold(place: Place, fold: str) -> dict[str, list[Tensor]]:
    """What the second round adds for a task of the first one, its own, and a stranger, all of it still live."""
    room, config = opened(place, method__rounds=[["a", "b"], ["c"]], method__fold=fold)
    method, found = room.method, {}
    end = method.end_task

    def spy(stage: Any) -> None:
        end(stage)
        if stage.index == 0:
            return
        for task in ("a", "c", "z"):
            found[task] = [route.clone() for route in routes(stage, [], task).values()]
            batch = stage.make_batch(mixed().examples, [task] * 6, [1.0] * 6)
            answers = stage.forward(batch)
            if fold == "mean":
                with room.adapters.without_terms():  # what the first round has left in the weight
                    assert torch.equal(stage.forward(batch), answers) == (task == "a")

    method.end_task = spy
    learn(room, config, 0, mixed("aaabbb"))
    method.load_state(method.state())
    learn(room, config, 1, mixed("cccccc"))
    return found


def test_before_the_fold_a_round_adds_nothing_to_tasks_of_rounds_that_were_folded() -> None:
    (folded,), (kept,) = on_ranks(1, _before_the_fold, "mean"), on_ranks(1, _before_the_fold, "keep")
    for task, wanted in (("a", [[0.0]] * 6), ("c", [[1.0]] * 6)):
        assert folded[task][-1].tolist() == kept[task][-1].tolist() == wanted, task
    assert folded["z"][-1].tolist() == [[1.0]] * 6  # the gate knows the tasks of this round alone
    assert kept["a"][0].tolist() == [[1.0, 0.0]] * 6


def _apart(place: Place) -> None:
    """Tasks whose inputs differ are told apart; the terms themselves change nothing about what the gate sees."""
    for kind in ("t5", "llama"):
        room, config = opened(place, kind, training__epochs=6, training__lr=0.1)
        examples = [e._replace(source=[10 + "abc".index(t)] * 4 + [1]) for e, t in zip(*_pairs("abc" * 4), strict=True)]
        own = Source(examples, list("abc" * 4))
        outcome = learn(room, config, 0, own)
        stage = StageRun(room, config, 0)
        batch = stage.padded(examples, [1.0] * 12)
        seen = stage.features(batch)
        shown = room.adapters.shown()
        room.adapters.show(None)
        assert torch.equal(stage.features(batch), seen)
        room.adapters.show(shown)
        gate = room.method.gates.of["round1"]
        weights = gate(seen)
        assert torch.allclose(weights.sum(1), torch.ones(12)) and weights.argmax(1).tolist() == [0, 1, 2] * 4
        own_answers = [stage.generate([e], t)[0] for e, t in zip(examples, own.tasks, strict=True)]
        assert stage.generate(examples, None) == own_answers  # the gate finds each one's expert
        assert outcome.losses[-1] < outcome.losses[0]


def _pairs(rows: str) -> tuple[list[Any], list[str]]:
    own = mixed(rows)
    return list(own.examples), list(own.tasks)


def test_the_gate_sees_the_frozen_base_and_tells_tasks_apart() -> None:
    on_ranks(1, _apart)


def _alone(place: Place, kind: Kind) -> None:
    """A batch of several tasks is answered as each task's rows alone, by a model without any router."""
    room, config = opened(place, kind, training__lr=0.1)
    for index in range(2):
        learn(room, config, index, mixed())
    stage, own = StageRun(room, config, 1), mixed("abcabc")
    batch = stage.make_batch(own.examples, own.tasks, [1.0] * 6)
    together = stage.forward(batch)
    rounds = [learned(room, name) for name in ("round1", "round2")]
    for k, task in enumerate(TASKS):
        rows = [i for i in range(6) if own.tasks[i] == task]
        room.adapters.show(None)
        for target, past in room.adapters.past.items():
            of = [factors[target] for factors in rounds]
            c = [f["mix"][k].sigmoid() for f in of]
            past.set(
                sum(
                    room.adapters.scale * (c[i] * f["shared_B"] @ f["shared_A"] + (1 - c[i]) * f["B"][k] @ f["A"][k])
                    for i, f in enumerate(of)
                )
            )
        assert off(stage.forward(batch)[rows], together[rows]) < 1e-5
        for past in room.adapters.past.values():
            past.set(None)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_hard_routing_is_the_tasks_own_expert_alone(kind: Kind) -> None:
    on_ranks(1, _alone, kind)


# State.


def said(stage: StageRun) -> dict[str, list[str]]:
    """The stage's answers as each task, to rows with and without the right answer at hand."""
    own = mixed("abcabc")
    found = {}
    for name in TASKS:
        task = Task(name=name, kind="SC", instruction="Say.", metric="accuracy", labels=["x"])
        rows = [Row(f"{name}/{i}", "text", "x") for i in range(6)]
        [scored] = scoring.evaluate(stage, {name: scoring.TestSet(task, rows, own.examples)})
        found[name] = [row["output"] for row in scored.predictions]
    return found


DROPPED: dict[str, Any] = {"dropout": 0.2, "adapter__dropout": 0.2, "training__lr": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "keep": {},
    "soft": {"method__routing": "soft"},
    "mean": {"method__fold": "mean"},
    "some": {"method__rounds": [["a", "b"], ["b", "c"], ["a", "c"]], "method__temperature": 2.0},
}


def _held(place: Place) -> None:
    """A finished round's factors are in the layers and in what is carried, in the same memory."""
    room, config = opened(place)
    for index in range(2):
        stage = learn(room, config, index, mixed()).stage
        before = {key: value.clone() for key, value in room.method.state().tensors.items()}
        for name, kept in room.method.rounds.items():
            for target, term in room.adapters.terms.of.items():
                assert isinstance(term.of[name], PastRound)
                memory = {part.untyped_storage().data_ptr() for part in (*term.of[name].stacked(), term.of[name].mix)}
                assert {part.untyped_storage().data_ptr() for part in kept.factors[target].values()} == memory
        room.method.build(StageRun(room, config, index, evaluating=True))  # stacked again
        after = room.method.state().tensors
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert len(room.method.rounds) == index + 1 and stage.plan.name in room.method.rounds


def test_finished_rounds_are_held_once() -> None:
    on_ranks(1, _held)


def _resumed(place: Place, folder: str, variant: str, kind: Kind) -> None:
    straight, config = opened(place, kind, **DROPPED, **VARIANTS[variant])
    rundir, answers = RunDir(Path(folder)), []
    for index, plan in enumerate(straight.order):
        own = mixed("".join(plan.tasks) * 3)
        learn(straight, config, index, own)
        room, _ = opened(place, kind, **DROPPED, **VARIANTS[variant])
        if index:
            restored = StageRun(room, config, index - 1)
            restore_stage(rundir, restored, index - 1)
            restored.close()
        stage = learn(room, config, index, own).stage
        assert same(room.method.state(), straight.method.state())
        for target, past in room.adapters.past.items():
            theirs = straight.adapters.past[target].sum
            assert (past.sum is None) == (theirs is None) == (variant != "mean")
            assert past.sum is None or torch.equal(past.sum, theirs)
        answers.append(said(StageRun(room, config, index)))
        commit(rundir, index, stage.plan.name, partial(save_stage, stage=stage))
    for index in range(len(straight.order)):
        room, _ = opened(place, kind, **DROPPED, **VARIANTS[variant])
        stage = StageRun(room, config, index, evaluating=True)
        restore_stage(rundir, stage, index)
        room.method.build(stage)
        assert said(stage) == answers[index]
    assert answers[0] != answers[-1]
    if variant in ("keep", "some"):
        assert len({tuple(of) for of in answers[-1].values()}) > 1  # the same inputs, asked as another task
    if variant == "some":
        assert answers[1]["a"] == answers[0]["a"]  # the second round has nothing of a


@pytest.mark.parametrize(
    ("variant", "kind"),
    paired([("keep", "t5"), ("soft", "llama"), ("mean", "llama"), ("some", "t5")], [("keep", "t5"), ("mean", "llama")]),
)
def test_restarted_at_every_round_and_asked_again_it_is_the_same_to_the_bit(
    variant: str, kind: Kind, tmp_path: Path
) -> None:
    on_ranks(1, _resumed, str(tmp_path), variant, kind)


def _folded(place: Place, more: dict[str, Any]) -> None:
    """The fold is the mean by task share, as one pair; the next round begins on it with nothing kept."""
    room, config = opened(place, method__fold="mean", method__temperature=2.0, **more)
    assert room.method.fold_loses and not opened(place)[0].method.fold_loses
    own, kept = mixed("aaaabb"), {}
    room.order = tuple(room.method.plan(["a", "b"]))

    def keep(stage: Any) -> None:
        kept.update(learned(room, "round1"))

    method: Any = room.method
    end = method.end_task
    method.end_task = lambda stage: (end(stage), keep(stage))
    learn(room, config, 0, own)
    counts = list(method.history["round1"]["rows"].values())
    assert sum(counts) == 6
    for target, past in room.adapters.past.items():
        of, wanted = kept[target], 0
        for k in range(2):
            c = of["mix"][k].sigmoid()
            pair = c * of["shared_B"] @ of["shared_A"] + (1 - c) * of["B"][k] @ of["A"][k]
            wanted = wanted + counts[k] / 6 * room.adapters.scale_of(target) * pair
        assert off(past.sum, wanted) < 1e-5
    [folded] = room.adapters.folded
    assert folded.stage == "round1" and {t: folded.rank_of(t) for t in kept} == {
        t: 3 * room.adapters.rank_of(t) for t in kept
    }
    assert {folded.scale_of(t) for t in kept} == {1.0}
    assert room.adapters.terms is None and not method.rounds and not method.state().tensors
    method.end_task = end
    learn(room, config, 1, own)
    assert [pair.stage for pair in room.adapters.folded] == ["round1", "round2"]


@pytest.mark.parametrize("more", [{}, BY_LAYER], ids=["", "ranks by layer"])
def test_the_mean_is_folded_as_one_plain_pair(more: dict[str, Any]) -> None:
    on_ranks(1, _folded, more)


def _peft(place: Place, folder: str, variant: str, kind: Kind) -> None:
    """Plain PEFT answers from a round's folder as the folded model, or as the mean of what is kept."""
    room, config = opened(place, kind, **VARIANTS[variant])
    rundir = RunDir(Path(folder))
    for index in range(2):
        stage = learn(room, config, index, mixed()).stage
        commit(rundir, index, stage.plan.name, partial(save_stage, stage=stage))
        where = rundir.stage_dir(index, stage.plan.name)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            theirs = PeftModel.from_pretrained(tiny_model(kind), where / "adapter").eval()
        batch = StageRun(room, config, index).padded(mixed().examples, [1.0] * 6)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if kind == "t5":
            inputs["decoder_input_ids"] = batch.decoder_input_ids
        shares = {f"round{i + 1}": torch.tensor([[3 / 6, 2 / 6, 1 / 6]]).expand(6, 3) for i in range(index + 1)}
        room.adapters.condition = shares
        with torch.no_grad():
            ours, base = room.adapters.model(**inputs).logits, tiny_model(kind)(**inputs).logits
            assert off(theirs(**inputs).logits, ours) < 1e-5 < 1e-3 < off(base, ours)


def _each_folder(place: Place, folder: str, kind: Kind) -> None:
    """``answers.json`` names a plain PEFT folder for each task that no gate routes; it answers as the run does."""
    for routing, known in (("auto", ["a", "b"]), ("hard", ["a", "b", "c"]), ("soft", [])):
        room, config = opened(place, kind, method__rounds=[["a", "b"], ["b", "c"]], method__routing=routing)
        rundir = RunDir(Path(folder) / routing)
        for index, own in enumerate((mixed("aaabbb"), mixed("bbbccc"))):
            stage = learn(room, config, index, own).stage
            commit(rundir, index, stage.plan.name, partial(save_stage, stage=stage))
        where, stage = rundir.stage_dir(1, "round2"), StageRun(room, config, 1)
        if not known:
            assert not (where / "answers.json").exists()
            continue
        answers = json.loads((where / "answers.json").read_text())
        assert answers == {task: f"adapters/{task}" for task in known}
        batch = stage.padded(mixed().examples, [1.0] * 6)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if kind == "t5":
            inputs["decoder_input_ids"] = batch.decoder_input_ids
        for task in known:
            room.adapters.condition = room.method.condition(stage, batch, task)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
                theirs = PeftModel.from_pretrained(tiny_model(kind), where / answers[task]).eval()
            with torch.no_grad():
                assert off(theirs(**inputs).logits, room.adapters.model(**inputs).logits) < 1e-5
        assert all(term.asked is None for term in room.adapters.terms.of.values())


@pytest.mark.parametrize("kind", narrowed(["t5", "llama"], ["llama"]))
def test_each_task_has_a_plain_peft_folder(kind: Kind, tmp_path: Path) -> None:
    on_ranks(1, _each_folder, str(tmp_path), kind)


@pytest.mark.parametrize(("variant", "kind"), [("keep", "llama"), ("mean", "t5")])
def test_each_round_is_a_plain_peft_folder(variant: str, kind: Kind, tmp_path: Path) -> None:
    on_ranks(1, _peft, str(tmp_path), variant, kind)


def _bf16(place: Place, base: torch.dtype) -> None:
    for variant in ("soft", "mean"):
        room, config = opened(place, bf16=True, **VARIANTS[variant])
        room.base.model.to(base)
        for index in range(2):
            outcome = learn(room, config, index, mixed())
        assert outcome.losses[-1] < outcome.losses[0], variant
        assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in outcome.parameters.values())
        kept = room.method.state().tensors.values()
        assert all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in kept)
        assert set(said(StageRun(room, config, 1))) == set(TASKS)


@pytest.mark.parametrize("base", narrowed([torch.float32, torch.bfloat16], [torch.bfloat16]))
def test_in_bf16_what_trains_and_what_is_carried_is_fp32(base: torch.dtype) -> None:
    on_ranks(1, _bf16, base)


def _every_layer(place: Place) -> None:
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    room, config = opened(place, "llama", adapter__target_modules=layers)
    assert len(room.adapters.past) == 14
    losses = [learn(room, config, index, mixed()).losses for index in range(2)]
    assert losses[1][-1] < losses[1][0] < losses[0][0]
    checkpointed, config = opened(
        place, "llama", adapter__target_modules=layers, training__activation_checkpointing=True
    )
    for index in range(2):
        learn(checkpointed, config, index, mixed())
    assert off(flat(learned(checkpointed, "round2")), flat(learned(room, "round2"))) < 1e-5


def test_all_linear_layers_of_a_llama_also_with_recomputed_activations() -> None:
    on_ranks(1, _every_layer)


# A run.


def test_a_run_of_rounds_says_what_the_fold_loses(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("name: two\ntasks: [dbpedia, agnews]\n")
    sets = ("--set=method.fold=mean", "--set=adapter.r=2", "--name=x")
    result = call("train", "--order", "two.yaml", "--method", "colora", *NANO, *sets, cwd=tmp_path)
    assert result.code == 0, result.err
    run = tmp_path / "runs/x"
    told = [line for line in result.err.splitlines() if "before the fold" in line]
    assert [line.split(":")[0] for line in told] == ["stage 1 of 2 round1", "stage 2 of 2 round2"]
    metrics = json.loads((run / "stages/02-round2/metrics.json").read_text())
    assert metrics["tasks"] == list(metrics["scores"]) == list(metrics["scores_before_fold"]) == ["dbpedia", "agnews"]
    mean = sum(metrics["scores_before_fold"].values()) / 2
    assert f"mean score before the fold {mean:.4f} %, after it {sum(metrics['scores'].values()) / 2:.4f} %" in told[1]
    assert (run / "matrix.csv").read_text().splitlines()[0] == "stage,dbpedia,agnews"
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"round1", "round2"}
    assert all({"orth_loss", "collab_loss", "losses"} <= row.keys() for row in rows)
    again = call("eval", "x", "--stage", "1", "--json", cwd=tmp_path)
    assert again.code == 0 and not any(again.json["differing_rows"].values())


def test_a_kept_run_is_asked_again(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("name: two\ntasks: [dbpedia, agnews]\n")
    sets = ("--set=method.rounds=[[dbpedia], [agnews, dbpedia]]", "--set=adapter.r=2", "--name=x")
    result = call("train", "--order", "two.yaml", "--method", "colora", *NANO, *sets, cwd=tmp_path)
    assert result.code == 0 and "before the fold" not in result.err, result.err
    answers = json.loads((tmp_path / "runs/x/stages/02-round2/answers.json").read_text())
    assert answers == {"dbpedia": "adapters/dbpedia"}  # agnews is routed by the first round's gate
    state = load_file(tmp_path / "runs/x/stages/02-round2/state.safetensors")
    assert {key.split(".")[1] for key in state} == {"round1", "round2", "gate"}
    for stage in ("1", "2"):
        again = call("eval", "x", "--stage", stage, "--json", cwd=tmp_path)
        assert again.code == 0 and not any(again.json["differing_rows"].values())


def test_the_penalty_carries_over_sizes() -> None:
    """The same distribution of entries: more layers or tasks change little."""

    def penalty(layers: int, tasks: int) -> float:
        rounds = [
            LiveRound.fresh(8, 64, tasks, 4, 1.0, torch.Generator().manual_seed(layer)) for layer in range(layers)
        ]
        terms = {str(i): SimpleNamespace(of={"r": each}) for i, each in enumerate(rounds)}
        stage: Any = SimpleNamespace(plan=SimpleNamespace(name="r"), terms=lambda: terms, index=0)
        found = CoLoRA(CoLoRA.Config()).penalty(stage)
        assert found is not None
        return float(found.detach())

    few = penalty(10, 3)
    assert penalty(40, 3) == pytest.approx(few, rel=0.1) and penalty(10, 9) == pytest.approx(few, rel=0.1)


def test_no_weights_no_penalty() -> None:
    config = CoLoRA.Config(lambda1=0, lambda2=0)
    rounds = LiveRound.fresh(4, 6, 2, 2, 1.0, torch.Generator())
    terms = {"x": SimpleNamespace(of={"r": rounds})}
    stage: Any = SimpleNamespace(plan=SimpleNamespace(name="r"), terms=lambda: terms)
    assert CoLoRA(config).penalty(stage) is None
