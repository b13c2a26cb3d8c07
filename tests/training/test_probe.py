"""A probe inside a stage: it sees what evaluation would see then, and changes nothing of what it looks at."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_runner.atomic import read_json
from cl_runner.engine.process import Place
from cl_runner.errors import LimitReached
from cl_runner.methods import METHODS
from cl_runner.methods.lfpt5 import method as lfpt5
from cl_runner.methods.protocol import Source, StagePlan, State
from cl_runner.models.batch import Example
from cl_runner.tasks.task import Row, Task
from cl_runner.training import evaluation as scoring
from cl_runner.training.loop import train_stage
from cl_runner.training.probe import Probe, rows_of_probe
from cl_runner.training.stage import StageRun
from cl_runner.training.step_log import Trained
from cl_runner.training.step_state import StepState
from tests.breadth import narrowed, wide
from tests.command_line import NANO, ORDER, Result, call, results
from tests.distributed import command_on_ranks, on_ranks
from tests.methods.orders import rows_of
from tests.stages import END, START, VOCABULARY
from tests.training.test_step_state import SLOW, _written, begun, differing

EVERY = {"eval__probe_every": 2}
UNLIKE = ("time", "examples_per_second", "memory_mb")


def test_rows_are_of_seed_and_task_alone() -> None:
    many, few = rows_of_probe(42, "dbpedia", 100, 20), rows_of_probe(42, "dbpedia", 100, 8)
    assert many == sorted(set(many)) and len(many) == 20 and set(few) < set(many) < set(range(100))
    assert rows_of_probe(42, "amazon", 100, 20) != many != rows_of_probe(43, "dbpedia", 100, 20)
    assert rows_of_probe(42, "dbpedia", 5, 8) == [0, 1, 2, 3, 4]


# Against the training it looks at.


def set_of(task: str, own: Source, golds: Sequence[Sequence[int]] | None = None) -> scoring.TestSet:
    """The rows of a source as test rows of a task of free text, whose answers are ids; or with other golds."""
    given = golds or [example.target[:-1] for example in own.examples]
    rows = [Row(f"test/{i}", "", " ".join(map(str, ids))) for i, ids in enumerate(given)]
    examples = [Example(e.source, [*ids, END]) for e, ids in zip(own.examples, given, strict=True)]
    return scoring.TestSet(Task(name=task, kind="SC", instruction="Say.", metric="exact"), rows, examples)


def samples_of(stage: StageRun) -> dict[str, scoring.TestSet]:
    seen = dict.fromkeys(task for plan in stage.order[: stage.index + 1] for task in plan.tasks)
    return {task: set_of(task, rows_of(StagePlan(task, (task,)))) for task in seen}


def probe_of(stage: StageRun, samples: Mapping[str, scoring.TestSet] | None = None, **more: Any) -> Probe:
    """Of the stage as it is; old tasks were all right as they were learned, and settled ones still are."""
    found = samples_of(stage) if samples is None else samples
    learned = {task: 100.0 for task in found if task not in stage.plan.tasks}
    fixed = stage.room.method.settled != "none"
    settled = {task: [row.label for row in found[task].rows] for task in learned} if fixed else {}
    return Probe(stage, found, learned, settled, **more)


class Left(Exception):
    """The stage is left."""


def trained(
    stage: StageRun,
    probe: Probe | None,
    state: StepState | None = None,
    between: Callable[[Callable[[], StepState]], None] = lambda _: None,
    tick: Callable[..., None] = lambda *_: None,
) -> tuple[list[dict[str, Any]], Trained | None]:
    rows: list[dict[str, Any]] = []
    done = None
    try:
        own = rows_of(stage.plan)
        done = train_stage(stage, own, log=rows.append, tick=tick, state=state, between=between, probe=probe)
    except Left:
        pass
    finally:
        stage.close()
    return [{key: value for key, value in row.items() if key not in UNLIKE} for row in rows], done


def held(stage: StageRun, taken: list[StepState]) -> dict[str, State]:
    """All that a stage has at its last step and after it."""
    parts = {name: part for name, part in taken[-1].parts.items() if name != "probe"}
    values = State({name: p.detach() for name, p in stage.adapters.parameters().items()})
    return {**parts, "carried": stage.room.method.state(), "values": values}


def _changes(place: Place, method: str, settings: dict[str, Any]) -> tuple[list[str], list[int]]:
    """What differs between a stage that is looked at and one that is not; and at which steps it was looked at."""
    found, logs = [], []
    for every in ({}, EVERY):
        stage = begun(place, method, 1, **settings, **every)
        probe = probe_of(stage) if every else None
        taken: list[StepState] = []
        modes: list[Any] = []

        def between(
            take: Callable[[], StepState], of: StageRun = stage, to: list[StepState] = taken, mode: list[Any] = modes
        ) -> None:
            to.append(take())
            flags = [(p.requires_grad, p.grad is None) for p in of.adapters.parameters().values()]
            generator = torch.get_rng_state().tolist()
            mode.append(([module.training for module in of.adapters.model.modules()], flags, generator))

        rows, _ = trained(stage, probe, between=between)
        found.append((held(stage, taken), modes))
        logs.append(rows)
    (plain, modes), (looked, modes_looked) = found
    looks = [row["step"] for row in logs[1] if "probe" in row]
    bad = [name for name in plain if differing(plain[name], looked[name])]
    bad += ["parts"] * (list(plain) != list(looked)) + ["modes"] * (modes != modes_looked)
    bad += ["log"] * (logs[0] != [row for row in logs[1] if "probe" not in row])
    return bad, looks


OTHERWISE = {"colora": {"method__routing": "hard"}}


# All weights, rows that are kept, a teacher, terms.
@pytest.mark.parametrize("method", narrowed(METHODS, ["seqft", "replay", "lwf", "sdlora"]))
def test_no_method_is_changed_by_a_bit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfpt5, "write", _written)
    [(bad, looks)] = on_ranks(1, _changes, method, OTHERWISE.get(method, {}))
    assert bad == []
    wanted = [*range(0, looks[-1], 2), looks[-1]]  # a method may mix rows in, and have more steps
    assert looks[-1] >= 4 and looks == (wanted[1:] if method == "mtl" else wanted)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        pytest.param("migu", {"method__train": "full"}, marks=wide),
        ("seqft", {"kind": "llama", **SLOW}),
        ("olora", {"kind": "llama", **SLOW, "bf16": True, "training__activation_checkpointing": True}),
        ("inclora", {"training__dropout_by": "micro", "training__optimizer": "muon", "adapter__init": "pissa"}),
        pytest.param("replay", {"adapter__kind": "dora", "method__memory_per_task": 3}, marks=wide),
    ],
)
def test_nor_is_any_option(method: str, settings: dict[str, Any]) -> None:
    [(bad, looks)] = on_ranks(1, _changes, method, settings)
    assert bad == [] and looks[0] == 0


@pytest.mark.parametrize("method", narrowed(["migu", "l2p", "coso"], ["coso"]))
def test_nor_on_two_ranks(method: str) -> None:
    found = on_ranks(2, _changes, method, SLOW if method == "migu" else {})
    assert [bad for bad, _ in found] == [[], []] and found[0] == found[1]


# What it sees, by hand.


@torch.no_grad()
def by_hand(stage: StageRun, source: Sequence[int]) -> list[int]:
    """The arg-max of one row's scores, token after token, by the model as it stands."""
    model = stage.adapters.model
    flags = {module: module.training for module in model.modules()}
    model.eval()
    said: list[int] = []
    while len(said) < stage.config.eval.max_new_tokens:
        if stage.room.base.encoder_decoder:
            scores = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[START, *said]])).logits
        else:
            scores = model(input_ids=torch.tensor([[*source, *said]])).logits
        token = int(scores[0, -1].argmax())
        if token == END:
            break
        said.append(token)
    for module, flag in flags.items():
        module.training = flag
    return said


