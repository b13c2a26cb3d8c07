"""The image, the workflow and the citation say what the package says: as far as can be told without running them."""

from __future__ import annotations

import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from cl_runner import __version__

REPO = Path(__file__).parents[1]
KNOWN = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "VOLUME", "WORKDIR"}
PROJECT = (REPO / "pyproject.toml").read_text()


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, each on one line."""
    lines = [line for line in (REPO / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def copied() -> list[str]:
    return [name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]]


def test_every_instruction_is_one_and_its_shell_is_shell() -> None:
    found = instructions()
    assert {word for word, _ in found} <= KNOWN
    assert next(word for word, _ in found if word != "ARG") == "FROM"
    if bash := shutil.which("bash"):
        for word, rest in found:
            if word == "RUN":
                assert subprocess.run([bash, "-n", "-c", rest], capture_output=True, check=False).returncode == 0, rest


def test_what_is_copied_is_there_and_is_sent() -> None:
    ignored = (REPO / ".dockerignore").read_text().split("\n")
    assert "*" in ignored  # nothing but what is named
    sent = {line[1:] for line in ignored if line.startswith("!")}
    assert set(copied()) == sent and all((REPO / name).exists() for name in sent)
    # All that the wheel is made of.
    [block] = re.findall(r"\[tool.hatch.build.targets.wheel.force-include\]\n(.*?)\n\n", PROJECT, re.S)
    included = {line.partition("=")[0].strip(' "') for line in block.splitlines()}
    assert included | {"cl_runner", "pyproject.toml", "README.md", "LICENSE"} == sent
    assert not [name for name in sent if any(fnmatch(name, line) for line in ignored if line not in ("", "*"))]


def test_versions_are_those_of_the_constraints_and_extras_are_there() -> None:
    pips = [
        part for word, rest in instructions() if word == "RUN" for part in rest.split("&&") if "pip install" in part
    ]
    assert len(pips) == 2 and all("--constraint constraints.txt" in part for part in pips)
    [extras] = re.findall(r"\.\[([\w,]+)\]", " ".join(pips))
    for name in extras.split(","):
        assert re.search(rf"^{name} = \[", PROJECT, re.M), name


def test_nothing_runs_as_root_and_caches_are_a_volume() -> None:
    words = [word for word, _ in instructions()]
    found = dict(instructions())
    assert words.index("USER") < words.index("ENTRYPOINT") and found["USER"] not in ("root", "0")
    assert f"useradd --create-home --uid 10001 {found['USER']}" in " ".join(rest for _, rest in instructions())
    environment = " ".join(rest for word, rest in instructions() if word == "ENV")
    for name in ("HF_HOME", "CL_RUNNER_CACHE"):
        assert f"{name}={found['VOLUME']}/" in environment
    assert found["ENTRYPOINT"] == '["cl-runner"]' and re.search(r'^cl-runner = "', PROJECT, re.M)


def test_the_workflow_does_what_the_makefile_does() -> None:
    [file] = (REPO / ".github" / "workflows").glob("*.yml")
    flow = yaml.safe_load(file.read_text())
    makefile = (REPO / "Makefile").read_text()
    steps = [step for job in flow["jobs"].values() for step in job["steps"]]
    targets = [found for step in steps for found in re.findall(r"\bmake (\w+)", step.get("run", ""))]
    assert sorted(targets) == ["dist", "docs", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target
    assert all(("uses" in step) != ("run" in step) for step in steps)
    [oldest] = re.findall(r'^requires-python = ">=([\d.]+)"', PROJECT, re.M)
    assert flow["jobs"]["test"]["strategy"]["matrix"]["python"] == [oldest, "3.12"]


def test_the_citation_is_of_this_version() -> None:
    about = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert about["cff-version"] == "1.2.0" and about["type"] == "software"
    assert set(about) >= {"message", "title", "authors", "version", "license"} and about["authors"]
    assert (str(about["version"]), about["license"]) == (__version__, "Apache-2.0")


@pytest.mark.parametrize("target", ["test", "docs", "dist", "lint", "setup"])
def test_targets_are_read_by_make(target: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    done = subprocess.run(["make", "--dry-run", target], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        if "pip install" in line:
            assert "--constraint constraints.txt" in line, line
