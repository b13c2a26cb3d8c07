"""`cl-runner watch`: one picture or JSON into a pipe; on a terminal until the run ends, or Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command_line import call, environment, times
from tests.commands.test_errors import refused
from tests.conftest import Finished
from tests.runs.test_watching import RIGHT, STAGES, a_run, row, write


def test_a_finished_run(finished: Finished) -> None:
    before = times(finished.cwd)
    shown = call("watch", cwd=finished.cwd)
    assert (shown.code, shown.err) == (0, "")
    assert "✓dbpedia → ✓amazon → ✓agnews" in shown.out and "done: all 3 stages" in shown.out
    assert call("watch", finished.name, "--once", cwd=finished.cwd).out == shown.out
    found = call("watch", "--json", cwd=finished.cwd).json
    report = call("report", "--json", cwd=finished.cwd).json
    log = [json.loads(line) for line in (finished.run / "log.jsonl").read_text().splitlines()]
    assert (found["state"], found["stage"], found["stages_done"], found["step"], found["steps"]) == ("done", 3, 3, 2, 2)
    assert found["loss"] == log[-1]["loss"] and found["seconds_left"] is None
    for key in ("average_accuracy", "forgetting", "matrix", "synthetic"):
        assert found[key] == report[key]
    assert times(finished.cwd) == before


def test_a_run_says_how_much_there_is_to_do_and_when_it_logged(finished: Finished) -> None:
    about = json.loads((finished.run / "run.json").read_text())
    assert [(stage["steps"], stage["test_rows"]) for stage in about["stages"]] == [(2, 4), (2, 8), (2, 12)]
    log = [json.loads(line) for line in (finished.run / "log.jsonl").read_text().splitlines()]
    when = [row["time"] for row in log]
    assert when == sorted(when) and abs(when[-1] - (finished.run / "log.jsonl").stat().st_mtime) < 60


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("nope",), ("there is no run 'nope' in runs",)), ((), ("there is no run in runs",)),
     (("--every", "0"), ("--every", "0.1"))],
)  # fmt: skip
def test_refused(tmp_path: Path, flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(call("watch", *flags, cwd=tmp_path), words)


class OnTerminal:
    """`cl-runner watch` on a terminal of 80 columns and 24 lines."""

    def __init__(self, cwd: Path) -> None:
        import struct
        import termios

        self.main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        command = [sys.executable, "-m", "cl_runner", "watch", "--every", "0.1"]
        env = environment(TERM="xterm")
        for name in ("COLUMNS", "LINES"):
            env.pop(name, None)
        self.process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=side, stdout=side, stderr=side, start_new_session=True
        )
        os.close(side)
        self.text = ""

    def until(self, words: str, seconds: float = 60) -> None:
        """Read until these words are there."""
        end = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < end, self.text[-3000:]
            self.read(0.1)

    def read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.main], [], [], seconds)
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            new = os.read(self.main, 1 << 16) if ready else b""
            self.text += new.decode("utf-8", "replace")
            return bool(new)
        return False

    def end(self) -> int:
        code = self.process.wait(60)
        while self.read(0.2):
            pass
        os.close(self.main)
        return code


def test_on_a_terminal_it_follows_the_run_to_its_end(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    with (run.path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        terminal = OnTerminal(tmp_path)
        terminal.until("preparing: stage 1 of 3 dbpedia")
        write(run, row("dbpedia", 1, 1.0), row("dbpedia", 2, 3.0))
        terminal.until("training: stage 1 of 3 dbpedia, step 2/4 (50 %), 32 s left")
        for stage in STAGES:
            run.commit({stage["name"]: RIGHT})
        terminal.until("done: all 3 stages")
        assert terminal.end() == 0
    assert terminal.text.count("\x1b[?25h") >= 1 and terminal.text.rindex("\x1b[?25h") > terminal.text.rindex(
        "\x1b[?25l"
    )


def test_ctrl_c_leaves_it(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    with (run.path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        terminal = OnTerminal(tmp_path)
        terminal.until("preparing")
        os.killpg(terminal.process.pid, signal.SIGINT)
        assert terminal.end() == 130
    assert terminal.text.rstrip().endswith("stopped")
