"""Names lazy and open: ours, packages', plugin files'; what is broken or twice is one line that says whose it is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cl_runner import registry
from cl_runner.adapters.kind import Kind
from cl_runner.commands.list import show_list
from cl_runner.commands.show import show_method
from cl_runner.config.schema import DataConfig
from cl_runner.errors import UserError
from cl_runner.methods.olora import OLoRA
from cl_runner.methods.protocol import Method
from cl_runner.registry import KINDS, METHODS, OPTIONS, REGISTRIES, SOURCES, TRACKERS, load_plugin
from cl_runner.sweeps.engines.protocol import Engine
from cl_runner.tasks import benchmark
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.sources import RowSource
from cl_runner.trackers.protocol import Entry, Tracked, Tracker
from cl_runner.training.options.protocol import Option
from tests.packages import install, use

METHOD = """
from cl_runner.methods.seqlora import SeqLoRA

class {cls}(SeqLoRA):
    name = "{name}"
    title = "{name}: a test's"
"""
BASES = (Method, Kind, Option, RowSource, Tracker, Engine)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Whatever a test installs is of that test."""
    before = set(sys.modules)
    yield
    registry._installed.cache_clear()
    registry.forget_plugins()
    for name in set(sys.modules) - before:
        if name.startswith(("theirs", "cl_runner_plugin_")):
            del sys.modules[name]


