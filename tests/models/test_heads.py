"""A head read once: logits, gradients and answers of the rows behind it are those of whole rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from cl_runner.models.base import Layout, neutral_generation
from cl_runner.models.batch import Batch, Example, collate, collate_prompts
from cl_runner.models.forward import accepted, logits, token_loss
from cl_runner.models.heads import (
    NEEDED,
    PACKED,
    Head,
    common_head,
    goes_on,
    head_of,
    logits_behind_head,
    logits_in_one_row,
    most_packed,
)
from cl_runner.models.verify import answers
from tests.families import FAMILIES

LAYOUT = Layout(False, 0, 1, (1,), None, 30)
END = LAYOUT.eos_id
HEAD = [5, 6, 7, 8, 9]
EXAMPLES = [
    Example([*HEAD, 20], [11, END]),
    Example([*HEAD, 21, 22, 23, 24], [12, 13, 14, END]),
    Example([*HEAD, 25, 26], [END]),
]
SHARING = [name for name, family in FAMILIES.items() if not family.encoder_decoder and not family.whole]
NO_WINDOW = ("Mistral", {"sliding_window": None})


def model_of(family: str, **more: Any) -> Any:
    """A random model of a family; everything trains, so that every gradient shows."""
    model = FAMILIES[family].model(**more).requires_grad_(True)
    model.generation_config = neutral_generation(LAYOUT)
    return model


def known(batch: Batch) -> Batch:
    """The batch with what is known of its rows."""
    lengths = tuple(len(e.source) + max(len(e.target) - 1, 0) for e in EXAMPLES)
    if not batch.labels.shape[1]:
        lengths = tuple(len(e.source) for e in EXAMPLES)
    return replace(batch, heads=(len(HEAD),) * 3, lengths=lengths)


def gradients(model: Any, scores: Tensor, batch: Batch) -> Tensor:
    model.zero_grad()
    (token_loss(scores, batch.labels) * batch.token_weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("extra", [0, 3], ids=["as-wide-as-its-rows", "wider"])
@pytest.mark.parametrize("way", [logits_behind_head, logits_in_one_row])
@pytest.mark.parametrize(
    ("family", "more"), [*((name, {}) for name in SHARING), NO_WINDOW, ("LLaMA 3", {"attn_implementation": "eager"})]
)
def test_logits_and_gradients(family: str, more: dict[str, Any], way: Any, extra: int) -> None:
    model = model_of(family, **more)
    assert most_packed(model) == int(PACKED * 32)
    batch = known(collate(EXAMPLES, LAYOUT))
    if extra:  # a part of a batch is padded as the whole was
        pad = torch.nn.functional.pad
        batch = replace(
            batch,
            input_ids=pad(batch.input_ids, (extra, 0)),
            attention_mask=pad(batch.attention_mask, (extra, 0)),
            position_ids=pad(batch.position_ids, (extra, 0)) if batch.position_ids is not None else None,
        )
    told: list[Batch] = []
    ours = way(model, batch, len(HEAD), told.append)
    plain = logits(model, batch)
    assert ours is not None and ours.shape == plain.shape
    real = batch.labels != -100
    torch.testing.assert_close(ours[real], plain[real], rtol=1e-4, atol=1e-5)
    found, wanted = gradients(model, ours, batch), gradients(model, plain, batch)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    if way is logits_behind_head:
        assert [(part.size, part.behind) for part in told] == [(1, 0), (3, len(HEAD))]
    else:
        [row] = told
        tokens = len(HEAD) + sum(length - len(HEAD) for length in batch.lengths)
        assert row.input_ids.shape == row.places.shape == (1, tokens)  # type: ignore[union-attr]


@pytest.mark.parametrize(("family", "more"), [*((name, {}) for name in SHARING), NO_WINDOW])
def test_answers(family: str, more: dict[str, Any]) -> None:
    model = model_of(family, **more)
    prompts = known(collate_prompts(EXAMPLES, LAYOUT))
    said = answers(model, prompts, [[END]] * 3, LAYOUT, 5)[0]
    for targets in ([[END]] * 3, [[*said[0], END], [3, END], [*said[2], END]], [[*ids, END] for ids in said]):
        with torch.no_grad():
            head = Head.read(model, head_of(torch.tensor([HEAD])))
        assert head is not None
        plain = answers(model, prompts, targets, LAYOUT, 5)
        for _ in range(2):  # a head is read once for many batches
            assert answers(model, prompts, targets, LAYOUT, 5, head=head) == plain


def test_a_window_that_slides_has_no_head() -> None:
    model = model_of("Mistral")
    assert Head.read(model, head_of(torch.tensor([HEAD]))) is None
    assert not goes_on(model) and goes_on(model_of("Mistral", sliding_window=None))


def test_models_that_mask_by_themselves_are_not_packed() -> None:
    sizes = {"vocab_size": 30, "hidden_size": 24, "bos_token_id": 2, "eos_token_id": END}
    neo = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(**sizes, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])
    )
    assert not most_packed(neo) and not goes_on(neo)
    falcon = transformers.FalconForCausalLM(
        transformers.FalconConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    )
    assert not most_packed(falcon)


def test_a_model_that_takes_no_positions_is_told_by_its_forward() -> None:
    assert all(accepted(model_of(family)) >= NEEDED for family in SHARING)
    assert not accepted(model_of("BLOOM")) >= NEEDED


def test_common_head() -> None:
    assert common_head([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9]]) == [1, 2]
    assert common_head([[1, 2], [1, 2, 3]]) == [1]  # the shortest keeps one of its own
    assert common_head([[1, 2, 3]]) == [1, 2]
    assert common_head([]) == common_head([[4], [5]]) == common_head([[4], []]) == common_head([[4, 5, 6], []]) == []
    assert common_head([[1, 2, 7], [1, 2, 8]], head=[1, 2, 3]) == [1, 2]  # with what other prompts have in common
    assert common_head([], head=[1, 2]) == [1, 2] and common_head([[1, 2, 3]], head=[]) == []
