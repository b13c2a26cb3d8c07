"""What the user sees while a run goes on: bars on a terminal, plain lines elsewhere, the same lines in ``run.log``.

Everything goes to stderr; stdout belongs to the result. Nothing here may stop a training: a terminal or pipe that
goes away is noted in ``run.log`` and the run goes on. No threads: the bars are redrawn from the calls themselves.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, TextIO, cast

from cl_runner.terminal.escapes import STEERING
from cl_runner.terminal.masking import masked

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

REDRAW = 0.1  # seconds between two drawings of the bars
QUIET = 2.0  # seconds: plain lines come no closer than this, so that a tiny run is not all lines
PATIENCE = 30.0  # seconds: without a line for so long, one is due
SHARE = 0.1  # of a stage: another reason for a line
FEW = 3  # old tasks whose probes stand in a line one by one

_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b.")


def clean(text: str) -> str:
    """``text`` without terminal escapes and control characters (a task's name is the user's, or a stranger's)."""
    return STEERING.sub("", _ESCAPES.sub("", text))


def duration(seconds: float) -> str:
    """``"42 s"``, ``"3 min 05 s"``, ``"2 h 07 min"``."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass(frozen=True)
class ShownStage:
    """What a stage will do: optimizer steps, and test rows evaluated after them."""

    name: str
    steps: int
    rows: int = 0


class TimeLeft:
    """Seconds left of a run, from the seconds a step and a test row have taken so far.

    Both are counted apart, since evaluation grows from stage to stage and training need not.
    """

    def __init__(self, plans: Sequence[ShownStage], done: int, clock: Callable[[], float]) -> None:
        self.plans = list(plans)
        self.clock = clock
        self.stage = done  # stages finished
        self.steps = self.rows = 0  # done in the current stage
        self._spent = {"step": 0.0, "row": 0.0}
        self._count = {"step": 0, "row": 0}
        self._since = clock()

    def start(self, stage: int, steps: int) -> None:
        """Stage number ``stage`` (0-based) begins, ``steps`` of it already done (a resumed stage)."""
        self.stage, self.steps, self.rows, self._since = stage, steps, 0, self.clock()

    def note(self, kind: str, count: int) -> None:
        """``count`` more steps or rows are done; the time since the last note went into them.

        A count of 0 starts the clock anew: what came before (a Fisher, a commit) was neither step nor row.
        """
        now = self.clock()
        if count > 0:
            self._spent[kind] += now - self._since
            self._count[kind] += count
        self._since = now
        if kind == "step":
            self.steps += count
        else:
            self.rows += count

    def cost(self, kind: str) -> float | None:
        """Seconds a step or a row takes, ``None`` before the first."""
        return self._spent[kind] / self._count[kind] if self._count[kind] else None

    def left(self) -> float | None:
        """Seconds left, ``None`` while there is nothing to tell it from. Leaves out evaluation before the first one."""
        step, row = self.cost("step"), self.cost("row")
        rest = self.plans[self.stage :]
        steps = max(sum(plan.steps for plan in rest) - self.steps, 0)
        rows = max(sum(plan.rows for plan in rest) - self.rows, 0)
        if step is None and (steps or row is None):
            return None
        return steps * (step or 0.0) + rows * (row or 0.0)


class _Stream:
    """A text stream that never raises: what cannot be written is dropped, and ``lost`` is told once.

    Rich turns a broken pipe into an exit of the process; behind this it never meets one.
    """

    def __init__(self, stream: TextIO | None, lost: Callable[[str], None]) -> None:
        self._stream = cast("TextIO", stream)
        self._lost = lost
        self._told = False
        self.gone = stream is None  # a process may be started without stderr

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError, AttributeError):
            return False

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        if not self.gone:
            encoding = self.encoding
            try:
                self._stream.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError) as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        if not self.gone:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """A full disk may have room again later; a pipe or terminal that is gone stays gone."""
        temporary = isinstance(error, OSError) and error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)
        if not temporary:
            self.gone = True
            self._to_devnull()
        if not self._told:
            self._told = True
            self._lost(f"the screen cannot be written any more ({error}); the run goes on, see this file")

    def _to_devnull(self) -> None:
        """What is left in the buffer would fail again at exit and turn exit code 0 into 120."""
        if self._stream not in (sys.stderr, sys.__stderr__):
            return
        with contextlib.suppress(OSError, ValueError, AttributeError):
            devnull = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(devnull, self._stream.fileno())
            finally:
                os.close(devnull)


class _Log:
    """``run.log``: plain lines, appended; lines said before its place is known are kept until then."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: TextIO | None = None
        self._waiting: list[str] = []

    def open(self, path: Path) -> None:
        self.close()
        self._path = path
        with contextlib.suppress(OSError):
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        waiting, self._waiting = self._waiting, []
        self.write(f"--- {datetime.now().astimezone().isoformat(timespec='seconds')}")
        for text in waiting:
            self.write(text)

    def write(self, text: str) -> None:
        """Append a line. A full disk stops the commit of a stage, with a clear message; it need not stop this."""
        if self._path is None:
            self._waiting.append(text)
            return
        with contextlib.suppress(OSError, ValueError):
            if self._file is not None:
                self._file.write(text + "\n")
            else:  # closed already: a last word after the run
                with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(text + "\n")

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError, ValueError):
                self._file.close()
            self._file = None


