"""What the screen says, where, and that nothing that happens to a terminal reaches the training."""

from __future__ import annotations

import errno
import io
import os
import pty
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from cl_runner.terminal.progress import Screen, ShownStage, TimeLeft, clean, duration


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Broken(io.StringIO):
    """A stream whose reader is gone, from the given write on."""

    def __init__(self, error: Exception, after: int = 0, lasting: bool = True) -> None:
        super().__init__()
        self.error, self.after, self.lasting, self.calls = error, after, lasting, 0

    def write(self, text: str) -> int:
        self.calls += 1
        if self.calls > self.after and (self.lasting or self.calls == self.after + 1):
            raise self.error
        return super().write(text)


def two_stages(screen: Screen, clock: Clock, seconds_a_step: float = 1.0, steps: int = 40) -> None:
    """40 steps of one second, then 10 rows of half a second; twice."""
    screen.begin([ShownStage("dbpedia", steps, 10), ShownStage("amazon", steps, 10)])
    for k, name in enumerate(["dbpedia", "amazon"], 1):
        screen.stage(k, 2, name, steps)
        for i in range(1, steps + 1):
            clock.now += seconds_a_step
            screen.step(i, 1 / i, 16.4)
        screen.evaluating(name, 0, 10)
        for i in range(1, 11):
            clock.now += 0.5
            screen.evaluating(name, i, 10)
        screen.scores({"dbpedia": 90.0, "amazon": None if k == 1 else 50.5}, mark="synthetic", average=90.0)
        screen.stage_done()


def test_plain_lines_and_run_log(tmp_path: Path) -> None:
    out, clock, log = io.StringIO(), Clock(), tmp_path / "run.log"
    with Screen(log, stream=out, clock=clock) as screen:
        screen.line("runs/x")
        two_stages(screen, clock)
    lines = out.getvalue().splitlines()
    assert lines[0] == "runs/x"
    assert lines[1] == "stage 1 of 2 dbpedia: 40 steps"
    assert lines[2] == "stage 1 of 2 dbpedia: step 4/40 (10 %), loss 0.2500, 16.4 examples/s, 1 min 16 s left"
    assert lines[-2] == "stage 2 of 2 amazon: scores (%, synthetic): dbpedia 90.00, amazon 50.50; average 90.00"
    assert lines[-1] == "stage 2 of 2 amazon: done in 45 s"
    assert sum("step " in line and "1 of 2" in line for line in lines) == 10
    logged = log.read_text().splitlines()
    assert logged[0].startswith("--- ")
    assert logged[1:] == lines


def test_slow_steps_get_a_line_each_half_minute_and_fast_ones_no_flood() -> None:
    for seconds, at_least, at_most in ((20.0, 15, 21), (0.01, 0, 1)):
        out, clock = io.StringIO(), Clock()
        with Screen(stream=out, clock=clock) as screen:
            screen.stage(1, 1, "a", 1000 if seconds > 1 else 40)
            for i in range(1, 31 if seconds > 1 else 41):
                clock.now += seconds
                screen.step(i, 1.0)
        count = out.getvalue().count("step ")
        assert at_least <= count <= at_most, (seconds, count)


def test_long_evaluation_is_not_silent() -> None:
    out, clock = io.StringIO(), Clock()
    with Screen(stream=out, clock=clock) as screen:
        screen.stage(1, 1, "a", 1)
        for i in range(1, 8):
            clock.now += 10
            screen.evaluating("MNLI", i * 100, 7600)
    assert "stage 1 of 1 a: evaluating MNLI, 300/7600 rows" in out.getvalue()


def test_log_named_late_has_the_lines_said_before(tmp_path: Path) -> None:
    out = io.StringIO()
    with Screen(stream=out) as screen:
        screen.line("first")
        screen.log_to(tmp_path / "run.log")
        screen.line("second")
    screen.line("after the end")
    with Screen(tmp_path / "run.log", stream=out) as screen:
        screen.line("resumed")
    lines = [line for line in (tmp_path / "run.log").read_text().splitlines() if not line.startswith("--- ")]
    assert lines == ["first", "second", "after the end", "resumed"]
    assert out.getvalue().splitlines() == lines


def test_log_is_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    with Screen(tmp_path / "run.log", stream=io.StringIO()) as screen:
        screen.line("now")
        assert "now\n" in (tmp_path / "run.log").read_text()


