"""The tables of methods and adapters say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cl_runner.methods import METHODS, method_class
from cl_runner.registry import KINDS
from cl_runner.training.compatibility import compatibility

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "methods.md").read_text()
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


KINDS_PAGE = (DOCS / "adapters.md").read_text()
KIND_ROWS = {
    row.split(" | ")[0].strip("| `"): row.split(" | ") for row in KINDS_PAGE.splitlines() if row.startswith("| `")
}


@pytest.mark.parametrize("name", KINDS.ours)
def test_every_adapter_kind_has_its_row(name: str) -> None:
    kind, row = KINDS.get(name), KIND_ROWS[name]
    assert len(row) == 6, row  # kind, update, settings, factors, folds, paper
    assert row[1] == kind.equation
    assert row[5].strip(" |") == kind.paper
    if "update" in kind.offers:
        assert row[4] == ("as factors" if "factors" in kind.folds else "densely")
    unused = getattr(kind.Config, "unused", frozenset())
    for setting in re.findall(r"\w+", row[2].replace("(below)", "")) if row[2] != "–" else ():
        assert setting in kind.Config.model_fields and setting not in unused, setting


def test_the_table_of_methods_on_kinds_is_what_the_code_computes() -> None:
    """As ``scripts/compatibility.py --table`` prints it, of pairs that were tried."""
    lines = KINDS_PAGE[KINDS_PAGE.index("## Which method on which kind") :].splitlines()
    head, rows = (
        [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| m")],
        [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")],
    )
    kinds = head[0][1:]
    assert kinds == list(KINDS.ours)
    wanted = {
        row["method"]: [row[kind] == "yes" for kind in kinds]
        for row in compatibility()
        if row["method"] in METHODS.ours
    }
    assert {row[0]: [cell == "✓" for cell in row[1:]] for row in rows} == wanted