class Screen:
    """A run's progress, told to a terminal, a pipe and ``run.log``.

    run_log: the file to append to, ``None`` if not known yet (``log_to`` says later) or not wanted. enabled: false on
    every rank but 0: then nothing is printed or written at all. force_plain: true for lines even on a terminal, false
    for bars even into a pipe, ``None`` to look. stream: where to print, default stderr. clock: seconds, for tests.

    The bars leave the cursor visible all the time, so that even a killed process leaves a usable terminal.
    """

    def __init__(
        self,
        run_log: Path | None = None,
        enabled: bool = True,
        force_plain: bool | None = None,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.enabled = enabled
        self._clock = clock
        self._log = _Log()
        self._stream = _Stream(stream if stream is not None else sys.stderr, self._log.write)
        terminal = self._stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
        self._plain = not terminal if force_plain is None else force_plain
        self._console: Console | None = None
        self._bars: Progress | None = None
        self._stage_bar: TaskID | None = None
        self._run_bar: TaskID | None = None
        self._left: TimeLeft | None = None
        self._k, self._total, self._name, self._steps, self._done = 0, 0, "", 0, 0
        self._stage_start = self._drawn = self._said_at = clock()
        self._said = 0.0  # share of the stage at the last plain line
        self._eval: tuple[str, int] = ("", 0)
        self._probe, self._probe_said = "", self._stage_start  # what the bar says of the last one, when a line did
        self._closed = False
        if run_log is not None:
            self.log_to(run_log)

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def bars(self) -> bool:
        """Whether bars are drawn (else plain lines)."""
        return self.enabled and not self._plain and not self._closed and not self._stream.gone

    def log_to(self, path: Path) -> None:
        """From now on every line also goes to ``path``; those said so far are written first."""
        if self.enabled:
            self._log.open(path)

    # --- what is told -------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        """One line (or several), on the screen and in ``run.log``."""
        self._say(text, screen=True)

    def begin(self, plans: Sequence[ShownStage], done: int = 0) -> None:
        """The whole run: its stages, the first ``done`` of them committed already. Makes the time left honest."""
        self._left = TimeLeft(plans, done, self._clock)

    def stage(self, k: int, total: int, name: str, steps: int, done: int = 0) -> None:
        """Stage ``k`` of ``total`` (1-based) starts: ``steps`` optimizer steps, ``done`` of them before a resume."""
        if not self.enabled:
            return
        self._k, self._total, self._name, self._steps, self._done = k, total, clean(name), steps, done
        if self._left is None or len(self._left.plans) != total:
            # Without a plan: as if the stages to come were like this one.
            self.begin([ShownStage(name, steps)] * total, k - 1)
        assert self._left is not None
        self._left.start(k - 1, done)
        self._stage_start = self._said_at = self._clock()
        self._said = done / steps if steps else 0.0
        self._eval = ("", 0)
        self._probe, self._probe_said = "", self._stage_start
        self._start_bars()
        resumed = f", {done} of them done before" if done else ""
        self._say(f"{self._where()}: {steps} steps{resumed}", screen=not self.bars)
        self._draw(force=True, what=self._name, completed=done, total=steps)

    def steps(self, steps: int) -> None:
        """The stage is one of ``steps`` optimizer steps: a method may mix rows into it that no plan knew of."""
        if not self.enabled or steps == self._steps:
            return
        assert self._left is not None, "stage() comes before steps()"
        self._steps = steps
        self._left.plans[self._k - 1] = replace(self._left.plans[self._k - 1], steps=steps)
        self._say(f"{self._where()}: {steps} steps, with the rows that the method adds", screen=not self.bars)

    def step(self, done: int, loss: float | None = None, examples_per_second: float | None = None) -> None:
        """``done`` steps of this stage are done; the last one's loss, and training examples a second."""
        if not self.enabled:
            return
        assert self._left is not None, "stage() comes before step()"
        self._left.note("step", done - self._done)
        self._done = done
        facts = [] if loss is None else [f"loss {loss:.4f}"]
        if examples_per_second is not None:
            facts.append(f"{examples_per_second:.1f} examples/s")
        if self._due(done / self._steps if self._steps else 1.0):
            percent = f" ({100 * done / self._steps:.0f} %)" if self._steps else ""
            left = self._left.left()
            parts = [f"{self._where()}: step {done}/{self._steps}{percent}", *facts]
            if left:
                parts.append(f"{duration(left)} left")
            self._say(", ".join(parts), screen=not self.bars)
        facts += [self._probe] if self._probe else []
        self._draw(what=self._name, completed=done, total=self._steps, facts="  ".join(facts))

    def probing(self, task: str, done: int, total: int) -> None:
        """``done`` of the ``total`` rows of ``task`` are answered that are asked between two steps.

        The time goes into the steps: there will be more probes among those to come.
        """
        if self.enabled:
            self._draw(what=f"probing {clean(task)}", completed=done, total=total)

    def probed(self, step: int, scores: Mapping[str, float | None], old: Sequence[str]) -> None:
        """The probe after so many steps: percent by task; ``old`` are those that this stage does not train."""
        if not self.enabled:
            return
        known = {task: score for task in old if (score := scores.get(task)) is not None}
        mean = sum(known.values()) / len(known) if known else None
        self._probe = f"old {mean:.1f} %" if mean is not None else ""
        if step < self._steps and self._clock() - self._probe_said < QUIET:
            return
        self._probe_said = self._clock()
        told = {task: score for task, score in scores.items() if task not in old or len(old) <= FEW}
        parts = [f"{task} {'-' if score is None else format(score, '.2f')}" for task, score in told.items()]
        if len(old) > FEW and mean is not None:
            lowest = min(known, key=lambda task: known[task])
            parts.append(f"{len(known)} old tasks {mean:.2f} (lowest: {lowest} {known[lowest]:.2f})")
        self._say(f"{self._where()}: probe at step {step}/{self._steps} (%): {', '.join(parts)}", screen=not self.bars)

    def evaluating(self, task: str, done: int, total: int) -> None:
        """``done`` of the ``total`` test rows of ``task`` are answered."""
        if not self.enabled:
            return
        if self._left is None:  # `eval` of a committed stage: no training before it
            self.begin([ShownStage("", 0, total)])
        assert self._left is not None
        task = clean(task)
        before = self._eval[1] if self._eval[0] == task else 0
        self._eval = (task, done)
        self._left.note("row", max(done - before, 0))
        if self._clock() - self._said_at >= PATIENCE:
            self._say(f"{self._where()}: evaluating {task}, {done}/{total} rows", screen=not self.bars)
        self._start_bars()
        self._draw(what=f"evaluating {task}", completed=done, total=total)

    def parts(self, what: str, done: int, total: int) -> None:
        """``done`` of the ``total`` parts (layers, …) of something that is no training are there, from 0 on."""
        if not self.enabled:
            return
        if self._left is None:
            self.begin([ShownStage("", 0, total)])
        assert self._left is not None
        self._left.note("row", done - self._left.rows)
        if self._clock() - self._said_at >= PATIENCE:
            left = self._left.left()
            more = f", {duration(left)} left" if left else ""
            self._say(f"{clean(what)}: {done}/{total} done{more}", screen=not self.bars)
        self._start_bars()
        self._draw(what=clean(what), completed=done, total=total)

    def scores(self, scores: Mapping[str, float | None], mark: str = "", average: float | None = None) -> None:
        """The evaluation's results, percent by task; ``mark`` (``"synthetic"``) is said beside them.

        average: AA so far, percent (the caller's: tasks still to come may stand among the scores).
        """
        told = [f"{task} {'-' if score is None else format(score, '.2f')}" for task, score in scores.items()]
        mean = f"; average {average:.2f}" if average is not None else ""
        unit = f"%, {mark}" if mark else "%"
        self._say(f"{self._where()}: scores ({unit}): {', '.join(told)}{mean}", screen=True)

    def stage_done(self, note: str = "") -> None:
        """The stage is committed. ``note``: anything to add."""
        if not self.enabled:
            return
        spent = duration(self._clock() - self._stage_start)
        self._say(f"{self._where()}: done in {spent}{', ' + note if note else ''}", screen=True)
        if self._left is not None:
            self._left.start(min(self._k, len(self._left.plans)), 0)
        self._draw(force=True, what=self._name, completed=self._steps, total=self._steps)

    def close(self) -> None:
        """Take the bars away, close ``run.log``. A ``line`` after it is still printed and logged. Safe to repeat."""
        if self._bars is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bars.stop()
            self._bars = None
        self._closed = True
        self._log.close()

    # --- how ----------------------------------------------------------------------------------------------------

    def _where(self) -> str:
        return f"stage {self._k} of {self._total} {self._name}" if self._total else "evaluation"

    def _due(self, share: float) -> bool:
        """Whether a plain line on the steps is due: another tenth of the stage, or half a minute of silence."""
        silent = self._clock() - self._said_at
        if silent >= PATIENCE or (share - self._said >= SHARE - 1e-9 and silent >= QUIET):
            self._said = share
            return True
        return False

    def _say(self, text: str, *, screen: bool) -> None:
        if not self.enabled:
            return
        self._said_at = self._clock()
        for part in clean(masked(text)).split("\n"):
            self._log.write(part)
            if not screen:
                continue
            if self._bars is not None and self._console is not None:
                self._console.print(part, markup=False, highlight=False, emoji=False, soft_wrap=True)
            else:
                self._stream.write(part + "\n")
                self._stream.flush()

    def _start_bars(self) -> None:
        if self._bars is not None or not self.bars:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        # stderr=True is for whoever asks the console; what it writes goes through the stream that never raises.
        self._console = Console(file=cast("IO[str]", self._stream), stderr=True, force_terminal=True)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=34)),
            BarColumn(bar_width=None, table_column=Column(min_width=8, ratio=1)),
            TextColumn("{task.fields[count]}", markup=False, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[facts]}", markup=False, table_column=Column(no_wrap=True)),
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            expand=True,
            transient=True,  # at the end the lines above the bars have said it all
        )
        self._stage_bar = self._bars.add_task(self._where(), total=1, count="", facts="")
        self._run_bar = self._bars.add_task("run", total=1.0, count="", facts="")
        self._bars.start()
        self._console.show_cursor(True)

    def _draw(self, *, what: str, completed: int, total: int, facts: str | None = None, force: bool = False) -> None:
        now = self._clock()
        if self._bars is None or self._stream.gone or not (force or completed >= total or now - self._drawn >= REDRAW):
            return
        self._drawn = now
        assert self._stage_bar is not None and self._run_bar is not None and self._left is not None
        head = f"stage {self._k} of {self._total} " if self._total else ""
        self._bars.update(
            self._stage_bar,
            description=head + what,
            completed=completed,
            total=max(total, 1),
            count=f"{completed}/{total}",
            facts=facts or "",
        )
        left = self._left.left()
        self._bars.update(
            self._run_bar,
            completed=self._progress(),
            count=f"{duration(left)} left" if left else "",
        )
        self._bars.refresh()

    def _progress(self) -> float:
        """The share of the run's work that is done, 0 to 1, steps and test rows weighed by the time they take."""
        left = self._left
        assert left is not None
        step, row = left.cost("step") or 1.0, left.cost("row") or 0.0
        work = [plan.steps * step + plan.rows * row for plan in left.plans]
        if not sum(work):
            return 0.0
        return min(1.0, (sum(work[: left.stage]) + left.steps * step + left.rows * row) / sum(work))
