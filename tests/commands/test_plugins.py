"""``--plugin FILE`` and ``plugins:``: a user's own file is run, one that only a run folder names is not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cl_runner import registry
from cl_runner.atomic import sha256
from tests.breadth import wide
from tests.command_line import SMALL, call, finish, results, start

PLUGIN = '''
"""What the tests bring along; that it was run is counted."""
from pathlib import Path

from cl_runner.config.schema import Section
from cl_runner.methods.seqlora import SeqLoRA
from cl_runner.tasks.sources import RowSource, found, source_of

log = Path({log!r})
with log.open("a") as file:  # of several processes at once
    file.write("x")


class Small(SeqLoRA):
    """A and B are held near zero."""

    class Config(Section):
        weight: float = 0.1

    name, title = "small", "small: a pair that stays small"

    def penalty(self, stage):
        return self.config.weight * sum(p.square().sum() for p in stage.parameters().values())


class Backwards(RowSource):
    name, title = "backwards", "the synthetic rows from last to first"

    def read(self, task, data, split):
        rows = source_of(task, data.model_copy(update={{"source": "synthetic"}})).read(task, data, split).rows
        return found([(row.text, row.label) for row in reversed(rows)], split, "backwards " + task.name)
'''
TRAIN = ("train", "--order", "two.yaml", "--method", "small", "--data", "backwards", "--name", "run", *SMALL)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Every test imports plugins anew."""
    for name in [name for name in sys.modules if name.startswith("cl_runner_plugin_")]:
        del sys.modules[name]
    yield
    registry.forget_plugins()


