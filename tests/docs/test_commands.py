"""Every command in the documentation is one that there is; those of tutorial and how-tos are run, on few rows."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cl_runner.cli import app
from cl_runner.commands.request import Request
from cl_runner.errors import UserError
from cl_runner.registry import METHODS
from tests.breadth import narrowed, wide
from tests.command_line import NANO, call, tree
from tests.pages import REPO, blocks, commands, pages

# What stands for a name of the reader's own.
PLACES = re.compile(r"\b(RUN|FILE|FOLDER|DIR|NAME|METHOD|LONGER|DATA)\b|…")
ALL = [
    pytest.param(page, words, id=f"{page.relative_to(REPO)}:{block.line}:{' '.join(words)[:60]}")
    for page in pages()
    for block in blocks(page)
    for words in commands(block)
]
OURS = [each for each in ALL if each.values[1][0] == "cl-runner"]
HOWTOS = sorted(page.stem for page in (REPO / "docs" / "howto").glob("*.md"))


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command that the words are of, and its parameters. Raises click's usage errors."""
    command: Any = get_command(app)
    context = command.make_context("cl-runner", list(words))
    name = ""
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        step, command, rest = command.resolve_command(context, rest)
        context = command.make_context(step, rest, parent=context)
        name = f"{name} {step}".strip()
    return name, context.params


def test_there_are_commands_to_look_at() -> None:
    assert len(OURS) > 80 and {page.values[0].name for page in OURS} >= {"README.md", "tutorial.md", "runs.md"}


@pytest.mark.parametrize(("page", "words"), OURS)
def test_a_command_is_one_that_there_is(page: Path, words: list[str]) -> None:
    words = words[1:]
    if ">" in words:
        words = words[: words.index(">")]
    if words[0] in ("--install-completion", "--show-completion"):  # done as they are read: tests/commands
        return
    name, given = parsed(words)
    if name in ("train", "plan", "config show"):
        _settings_are_known(page, given)
    if name == "show" and not PLACES.search(given["method"]) and not given["plugin"]:
        assert given["method"] in METHODS.names()


def _settings_are_known(page: Path, given: dict[str, Any]) -> None:
    """Names of orders, presets, methods and settings; files of the reader's own are not there."""
    texts = [given.get("order"), given.get("extend"), given.get("config"), *(given.get("plugin") or [])]
    own = any(str(text).endswith((".yaml", ".py")) or PLACES.search(str(text)) for text in texts if text)
    sets = [text for text in given.get("set_") or [] if not PLACES.search(text)]
    theirs = given.get("method") in ("mas",) or any(text.startswith("adapter.kind=lora-fa") for text in sets)
    if own or theirs or given.get("order") == "longer":
        return
    flags = {"method.name": given.get("method"), "model.name": given.get("model"), "data.source": given.get("data")}
    flags = {key: value for key, value in flags.items() if value is not None and value != "sqlite"}
    Request(given.get("order"), given.get("preset") or [], None, flags, sets).resolve()


def test_a_wrong_command_would_be_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parsed(["train", "--ordre", "order1"])
    with pytest.raises(UserError, match=r"training\.lrr"):
        _settings_are_known(REPO / "README.md", {"order": "order1", "set_": ["training.lrr=1"]})


@pytest.mark.parametrize(("page", "words"), [each for each in ALL if each.values[1][0] != "cl-runner"])
def test_scripts_and_targets_are_there(page: Path, words: list[str]) -> None:
    if words[0].startswith("scripts/"):
        assert os.access(REPO / words[0], os.X_OK), words
    elif words[0] == "make":
        target = next(word for word in words[1:] if "=" not in word)
        assert re.search(rf"^{target}:", (REPO / "Makefile").read_text(), re.M), target
    elif words[1] == "-m":
        assert (REPO / Path(*words[2].split("."))).with_suffix(".py").is_file() or (
            REPO / Path(*words[2].split(".")) / "__main__.py"
        ).is_file(), words
    else:
        assert (REPO / words[1]).is_file(), words


def follow(page: Path, folder: Path) -> int:
    """Write the files of a page and run its commands, in its order, on few rows; returns how many ran."""
    ran = 0
    for block in blocks(page):
        if block.title:
            file = folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
    for block in blocks(page):
        for words in commands(block):
            # The doctor has tests of its own; real rows and published models are not here.
            if words[0] == "cl-runner" and not {"doctor", "CL_Benchmark", "published"} & set(words):
                _run(words[1:], folder, f"{page.name}:{block.line}")
                ran += 1
    return ran


def _run(words: list[str], folder: Path, where: str) -> None:
    few = [word for word in NANO if word not in ("--preset", "tiny")]
    if words[0] == "train":
        given = "--extend" in words or "run.yaml" in " ".join(words)
        words = [*words, *([] if given else few)]
    if words[0] == "sweep" and "--dry-run" not in words:  # its runs, each in this process
        for line in call(*words, "--print-commands", cwd=folder).out.splitlines():
            _run(line.split()[1:], folder, where)
        return
    result = call(*words, cwd=folder)
    assert result.code == 0, f"{where}: cl-runner {' '.join(words)}\n{result.err}"


@wide
@pytest.mark.slow
def test_the_tutorial(tmp_path: Path) -> None:
    assert follow(REPO / "docs" / "tutorial.md", tmp_path) >= 11
    assert {each.split("-")[1] for each in os.listdir(tmp_path / "runs") if "-" in each} == {"seqlora", "olora"}  # noqa: PTH208
    assert len(os.listdir(tmp_path / "runs/seeds")) == 9  # noqa: PTH208
    assert "compare.html" in tree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", narrowed(HOWTOS, {"own-task", "own-method"}))
def test_a_how_to(page: str, tmp_path: Path) -> None:
    assert follow(REPO / "docs" / "howto" / f"{page}.md", tmp_path) >= 2
