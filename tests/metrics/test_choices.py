"""Which choice is answered, and a set's scores."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cl_runner.metrics.choices import answered, section


@given(st.lists(st.tuples(st.floats(-1e3, -1e-3), st.integers(1, 40)), min_size=2, max_size=26))
def test_the_likeliest_is_answered_and_of_equals_the_first(pairs: list[tuple[float, int]]) -> None:
    logs, lengths = [log for log, _ in pairs], [length for _, length in pairs]
    assert answered(logs) == logs.index(max(logs))
    by_length = [log / length for log, length in pairs]
    assert answered(logs, lengths) == by_length.index(max(by_length))


def test_by_character() -> None:
    """A long choice is less likely as a whole, and likelier by character."""
    assert answered([-6.0, -9.0], [2, 9]) == 1
    assert answered([-6.0, -9.0]) == 0


def test_scores() -> None:
    rows = [{"subject": s, "correct": c} for s, c in (("b", True), ("a", False), ("b", False), ("a", False))]
    found = section("letter", 5, [*rows, {"correct": True}])
    assert found == {"score": 40.0, "rows": 5, "by": "letter", "shots": 5, "subjects": {"a": 0.0, "b": 50.0}}
    assert "subjects" not in section("text", 0, [{"correct": True}])
