"""``python -m cl_runner.trackers``: the process of one tracker. What it has to say is a JSON object a line on stdout.

Its stdin is a pipe from the run, which ends when the run does, even by kill -9. What a library prints goes nowhere. It
leaves the process that started it at once: who ends a run's processes (DeepSpeed's launcher) ends all that stem from
them, the tracker's own helpers too, and what is still to be sent would be lost.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path

from cl_runner.errors import first_line
from cl_runner.registry import TRACKERS, load_plugin
from cl_runner.runs.folder import RunDir
from cl_runner.trackers.feeding import feed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # are the run's, which says how it ended
EVERY = 1.0  # seconds between two looks at the run's folder
AFTER = 120.0  # seconds that it may take, after the run has ended and did not wait any longer


def main() -> None:
    """Feed the tracker that the arguments name, until the run has ended."""
    given = json.loads(sys.argv[1])
    if os.fork():
        os._exit(0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    words = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    for stream in (1,) if given["debug"] else (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    ended = threading.Event()
    threading.Thread(target=_wait_for_the_end, args=(ended,), daemon=True).start()

    def tell(**word: str) -> None:
        with suppress(BrokenPipeError):  # the run was killed: nobody hears it, and the tracker is to have the rest
            words.write(json.dumps(word) + "\n")

    try:
        for file in given["plugins"]:
            load_plugin(file)
        tracker = TRACKERS.get(given["tracker"])()
        run, kept, step = RunDir(Path(given["run"])), given["kept"], given["step"]
        feed(run, tracker, kept, lambda: ended.wait(EVERY), lambda text: tell(says=text), step)
        tell(ended="")
    except BaseException as error:
        traceback.print_exc()
        tell(failed=f"{type(error).__name__}: {first_line(error)}")
        os._exit(1)


def _wait_for_the_end(ended: threading.Event) -> None:
    while sys.stdin.buffer.read(1):
        pass
    ended.set()
    threading.Event().wait(AFTER)
    os.killpg(0, signal.SIGKILL)  # its own group (``processes.py``): a call hangs, and nobody waits for it


if __name__ == "__main__":
    main()