def _answers(stage: StageRun, rows: Source, probe: Probe | None = None) -> tuple[list[Any], list[list[Any]]]:
    """The log, and what the model says to rows by hand after each step from 0 on (with the slow copy, if any)."""
    said: list[list[Any]] = []

    def look() -> None:
        own = stage.adapters.parameters()
        values = next((option.answering(stage) for option in stage.options), None) or {}
        before = {name: own[name].detach().clone() for name in values}
        for name, value in values.items():
            own[name].data.copy_(value)
        said.append([by_hand(stage, example.source) for example in rows.examples])
        for name, value in before.items():
            own[name].data.copy_(value)

    def tick(step: int, *_: object) -> None:
        if step == 0:
            look()

    log, _ = trained(stage, probe, tick=tick, between=lambda _: look())
    return log, said


def _sees(place: Place, method: str, settings: dict[str, Any]) -> tuple[dict[int, float], dict[int, float], list[int]]:
    settings = {**EVERY, "training__lr": 0.05, "adapter__dropout": 0.2, **settings}
    rows = rows_of(StagePlan("a", ("a",)))
    _, said = _answers(begun(place, method, 1, **settings), rows)
    # Right after 2 steps, as the stage begins, or never: so that scores move.
    golds = [said[2][0], said[2][1], said[0][2], said[0][3], said[2][4], [VOCABULARY - 1]]
    stage = begun(place, method, 1, **settings)
    log, said = _answers(stage, rows, probe_of(stage, {"a": set_of("a", rows, golds)}))
    seen = {row["step"]: row["probe"]["a"] for row in log if "probe" in row}
    right = {step: [ids == gold for ids, gold in zip(said[step], golds, strict=True)] for step in seen}
    assert all(row["probe_rows"] == {"a": 6} for row in log if "probe" in row)
    return seen, {step: 100 * sum(of) / 6 for step, of in right.items()}, [len(ids) for ids in said[2]]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        pytest.param("seqlora", {}, marks=wide),
        ("seqlora", {"kind": "llama"}),
        ("olora", {"kind": "llama", "eval__mode": "generate"}),
        ("seqft", {"training__lr": 0.005}),
        ("inclora", {"options__slow_copy": {"beta": 0.6}}),
        pytest.param("osft", {"method__lr": 0.02}, marks=wide),
        pytest.param("sdlora", {}, marks=wide),
    ],
)
def test_it_sees_what_the_model_says_then(method: str, settings: dict[str, Any]) -> None:
    [(seen, wanted, lengths)] = on_ranks(1, _sees, method, settings)
    assert seen == pytest.approx(wanted)
    assert seen[2] >= 50 and len(set(seen.values())) > 1, "a probe that always says the same shows nothing"
    assert any(lengths)


