"""What the shell completes, asked as bash, zsh and fish ask; the installed script in a real bash."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from cl_runner.config.schema import RunConfig
from cl_runner.methods import METHODS, method_schema
from cl_runner.registry import KINDS, SOURCES
from cl_runner.runs.listing import STATES
from cl_runner.settings.keys import settings
from cl_runner.settings.presets import preset_names
from cl_runner.tasks.order import order_names
from tests.command_line import call, environment, variables

REPO = Path(__file__).parents[2]
HERE = Path(__file__).parent
SCHEDULES = ("", "constant", "linear", "cosine")
INSTALLED = {
    "bash": ".bash_completions/cl-runner.sh",
    "zsh": ".zfunc/_cl-runner",
    "fish": ".config/fish/completions/cl-runner.fish",
}


def bash(*words: str, cwd: Path = HERE, apart: str = "\n") -> list[str]:
    """What bash is answered, for the last of these words; it ends words at ``=``."""
    asked = {"COMP_WORDS": apart.join(("cl-runner", *words)), "COMP_CWORD": str(len(words))}
    with variables(_CL_RUNNER_COMPLETE="complete_bash", **asked):
        result = call(cwd=cwd)
    assert result.err == "" and result.code == 0
    return result.out.splitlines()


def zsh(line: str) -> str:
    with variables(_CL_RUNNER_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=line):
        return call(cwd=HERE).out


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("train", "--method", ""), METHODS.names()),
        (("train", "--order", ""), order_names()),
        (("plan", "--preset", "tiny", "--preset", ""), preset_names()),
        (("train", "--data", ""), ["auto", *SOURCES]),
        (("list", "runs", "--state", ""), STATES),
        (("show", "olo"), ["olora"]),
        (("compare", "--against", "nlo"), ["nlora"]),
        (("data", "show", "--order", "order2", "--task", ""), ["dbpedia", "amazon", "agnews", "yahoo"]),
        (("train", "--set", "adapter.kind", "=", ""), list(KINDS)),
        (("train", "--set", "adapter.kind", "="), list(KINDS)),  # right behind the sign
        (("train", "--set", "training.schedule", "=", "li"), ["linear"]),
        (("train", "--set", "=", "training.schedule", "=", "li"), ["linear"]),
        (("train", "--set", "seed", "=", ""), ["42"]),
        (("train", "--set", "eval.future", "=", ""), ["true", "false"]),
        (("train", "--set", "adapter.target_modules", "=", "m"), ["mlp"]),
        (("train", "--set", "training.share_prefix", "=", "o"), ["off"]),
        (("train", "--set", "=", "training.sched"), [f"training.schedule={value}" for value in SCHEDULES]),
        (
            ("train", "--order", "order1-three", "--set", "tasks.ag"),
            [f"tasks.agnews.{section}." for section in ("training", "method", "options", "data")],
        ),
        (
            ("train", "--set", "tasks.agnews.training.ep"),
            [f"tasks.agnews.training.epochs={each}" for each in ("", "1")],
        ),
        (("train", "--set", "stages.2.method.lambda1"), ["stages.2.method.lambda1=", "stages.2.method.lambda1=null"]),
        (("train", "--set", "nonsense.", "=", ""), []),
        (("train", "--order", "no-such", "--set", "tasks."), []),
    ],
)
def test_what_is_completed(words: Sequence[str], wanted: Sequence[str]) -> None:
    assert bash(*words) == list(wanted)


def test_every_setting_is_completed_and_can_be_set(tmp_path: Path) -> None:
    keys = [word.partition("=")[0] for word in bash("train", "--set", "")]
    ours = [each.key for each in settings(method_schema("olora"))]
    assert keys == ours and len(set(keys)) == len(keys)
    sections = {name for name in RunConfig.model_fields if name not in ("tasks", "stages")}
    assert {key.partition(".")[0] for key in keys} == sections
    for kind in ("training", "eval", "data"):
        model = RunConfig.model_fields[kind].annotation
        assert model is not None
        assert {key.split(".")[1] for key in keys if key.startswith(kind + ".")} == set(model.model_fields)


def test_settings_are_those_of_the_method_and_the_kind_that_are_given() -> None:
    assert "method.lambda1=" in bash("train", "--set", "method.l")
    assert bash("train", "--method", "seqlora", "--set", "method.l") == []
    assert "method.preserve_first=" in bash("train", "--set", "method.name", "=", "osft", "--set", "method.")
    assert bash("train", "--set", "adapter.kind", "=", "vera", "--set", "adapter.d_") == [
        "adapter.d_initial=", "adapter.d_initial=0.1",
    ]  # fmt: skip
    assert "adapter.alpha=" not in bash("train", "--set", "adapter.kind", "=", "vera", "--set", "adapter.a")


def test_default_beside_the_key_keeps_bash_from_a_space() -> None:
    """Of two words bash completes what they have in common."""
    assert bash("train", "--set", "training.lr") == ["training.lr=", "training.lr=0.001"]
    assert bash("train", "--set", "training.lr", "=") == ["0.001"]


def test_runs_are_those_of_the_folder(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / "here" / name).mkdir(parents=True)
        for file in ("run.json", "run.yaml"):
            (tmp_path / "here" / name / file).write_text("{}")
    words = ("report", "--output-dir", "here", "")
    assert sorted(bash(*words, cwd=tmp_path)) == ["first", "second"]
    assert bash("report", "", cwd=tmp_path) == []


def test_zsh_and_fish_are_told_what_a_setting_is() -> None:
    assert zsh("cl-runner train --method olo").strip() == "_arguments '*: :((\"olora\"))'"
    assert '"training.schedule=":"After the warm-up."' in zsh("cl-runner train --set training.sch")
    with variables(
        _CL_RUNNER_COMPLETE="complete_fish", _TYPER_COMPLETE_FISH_ACTION="get-args",
        _TYPER_COMPLETE_ARGS="cl-runner train --set training.schedule=l",
    ):  # fmt: skip
        assert call(cwd=HERE).out == "training.schedule=linear\n"


def test_no_torch_is_imported_for_it() -> None:
    program = (
        "import sys; from cl_runner.cli import outcome; code = outcome([]); "
        "assert 'torch' not in sys.modules and 'pydantic' in sys.modules; sys.exit(code)"
    )
    env = environment(
        _CL_RUNNER_COMPLETE="complete_bash", COMP_WORDS="cl-runner train --set training.l", COMP_CWORD="3",
        PYTHONPATH=str(REPO),
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["training.lr=", "training.length_window=", "training.loss_mean="]


@pytest.mark.parametrize("shell", INSTALLED)
def test_it_is_installed(shell: str, tmp_path: Path) -> None:
    env = environment(HOME=str(tmp_path), PYTHONPATH=str(REPO), _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    command = [sys.executable, "-m", "cl_runner", "--install-completion", shell]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / INSTALLED[shell]).read_text()
    assert f"_CL_RUNNER_COMPLETE=complete_{shell}" in text and "cl-runner" in text
    if shell == "bash":
        _bash_completes(tmp_path / INSTALLED[shell], tmp_path)


def _bash_completes(script: Path, folder: Path) -> None:
    """What a real bash puts into COMPREPLY, with a ``cl-runner`` on its path."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    command = folder / "cl-runner"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cl_runner "$@"\n')
    command.chmod(0o755)
    program = (
        f"PATH={folder}:$PATH; source {script}; complete -p cl-runner >/dev/null || exit 9; "
        "COMP_WORDS=(cl-runner train --set training.schedule = c); COMP_CWORD=5; "
        '_cl_runner_completion cl-runner; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    env = environment(PYTHONPATH=str(REPO), HOME=str(folder))
    done = subprocess.run([bash, "--norc", "-c", program], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "constant\ncosine\n")
