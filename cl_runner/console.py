"""What goes where: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_results: TextIO | None = None


@contextmanager
def stdout_kept_for_results() -> Iterator[None]:
    """Inside, whatever libraries print (C code too) goes to stderr; ``result`` still reaches the real stdout."""
    global _results
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # started with stdout or stderr closed
        yield
        return
    _results = os.fdopen(kept, "w", encoding="utf-8")
    was = sys.stdout
    sys.stdout = _results  # ours: print() is a result
    try:
        yield
        _results.flush()
    except BrokenPipeError:
        # Who read us (head) has had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), kept)
    finally:
        sys.stdout = was
        _results = None


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def report_error(error: Exception, debug: bool) -> None:
    """One line on stderr, by one process of a run; with ``--debug`` the traceback before it."""
    if os.environ.get("RANK", "0") != "0":
        return
    if debug:
        traceback.print_exception(error)
    print(f"cl-runner: {error}", file=sys.stderr)
