"""Evaluation batches: every row once, no batch too large, little padding. Tokens end to end, put back into rows."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_runner.models.batch import Example, collate, token_batches
from tests.stages import LAYOUTS, Kind, some_rows


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


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_row_by_itself_is_the_batch_of_it_alone(kind: Kind) -> None:
    examples = [Example([5, 6, 7], [8, 9, 2]), Example([5], [2]), Example([5, 7, 9, 6], [8, 2]), Example([6, 5], [])]
    weights = [0.5, 2.0, 0.0, 1.0]
    batch = replace(
        collate(examples, LAYOUTS[kind], weights=weights),
        tasks=("a", "b", "c", "d"),
        heads=(1, 0, 2, 0),
    )
    for number, (example, weight) in enumerate(zip(examples, weights, strict=True)):
        alone, found = collate([example], LAYOUTS[kind], weights=[weight]), batch.row(number)
        for name in ("input_ids", "attention_mask", "labels", "token_weights", "position_ids", "decoder_input_ids"):
            ours, wanted = getattr(found, name), getattr(alone, name)
            assert (ours is None and wanted is None) or torch.equal(ours, wanted), name
        assert found.tasks == (batch.tasks[number],) and found.heads == (batch.heads[number],)
    conditioned = replace(batch, condition={"of each token": batch.input_ids.float()}).row(1)
    assert conditioned.input_ids.shape == conditioned.condition["of each token"].shape == (1, batch.input_ids.shape[1])