# Entered in its middle.


def _entered(place: Place, limits: dict[str, Any], probed_before: bool) -> tuple[Any, Any]:
    settings = {**EVERY, **limits, "training__epochs": 3}
    straight, left, entered = (begun(place, "seqlora", 1, **settings) for _ in range(3))
    whole = probe_of(straight)
    wanted, _ = trained(straight, whole)
    taken: list[StepState] = []

    def leave(take: Callable[[], StepState]) -> None:
        if left.step == 3:
            taken.append(take())
            raise Left

    trained(left, probe_of(left) if probed_before else None, between=leave)
    warned: list[str] = []
    rest = probe_of(entered, warn=warned.append)
    rows, _ = trained(entered, rest, state=taken[0])
    same = differing(*(State({n: p.detach() for n, p in s.adapters.parameters().items()}) for s in (straight, entered)))
    log = rows == [row for row in wanted if row["step"] > 3]
    return (same, log, rest.about() == whole.about(), len(warned)), rest.about()


def test_a_stage_that_is_entered_is_looked_at_as_one_in_one_go() -> None:
    warn = {"eval__probe_warn": 5.0}
    [(found, about)] = on_ranks(1, _entered, warn, True)
    assert found == ([], True, True, 0) and about["a"]["warned_at"] == 0  # said before it was left
    [(found, about)] = on_ranks(1, _entered, warn, False)  # turned on since
    assert found == ([], True, False, 1) and about["a"]["warned_at"] == 4


# Limits and time.


