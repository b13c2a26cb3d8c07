"""Where what can be made anew is kept between commands: token ids, dequantised models."""

from __future__ import annotations

import os
from pathlib import Path


def folder(what: str) -> Path | None:
    """``$CL_RUNNER_CACHE/WHAT``, else in ``$XDG_CACHE_HOME/cl-runner`` or ``~/.cache/cl-runner``; None: no home."""
    own, cache = os.environ.get("CL_RUNNER_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(own).expanduser() if own else (Path(cache) if cache else Path.home() / ".cache") / "cl-runner"
    except RuntimeError:
        return None
    return root / what
