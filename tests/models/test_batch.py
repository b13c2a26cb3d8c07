"""Evaluation batches: every row once, no batch too large, little padding. Tokens end to end, put back into rows."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_runner.models.batch import collate, token_batches
from tests.stages import LAYOUTS, some_rows


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


def test_tokens_end_to_end_become_rows_again_and_nothing_else_does() -> None:
    batch = collate(some_rows(4).examples, LAYOUTS["llama"])
    s, t = batch.attention_mask.shape[1], batch.labels.shape[1]
    assert s != t
    for width in (s, t):
        rows = torch.randn(4, width, 3)
        assert torch.equal(batch.by_row(rows.flatten(0, 1)), rows) and batch.by_row(rows) is rows
    for shape in ((4, 3), (4 * s + 1, 3), (4 * (s + 2), 3), (4, 2, s, s)):
        other = torch.randn(shape)
        assert batch.by_row(other) is other
    behind_a_prompt = replace(batch, condition={"prefix": torch.zeros(4, 2, 3)})
    assert behind_a_prompt.by_row(torch.randn(4 * (s + 2), 3)).shape == (4, s + 2, 3)