def _limited(place: Place, scores: list[float], limits: dict[str, Any]) -> tuple[Any, ...]:
    """What a probe does whose looks find these scores of an old task, learned at 100 %."""
    stage = begun(place, "seqlora", 1, **EVERY, **limits)
    warned: list[str] = []
    probe = probe_of(stage, warn=warned.append)
    given = iter(scores)
    probe._asked = lambda: [scoring.Scored("a", next(given), []), scoring.Scored("b", 0.0, [])]  # type: ignore
    rows: list[dict[str, Any]] = []
    why = ""
    try:
        train_stage(stage, rows_of(stage.plan), log=rows.append, tick=lambda *_: None, probe=probe)
    except LimitReached as error:
        why = str(error)
    stage.close()
    looks = {row["step"]: row["probe"]["a"] for row in rows if "probe" in row}
    return warned, why, looks, probe.about()


def test_limits_hold_for_old_tasks_and_for_more_than_they_say() -> None:
    fell = "at step 2 of 4 probes have fallen since their tasks were learned: a by 30.00 points to 70.00 %"
    [(warned, why, looks, about)] = on_ranks(1, _limited, [80.0, 70.0, 60.0], {"eval__probe_warn": 20.0})
    assert warned == [f"warning: {fell} (eval.probe_warn is 20)"] and not why
    assert looks == {0: 80.0, 2: 70.0, 4: 60.0}
    lowest = {"lowest": 60.0, "lowest_at": 4, "last": 60.0, "warned_at": 2}
    assert about["a"] == {"rows": 6, "learned": 100.0, "first": 80.0, **lowest}
    assert "learned" not in about["b"] and "warned_at" not in about["b"]  # what the stage itself learns

    both = {"eval__probe_warn": 10.0, "eval__probe_stop": 25.0}
    [(warned, why, looks, _)] = on_ranks(1, _limited, [95.0, 70.0, 60.0], both)
    assert warned == [f"warning: {fell} (eval.probe_warn is 10)"]
    assert why == f"{fell} (eval.probe_stop is 25)" and looks == {0: 95.0, 2: 70.0}  # it is logged what stopped it
    [(_, why, looks, _)] = on_ranks(1, _limited, [95.0, 75.0, 60.0], {"eval__probe_stop": 50.0})
    assert not why and len(looks) == 3
    # A fall of just as much, but for rounding, is none of more.
    exact = {"eval__probe_warn": 40.0, "eval__probe_stop": 40.0}
    [(warned, why, looks, _)] = on_ranks(1, _limited, [100 - 40.00000000000001, 60.0, 60.0], exact)
    assert not warned and not why and len(looks) == 3
    found = on_ranks(2, _limited, [95.0, 70.0], both)
    assert [why for _, why, *_ in found] == [f"{fell} (eval.probe_stop is 25)"] * 2  # none waits for the other


def _timed(place: Place) -> tuple[float, float, float, list[float]]:
    """A clock on which looking alone takes time, a thousand seconds a look."""
    now = 0.0
    stage = begun(place, "seqlora", 1, **EVERY)
    probe = probe_of(stage)
    asked = probe._asked

    def slow() -> Any:
        nonlocal now
        now += 1000.0
        return asked()

    probe._asked = slow  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: now)
        rows: list[dict[str, Any]] = []
        done = train_stage(stage, rows_of(stage.plan), log=rows.append, tick=lambda *_: None, probe=probe)
    stage.close()
    return done.seconds, done.hook_seconds, probe.seconds, [row.get("examples_per_second", 1e9) for row in rows]


def test_its_time_is_no_trainings() -> None:
    [(training, hooks, looking, pace)] = on_ranks(1, _timed)
    assert (training, hooks, looking) == (0.0, 0.0, 3000.0)
    assert min(pace) > 1e8  # the steps took no time at all


# Whole runs.

# Chosen among the labels, a random model is right now and then.
ROWS = ("--set=data.max_test=12", "--set=data.max_train=16", "--set=training.epochs=2")
RUN = (*NANO, *ROWS, "--set=output.log_every=2", "--set=eval.mode=choose")
ON = ("--set=eval.probe_every=3", "--set=eval.probe_rows=8")


def train(cwd: Path, *words: str) -> Result:
    (cwd / "three.yaml").write_text(ORDER)
    return call("train", "--order", "three.yaml", *RUN, *words, cwd=cwd)


def log_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in UNLIKE} for row in rows]