def test_terminal_gets_bars_and_the_log_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out, clock, log = io.StringIO(), Clock(), tmp_path / "run.log"
    threads = threading.active_count()
    stderr = sys.stderr
    with Screen(log, force_plain=False, stream=out, clock=clock) as screen:
        assert screen.bars
        two_stages(screen, clock)
        assert threading.active_count() == threads
    assert sys.stderr is stderr
    text = clean(out.getvalue())
    assert "stage 2 of 2 amazon" in text and "40/40" in text and "16.4 examples/s" in text
    assert re.search(r"run .*━.* left", text)
    assert "evaluating dbpedia" in text and "10/10" in text
    assert "scores (%, synthetic): dbpedia 90.00" in text
    assert "\x1b[" in out.getvalue()
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")  # the cursor is there
    logged = log.read_text()
    assert "\x1b" not in logged and "━" not in logged
    assert "stage 1 of 2 dbpedia: step 40/40 (100 %)" in logged
    assert "step 40/40 (100 %)" not in text  # on the screen that is the bar's job


def test_bars_are_decided_by_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    main, side = pty.openpty()
    try:
        with os.fdopen(side, "w") as terminal:
            monkeypatch.setenv("TERM", "xterm")
            assert Screen(stream=terminal).bars
            assert not Screen(stream=terminal, force_plain=True).bars
            assert not Screen(stream=terminal, enabled=False).bars
            monkeypatch.setenv("TERM", "dumb")
            assert not Screen(stream=terminal).bars
            monkeypatch.setenv("FORCE_COLOR", "1")
            assert not Screen(stream=io.StringIO()).bars
    finally:
        os.close(main)


def test_other_ranks_say_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, clock = io.StringIO(), Clock()
    with Screen(tmp_path / "run.log", enabled=False, stream=out, clock=clock) as screen:
        screen.line("x")
        two_stages(screen, clock)
    assert out.getvalue() == "" and capsys.readouterr() == ("", "")
    assert not (tmp_path / "run.log").exists()


def test_default_is_stderr_and_never_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    for plain in (True, False):
        with Screen(force_plain=plain) as screen:
            two_stages(screen, Clock())
        told = capsys.readouterr()
        assert told.out == "" and "stage 1 of 2" in told.err


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    "error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "I/O error"), ValueError("closed file")]
)
@pytest.mark.parametrize("after", [0, 3])
def test_a_lost_terminal_stops_nothing_and_is_said_in_the_log(
    tmp_path: Path, plain: bool, error: Exception, after: int
) -> None:
    out, clock, log = Broken(error, after), Clock(), tmp_path / "run.log"
    stderr = sys.stderr
    with Screen(log, force_plain=plain, stream=out, clock=clock) as screen:
        two_stages(screen, clock)
    assert sys.stderr is stderr
    logged = log.read_text()
    assert logged.count("the screen cannot be written any more") == 1
    assert "stage 2 of 2 amazon: done in 45 s" in logged
    assert out.calls == after + 1  # not tried again


def test_a_full_disk_behind_stderr_may_come_back(tmp_path: Path) -> None:
    out = Broken(OSError(errno.ENOSPC, "No space left on device"), 0, lasting=False)
    with Screen(tmp_path / "run.log", stream=out) as screen:
        screen.line("lost")
        screen.line("back")
    assert out.getvalue() == "back\n"


def test_unwritable_log_stops_nothing(tmp_path: Path) -> None:
    out = io.StringIO()
    with Screen(tmp_path / "missing" / "run.log", stream=out) as screen:
        screen.line("still here")
    assert out.getvalue() == "still here\n"


def test_names_of_strangers_cannot_steer_the_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    with Screen(tmp_path / "run.log", stream=out) as screen:
        screen.stage(1, 1, "\x1b]0;owned\x07a\x1b[2Jb\rc", 1)
    assert "stage 1 of 1 abc: 1 steps" in out.getvalue()
    assert "\x1b" not in out.getvalue() + (tmp_path / "run.log").read_text()


def test_real_pipe_closed_by_its_reader_leaves_exit_code_zero(tmp_path: Path) -> None:
    """As ``cl-runner train 2>&1 | head -1``: Python would end with 120 if stderr could not be flushed at exit."""
    code = textwrap.dedent(f"""
        import pathlib, sys
        from cl_runner.terminal.progress import Screen
        sys.stdin.read()
        with Screen(pathlib.Path({str(tmp_path / "run.log")!r})) as screen:
            screen.stage(1, 1, "a", 100)
            for i in range(100):
                screen.step(i + 1, 0.5)
            screen.stage_done()
    """)
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdin is not None and child.stderr is not None
    child.stderr.close()
    child.stdin.close()
    assert child.wait(timeout=60) == 0
    logged = (tmp_path / "run.log").read_text()
    assert "Broken pipe" in logged and "done in" in logged


def test_interrupt_leaves_the_cursor_and_stderr_as_they_were() -> None:
    out = io.StringIO()
    stderr = sys.stderr
    with pytest.raises(KeyboardInterrupt), Screen(force_plain=False, stream=out) as screen:
        screen.stage(1, 1, "a", 10)
        assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")  # even if killed here
        raise KeyboardInterrupt
    assert sys.stderr is stderr
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


