"""YAML with positions."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_runner.config.yamlfile import as_yaml, load, parse, parse_value
from cl_runner.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1e5", 1e5),
        ("1.e-3", 1e-3),
        (".5", 0.5),
        ("-3", -3),
        ("+2.5E1", 25.0),
        ("0", 0),
        ("010", "010"),
        ("0x1f", "0x1f"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2020-01-01", "2020-01-01"),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("True", "True"),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'5'", "5"),
        ('"true"', "true"),
        ("!!str 5", "5"),
        (".inf", ".inf"),
        ("[q, 1, no]", ["q", 1, "no"]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_values(text: str, value: Any) -> None:
    got = parse(f"a: {text}", "f").data["a"]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a: 1\nb: 2\na: 3", ":3:1", "'a' is here twice (first in line 1)"),
        ("x:\n  a: 1\n  a: 1", ":3:3", "twice"),
        ("a: !!python/object/apply:os.system ['x']", ":1:4", "!!python/object/apply:os.system is refused"),
        ("a: &x !!python/none x", ":1:4", "!!python/none"),
        ("!!python/name:os.system : 1", ":1:1", "tag"),
        ("a: !own 1", ":1:4", "tag !own"),
        ("a: !!binary aGk=", ":1:4", "tag"),
        ("a: [1", ":1:6", "broken YAML"),
        ("a: b: c", ":1:5", "broken YAML"),
        ("a:\n\tb: 1", ":2:1", "tab"),
        ("- a\n- b", ":1:1", "top level must be a mapping"),
        ("word", ":1:1", "top level"),
        ("a: &a [*a]", ":1:4", "contains itself"),
        ("a: *b", ":1:4", "alias"),
        ("a: 1\n---\nb: 2", ":2:1", "second '---'"),
        ("? [a]\n: 1", ":1:3", "key"),
        ("<<: {a: 1}", ":1:1", "merge"),
        ("a: \x01", ":1:4", "U+0001"),
        ("a: \x00", ":1:4", "binary"),
        ("a: " + "9" * 5000, ":1:4", "too long"),
        ("[" * 5000, ":1:41", "deep"),
        ("a: " + "{a: " * 200, ":1:", "deep"),
        ('a: "\\UFFFFFFFF"', "", "broken YAML"),
    ],
)
def test_refused_in_one_line_with_its_place(tmp_path: Path, text: str, place: str, words: str) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load(file)
    message = str(caught.value)
    assert message.startswith(f"{file}{place}") and words in message and "\n" not in message


def test_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    file = tmp_path / "bomb.yaml"
    file.write_text("\n".join(lines))
    start = time.monotonic()
    with pytest.raises(UserError, match="too many values"):
        load(file)
    assert time.monotonic() - start < 10


def test_files_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_bytes(b"a: 1\nb: \xff\xfe")
    with pytest.raises(UserError, match=r"f\.yaml:2:4: not UTF-8"):
        load(file)
    file.write_bytes(b"\x7fELF\x02\x01\x01\0\0\0")
    with pytest.raises(UserError, match="binary"):
        load(file)
    file.write_bytes(b"a" * (4 * 2**20 + 1))
    with pytest.raises(UserError, match="larger than 4 MiB"):
        load(file)
    with pytest.raises(UserError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"a\\x00b: cannot be read"):
        load("a\0b")


def test_empty_file_and_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("# nothing\n")
    assert load(file).data == {}
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert load(file).data == {"a": 1}


def test_positions_of_keys_and_values() -> None:
    document = parse("training:\n  lr:   1e-3\nlist: [a, {b: c}]\nbase: &x {k: v}\nuse: *x\n", "f")
    assert document.position(("training", "lr"), key=True) == "f:2:3"
    assert document.position(("training", "lr")) == "f:2:9"
    assert document.position(("list", 1, "b")) == "f:3:15"
    assert document.position(("list", 7)) == "f:3:7"  # absent: the nearest above
    assert document.position(("training", "epoch"), key=True) == "f:2:3"
    assert document.position(("use", "k")) == "f:4:14"  # an alias: where it is written
    assert document.data["use"] == {"k": "v"}
    assert document.text(("training", "lr")) == "1e-3"


def test_values_of_the_command_line() -> None:
    assert parse_value("1e-3", "--set") == (1e-3, "1e-3")
    assert parse_value("[q, v]", "--set")[0] == ["q", "v"]
    assert parse_value("a: b", "--set")[0] == "a: b"
    assert parse_value("@home", "--set")[0] == "@home"
    assert parse_value("", "--set")[0] is None
    for bad in ("[a", "!!python/none x", "*x"):
        with pytest.raises(UserError, match=r"^--set x=: \S"):
            parse_value(bad, "--set x=")


scalars = st.none() | st.booleans() | st.integers(-(10**50), 10**50) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    scalars | texts, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner), max_leaves=10
)


@settings(max_examples=150, deadline=None)
@given(values)
def test_what_we_write_we_read(value: Any) -> None:
    assert parse(f"a: {as_yaml(value)}", "f").data["a"] == value


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_what_we_write_as_text_is_text_to_other_readers(text: str) -> None:
    assert yaml.safe_load(as_yaml(text)) == text


@settings(max_examples=100, deadline=None)
@given(values)
def test_json_is_read_too(value: Any) -> None:
    """JSON is YAML 1.2, but for `1E400` and the escapes that JSON writes as two halves."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isprintable():
        assert parse(f"a: {text}", "f").data["a"] == value


@settings(max_examples=300, deadline=None)
@given(st.text("ab:-[]{}#&*!|>'\"%@,? \n\t\\0.e1<\x85\ufeff", max_size=40) | st.text(max_size=40))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        parse(text, "f")
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith("f")
