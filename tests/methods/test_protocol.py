"""The protocol: every hook of the design with a default that does nothing, settings per stage, and no torch to list."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from cl_runner.adapters.kind import Fold
from cl_runner.config.schema import RunConfig, Section
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import METHODS, make_method, method_class, method_schema
from cl_runner.methods import protocol as protocol
from cl_runner.methods.protocol import Method, Progress, Source, Stage, StagePlan, State, overrides
from cl_runner.models.batch import Example
from cl_runner.training.prepare import open_stage
from cl_runner.training.stage import StageRun, commit_update
from tests.adapters.families import adapters_of, base_model, logits, off, random_pair
from tests.stages import tiny_config, tiny_room

# The table of the design: hook → its parameters.
HOOKS = {
    "plan": ["order"],
    "build": ["stage"],
    "parameter_groups": ["stage"],
    "begin_task": ["stage"],
    "training_data": ["stage", "own"],
    "condition": ["stage", "batch", "task"],
    "loss": ["stage", "batch"],
    "penalty": ["stage"],
    "edit_gradients": ["stage", "gradients"],
    "whole_step": ["stage", "name", "gradient", "lr"],
    "after_step": ["stage"],
    "end_task": ["stage"],
    "fold": ["stage"],
    "dense_update": ["stage"],
    "state": [],
    "load_state": ["state"],
    "answering": ["task"],
}
SERVICES = [
    "forward", "gradient", "observe", "batches", "generate", "factors", "base_weight", "input_groups", "sum", "mean",
    "broadcast", "rng", "write", "moments", "set_moments", "progress", "parameters",
]  # fmt: skip


class Plain(Method):
    """A method that leaves every hook alone."""

    name, title = "plain", "nothing of its own"


def test_every_hook_is_there_and_says_when_it_runs() -> None:
    for name, wanted in HOOKS.items():
        hook = getattr(Method, name)
        assert list(inspect.signature(hook).parameters) == ["self", *wanted]
        first = inspect.getdoc(hook).splitlines()[0]  # type: ignore[union-attr]
        assert first.startswith("Runs "), name
        assert not overrides(Plain(Section()), name)
    assert get_args(Fold) == ("factors", "dense", "keep", "replace")


def test_a_method_that_overrides_a_hook_is_seen_to() -> None:
    class Own(Plain):
        def penalty(self, stage: Stage) -> Tensor | None:
            return None

    assert [name for name in HOOKS if overrides(Own(Section()), name)] == ["penalty"]


def test_the_stage_keeps_every_promise_by_name() -> None:
    promised = {
        name
        for name, value in vars(Stage).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
    }
    assert set(SERVICES) <= promised
    for name in promised:
        ours = inspect.getattr_static(StageRun, name)
        theirs = inspect.getattr_static(Stage, name)
        assert isinstance(ours, property) == isinstance(theirs, property), name
        if not isinstance(ours, property):
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name
    room = tiny_room(Plain(Section()), tiny_config(), Place())
    stage = StageRun(room, tiny_config(), 0)
    assert all(hasattr(stage, name) for name in Stage.__annotations__)
    stage.close()


def test_defaults_do_nothing() -> None:
    method = Plain(Section())
    assert method.plan(["b", "a"]) == [StagePlan("b", ("b",)), StagePlan("a", ("a",))]
    assert {plan.start for plan in method.plan(["a"])} == {"previous"}
    nothing: Any = SimpleNamespace()
    for result in (
        method.begin_task(nothing), method.condition(nothing, nothing, None), method.penalty(nothing),
        method.edit_gradients(nothing, {}), method.after_step(nothing), method.end_task(nothing),
        method.answering("a"), method.answering(None), method.load_state(State({"x": torch.ones(1)}, {"y": 1})),
    ):  # fmt: skip
        assert result is None
    own = Source([], [])
    assert method.training_data(nothing, own) == [own] and method.training_data(nothing, own)[0] is own
    assert method.fold(nothing) == "factors" and method.state() == State({}, {})
    assert method.form == "" and method.check(RunConfig()) is None
    with pytest.raises(NotImplementedError):
        method.whole_step(nothing, "x", torch.ones(1), 0.1)


def test_default_build_begins_a_pair_that_depends_on_seed_and_stage_alone() -> None:
    def pair_of(index: int, seed: int, before: int = 0) -> Tensor:
        config = tiny_config(seed=seed)
        room = tiny_room(Plain(Section()), config, Place(), order=("one", "two"))
        torch.manual_seed(before)
        stage = StageRun(room, config, index)
        stage.room.method.build(stage)
        stage.close()
        assert room.adapters.live == ("one", "two")[index]
        return torch.cat([a.flatten() for a in room.adapters.pair().A.values()])

    first = pair_of(0, 1)
    assert torch.equal(first, pair_of(0, 1, before=5))
    assert not torch.equal(first, pair_of(1, 1)) and not torch.equal(first, pair_of(0, 2))


def test_default_parameters_and_loss() -> None:
    config = tiny_config(training__weight_decay=0.25)
    room = tiny_room(Plain(Section()), config, Place())
    stage = StageRun(room, config, 0)
    room.method.build(stage)
    (group,) = room.method.parameter_groups(stage)
    assert (group.rule, group.lr_scale, group.weight_decay) == ("adamw", 1.0, 0.25)
    assert group.parameters.keys() == room.adapters.parameters().keys()
    from tests.stages import naive_loss, some_rows, tiny_model

    own = some_rows(3)
    tokens = sum(len(e.target) for e in own.examples)
    batch = stage.make_batch(own.examples, own.tasks, [1 / tokens] * 3)
    loss = room.method.loss(stage, batch)
    stage.close()
    assert off(loss, naive_loss(tiny_model(), "t5", own.examples)) < 1e-5


# What becomes of the update.


class Folding(Plain):
    def __init__(self, how: Fold) -> None:
        super().__init__(Section())
        self.how = how

    def fold(self, stage: Stage) -> Fold:
        return self.how

    def replacement(self, stage: Stage) -> dict[str, Tensor]:
        return stage.live_update()


class Halved(Folding):
    def dense_update(self, stage: Stage) -> dict[str, Tensor]:
        return {target: 0.5 * update for target, update in stage.live_update().items()}


@pytest.mark.parametrize("how", get_args(Fold))
def test_what_the_method_says_becomes_of_the_update(how: Fold) -> None:
    """However it is folded or kept, the model answers as before."""
    adapters = adapters_of(base_model("t5"))
    live = random_pair(adapters, "one")
    adapters.show(live)
    before = logits(adapters.model)
    stage: Any = SimpleNamespace(adapters=adapters, plan=StagePlan("one", ("one",)), live_update=adapters.live_update)
    commit_update(Folding(how), stage)
    assert off(logits(adapters.model), before) < 1e-5
    assert [pair.stage for pair in adapters.folded] == (["one"] if how == "factors" else [])
    assert adapters.dense == (["one"] if how in ("dense", "replace") else [])
    assert list(adapters.kept) == (["one"] if how == "keep" else [])
    assert adapters.live == ("one" if how == "keep" else None)
    sums = [past.sum for past in adapters.past.values()]
    assert all((s is None) == (how == "keep") for s in sums)


def test_a_method_hands_over_a_dense_update_of_its_own() -> None:
    adapters = adapters_of(base_model("qwen2"), "qwen2")
    live = random_pair(adapters, "one")
    adapters.show(live)
    stage: Any = SimpleNamespace(adapters=adapters, plan=StagePlan("one", ("one",)), live_update=adapters.live_update)
    commit_update(Halved("dense"), stage)
    for target, past in adapters.past.items():
        assert torch.equal(past.sum, 0.5 * live.update(target))
        assert off(past.weight - past.base, 0.5 * live.update(target)) < 1e-5


# Settings.


def test_settings_differ_by_task_and_by_position() -> None:
    values = {
        "method": {"name": "olora", "lambda1": 0.5},
        "tasks": {"b": {"method.lambda1": 5, "method.lambda2": 0.1}, "c": {"method.lambda1": 7}},
        "stages": {3: {"method.lambda1": 0}},
    }
    config = RunConfig.model_validate({**tiny_config().model_dump(), **values})
    method = make_method(config)
    room = tiny_room(method, config, Place(), order=("a", "b", "c", "d"))
    seen = []
    for index in range(4):
        stage = open_stage(room, config, index)
        seen.append((method.config.lambda1, method.config.lambda2, stage.config.method.own()["lambda1"]))
        stage.close()
    assert seen == [(0.5, 0.0, 0.5), (5, 0.1, 5), (0, 0.0, 0), (0.5, 0.0, 0.5)]


def test_the_penalty_follows_the_settings_of_the_stage() -> None:
    values = {"method": {"name": "olora", "lambda1": 0.5}, "tasks": {"b": {"method.lambda1": 5}}}
    config = RunConfig.model_validate({**tiny_config().model_dump(), **values})
    room = tiny_room(make_method(config), config, Place(), order=("a", "b", "c"))
    room.adapters.fold(random_pair(room.adapters, "a"))
    penalties = []
    for index in (1, 2):
        stage = open_stage(room, config, index)
        room.adapters.show(random_pair(room.adapters, "now", seed=3))
        penalties.append(float(room.method.penalty(stage)))  # type: ignore[arg-type]
        stage.close()
    assert penalties[0] == pytest.approx(10 * penalties[1])


def test_unknown_methods_and_settings_are_refused() -> None:
    with pytest.raises(UserError, match=r"^there is no method 'olra'; did you mean 'olora'\?$"):
        method_class("olra")
    with pytest.raises(UserError, match=r"^there is no method 'zzz' \(there are seqft, .*nlora.*\)$"):
        method_class("zzz")
    for name in METHODS:
        assert method_schema(name) is method_class(name).Config
        with pytest.raises(ValueError, match="nonsense"):
            method_schema(name)(nonsense=1)
    assert make_method(RunConfig.model_validate({"method": {"name": "olora", "lambda1": 2}})).config.lambda1 == 2


def test_rows_by_length_are_the_same_rows_task_by_task_the_longest_first() -> None:
    source = Source([Example([5] * n, [2]) for n in (2, 4, 3, 9)], ["b", "a", "a", "b"], 0.5, ["0", "1", "2", "3"])
    found = source.by_length()
    assert [len(example.source) for example in found.examples] == [4, 3, 9, 2]
    assert found.tasks == ["a", "a", "b", "b"] and found.ids == ["1", "2", "3", "0"] and found.weight == 0.5


def test_progress() -> None:
    assert [Progress(step, 4, None).share for step in (0, 1, 4)] == [0, 0.25, 1] and Progress(0, 0, None).share == 1


def test_methods_and_the_command_line_import_without_torch() -> None:
    code = """
import sys
from cl_runner.methods import METHODS, method_class, make_method
from cl_runner.config.schema import RunConfig
for name in METHODS:
    config = RunConfig.model_validate({"method": {"name": name}})
    made = make_method(config)
    made.plan(["a", "b"]), made.form, made.check(config), made.state(), made.answering("a")
import cl_runner.cli
heavy = {"torch", "transformers", "peft", "deepspeed", "safetensors", "numpy"} & set(sys.modules)
print(sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_protocol_says_all_that_it_offers() -> None:
    """Every public method of the protocol has a docstring."""
    for owner in (Stage, Method):
        for name, value in vars(owner).items():
            if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                assert inspect.getdoc(value), f"{owner.__name__}.{name}"
    assert protocol.__doc__
