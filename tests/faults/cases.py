"""What is killed: every method on the kind that it trains by default, every kind and option under one method."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cl_runner.registry import KINDS, METHODS, OPTIONS
from tests.command_line import NANO
from tests.methods.small import OWN

# Rows of our own, short and few: a step is a few milliseconds, and no grammar has to be expanded at each start.
TASKS = {
    "colours": [("the sky", "blue"), ("a leaf", "green"), ("deep water", "blue"), ("new grass", "green")],
    "sounds": [("a dog", "bark"), ("a cat", "meow"), ("an old hound", "bark"), ("her kitten", "meow")],
}
STEPS = 4  # of each stage: two epochs of two
SMALL = tuple(
    f"--set={setting}"
    for setting in (
        "training.epochs=2", "data.max_test=2", "output.checkpoint.every_steps=1", "output.checkpoint.keep=2",
        "data.max_train=8",
    )
)  # fmt: skip

KIND: dict[str, dict[str, Any]] = {
    "vera": {"r": 16},
    "vblora": {"vector_length": 48, "vectors": 8},
    "oft": {"block_size": 4},
    "boft": {"block_size": 4},
    "hra": {"r": 4},
    "fourierft": {"frequencies": 30},
}
OPTION: dict[str, dict[str, Any]] = {
    "auto-rank": {"adapter.r": "auto", "adapter.max_r": 4},
    "initialise": {"adapter.init": "pissa"},
    "reorthogonalise": {"method.reorthogonalise": {"every": 1}},
    "slow-copy": {"options.slow_copy": {"beta": 0.7}},
}
OF_KINDS, OF_OPTIONS = "replay", "olora"  # the methods that kinds and options are tried under


def cases() -> dict[str, tuple[str, ...]]:
    """Case → settings on the command line."""
    found = {f"method {name}": (f"--method={name}", *_sets(_under("method", OWN.get(name, {})))) for name in METHODS}
    for name in KINDS:
        if name == "prompts":  # of progprompt, l2p and lfpt5 alone, which are cases of their own
            continue
        kind = {"adapter.kind": name, **_under("adapter", KIND.get(name, {}))}
        if name == "full":
            kind = {"method.train": "full", "training.lr": 1e-3}
        found[f"kind {name}"] = (f"--method={OF_KINDS}", *_sets({**_under("method", OWN[OF_KINDS]), **kind}))
    for name in OPTIONS:
        found[f"option {name}"] = (f"--method={OF_OPTIONS}", *_sets(OPTION[name]))
    return found


def room(cwd: Path) -> None:
    """Put the order and its rows into a folder."""
    tasks = []
    for name, rows in TASKS.items():
        labels = sorted({label for _, label in rows})
        for split, few in (("train", rows * 2), ("test", rows[:2])):
            text = [
                json.dumps({"text": f"{text} {number}", "label": label}) for number, (text, label) in enumerate(few)
            ]
            (cwd / f"{name}-{split}.jsonl").write_text("\n".join(text) + "\n")
        source = {split: f"{name}-{split}.jsonl" for split in ("train", "test")}
        tasks.append({"name": name, "kind": "TC", "labels": labels, "source": source})
    (cwd / "two.yaml").write_text(json.dumps({"name": "two", "tasks": tasks}))


def train(name: str, *more: str) -> tuple[str, ...]:
    """The command that trains a run of that name, or goes on with it."""
    nano = [word for word in NANO if word not in ("--data", "synthetic")]
    return ("train", "--order", "two.yaml", *nano, *SMALL, "--name", name, *more)


def _under(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for key, value in values.items()}


def _sets(values: Mapping[str, Any]) -> list[str]:
    return [f"--set={key}={json.dumps(value)}" for key, value in values.items()]