def test_time_left_counts_steps_and_rows_apart() -> None:
    clock = Clock()
    left = TimeLeft([ShownStage("a", 10, 100), ShownStage("b", 10, 200)], 0, clock)
    left.start(0, 0)
    assert left.left() is None
    clock.now += 20
    left.note("step", 10)  # 2 s a step
    assert left.left() == pytest.approx(20.0)  # rows not known yet
    clock.now += 100
    left.note("row", 0)  # whatever came between is neither
    clock.now += 5
    left.note("row", 50)  # 0.1 s a row
    assert left.left() == pytest.approx(50 * 0.1 + 10 * 2 + 200 * 0.1)
    left.start(1, 4)  # the second stage, resumed after 4 steps
    assert left.left() == pytest.approx(6 * 2 + 200 * 0.1)


def test_probes_get_a_line_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    clock, stream = Clock(), io.StringIO()
    screen = Screen(stream=stream, clock=clock)
    screen.stage(2, 2, "b", 40)
    few, many = {"a": 50.0, "b": None}, {**dict.fromkeys("acde", 80.0), "f": 20.0, "b": 5.0}
    for step, scores in ((1, few), (2, few), (3, few), (4, many), (40, few)):
        clock.now += 1.5
        screen.probed(step, scores, [task for task in scores if task != "b"])
    screen.close()
    assert stream.getvalue().splitlines()[1:] == [
        "stage 2 of 2 b: probe at step 2/40 (%): a 50.00, b -",
        "stage 2 of 2 b: probe at step 4/40 (%): b 5.00, 5 old tasks 68.00 (lowest: f 20.00)",
        "stage 2 of 2 b: probe at step 40/40 (%): a 50.00, b -",
    ]


def test_time_of_probes_goes_into_the_steps_to_come() -> None:
    clock = Clock()
    screen = Screen(stream=io.StringIO(), clock=clock)
    screen.begin([ShownStage("a", 10, 0)])
    screen.stage(1, 1, "a", 10)
    for step in range(1, 6):
        clock.now += 1.0
        screen.step(step)
        screen.probing("a", 0, 4)
        clock.now += 2.0
        screen.probed(step, {"a": 50.0}, [])
    clock.now += 1.0
    screen.step(6)
    assert screen._left is not None
    assert screen._left.left() == pytest.approx(4 * 16 / 6)  # 4 steps of 6, which took 16 s with the looks between


def test_evaluation_alone_has_a_screen_too() -> None:
    out, clock = io.StringIO(), Clock()
    with Screen(force_plain=False, stream=out, clock=clock) as screen:
        screen.begin([ShownStage("", 0, 20)])
        for i in range(1, 11):
            clock.now += 1
            screen.evaluating("agnews", i, 10)
        screen.scores({"agnews": 40.0})
    text = clean(out.getvalue())
    assert "evaluating agnews" in text and "10 s left" in text
    assert "evaluation: scores (%): agnews 40.00" in text


def test_what_is_no_training_has_a_bar_or_lines() -> None:
    out, clock = io.StringIO(), Clock()
    with Screen(force_plain=False, stream=out, clock=clock) as screen:
        screen.parts("layers", 0, 10)
        for i in range(1, 7):
            clock.now += 2
            screen.parts("layers", i, 10)
    text = clean(out.getvalue())
    assert "layers" in text and "6/10" in text and "8.0 s left" in text
    out = io.StringIO()
    with Screen(stream=out, clock=clock) as screen:
        screen.parts("layers", 0, 10)
        for i in range(1, 9):
            clock.now += 6
            screen.parts("layers", i, 10)
    assert out.getvalue().splitlines() == ["layers: 5/10 done, 30 s left"]


def test_duration() -> None:
    assert [duration(s) for s in (0.44, 9.96, 42, 59.7, 185, 3599.7, 7620)] == [
        "0.4 s", "10 s", "42 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "2 h 07 min",
    ]  # fmt: skip


def test_a_method_may_add_rows_that_no_plan_knew_of() -> None:
    clock, stream = Clock(), io.StringIO()
    screen = Screen(force_plain=True, stream=stream, clock=clock)
    screen.begin([ShownStage("dbpedia", 10), ShownStage("amazon", 10)])
    for k, name, steps in ((1, "dbpedia", 10), (2, "amazon", 20)):
        screen.stage(k, 2, name, 10)
        for i in range(1, steps + 1):
            clock.now += 1.0
            screen.steps(steps)
            screen.step(i)
        screen.stage_done()
    said = stream.getvalue()
    assert said.count("with the rows that the method adds") == 1
    assert "stage 2 of 2 amazon: 20 steps, with the rows that the method adds" in said
    assert "amazon: step 17/20 (85 %), 3.0 s left" in said and "/10 (" not in said.split("amazon: 20 steps")[1]
