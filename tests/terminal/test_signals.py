"""Ctrl-C, SIGTERM, a lost terminal: one line with the stage, what is kept and the command to go on; exit code 130."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cl_runner.terminal import stopping
from cl_runner.terminal.stopping import Stopped, signals_stop
from tests.breadth import wide
from tests.command_line import ORDER, SMALL, STAGES, call, environment, finish, logged, start

NAMED = ("train", "--order", "three.yaml", *SMALL, "--name", "mine", "--set=training.epochs=20")


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    (tmp_path / "three.yaml").write_text(ORDER)
    return tmp_path


def stage_of(said: str) -> str:
    found = re.search(
        r"^stopped in stage (\d) \((\w+)\); (.*?)( to step \d+)?; go on: cl-runner train .*--name mine",
        said,
        re.MULTILINE,
    )
    assert found, said
    before = STAGES[: int(found[1]) - 1]
    if found[4]:
        there = f"kept: {', '.join(before)}{', and ' if before else ''}{found[2]}"
    else:  # between its steps alone there is something to keep
        there = f"kept: {', '.join(before)}" if before else "no stage is finished yet"
    assert found[3] == there
    return found[2]


@wide
def test_sigterm(cwd: Path) -> None:
    process = start(*NAMED, "--json", cwd=cwd)
    run = cwd / "runs" / "mine"
    logged(run, "dbpedia", 2, process)
    [listed] = call("list", "runs", "--json", cwd=cwd).json["runs"]
    assert (listed["state"], listed["stage"]) == ("running", 0)
    second = call(*NAMED, cwd=cwd)
    assert second.code == 2
    assert f"is being trained by another process (pid {process.pid} on " in second.line
    logged(run, "amazon", 2, process)
    sent = time.monotonic()
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    ended = finish(process)
    assert time.monotonic() - sent < 30, "seconds, on a machine of its own one or two"
    assert ended.code == 130
    assert ended.out == ""
    stage = stage_of(ended.err)
    last = ended.err.splitlines()[-1]
    assert last.startswith(f"stopped in stage 2 ({stage})")
    assert ended.err.count("stopped") == 1
    assert (run / "run.log").read_text().splitlines()[-1] == last
    assert json.loads((run / "status.json").read_text()) == {"state": "stopped", "message": "by SIGTERM"}
    [listed] = call("list", "runs", "--json", cwd=cwd).json["runs"]
    assert (listed["state"], listed["stage"]) == ("stopped", 1)
    command = last.split("go on: cl-runner ")[1].split()
    assert (
        "goes on in stage 2 at step " in call(*(word for word in command if word != "--json"), "--dry-run", cwd=cwd).out
    )


class Terminal:
    """A process on a terminal of its own, and all it has written there."""

    def __init__(self, cwd: Path) -> None:
        self.main, side = pty.openpty()

        def lead() -> None:
            os.setsid()
            import fcntl
            import termios

            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "cl_runner", *NAMED], cwd=cwd, stdin=side, stdout=side, stderr=side,
            env=environment(TERM="xterm-256color", COLUMNS="100", LINES="30"), preexec_fn=lead,
        )  # fmt: skip
        os.close(side)
        self.said = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._open = True
        self._reader.start()

    def _read(self) -> None:
        while self._open:
            ready, _, _ = select.select([self.main], [], [], 0.1)
            if not ready:
                continue
            try:
                block = os.read(self.main, 65536)
            except OSError:  # the last process on it has ended
                return
            if not block:
                return
            self.said += block

    def press(self, key: bytes) -> None:
        os.write(self.main, key)

    def hang_up(self) -> None:
        self._open = False
        self._reader.join()
        os.close(self.main)

    def end(self) -> int:
        code = self.process.wait(timeout=300)
        self._reader.join(timeout=10)
        return code


def wait_for_log(run: Path, terminal: Terminal) -> None:
    until = time.monotonic() + 300
    while not (run / "log.jsonl").exists():
        assert terminal.process.poll() is None, terminal.said
        assert time.monotonic() < until
        time.sleep(0.05)


def test_ctrl_c_at_a_terminal(cwd: Path) -> None:
    terminal = Terminal(cwd)
    wait_for_log(cwd / "runs" / "mine", terminal)
    time.sleep(0.5)
    terminal.press(b"\x03")
    assert terminal.end() == 130
    os.close(terminal.main)
    said = terminal.said.decode()
    assert "stage 1 of 3 dbpedia" in said
    assert "examples/s" in said
    assert "\x1b[?25l" not in said.rsplit("\x1b[?25h", 1)[-1], "the cursor is shown at the end"
    plain = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", said).replace("\r", "\n")
    assert stage_of(plain) == "dbpedia"
    assert "Traceback" not in plain
    assert plain.rstrip().splitlines()[-1].startswith("stopped in stage 1")


@wide
def test_lost_terminal(cwd: Path) -> None:
    terminal = Terminal(cwd)
    run = cwd / "runs" / "mine"
    wait_for_log(run, terminal)
    terminal.hang_up()
    assert terminal.end() == 130
    assert stage_of((run / "run.log").read_text()) == "dbpedia"
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"


def test_what_was_ignored_stays_ignored() -> None:
    """nohup, and a script's &: the run outlives the terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals_stop():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGHUP)
        stopping.check()
        stopping.end_at_once()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_stops_and_is_remembered(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    with signals_stop():
        assert stopping.asked() is None
        with pytest.raises(Stopped, match=number.name):
            os.kill(os.getpid(), number)
        assert stopping.asked() == number.name
        os.kill(os.getpid(), number)  # an impatient second one is no news
        with pytest.raises(Stopped):  # had Python dropped the first
            stopping.check()
        monkeypatch.setattr(stopping, "AGAIN", 0.0)
        with pytest.raises(Stopped):
            os.kill(os.getpid(), number)
        stopping.last_words()
        os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # one more, while the process ends
    assert signal.getsignal(number) == signal.SIG_IGN


def test_a_signal_within_a_destructor_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    class Dies:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)

    with signals_stop():
        Dies()
        with pytest.raises(Stopped, match="SIGTERM"):
            stopping.check()
    assert capfd.readouterr().err == ""


def test_no_library_takes_it_for_a_failure() -> None:
    assert not issubclass(Stopped, Exception | KeyboardInterrupt)


def test_stopped_before_there_is_a_run(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_runner.training.plan import Plan

    monkeypatch.setattr(Plan, "make", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    result = call(*NAMED, cwd=cwd)
    assert result.code == 130
    assert result.line == "cl-runner: stopped"
    assert not (cwd / "runs").exists()