def folder_with(at: Path) -> Path:
    at.mkdir(exist_ok=True)
    (at / "two.yaml").write_text("name: two\ntasks: [dbpedia, amazon]\n")
    (at / "mine.py").write_text(PLUGIN.format(log=str(at / "imported")))
    return at


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of a plugin's method on a plugin's rows."""
    folder = folder_with(tmp_path_factory.mktemp("plugins"))
    result = call(*TRAIN, "--plugin", "mine.py", cwd=folder)
    assert result.code == 0, result.err
    return folder


def copied(made: Path, to: Path, stages: int = 2) -> Path:
    shutil.copytree(made, to, dirs_exist_ok=True)
    for stage in sorted((to / "runs/run/stages").iterdir())[stages:]:
        shutil.rmtree(stage)
    return to


def imports(folder: Path) -> int:
    return len((folder / "imported").read_text()) if (folder / "imported").exists() else 0


def test_a_run_says_what_it_was_made_with(made: Path) -> None:
    run = made / "runs/run"
    assert f'plugins: ["{made / "mine.py"}"]\n' in (run / "run.yaml").read_text()
    about = json.loads((run / "run.json").read_text())
    assert about["identity"]["plugins"] == {sha256(made / "mine.py"): "mine.py"}
    assert about["identity"]["data"]["dbpedia"]["train"]["source"] == "backwards dbpedia"
    plugin = f"plugin {made / 'mine.py'}"
    assert json.loads((run / "environment.json").read_text())["from"] == {"small": plugin, "backwards": plugin}
    shown = call("config", "show", "--config", "runs/run/run.yaml", "--plugin", "mine.py", cwd=made)
    assert shown.code == 0 and any(
        line.startswith("plugins: [") and line.endswith("# --plugin") for line in shown.out.splitlines()
    )


def test_what_reads_a_run_alone_needs_no_plugin(made: Path) -> None:
    before = imports(made)
    for arguments in (("report", "run"), ("compare", "run", "run"), ("list", "runs")):
        result = call(*arguments, cwd=made)
        assert result.code == 0 and "small" in result.out
    assert imports(made) == before


@pytest.mark.parametrize("how", ["run", "no run.json", "renamed", "link", "eval", "extend"])
def test_a_file_that_only_a_run_names_is_not_run(made: Path, tmp_path: Path, how: str) -> None:
    there = copied(made, tmp_path / "there")
    run, before = there / "runs/run", imports(made)
    config = run / "run.yaml"
    if how == "no run.json":
        (run / "run.json").unlink()
    elif how == "renamed":
        config = config.rename(run / "mine.yaml")
    elif how == "link":
        config = tmp_path / "mine.yaml"
        config.symlink_to(run / "run.yaml")
    (there / "three.yaml").write_text("name: three\ntasks: [dbpedia, amazon, agnews]\n")
    arguments = {
        "eval": ("eval", "run"),
        "extend": ("train", "--extend", "run", "--order", "three.yaml"),
    }.get(how, ("train", "--config", str(config)))
    result = call(*arguments, cwd=there)
    assert result.code == 2
    assert result.line.endswith(
        f"a run's plugins are run only if you say so: look at them, and give --plugin {made / 'mine.py'}"
    ), result.line
    assert str(config if how not in ("eval", "extend") else Path("runs/run/run.yaml")) in result.line
    assert imports(made) == before == imports(there)


def test_with_the_plugin_given_the_run_is_scored_again_and_is_done(made: Path) -> None:
    found = call("eval", "run", "--plugin", "mine.py", "--set", "eval.mode=generate", "--json", cwd=made)
    assert found.code == 0 and "plugin" not in found.err, found.err
    assert found.json["scores"] == found.json["committed"] and not any(found.json["differing_rows"].values())
    again = call("train", "--config", "runs/run/run.yaml", "--plugin", "mine.py", cwd=made)
    assert again.code == 0 and "is done already" in again.err


def test_a_moved_plugin_goes_on_to_the_bit_and_a_changed_one_is_refused(made: Path, tmp_path: Path) -> None:
    there = copied(made, tmp_path / "there", stages=1)
    file = there / "mine.py"
    text = file.read_text()
    file.write_text(text.replace("weight: float = 0.1", "weight: float = 0.2"))
    result = call(*TRAIN, "--plugin", "mine.py", cwd=there)
    assert (
        result.code == 2 and "the plugin mine.py has changed since the run runs/run began; give another" in result.line
    )
    with_other = call(*TRAIN[:3], "--name", "run", *SMALL, cwd=there)
    assert (
        with_other.code == 2 and "the run runs/run was made with the plugin mine.py: give --plugin" in with_other.line
    )
    scored = call("eval", "run", "--stage", "1", "--plugin", "mine.py", cwd=there)
    assert scored.code == 0 and "the plugin mine.py has changed since the run" in scored.out + scored.err
    (there / "other.py").write_text(text.replace('"small"', '"other"').replace('"backwards"', '"others"'))
    (there / "elsewhere").mkdir()
    (there / "elsewhere" / "same.py").write_text(text)
    file.unlink()
    more = call(*TRAIN, "--plugin", "elsewhere/same.py", "--plugin", "other.py", cwd=there)
    assert more.code == 2 and "the run runs/run was made without the plugin other.py" in more.line
    result = call(*TRAIN, "--plugin", "elsewhere/same.py", cwd=there)
    assert result.code == 0, result.err
    assert results(there / "runs/run") == results(made / "runs/run")


def test_a_config_file_of_the_user_names_plugins(made: Path) -> None:
    (made / "sweep.yaml").write_text("plugins: [mine.py]\norder: two.yaml\nmethod: {name: small}\n")
    shown = call("config", "show", "--config", "sweep.yaml", "--json", cwd=made).json
    assert shown["config"]["plugins"] == [str(made / "mine.py")] and shown["origin"]["plugins"] == "sweep.yaml:1"
    assert shown["config"]["method"] == {"name": "small", "weight": 0.1}
    both = call("config", "show", "--config", "sweep.yaml", "--plugin", "./mine.py", "--json", cwd=made).json
    assert both["config"]["plugins"] == [str(made / "mine.py")]


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ("plugins: no.py", (), "mine.yaml:1:10: plugins must be a list of Python files, such as [mine.py]"),
        ("plugins: [3]", (), "mine.yaml:1:10: plugins must be a list of Python files"),
        ("plugins: [no.py]", (), "mine.yaml:1:10: no.py: cannot be read: No such file or directory"),
        ("seed: 1", ("--plugin", "no.py"), "--plugin: no.py: cannot be read"),
        ("seed: 1", ("--set", "plugins=[mine.py]"), "--set plugins=[mine.py]: choose plugins with --plugin"),
        ("seed: 1", ("--preset", "preset.yaml"), "preset.yaml:1:1: a preset does not set plugins"),
        ("seed: 1", ("--method", "smal"), "--method: there is no method 'smal'"),
        (
            "plugins: [mine.py]",
            ("--method", "smal"),
            "--method: there is no method 'smal'; did you mean 'small'?",
        ),
        (
            "plugins: [mine.py]\ndata: {source: backward}",
            (),
            "mine.yaml:2:16: data.source must be one of auto, folder, hub, synthetic, trace, backwards; did you mean",
        ),
        (
            "tasks: {dbpedia: {data.source: hubb}}",
            (),
            "mine.yaml:1:32: tasks.dbpedia.data.source must be one of auto, folder, hub, synthetic, trace; did you",
        ),
    ],
)
def test_what_is_wrong_is_said_where_it_was_written(
    tmp_path: Path, config: str, arguments: tuple[str, ...], message: str
) -> None:
    folder_with(tmp_path)
    (tmp_path / "mine.yaml").write_text(config + "\n")
    (tmp_path / "preset.yaml").write_text("plugins: [mine.py]\n")
    result = call("config", "show", "--order", "two.yaml", "--config", "mine.yaml", *arguments, cwd=tmp_path)
    assert result.code == 2 and result.line.removeprefix("cl-runner: ").startswith(message), result.line


def test_lists_and_the_schema_have_what_a_plugin_brings(made: Path) -> None:
    flag = ("--plugin", "mine.py")
    for what, name in (("methods", "small"), ("sources", "backwards")):
        rows = call("list", what, *flag, "--json", cwd=made).json[what]
        assert rows[-1][what[:-1]] == name and rows[-1]["from"] == f"plugin {made / 'mine.py'}"
        assert name not in [row[what[:-1]] for row in call("list", what, "--json", cwd=made).json[what]]
    assert call("show", "small", *flag, "--json", cwd=made).json["settings"]["weight"]["default"] == 0.1
    schema = call("config", "schema", *flag, cwd=made).json
    assert "small" in [each["title"] for each in schema["properties"]["method"]["anyOf"]]
    assert schema["$defs"]["DataConfig"]["properties"]["source"]["enum"][-2:] == ["trace", "backwards"]
    shown = call(
        "data", "show", "--order", "two.yaml", "--task", "amazon", "-n", "1", "--data", "backwards", *flag, cwd=made
    )
    plain = call("data", "show", "--order", "two.yaml", "--task", "amazon", "-n", "200", cwd=made)
    assert shown.code == 0 and shown.out.split("\n", 1)[1].split("---")[0] in plain.out.rpartition("--- test/199")[2]


@wide
def test_every_process_of_a_run_has_the_plugin(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    result = finish(start(*TRAIN, "--plugin", "mine.py", "--gpus", "2", cwd=folder))
    assert result.code == 0, result.err
    assert imports(folder) == 3  # the command that starts them, and each of the two
    about = json.loads((folder / "runs/run/environment.json").read_text())
    assert about["processes"] == 2 and set(about["from"]) == {"small", "backwards"}