def without(found: dict[str, str]) -> dict[str, Any]:
    """The results of a run, without what its stages say of probes."""
    files = {name: json.loads(text) for name, text in found.items() if name.endswith("/metrics.json")}
    return {**found, **{name: {k: v for k, v in about.items() if k != "probe"} for name, about in files.items()}}


def correct(run: Path, stage: str, task: str, ids: Sequence[str]) -> float:
    """Percent of some rows of a task that a stage's answers have right."""
    lines = [json.loads(line) for line in (run / "stages" / stage / "predictions.jsonl").read_text().splitlines()]
    right = {row["id"]: row["correct"] for row in lines if row["task"] == task}
    return 100 * sum(right[row] for row in ids) / len(ids)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("--method", "seqlora"), marks=wide),
        ("--method", "pertask", "--set=stages.3.training.share_prefix=off"),  # which would be asked again otherwise
        pytest.param(("--method", "progprompt"), marks=wide),
        pytest.param(
            ("--method", "seqft", "--set=training.lr=1e-3", "--set=options.slow_copy={beta: 0.5}"), marks=wide
        ),
        pytest.param(("--method", "replay", "--set=method.replay_ratio=0.5"), marks=wide),
        pytest.param(("--method", "shared-basis"), marks=wide),
    ],
    ids=lambda words: words[1],
)
def test_a_run_is_the_same_and_the_last_look_is_its_evaluation(tmp_path: Path, words: tuple[str, ...]) -> None:
    plain, looked = tmp_path / "plain", tmp_path / "looked"
    runs = []
    for cwd, more in ((plain, ()), (looked, ON)):
        cwd.mkdir()
        done = train(cwd, *words, *more)
        assert done.code == 0, done.err
        runs += (cwd / "runs").iterdir()
    assert runs[0].name == runs[1].name
    assert without(results(runs[1])) == without(results(runs[0]))
    rows = log_of(runs[1])
    assert [row for row in rows if "probe" not in row] == log_of(runs[0])
    seen: list[str] = []
    for stage in ("01-dbpedia", "02-amazon", "03-agnews"):
        seen.append(stage[3:])
        looks = [row for row in rows if row["stage"] == seen[-1] and "probe" in row]
        last = looks[-1]
        due = [0, *range(3, last["steps"], 3), last["steps"]]
        assert [row["step"] for row in looks] == due[len(seen) == 1 :] and last["steps"] >= 8
        assert list(last) == ["stage", "step", "steps", "probe", "probe_rows"]
        assert last["probe_rows"] == dict.fromkeys(seen, 8)
        ids = {task: [f"test/{i}" for i in rows_of_probe(42, task, 12, 8)] for task in seen}
        assert last["probe"] == pytest.approx({task: correct(runs[1], stage, task, ids[task]) for task in seen})
        about = read_json(runs[1] / "stages" / stage / "metrics.json")
        assert {task: found["last"] for task, found in about["probe"].items()} == last["probe"]
        assert about["seconds"]["probe"] > 0
        learned = {task: correct(runs[1], f"0{seen.index(task) + 1}-{task}", task, ids[task]) for task in seen[:-1]}
        told = {task: found["learned"] for task, found in about["probe"].items() if "learned" in found}
        assert told == pytest.approx(learned)
    assert any(score for row in rows for score in row.get("probe", {}).values()), "nothing was ever right"


SEQ = ("--method", "seqlora")


def test_two_ranks_ask_the_same_rows(tmp_path: Path) -> None:
    assert train(tmp_path, *SEQ, *ON, "--name", "one").code == 0
    arguments = ("train", "--order", "three.yaml", *RUN, *SEQ, *ON, "--name", "two")
    first, second = command_on_ranks(2, *arguments, cwd=tmp_path)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    one, two = ([row for row in log_of(tmp_path / "runs" / name) if "probe" in row] for name in ("one", "two"))
    assert one == two and len(one) == 11


