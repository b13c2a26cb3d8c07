"""Options beside any method: their order, what they say and hold, what is refused; the settings that turn them on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from cl_runner.commands.show import show_method
from cl_runner.config.schema import RunConfig
from cl_runner.config.yamlfile import load
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import METHODS, make_method, method_class, method_schema
from cl_runner.methods.protocol import State
from cl_runner.registry import Registry
from cl_runner.runs.catalog import changed, variant
from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.settings import difference, dump, resolve, show
from cl_runner.training import options
from cl_runner.training.checkpoint import restore_stage, save_stage
from cl_runner.training.compatibility import check_method
from cl_runner.training.options import make_options
from cl_runner.training.options.protocol import Option, Values
from cl_runner.training.stage import StageRun
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room


class Counting(Option):
    """Writes down which hooks ran, counts steps, carries the sum."""

    name = "counting"
    title, setting = "counts", "options.counting"
    heard: ClassVar[list[str]] = []  # of all options that count

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.int64)

    def wanted(self, config: RunConfig, method: Any) -> bool:
        return config.training.epochs > 0

    def hear(self, what: str) -> None:
        self.heard.append(f"{self.name} {what}")

    def begin(self, stage: Any, own: Any) -> None:
        self.hear("begins")

    def before_step(self, stage: Any) -> None:
        self.hear("before")

    def after_step(self, stage: Any, batch: Any) -> dict[str, Any] | None:
        self.hear("after")
        self.total = self.total + 1
        return {self.name: int(self.total)} if stage.step == 2 else None

    def logged(self, stage: Any) -> dict[str, Any]:
        return {f"column of {self.name}": int(self.total)}

    def end(self, stage: Any) -> None:
        self.hear("ends")

    def about(self) -> dict[str, Any]:
        return {self.name: int(self.total)}

    def said(self) -> str:
        return f"{self.name}: {int(self.total)}"

    def state(self) -> State:
        return State({"total": self.total}, {"total": int(self.total)}) if self.total else State()

    def load_state(self, state: State) -> None:
        self.total = state.tensors.get("total", torch.zeros((), dtype=torch.int64))
        assert int(self.total) == state.json.get("total", 0)


class Second(Counting):
    name, setting = "second", "options.second"

    def gives(self, config: RunConfig) -> tuple[Values, ...]:
        return ("answering",)


class Third(Second):
    name, setting = "third", "options.third"

    def gives(self, config: RunConfig) -> tuple[Values, ...]:
        return ("leaving", "answering")


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {kind.name: f"{__name__}:{kind.__name__}" for kind in (Counting, Second)}
    of_test = Registry[Any]("option", "cl_runner.none", "cl_runner.training.options.protocol:Option", table)
    monkeypatch.setattr(options, "OPTIONS", of_test)
    Counting.heard.clear()


def test_hooks_run_in_the_stated_order(two: None, tmp_path: Path) -> None:
    on_ranks(1, _order)


def _order(place: Place) -> None:
    room, config = order_room(place, "seqlora", training__epochs=1)
    method: Any = room.method
    for hook in ("begin_task", "after_step", "end_task"):
        own = getattr(method, hook)
        setattr(method, hook, lambda stage, hook=hook, own=own: (Counting.heard.append(f"method {hook}"), own(stage)))
    outcome = learn(room, config, 0)
    step = ["counting before", "second before", "method after_step", "counting after", "second after"]
    begins, ends = ["counting begins", "second begins"], ["counting ends", "second ends"]
    assert Counting.heard == [*begins, "method begin_task", *step, *step, *ends, "method end_task"]
    assert outcome.trained.about == {"counting": 2, "second": 2}
    assert outcome.trained.said == ["counting: 2", "second: 2"]
    noted = [(row["step"], row.get("counting"), row.get("second")) for row in outcome.rows if "loss" not in row]
    assert noted == [(2, 2, None), (2, None, 2)]
    columns = [(row["column of counting"], row["column of second"]) for row in outcome.rows if "loss" in row]
    assert columns == [(1, 1), (2, 2)]
    assert ["loss" in row for row in outcome.rows] == [True, False, False, True]


def test_what_options_carry_goes_on_with_the_run(two: None, tmp_path: Path) -> None:
    on_ranks(1, _carried, str(tmp_path))


def _carried(place: Place, folder: str) -> None:
    rundir = RunDir(Path(folder))
    room, config = order_room(place, "seqlora", training__epochs=1)
    unlike = RunConfig.model_validate({**config.model_dump(), "training": {"epochs": 0}})
    for index, (settings, wanted) in enumerate(((config, 2), (unlike, 2), (config, 4))):
        if index:
            room, _ = order_room(place, "seqlora")
            restored = StageRun(room, config, index - 1)
            restore_stage(rundir, restored, index - 1)
            restored.close()
        stage = learn(room, settings, index).stage
        commit(rundir, index, stage.plan.name, lambda draft, stage=stage: save_stage(draft, stage))
        about = json.loads((rundir.stage_dir(index, stage.plan.name) / "state.json").read_text())
        assert about["options"] == {"counting": {"total": wanted}, "second": {"total": wanted}}


def test_where_no_option_carries_anything_a_state_does_not_speak_of_it(tmp_path: Path) -> None:
    on_ranks(1, _silent, str(tmp_path))


def _silent(place: Place, folder: str) -> None:
    room, config = order_room(place, "seqlora")
    save_stage(Path(folder), learn(room, config, 0).stage)
    assert "options" not in json.loads((Path(folder) / "state.json").read_text())


def test_only_one_option_decides_what_answers(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(**training: Any) -> None:
        config = RunConfig.model_validate({"training": training})
        check_method(config, make_method(config).plan(["a"]))

    check()
    options.OPTIONS.ours["third"] = f"{__name__}:Third"
    with pytest.raises(UserError) as refused:
        check()
    assert str(refused.value) == (
        "options.second and options.third: each is to give what answers after a stage, and only one can; leave one out"
    )
    check(epochs=0)  # neither is wanted


# What there is.


def test_the_order_of_ours() -> None:
    assert (
        [option.name for option in make_options()]
        == ["auto-rank", "initialise", "reorthogonalise", "slow-copy"]
        == [*options.OPTIONS.ours]
    )
    for option in make_options():
        assert option.title and option.setting and type(option).__doc__


@pytest.mark.parametrize("method", METHODS.ours)
def test_a_method_says_which_options_it_takes(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that a check does not refuse."""
    show_method(method, as_json=True)
    told = json.loads(capsys.readouterr().out)["options"]
    sets: dict[str, dict[str, Any]] = {
        "adapter.r=auto": {"adapter": {"r": "auto"}},
        "options.slow_copy": {"options": {"slow_copy": {}}},
    }
    for setting, values in sets.items():
        config = RunConfig.model_validate({**values, "method": {"name": method}})
        made = make_method(config)
        plain = made.only_kind or made.full  # of them r means nothing
        try:
            options.check_options(config, made)
        except UserError as error:
            assert str(error).startswith(setting)
            assert setting not in told or made.fold_loses  # which other settings of the method may not have
        else:
            assert setting in told or (plain and setting == "adapter.r=auto")
    assert ("method.reorthogonalise" in told) == ("reorthogonalise" in method_class(method).Config.model_fields)
    show_method(method, as_json=False)
    said = capsys.readouterr().out
    assert all(f"  {setting}\n" in said for setting in told) and ("options: none" in said) == (not told)


