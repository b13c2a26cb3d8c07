"""Evaluation batches: every row once, no batch too large, little padding."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from cl_runner.models.batch import token_batches


@given(lengths=st.lists(st.integers(1, 40), max_size=30), most=st.integers(1, 100))
def test_batches_hold_every_row_once_and_no_more_than_so_many_tokens(lengths: list[int], most: int) -> None:
    batches = token_batches(lengths, most)
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= most
    flat = [lengths[row] for rows in batches for row in rows]
    assert flat == sorted(flat)
    for rows, later in itertools.pairwise(batches):  # none is cut off early
        assert (len(rows) + 1) * lengths[later[0]] > most