def said(name: str, among: registry.Registry[object] = METHODS) -> str:
    with pytest.raises(UserError) as refused:
        among.get(name)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def listed(what: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    show_list(what, as_json=False)
    return {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}


# Ours.


def test_every_name_of_ours_is_a_class_of_its_sort_with_that_name() -> None:
    for found, base in zip(REGISTRIES, BASES, strict=True):
        for name in found.ours:
            cls = found.get(name)
            assert base is not None and issubclass(cls, base) and vars(cls)["name"] == name
            assert found.origin(name) == "cl-runner"
    assert METHODS.get("olora") is OLoRA and list(METHODS.ours)[:3] == ["seqft", "seqlora", "inclora"]


def test_names_are_known_without_an_import() -> None:
    code = """
import sys
from cl_runner.registry import REGISTRIES
names = [name for each in REGISTRIES for name in each]
assert "olora" in names and "hub" in names
print(sorted(name for name in sys.modules if name.startswith("cl_runner.")), "pydantic" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "['cl_runner.errors', 'cl_runner.plain_files', 'cl_runner.registry'] False\n", done.stderr


# Of packages.


def test_a_package_brings_a_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = {"cl_runner.methods": {"mine": "theirs_mine:Mine"}}
    install(tmp_path, "good-package", points, "2.5", theirs_mine=METHOD.format(cls="Mine", name="mine"))
    use(monkeypatch, tmp_path)
    assert METHODS.names() == [*METHODS.ours, "mine"]
    assert METHODS.origin("mine") == "package good-package 2.5" and "theirs_mine" not in sys.modules
    assert METHODS.get("mine").title == "mine: a test's"
    assert listed("methods", capsys)["mine"].endswith("package good-package 2.5")
    show_method("mine", as_json=False)
    assert "from:                 package good-package 2.5\n" in capsys.readouterr().out
    assert said("min") == "there is no method 'min'; did you mean 'mine'?"


def test_a_name_that_is_there_already_is_refused_and_both_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "one", {"cl_runner.methods": {"olora": "theirs_one:X", "mine": "theirs_one:X"}})
    install(tmp_path, "two", {"cl_runner.methods": {"mine": "theirs_two:X"}}, "3")
    use(monkeypatch, tmp_path)
    assert said("olora") == (
        "method 'olora' is there twice, of cl-runner and of package one 1.0; rename one, or leave it out"
    )
    twice = "method 'mine' is there twice, of package one 1.0 and of package two 3"
    assert said("mine").startswith(twice)
    assert f"cannot be used: {twice}" in listed("methods", capsys)["mine"]
    assert METHODS.get("nlora").name == "nlora"


def test_what_cannot_be_used_is_one_line_and_the_others_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = {
        "gone": "theirs_gone:X", "lacks": "theirs_bad:Nothing", "raises": "theirs_raises:X", "sort": "theirs_bad:Sort",
        "thing": "theirs_bad:thing", "other": "theirs_bad:Mine", "../up": "theirs_bad:Up", "exits": "theirs_exits:X",
    }  # fmt: skip
    bad = METHOD.format(cls="Mine", name="mine") + "class Sort: name = 'sort'\nthing = 3\n"
    bad += "class Up(SeqLoRA): name = '../up'\n"
    modules = {"theirs_bad": bad, "theirs_raises": "import os\n1 / 0\n", "theirs_exits": "raise SystemExit(3)\n"}
    install(tmp_path, "bad", {"cl_runner.methods": points}, **modules)
    use(monkeypatch, tmp_path)
    wanted = {
        "gone": "cannot be imported: ModuleNotFoundError: No module named 'theirs_gone'",
        "lacks": "cannot be imported: AttributeError: module 'theirs_bad' has no attribute 'Nothing'",
        "raises": "cannot be imported: ZeroDivisionError: division by zero",
        "exits": "cannot be imported: SystemExit: 3",
        "sort": "is no subclass of cl_runner.methods.protocol.Method",
        "thing": "is no subclass of cl_runner.methods.protocol.Method",
        "other": "has name = 'mine'; it must be the same",
        "../up": "has name = '../up'; it must be the same, a word",
    }
    lines = listed("methods", capsys)
    for name, words in wanted.items():
        assert said(name).startswith(f"method '{name}' of package bad 1.0: {points[name]} {words}")
        assert words in lines[name]
    assert set(METHODS.ours) <= set(lines)


@pytest.mark.parametrize(
    ("found", "module", "base"),
    [(KINDS, "cl_runner.adapters.kind", "Kind"), (OPTIONS, "cl_runner.training.options.protocol", "Option")],
)
def test_kinds_and_options_of_packages_and_plugins(
    found: registry.Registry[object], module: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sort = type(base, (), {})
    made = ModuleType(module)
    monkeypatch.setitem(sys.modules, module, made)
    made.__dict__[base] = sort
    text = f"from {module} import {base}\nclass New({base}):\n    name = 'new'\n"
    install(tmp_path, "pack", {found.group: {"new": "theirs_new:New"}}, theirs_new=text)
    plugin = tmp_path / "mine.py"
    plugin.write_text(text.replace("new", "own"))
    use(monkeypatch, tmp_path)
    load_plugin(str(plugin))
    assert found.names() == [*found.ours, "new", "own"]
    for name, whose in (("new", "package pack 1.0"), ("own", f"plugin {plugin}")):
        assert issubclass(found.get(name), sort) and found.origin(name) == whose
    assert said("nw", found) == f"there is no {found.noun} 'nw'; did you mean 'new'?"


# Of plugin files.


def plugin(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def refused(file: str) -> str:
    with pytest.raises(UserError) as caught:
        load_plugin(file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_plugin_is_imported_once_and_brings_every_class_that_is_defined_in_it(tmp_path: Path) -> None:
    text = METHOD.format(cls="Mine", name="mine") + METHOD.format(cls="Second", name="second")
    text += "from cl_runner.methods.olora import OLoRA\nclass Base(OLoRA.__bases__[0]): pass\n"  # of neither: no name
    text += "from cl_runner.tasks.sources import RowSource\nclass Rows(RowSource):\n    name = title = 'rows'\n"
    text += f"from pathlib import Path\nPath({str(tmp_path)!r}, 'imported').mkdir()\n"  # a second time would fail
    file = plugin(tmp_path / "my-plugin.py", text)
    first, again = load_plugin(file), load_plugin(str(tmp_path / "." / "my-plugin.py"))
    assert first is again
    assert METHODS.names()[-2:] == ["mine", "second"] and SOURCES.names()[-1] == "rows"
    assert METHODS.origin("mine") == SOURCES.origin("rows") == f"plugin {tmp_path / 'my-plugin.py'}"
    module = METHODS.get("mine").__module__
    assert module == f"cl_runner_plugin_my_plugin_{first.sha256[:12]}" and sys.modules[module].__file__ == file
    assert not (tmp_path / "__pycache__").exists()
    registry.forget_plugins()
    assert METHODS.names() == list(METHODS.ours) and registry.plugins() == []


def test_a_plugin_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    assert refused(str(tmp_path / "no.py")) == f"{tmp_path / 'no.py'}: cannot be read: No such file or directory"
    assert "a plugin is a Python file" in refused(plugin(tmp_path / "x.txt", ""))
    nothing = refused(plugin(tmp_path / "empty.py", "from cl_runner.methods.olora import OLoRA\n"))
    assert nothing.endswith(
        "empty.py: defines no method, adapter kind, option, task source, tracker, engine with a name"
    )
    raises = plugin(tmp_path / "raises.py", "def f():\n    1 / 0\n\nf()\n")
    assert refused(raises) == f"{raises}: cannot be imported: line 2: ZeroDivisionError: division by zero"
    broken = plugin(tmp_path / "broken.py", "x = 1\ny = = 2\n")
    assert refused(broken).startswith(f"{broken}: cannot be imported: line 2: SyntaxError: invalid syntax")
    ours = plugin(tmp_path / "ours.py", METHOD.format(cls="Mine", name="olora"))
    assert refused(ours) == f"plugin {ours}: method 'olora' is cl-runner's already; rename it"
    one = plugin(tmp_path / "one.py", METHOD.format(cls="Mine", name="mine"))
    two = plugin(tmp_path / "two.py", METHOD.format(cls="Other", name="mine"))
    load_plugin(one)
    assert refused(two) == f"plugin {two}: method 'mine' is plugin {one}'s already; rename it"
    assert METHODS.get("mine").__name__ == "Mine"


def test_the_same_text_in_another_place_is_the_same_module(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    text = METHOD.format(cls="Mine", name="mine")
    first = load_plugin(plugin(tmp_path / "mine.py", text))
    second = load_plugin(plugin(tmp_path / "there" / "mine.py", text))
    assert first.sha256 == second.sha256 and METHODS.get("mine").__name__ == "Mine"


def test_what_the_docs_have_as_plugins_works(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for number, text in enumerate(blocks):
        load_plugin(plugin(tmp_path / f"block{number}.py", text))
    small, lines = METHODS.get("small"), SOURCES.get("lines")
    values = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0])}
    stage: Any = SimpleNamespace(parameters=lambda: values)
    assert float(small(small.Config()).penalty(stage)) == pytest.approx(0.1 * 14)  # type: ignore[arg-type]
    (tmp_path / "agnews-test.txt").write_text("a b\tWorld\nc\tSports\n")
    data, task = DataConfig(source="lines", dir=str(tmp_path)), benchmark.get("agnews")
    rows = load_rows(task, data, "test").rows
    assert [(row.id, row.text, row.label) for row in rows] == [("test/0", "a b", "World"), ("test/1", "c", "Sports")]
    with pytest.raises(UserError, match=r"agnews-train.txt: No such file or directory; give its folder"):
        load_rows(task, data, "train")
    assert lines.title.startswith("one row a line") and len(blocks) == 3
    feed, run = TRACKERS.get("feed")(), Tracked("mine", "mine-1", tmp_path, {}, {}, True, 4)
    assert feed.start(run)
    feed.log([Entry(5, "agnews", 0.0, {"train/loss": 0.5, "train/lr": 0.25})])
    feed.end("done")
    told = [json.loads(line) for line in (tmp_path / "feed.jsonl").read_text().splitlines()]
    assert told == [[5, "agnews", "train/loss", 0.5], [5, "agnews", "train/lr", 0.25]]


@pytest.mark.parametrize(("name", "instead"), [("osf", "--method osft"), ("qlora", "quantize"), ("adalora", "r=auto")])
def test_a_name_known_from_elsewhere_says_what_there_is_instead(name: str, instead: str) -> None:
    with pytest.raises(UserError, match=f"there is no adapter kind '{name}': .*{instead}"):
        KINDS.get(name)
