"""A while in which nothing is fetched: the local cache of the hub answers, or there is an error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MODULES = ("huggingface_hub.constants", "datasets.config")  # read the variable once, as they are imported
_VARIABLE = "HF_HUB_OFFLINE"
_depth = 0


@contextmanager
def cache_alone(on: bool = True) -> Iterator[None]:
    """Inside, no library asks the Hugging Face hub, whether it is imported by now or will be."""
    global _depth
    if not on:
        yield
        return
    before = os.environ.get(_VARIABLE)
    kept = {name: module.HF_HUB_OFFLINE for name in _MODULES if (module := sys.modules.get(name))}
    os.environ[_VARIABLE] = "1"
    _set(dict.fromkeys(kept, True))
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before
        wished = bool(before) and str(before).upper() in ("1", "ON", "YES", "TRUE")
        _set({name: kept.get(name, wished) for name in _MODULES if name in sys.modules})


def nothing_is_fetched() -> bool:
    """Whether we are inside, as against a user who has set the libraries' own variable."""
    return _depth > 0


def _set(offline: dict[str, bool]) -> None:
    for name, value in offline.items():
        sys.modules[name].HF_HUB_OFFLINE = value  # type: ignore[attr-defined]
