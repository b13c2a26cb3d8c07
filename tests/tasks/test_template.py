"""Texts of several fields: one pass, numbers as written, and what is missing."""

from __future__ import annotations

import datetime
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_runner.tasks.template import Templates, WrittenFloat


def test_values_are_put_in_as_they_are() -> None:
    filled = Templates(["{a}-{b}"]).fill({"a": "{b} {0} \\1 {{", "b": "%s"})
    assert filled == ("{b} {0} \\1 {{-%s", True)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{a}", "x"), ("{{a}}", "{a}"), ("{{{a}}}", "{x}"), ("{{}}", "{}"), ("no field", "no field"),
        ("{#1 String}|{a b}", "first|second"), ("{a}{a}", "xx"), ("{n} of {f}", "7 of 1.50"),
        ("{t} {d}", "True 2024-01-02"), ('{{"q": "{a}"}}', '{"q": "x"}'),
    ],
)  # fmt: skip
def test_templates(template: str, text: str) -> None:
    record = {
        "a": "x", "#1 String": "first", "a b": "second", "n": 7, "f": WrittenFloat("1.50"), "t": True,
        "d": datetime.date(2024, 1, 2),
    }  # fmt: skip
    assert Templates([template]).fill(record) == (text, True)


@pytest.mark.parametrize("template", ["{", "}", "{a", "a}", "{}", "{{a}", "{a{b}}"])
def test_braces_that_mean_nothing(template: str) -> None:
    with pytest.raises(ValueError, match="a lone"):
        Templates([template])


@pytest.mark.parametrize(
    ("value", "text", "whole"),
    [("", "-b", False), (" \n", " \n-b", False), (None, "-b", False), (math.nan, "-b", False), (0, "0-b", True)],
)
def test_a_missing_part_is_empty_and_told(value: Any, text: str, whole: bool) -> None:
    assert Templates(["{a}-{b}"]).fill({"a": value, "b": "b"}) == (text, whole)


def test_the_first_that_is_filled_is_taken_else_the_last() -> None:
    templates = Templates(["{title}: {body}", "{body}"])
    assert templates.names == ["title", "body"]
    assert templates.fill({"title": "T", "body": "B"}) == ("T: B", True)
    assert templates.fill({"title": None, "body": "B"}) == ("B", True)
    assert templates.fill({"title": "T", "body": ""}) == ("", False)


@pytest.mark.parametrize("value", [["a"], {"a": 1}, b"a"])
def test_what_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="'a' is"):
        Templates(["{a}"]).fill({"a": value})


@given(st.text(), st.text())
def test_any_text_goes_in_and_comes_out(first: str, second: str) -> None:
    def literal(text: str) -> str:
        return text.replace("{", "{{").replace("}", "}}")

    made, _ = Templates([literal(first) + "{a}" + literal(second)]).fill({"a": second})
    assert made == first + second + second