def amazon_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the third stage amazon is as it was learned until step 3, and a row of eight worse from then on."""
    ask = Probe._asked

    def asked(self: Probe) -> list[scoring.Scored]:
        if self.stage.index < 2:
            return ask(self)
        fallen = {"dbpedia": 0.0, "amazon": 12.5 if self.stage.step >= 3 else 0.0}
        return [
            replace(one, score=(self.learned[one.task] or 0.0) - fallen[one.task]) if one.task in fallen else one
            for one in ask(self)
        ]

    monkeypatch.setattr(Probe, "_asked", asked)


def test_a_run_that_is_stopped_goes_on_without_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    amazon_falls(monkeypatch)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for cwd in (whole, cut):
        cwd.mkdir()
    assert train(whole, *SEQ).code == 0
    words = (*SEQ, *ON, "--set=eval.probe_warn=0", "--set=eval.probe_stop=0")
    done = train(cut, *words)
    [run] = (cut / "runs").iterdir()
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert last.startswith("stopped in stage 3 (agnews): at step 3 of 8 probes have fallen since ")
    fall = r"amazon by 12\.50 points to -?[\d.]+ % \(eval\.probe_stop is 0\); kept: dbpedia, amazon; go on: "
    assert re.search(fall, last)
    assert last.endswith(" --set eval.probe_stop=null") and "Traceback" not in done.err
    assert sum("eval.probe_warn is 0" in line for line in (run / "run.log").read_text().splitlines()) == 1
    status = read_json(run / "status.json")
    assert status["state"] == "stopped" and "probes have fallen" in status["message"]
    assert len(list((run / "stages").glob("*/DONE"))) == 2
    again = train(cut, *words, "--set=eval.probe_stop=null")
    assert again.code == 0, again.err
    assert without(results(run)) == without(results(next((whole / "runs").iterdir())))


def test_it_may_be_turned_on_and_off_as_a_run_goes_on(tmp_path: Path) -> None:
    assert train(tmp_path, "--method", "seqlora").code == 0
    [run] = (tmp_path / "runs").iterdir()
    before = results(run)
    shutil.rmtree(run / "stages" / "03-agnews")
    assert train(tmp_path, "--method", "seqlora", *ON).code == 0
    assert without(results(run)) == without(before)
    looks = [row for row in log_of(run) if "probe" in row]
    assert [row["step"] for row in looks] == [0, 3, 6, 8]
    assert looks[0]["probe_rows"] == {"dbpedia": 8, "amazon": 8, "agnews": 8}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--set=eval.probe_warn=5",), "eval.probe_warn: there is no probe; set eval.probe_every"),
        (
            (*ON, "--set=eval.probe_warn=5", "--set=eval.probe_stop=4"),
            "eval.probe_stop: 4 is less than eval.probe_warn 5",
        ),
        ((*ON, "--method", "shared-basis", "--set=method.mixing=similarity"), "shared-basis weighs tasks' updates"),
        ((*ON, "--method", "colora", "--set=method.routing=soft"), "colora makes a round's gate at its end"),
        ((*ON, "--method", "colora", "--set=method.fold=mean"), "colora may answer otherwise once a stage is folded"),
        (("--set=eval.probe_every=0",), "eval.probe_every must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    done = train(tmp_path, *words)
    assert done.code == 2 and says in done.line
    assert not (tmp_path / "runs").exists()


# A method of somebody else's.

OTHERS = """
from cl_runner.methods.pertask import PerTask


class Unsettled(PerTask):
    name, settled = "unsettled", "none"
"""


def test_what_another_parameter_set_answers_is_said_to_be_left_out(tmp_path: Path) -> None:
    from cl_runner import registry

    (tmp_path / "others.py").write_text(OTHERS)
    try:
        done = train(tmp_path, "--method", "unsettled", "--plugin", "others.py", *ON)
    finally:
        registry.forget_plugins()
    assert done.code == 0, done.err
    assert "stage 2 of 3 amazon: not probed, as another parameter set answers: dbpedia" in done.err
    [run] = (tmp_path / "runs").iterdir()
    looks = [row for row in log_of(run) if "probe" in row]
    assert [list(row["probe"]) for row in looks if row["stage"] == "agnews"] == [["agnews"]] * 4
    ids = [f"test/{i}" for i in rows_of_probe(42, "agnews", 12, 8)]
    assert looks[-1]["probe"]["agnews"] == pytest.approx(correct(run, "03-agnews", "agnews", ids))
