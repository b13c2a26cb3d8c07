"""The slow copy against the recursion by hand; what answers and what goes on, in stages and in whole runs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from cl_runner.config.schema import ModelConfig, RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.models.base import load_base
from cl_runner.training.compatibility import check_method
from cl_runner.training.loop import train_stage
from cl_runner.training.options import answering, leaving
from cl_runner.training.options.slow_copy import SlowCopy
from cl_runner.training.stage import StageRun, commit_update
from tests.breadth import narrowed, paired
from tests.command_line import NANO, call, results
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room, rows_of
from tests.methods.steps import Values, off, vector
from tests.nano import nano_t5

BETA = 0.6
COMBINATIONS = [(answers, goes_on) for answers in (True, False) for goes_on in ("fast", "slow")]
combinations = pytest.mark.parametrize(("answers", "goes_on"), COMBINATIONS)


def copied(stage: Any) -> Values:
    return {name: p.detach().clone() for name, p in stage.parameters().items()}


def followed(slow: Values, fast: Values, beta: float = BETA) -> Values:
    """One step of the recursion, in fp64."""
    return {name: beta * slow[name].double() + (1 - beta) * fast[name].double() for name in fast}


@dataclass
class Seen:
    """A stage's parameters as its steps began and after each, and as its method's ``end_task`` found them."""

    start: Values = field(default_factory=dict)
    steps: list[Values] = field(default_factory=list)
    at_end: Values = field(default_factory=dict)

    def slow(self, beta: float = BETA) -> Values:
        slow = self.start
        for fast in self.steps:
            slow = followed(slow, fast, beta)
        return slow


def seen_stage(room: Any, config: RunConfig, index: int) -> tuple[Seen, StageRun]:
    """A stage trained up to its commit, looked at from outside of the option."""
    stage, seen, method = StageRun(room, config, index), Seen(), room.method
    method.build(stage)
    begin, end = method.begin_task, method.end_task

    def begun(stage: Any) -> None:
        begin(stage)
        seen.start = copied(stage)

    def ended(stage: Any) -> None:
        seen.at_end = copied(stage)
        end(stage)

    method.begin_task, method.end_task = begun, ended
    try:
        train_stage(
            stage,
            rows_of(stage.plan),
            log=lambda _: None,
            tick=lambda *_: None,
            between=lambda _: seen.steps.append(copied(stage)),
        )
    finally:
        del method.begin_task, method.end_task
        stage.close()
    return seen, stage


def opened(place: Place, method: str, answers: bool = True, goes_on: str = "fast", **settings: Any) -> tuple[Any, Any]:
    own = {"beta": BETA, "answers": answers, "next": goes_on}
    return order_room(place, method, options__slow_copy=own, training__epochs=2, dropout=0.1, **settings)


def _recursion(place: Place, method: str, settings: dict[str, Any]) -> Values:
    for index in range(2):
        room, config = opened(place, method, **settings)
        if index:
            learn(room, config, 0)
        seen, stage = seen_stage(room, config, index)
        assert len(seen.steps) == 4
        found = answering(stage)
        assert found is not None and list(found) == list(seen.start)
        assert all(value.dtype == torch.float32 for value in found.values())
        assert off(vector(found), vector(seen.slow())) < 1e-6
        assert off(vector(found), vector(seen.steps[-1])) > 1e-3
    return found


RECURSIONS: list[tuple[str, dict[str, Any]]] = [
    ("seqlora", {}),
    ("olora", {"method__reorthogonalise": {"every": 1, "rescale": True}}),  # the copy follows what that has left
    ("ewc", {"training__optimizer": "muon"}),
    ("grassmann", {"method__stiefel": True}),  # begins by writing A, and writes it after each step
    ("inflora", {"bf16": True}),  # A does not train
    ("seqft", {}),
]


@pytest.mark.parametrize("ranks", narrowed([1, 2], [1]))
@pytest.mark.parametrize(("method", "settings"), RECURSIONS, ids=[method for method, _ in RECURSIONS])
def test_the_recursion_by_hand(method: str, settings: dict[str, Any], ranks: int) -> None:
    found = on_ranks(ranks, _recursion, method, settings)
    assert all(torch.equal(vector(one), vector(found[0])) for one in found)


def _given(place: Place, method: str, answers: bool, goes_on: str) -> None:
    room, config = opened(place, method, answers, goes_on)
    seen, stage = seen_stage(room, config, 0)
    fast, slow = seen.steps[-1], seen.slow()
    assert off(vector(seen.at_end), vector(slow if goes_on == "slow" else fast)) < 1e-6
    trained = {name: p.detach() for name, p in stage.adapters.parameters().items()}
    answer, leave = answering(stage) or trained, leaving(stage) or trained
    assert off(vector(answer), vector(slow if answers else fast)) < 1e-6
    assert off(vector(leave), vector(slow if goes_on == "slow" else fast)) < 1e-6
    assert off(vector(fast), vector(slow)) > 1e-3


@combinations
@pytest.mark.parametrize("method", ["olora", "seqlora", "seqft"])
def test_what_answers_and_what_goes_on(method: str, answers: bool, goes_on: str) -> None:
    on_ranks(1, _given, method, answers, goes_on)


def _no_steps(place: Place) -> None:
    room, config = order_room(place, "seqlora", options__slow_copy={"next": "slow"}, training__epochs=0)
    _, stage = seen_stage(room, config, 0)
    assert answering(stage) is None and leaving(stage) is None


def test_without_a_step_there_is_no_other_copy() -> None:
    on_ranks(1, _no_steps)


def _of_one_stage(place: Place) -> None:
    room, config = order_room(place, "seqlora")
    config.stages = {2: {"options.slow_copy": {"beta": BETA}}}
    for index, has in enumerate((False, True, False)):
        of_stage = config.at(index + 1, None)
        seen, stage = seen_stage(room, of_stage, index)
        assert (answering(stage) is not None) == has
        if has:
            assert off(vector(answering(stage) or {}), vector(seen.slow())) < 1e-6
        commit_update(room.method, stage)


def test_one_stage_alone_may_have_it() -> None:
    on_ranks(1, _of_one_stage)


@pytest.mark.parametrize(
    "method", ["l2p", "progprompt", "lfpt5", "coso", "osft", "sdlora", "colora", "shared-basis", "gainlora", "sapt"]
)
def test_methods_that_carry_what_they_train_refuse_it(method: str) -> None:
    config = RunConfig.model_validate({"method": {"name": method}, "options": {"slow_copy": {}}})
    with pytest.raises(UserError) as refused:
        check_method(config, make_method(config).plan(["a", "b"]))
    assert str(refused.value) == (
        f"options.slow_copy: {method} trains neither a pair nor all weights, and it carries on by itself; leave it out"
    )


def test_where_it_changes_nothing_it_is_said() -> None:
    def notes(**own: Any) -> list[str]:
        config = RunConfig.model_validate({"options": {"slow_copy": own}})
        return SlowCopy().notes([(config, make_method(config), 3)])

    assert notes() == notes(answers=False, next="slow") == []
    assert notes(answers=False) == [
        "options.slow_copy has no effect: it neither answers (answers) nor goes on (next: slow)"
    ]


# Whole runs.

# Pairs beside each other, and one that trains on; where all weights train, the fast one answers and the slow goes on.
IN_RUNS = paired(
    [(method, *each) for method in ("olora", "seqlora", "ewc") for each in COMBINATIONS],
    [("olora", True, "fast"), ("seqlora", True, "slow")],
)
ORDER = "name: two\ntasks: [dbpedia, amazon]\n"
STAGES = ("01-dbpedia", "02-amazon")


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> dict[str, Seen]:
    """Stage → what it saw, of the runs in this process."""
    found: dict[str, Seen] = {}
    before, after = SlowCopy.before_step, SlowCopy.after_step

    def began(self: SlowCopy, stage: Any) -> None:
        if stage.step == 0:
            found[stage.plan.name] = Seen(copied(stage))
        before(self, stage)

    def stepped(self: SlowCopy, stage: Any, batch: Any) -> None:
        found[stage.plan.name].steps.append(copied(stage))
        after(self, stage, batch)

    monkeypatch.setattr(SlowCopy, "before_step", began)
    monkeypatch.setattr(SlowCopy, "after_step", stepped)
    return found


def arguments(method: str, *slow_copy: str) -> tuple[str, ...]:
    sets = ("training.epochs=3", "adapter.r=4", "training.lr=2e-2", *slow_copy)
    return ("train", "--order", "two.yaml", "--method", method, *NANO, *(f"--set={s}" for s in sets), "--name", "it")


def slow_copy(answers: bool, goes_on: str) -> str:
    return f"options.slow_copy={{beta: {BETA}, answers: {str(answers).lower()}, next: {goes_on}}}"


def trained(cwd: Path, *given: str) -> Path:
    cwd.mkdir(exist_ok=True)
    (cwd / "two.yaml").write_text(ORDER)
    done = call(*given, cwd=cwd)
    assert done.code == 0, done.err
    return cwd / "runs" / "it"


def update(values: Values) -> dict[str, Tensor]:
    """ΔW of a pair by target, fp64; s = 32 / 4."""
    targets = [name.removesuffix(".lora_A") for name in values if name.endswith(".lora_A")]
    return {t: 8.0 * values[f"{t}.lora_B"].double() @ values[f"{t}.lora_A"].double() for t in targets}


def by_peft(folder: Path) -> dict[str, Tensor]:
    """ΔW of a stage's folder by target, as plain PEFT merges it into the untouched base."""
    base = load_base(ModelConfig(name=nano_t5()), torch.device("cpu")).model
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers by a name that transformers 5.23 deprecates.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload().state_dict()
    moved = {name: value.double() - before[name].double() for name, value in merged.items()}
    return {name.removesuffix(".weight"): value for name, value in moved.items() if value.any()}


