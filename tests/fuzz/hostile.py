"""Values that have broken programs, and what is done to a valid input to make it one that nobody thought of."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = [
    "", " ", "\n", "\0", "a" * 300, "x" * 5000, "../../outside/written", "../outside", "/etc/passwd", "/dev/zero",
    "~root",
    "~nobody-there/x", "..", ".", "-", "--", "-h", "\x1b[2J\x1b]0;owned\x07", "\x9b31m", "\u202eevil", "\ud800",
    "\ufeff",
    "<script>alert(1)</script>", "$(touch ../outside/run)", "`id`", "${HOME}", "{{ 7 * 7 }}", "%s%n", "\\input{x}",
    "$\\frac{",
    "NaN", "nan", "inf", "-inf", "1e999", "9" * 5000, "-1", "0", "1e-400", "0x10", "1_000", "٣", "true", "null", "yes",
    "[", "{",
    "]", "}", "[[[[", "&a [*a]", "*a", "!!python/object/apply:os.system [id]", "<<: *a", "? x", "- - -", "|", ">", "'",
    '"', "#",
    "a: b: c", "key: value", "%YAML 9", "---", "...", "(a+)+$", "(", "[a-", "(?P<x>", "\\", "https://127.0.0.1:1/x",
    "hf://x/y",
    "file:///etc/passwd", "tiny-t5", "olora", "lora", "synthetic", "hub", "folder", "dbpedia", "order1", "🙂", "ﬀ",
    "é" * 90,
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, 1e-320, [], {}, [[]],
    [None], {"": ""},
    ["a", 1, None], {"a": {"b": {"c": []}}}, [0] * 200,
]  # fmt: skip


def word(rng: random.Random) -> str:
    """A hostile word, or letters by chance."""
    if rng.random() < 0.8:
        return rng.choice(WORDS)
    return "".join(
        chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x110000)])) for _ in range(rng.randrange(1, 12))
    )


def value(rng: random.Random) -> Any:
    """A hostile value of JSON."""
    found = rng.random()
    if found < 0.45:
        return rng.choice(VALUES)
    if found < 0.95:
        return word(rng)
    return nested(rng.choice([30, 300, 900]), rng)


def nested(depth: int, rng: random.Random) -> Any:
    made: Any = 0
    for _ in range(depth):
        made = [made] if rng.random() < 0.5 else {"a": made}
    return made


def mutated(data: Any, rng: random.Random) -> Any:
    """A JSON value with something in it replaced, removed or added."""
    if isinstance(data, dict) and data and rng.random() < 0.85:
        key = rng.choice(sorted(data, key=str))
        way = rng.random()
        if way < 0.75:
            return {**data, key: mutated(data[key], rng)}
        if way < 0.87:
            return {other: each for other, each in data.items() if other != key}
        return {**data, word(rng): value(rng)}
    if isinstance(data, list) and data and rng.random() < 0.85:
        at = rng.randrange(len(data))
        way = rng.random()
        if way < 0.75:
            return [*data[:at], mutated(data[at], rng), *data[at + 1 :]]
        return [*data[:at], *data[at + 1 :]] if way < 0.87 else [*data, rng.choice([*data, value(rng)])]
    return value(rng)


def as_json(data: Any, rng: random.Random) -> bytes:
    """Its text, surrogates and all; now and then with what is no JSON, or longer than anybody writes."""
    try:
        text = json.dumps(data, ensure_ascii=rng.random() < 0.5)
    except (ValueError, RecursionError):
        text = "[" * 100_000
    if rng.random() < 0.05:
        text = text.replace("0", rng.choice(["NaN", "Infinity", "1e999", "9" * 5000, "-"]), 1)
    return text.encode("utf-8", "surrogatepass")


def garbled(raw: bytes, rng: random.Random) -> bytes:
    """Bytes with some of them other, gone, doubled, or hostile words between them."""
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        at, way = rng.randrange(len(raw) + 1), rng.randrange(7)
        if way == 0:
            raw = raw[:at]
        elif way == 1 and raw:
            at = min(at, len(raw) - 1)
            raw = raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :]
        elif way == 2:
            raw = raw[:at] + word(rng).encode("utf-8", "surrogatepass") + raw[at:]
        elif way == 3:
            end = min(len(raw), at + rng.randrange(1, 40))
            raw = raw[:at] + raw[end:]
        elif way == 4:
            raw = raw[:at] + raw[at : at + rng.randrange(1, 40)] * rng.choice([2, 3, 50]) + raw[at:]
        elif way == 5:
            raw = raw[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9))) + raw[at:]
        else:
            raw = (
                raw[:at]
                + rng.choice([b"\xff" * 8, b"\0" * 8, b"[" * 3000, b"{" * 3000, b"\r\n", b"\xe2\x80\xa8"])
                + raw[at:]
            )
    return raw


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 * 2**30)


def _link(to: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(to)


THINGS: list[Callable[[Path], None]] = [
    _pipe, _sparse, _link("/etc/passwd"), _link("/dev/zero"), _link("../../outside/secret.json"), _link("no/where"),
    _link("."),
    lambda path: path.symlink_to(path.name), Path.mkdir, Path.touch, lambda path: None,
]  # fmt: skip


def replaced(path: Path, rng: random.Random) -> None:
    """Another thing in the place of a file: a pipe, a link, a folder, ten gigabytes of nothing, nothing."""
    path.unlink()
    rng.choice(THINGS)(path)
