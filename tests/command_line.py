"""Calling ``cl-runner`` in tests: in this process (importing torch takes seconds), or as a process of its own.

result = call("report", "nope", cwd=folder)      # in this process
process = start("train", *SMALL, cwd=folder)     # on its own, to be interrupted or killed
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.nano import nano_t5

ORDER = "name: three\ntasks: [dbpedia, amazon, agnews]\n"
STAGES = ["dbpedia", "amazon", "agnews"]
# A step or two a stage: the spine is what is tested, not what is learned. Wrong answers have no end of their own, and
# to write them to 50 tokens would be more than half of the time.
SMALL = tuple(
    f"--set={setting}"
    for setting in (
        "data.max_train=8", "data.max_test=4", "training.epochs=1", "training.lr=1e-2", "training.global_batch=4",
        "training.micro_batch=2", "output.log_every=1", "eval.max_new_tokens=6",
        "output.html=false",
    )
)  # fmt: skip
# The same on a model whose steps take a third of the time, where neither its name nor its answers are the matter.
NANO = ("--model", nano_t5(), "--preset", "tiny", "--data", "synthetic", *SMALL)
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CL_RUNNER_CHANNEL", "SLURM_PROCID",
            "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")  # fmt: skip


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout as the one JSON object it has to be."""

        def never(word: str) -> None:
            raise AssertionError(f"{word} in JSON")

        value = json.loads(self.out, parse_constant=never)
        assert isinstance(value, dict)
        return value

    @property
    def line(self) -> str:
        """Stderr as the one line it has to be."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert self.out == ""
        return lines[0]


def environment(**more: str) -> dict[str, str]:
    """This environment without what a launcher or a user may have set."""
    env = {key: value for key, value in os.environ.items() if key not in (*LAUNCHER, "CL_RUNNER_DATA")}
    return {**env, "OMP_NUM_THREADS": "1", **more}


def call(*arguments: str, cwd: Path) -> Result:
    """``cl-runner`` with these arguments, in this process."""
    from cl_runner.cli import outcome

    with _streams() as (out, err), _in(cwd, arguments):
        code = outcome(list(arguments))
    return Result(code, _text(out), _text(err))


@contextmanager
def _streams() -> Iterator[tuple[Any, Any]]:
    """The process's stdout and stderr, for C code too, go to files."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        kept = os.dup(1), os.dup(2)
        streams = sys.stdout, sys.stderr
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
        try:
            yield out, err
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = streams
            for descriptor, number in zip(kept, (1, 2), strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
            out.seek(0)
            err.seek(0)
            _texts[out], _texts[err] = out.read().decode(), err.read().decode()


_texts: dict[Any, str] = {}


def _text(stream: Any) -> str:
    return _texts.pop(stream)


@contextmanager
def _in(cwd: Path, arguments: tuple[str, ...]) -> Iterator[None]:
    """In a folder, with a fresh environment and the warnings that a user would see."""
    before, argv, env = Path.cwd(), sys.argv, dict(os.environ)
    os.chdir(cwd)
    sys.argv = ["cl-runner", *arguments]
    for name in (*LAUNCHER, "CL_RUNNER_DATA"):
        if name not in _allowed:
            os.environ.pop(name, None)
    try:
        with warnings.catch_warnings():
            warnings.resetwarnings()
            for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        os.chdir(before)
        sys.argv = argv
        os.environ.clear()
        os.environ.update(env)


_allowed: set[str] = set()


@contextmanager
def variables(**values: str) -> Iterator[None]:
    """Inside, ``call`` sees these environment variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    _allowed.update(values)
    try:
        yield
    finally:
        _allowed.difference_update(values)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def start(
    *arguments: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    program: Sequence[str] = ("-m", "cl_runner"),
    **more: Any,
) -> subprocess.Popen[str]:
    """``cl-runner`` with these arguments, as a process of its own (or another program of Python's)."""
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=cwd,
        env=dict(env or environment()),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def finish(process: subprocess.Popen[str], seconds: float = 300) -> Result:
    """How the process ended; one that does not end is killed."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"did not end in {seconds} s:\n{err}") from None
    return Result(process.returncode, out, err)


def logged(run: Path, stage: str, step: int, process: subprocess.Popen[str], seconds: float = 300) -> None:
    """Wait until the run has logged this step."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        file = run / "log.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written
        if any(row["stage"] == stage and row["step"] >= step for row in rows):
            return
        if process.poll() is not None:
            raise AssertionError(f"ended too early:\n{process.communicate()}")
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"{stage}, step {step} was not reached:\n{process.communicate()}")


def tree(folder: Path) -> dict[str, str]:
    """Every path under a folder, and what it holds (folders and links by kind): nothing may change unseen."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        else:
            found[name] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def times(folder: Path) -> dict[str, int]:
    """When each path under a folder was last written, in ns."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def results(run: Path) -> dict[str, str]:
    """What has to be equal, bit for bit, in two runs of the same settings: adapters, states, answers, scores."""
    found = {
        name: digest for name, digest in tree(run / "stages").items() if not name.endswith(("metrics.json", "DONE"))
    }
    for file in sorted((run / "stages").glob("*/metrics.json")):
        about = json.loads(file.read_text())
        about.pop("seconds", None)
        found[str(file.relative_to(run))] = json.dumps(about)
    return {**found, "matrix.csv": (run / "matrix.csv").read_text(), "metrics.json": (run / "metrics.json").read_text()}
