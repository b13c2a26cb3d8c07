"""What is otherwise where a run goes on than where it was trained so far, key by key, and what that may change.

Settings, rows, the base model and plugins are compared by ``resume_guard``, which refuses what differs. Here is what no
run can hold still: versions, the machine, the code itself. It is said, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_DIGITS = "may differ in the last digits"
_CODE = "may be trained by other code"
# What may be otherwise (keys of environment.json, and its packages), and what comes of it. Not here: what changes no
# number (safetensors, accelerate), or nothing that is not compared by what it leads to (datasets: rows).
EFFECTS = {
    "cl_runner": f"{_CODE} (CHANGELOG.md says what changed)",
    "git_commit": _CODE,
    "git_dirty": f"{_CODE} than the commit's",
    "python": "may differ where Python's own random numbers are drawn",
    "device": f"{_DIGITS}, and between a CPU and a GPU in precision and in what is drawn at random",
    "cpu": _DIGITS,
    "cuda": _DIGITS,
    "processes": _DIGITS,
    "threads": _DIGITS,
    "torch": f"{_DIGITS}, and in what is drawn at random",
    "transformers": "may differ: the model's own code is another",
    "peft": "may differ: the adapters' own code is another",
    "deepspeed": f"{_DIGITS} of an optimizer step",
    "tokenizers": "may be of other tokens",
    "sentencepiece": "may be of other tokens",
    "bitsandbytes": "may differ: the base is rounded to 4 bits by other code",
    "gguf": "may differ: the base is read by other code",
    "numpy": "may be scored otherwise in the last digits",
    "scipy": "may be scored otherwise in the last digits",
    "scikit-learn": "may be scored otherwise",
    "rouge-score": "may be scored otherwise",
    "sacrebleu": "may be scored otherwise",
}
_PACKAGE = "may differ: its equations are those of another version"


def drift(before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> Iterator[str]:
    """A warning for each key that is otherwise now than at any process of the run so far.

    Args:
        before: ``environment.json``; empty of a run that was never begun. What it does not know does not count.
        now: what would stand in it of this process.
        what: what is about to be trained, in words.
    """
    former = [_flat({**before, **later}) for later in [{}, *before.get("later", [])]] if before else []
    for key, value in _flat(now).items():
        others = [one[key] for one in former if key in one and one[key] != value]
        if others:
            yield f"warning: {key} {_short(others[-1])} → {_short(value)}: {what} {EFFECTS.get(key, _PACKAGE)}"


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    """Of an environment what may change a number; of somebody's method or source the package's version."""
    every = {**about, **about.get("packages", {})}
    theirs = {name: whose for name, whose in about.get("from", {}).items() if str(whose).startswith("package ")}
    return {**{key: every[key] for key in EFFECTS if key in every}, **theirs}


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 40 else str(value)
