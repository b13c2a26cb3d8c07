"""The table of methods says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cl_runner.methods import METHODS, method_class

PAGE = (Path(__file__).parents[1] / "docs/methods.md").read_text()
TABLE = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
ROWS = {name: row for row in TABLE for name in re.findall(r"`([\w-]+)`", row[0])}


def test_every_method_has_its_row_and_no_other() -> None:
    assert set(ROWS) == set(METHODS.ours)


@pytest.mark.parametrize("name", METHODS.ours)
def test_row_and_code_agree(name: str) -> None:
    method, row = method_class(name), ROWS[name]
    assert len(row) == 6, row  # method, equation, state, task id, source, verified
    known = set(re.findall(r"\b\d{4}\.\d{5}\b", method.paper))
    assert known == set(re.findall(r"\b\d{4}\.\d{5}\b", row[4])), (known, row[4])
    assert row[3] == method.task_id or (method.task_id == "optional" and row[3] == "under similarity")
    assert (method.task_id == "optional") == ("knows_task" in vars(method))
    for fact in ("title", "equation", "carried", "growth", "trains", "factors", "frozen"):
        assert getattr(method, fact), fact


@pytest.mark.parametrize("name", METHODS.ours)
def test_every_setting_says_what_it_is(name: str) -> None:
    for key, field in method_class(name).Config.model_fields.items():
        assert field.description, key