def test_no_torch() -> None:
    code = (
        "import sys; from cl_runner.training.options import make_options, check_options; "
        "from cl_runner.config.schema import RunConfig; from cl_runner.methods import make_method; "
        "c = RunConfig.model_validate({'options': {'slow_copy': {}}}); check_options(c, make_method(c)); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# Settings.


def found(*sets: str, **more: Any) -> Any:
    return resolve(order="order1", sets=list(sets), method_schema=method_schema, **more)


WHOLE = {"beta": 0.99, "answers": True, "next": "fast"}


def test_parts_of_an_option_are_set_like_those_of_a_methods_setting(tmp_path: Path) -> None:
    def own(*sets: str, **more: Any) -> Any:
        return found(*sets, **more).config.options.model_dump()["slow_copy"]

    assert own() is None
    assert own("options.slow_copy={}") == WHOLE
    assert own("options.slow_copy.beta=0.9") == {**WHOLE, "beta": 0.9}
    assert own("options.slow_copy.beta=0.9", "options.slow_copy.next=slow") == {**WHOLE, "beta": 0.9, "next": "slow"}
    file = tmp_path / "c.yaml"
    file.write_text("options: {slow_copy: {beta: 0.5, answers: false}}\n")
    assert own("options.slow_copy.beta=0.9", config_file=file) == {**WHOLE, "beta": 0.9, "answers": False}
    file.write_text(
        "tasks: {yahoo: {options: {slow_copy: {next: slow}}}}\nstages: {2: {options.slow_copy: {beta: 0}}}\n"
    )
    config = found("tasks.yahoo.options.slow_copy.beta=0.5", config_file=file).config
    assert config.at(3, "yahoo").options.model_dump() == {"slow_copy": {**WHOLE, "beta": 0.5, "next": "slow"}}
    assert config.at(2, "amazon").options.model_dump() == {"slow_copy": {**WHOLE, "beta": 0.0}}
    assert config.options.slow_copy is None
    off = found("options.slow_copy={}", "stages.2.options.slow_copy=null").config
    assert off.at(2, "amazon").options.slow_copy is None and off.at(1, "dbpedia").options.slow_copy is not None


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("options=1", "options is a section; write options.key=value"),
        ("options.slow_cpy.beta=1", "options.slow_cpy.beta is not a setting; did you mean 'slow_copy'?"),
        ("options.slow_copy.bta=1", "options.slow_copy.bta is not a setting; did you mean 'beta'?"),
        ("options.slow_copy.beta=1", "options.slow_copy.beta must be less than 1"),
        ("options.slow_copy.next=slw", "options.slow_copy.next must be one of fast, slow, both; did you mean 'slow'?"),
        ("options.slow_copy=true", "options.slow_copy must be a mapping"),
        ("tasks.yahoo.options.slow_cpy.beta=1", "options.slow_cpy.beta is not a setting; did you mean 'slow_copy'?"),
        ("tasks.yahoo.options.slow_copy.bta=1", "tasks.yahoo.options.slow_copy.bta is not a setting"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(item: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        found(item)
    assert str(refused.value).startswith(f"--set {item}: ") and message in str(refused.value)


def test_a_run_without_an_option_is_the_run_it_was(tmp_path: Path) -> None:
    """Settings of a time without the section are the same run: nothing differs, and the hash is that of then."""
    plain = found("training.lr=0.5")
    assert variant(plain) == "381060" and changed(plain) == ["training.lr=0.5"]
    lines = dump(plain.config).splitlines()
    start = lines.index("options:")
    assert lines[start + 1 : start + 2] == ["  slow_copy: null"]
    file = tmp_path / "run.yaml"
    file.write_text("\n".join(lines[:start] + lines[start + 2 :]) + "\n")
    old = RunConfig.model_validate(load(file).data)
    assert difference(old, plain.config) == []
    with_it = found("training.lr=0.5", "options.slow_copy.beta=0.9")
    assert variant(with_it) != variant(plain)
    assert difference(old, with_it.config) == ["options.slow_copy"]
    assert changed(with_it)[0] == "options.slow_copy={beta: 0.9, answers: true, next: fast}"
    assert variant(found(*changed(with_it))) == variant(with_it)
    assert "slow_copy: {beta: 0.9, answers: true, next: fast}" in show(with_it)
