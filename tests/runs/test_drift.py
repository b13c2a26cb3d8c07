"""What is otherwise where a run goes on: each key once, in a line that says what it may change."""

from __future__ import annotations

from typing import Any

import pytest

from cl_runner.metrics.scores import METRICS, package_of
from cl_runner.runs.drift import EFFECTS, drift
from cl_runner.versions import PACKAGES

FIRST: dict[str, Any] = {
    "cl_runner": "0.1.0", "git_commit": "a" * 40, "git_dirty": False, "python": "3.11.1", "device": "x86_64",
    "cpu": "AVX2", "processes": 1, "threads": 2, "platform": "Linux", "command": "cl-runner train", "started": "then",
    "packages": {"torch": "2.13.0", "tokenizers": "0.23.3", "datasets": "5.2.0"},
    "from": {"mas": "package mine 1.0", "backwards": "plugin /there/mine.py"}, "later": [],
}  # fmt: skip
NOW = {key: value for key, value in FIRST.items() if key != "later"}


def said(before: dict[str, Any], **now: Any) -> list[str]:
    packages = {**NOW["packages"], **now.pop("packages", {})}
    return list(drift(before, {**NOW, **now, "packages": packages}, "stage 3 (amazon)"))


def test_nothing_is_said_where_all_is_the_same() -> None:
    assert said(FIRST) == said({}) == []
    assert said(FIRST, started="now", command="cl-runner train --again", platform="Linux 7") == []


@pytest.mark.parametrize(
    ("now", "line"),
    [
        (
            {"packages": {"torch": "2.14.0"}},
            "torch 2.13.0 → 2.14.0: stage 3 (amazon) may differ in the last digits, and",
        ),
        ({"packages": {"tokenizers": "0.24"}}, "tokenizers 0.23.3 → 0.24: stage 3 (amazon) may be of other tokens"),
        (
            {"git_commit": "b" * 40},
            f"git_commit {'a' * 12} → {'b' * 12}: stage 3 (amazon) may be trained by other code",
        ),
        (
            {"git_dirty": True},
            "git_dirty False → True: stage 3 (amazon) may be trained by other code than the commit's",
        ),
        ({"threads": 8}, "threads 2 → 8: stage 3 (amazon) may differ in the last digits"),
        ({"cpu": "AVX512"}, "cpu AVX2 → AVX512: stage 3 (amazon) may differ in the last digits"),
        (
            {"from": {"mas": "package mine 1.1"}},
            "mas package mine 1.0 → package mine 1.1: stage 3 (amazon) may differ: its",
        ),
    ],
)
def test_each_key_says_what_it_may_change(now: dict[str, Any], line: str) -> None:
    [found] = said(FIRST, **now)
    assert found.startswith(f"warning: {line}")


def test_what_changes_no_number_is_not_said() -> None:
    """Rows are compared by fingerprint, and a plugin by its text, wherever it lies."""
    assert said(FIRST, packages={"datasets": "6.0"}) == []
    assert said(FIRST, **{"from": {"mas": "package mine 1.0", "backwards": "plugin /here/mine.py"}}) == []
    assert set(PACKAGES) - set(EFFECTS) == {"datasets", "accelerate", "safetensors"}
    scored_by = {package_of(metric, ["a"]) for metric in METRICS} - {""}
    assert scored_by == {"scipy", "scikit-learn", "rouge-score", "sacrebleu"} and scored_by <= set(EFFECTS)


def test_every_process_of_the_run_counts() -> None:
    """A stage may be of the first, or of one that came between: of several values the last other one is named."""
    later = {"packages": {"torch": "2.12.0", "tokenizers": "0.23.3"}}
    before = {**FIRST, "later": [later, {"started": "again"}]}
    assert [line.partition(":")[2].partition(":")[0] for line in said(before)] == [" torch 2.12.0 → 2.13.0"]
    [line] = said({**before, "later": [later, {"packages": {"torch": "2.11.0"}}]}, packages={"torch": "2.14.0"})
    assert "torch 2.11.0 → 2.14.0" in line


def test_what_an_earlier_version_did_not_write_is_not_said() -> None:
    assert said({"packages": {"torch": "2.13.0"}, "cl_runner": "0.1.0", "later": []}) == []