def same_update(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for target, value in wanted.items():
        assert off(found[target], value) < 1e-4, target


@pytest.mark.parametrize(("method", "answers", "goes_on"), IN_RUNS)
def test_a_run_answers_with_the_one_and_goes_on_with_the_other(
    method: str,
    answers: bool,
    goes_on: str,
    by_hand: dict[str, Seen],
    cut: Callable[[], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = arguments(method, slow_copy(answers, goes_on))
    run = trained(tmp_path, *given)
    one, two = by_hand["dbpedia"], by_hand["amazon"]
    answer = [seen.slow() if answers else seen.steps[-1] for seen in (one, two)]
    left = one.slow() if goes_on == "slow" else one.steps[-1]
    assert off(vector(one.slow()), vector(one.steps[-1])) > 1e-2
    same_update(by_peft(run / "stages" / STAGES[0] / "adapter"), update(answer[0]))
    wanted = update(answer[1])
    if method == "olora":  # a new pair, and the first one in the sum
        wanted = {target: value + update(left)[target] for target, value in wanted.items()}
    else:  # the pair that was left trains on
        assert off(vector(two.start), vector(left)) < 1e-6
    same_update(by_peft(run / "stages" / STAGES[1] / "adapter"), wanted)
    answers_again(tmp_path)
    cut_and_gone_on_with(given, tmp_path, cut, monkeypatch)


@pytest.mark.parametrize(
    ("answers", "goes_on"),
    paired(COMBINATIONS, [(False, "slow")]),
)
def test_all_weights(
    answers: bool,
    goes_on: str,
    by_hand: dict[str, Seen],
    cut: Callable[[], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = arguments("seqft", slow_copy(answers, goes_on))
    run = trained(tmp_path, *given)
    one, two = by_hand["dbpedia"], by_hand["amazon"]
    assert off(vector(two.start), vector(one.slow() if goes_on == "slow" else one.steps[-1])) < 1e-6
    for seen, stage in ((one, STAGES[0]), (two, STAGES[1])):
        model = load_file(run / "stages" / stage / "model" / "model.safetensors")
        wanted = seen.slow() if answers else seen.steps[-1]
        both = set(wanted) & set(model)
        assert len(both) > 10 and all(off(model[name], wanted[name]) < 1e-5 for name in both)
    answers_again(tmp_path)
    cut_and_gone_on_with(given, tmp_path, cut, monkeypatch)


def answers_again(cwd: Path) -> None:
    """``eval`` reads each stage's folder and answers as was committed."""
    for stage in ("1", "2"):
        again = call("eval", "it", "--stage", stage, "--json", cwd=cwd)
        assert again.code == 0, again.err
        found = json.loads(again.out)
        assert not any(found["differing_rows"].values()) and found["scores"] == found["committed"]


def cut_and_gone_on_with(given: tuple[str, ...], cwd: Path, cut: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Ended after its first stage and gone on with: the bits of the run in ``cwd``, which went through."""
    here = cwd / "cut"
    here.mkdir()
    (here / "two.yaml").write_text(ORDER)
    cut()
    assert call(*given, cwd=here).code == 1
    patch.undo()
    assert results(trained(here, *given)) == results(cwd / "runs" / "it")
