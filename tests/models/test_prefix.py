"""Soft prompts before the input: in training, verification and generation what a row by itself, unpadded, gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl_runner.models.base import Base
from cl_runner.models.batch import Batch, Example, collate, collate_prompts
from cl_runner.models.forward import features, greedy, logits, model_inputs, sampled
from cl_runner.models.verify import answers
from tests.breadth import narrowed
from tests.models.test_forward import FAMILIES, examples_of, load
from tests.models.test_verify import LIMIT, golds, opened

# peft 0.21 asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

P = 5
every_family = pytest.mark.parametrize("family", FAMILIES)


def prompts_of(base: Base, rows: int) -> Tensor:
    """A soft prompt (rows, P, d) for each row, as large as embeddings are."""
    table = base.model.get_input_embeddings().weight
    dice = torch.Generator().manual_seed(5)
    return table.std() * torch.randn(rows, P, table.shape[1], generator=dice)


def with_prefix(batch: Batch, prefix: Tensor) -> Batch:
    return replace(batch, condition={"prefix": prefix})


def naive_scores(base: Base, prefix: Tensor, source: list[int], target: list[int]) -> Tensor:
    """(len(target), V) of one row: its prompt, its embeddings, nothing else."""
    embed = base.model.get_input_embeddings()
    if base.encoder_decoder:
        both = torch.cat([prefix, embed(torch.tensor(source))])[None]
        start = base.model.config.decoder_start_token_id
        return base.model(inputs_embeds=both, decoder_input_ids=torch.tensor([[start, *target[:-1]]])).logits[0]
    both = torch.cat([prefix, embed(torch.tensor([*source, *target[:-1]]))])[None]
    return base.model(inputs_embeds=both, use_cache=False).logits[0, P + len(source) - 1 :]


@every_family
def test_logits_and_gradients_are_those_of_a_row_by_itself(saved: Callable[[str], Path], family: str) -> None:
    base = load(saved(family))
    examples = examples_of(base)
    prefix = prompts_of(base, len(examples)).requires_grad_()
    batch = collate(examples, base.layout)
    scores = logits(base.model, with_prefix(batch, prefix))
    assert scores.shape == (*batch.labels.shape, base.layout.vocab_size)
    alone = [naive_scores(base, prefix[row], e.source, e.target) for row, e in enumerate(examples)]
    found = [scores[row][batch.labels[row] != -100] for row in range(len(examples))]
    for ours, theirs in zip(found, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert float((scores.detach() - logits(base.model, batch)).abs().max()) > 0.1  # it counts
    weights = [torch.randn(one.shape, generator=torch.Generator().manual_seed(1)) for one in alone]
    (ours,) = torch.autograd.grad(sum((a * w).sum() for a, w in zip(found, weights, strict=True)), prefix)  # type: ignore[arg-type]
    (theirs,) = torch.autograd.grad(sum((a * w).sum() for a, w in zip(alone, weights, strict=True)), prefix)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@every_family
def test_padding_stands_outside(saved: Callable[[str], Path], family: str) -> None:
    base = load(saved(family))
    batch = collate(examples_of(base), base.layout)
    prefix = prompts_of(base, batch.size)
    read = model_inputs(base.model, with_prefix(batch, prefix))
    for row, mask in enumerate(read["attention_mask"]):
        n = int(batch.attention_mask[row].sum())
        assert mask.tolist() == ([1] * (P + n) + [0] * (len(mask) - P - n))[:: 1 if base.encoder_decoder else -1]
        first = 0 if base.encoder_decoder else len(mask) - P - n
        assert torch.equal(read["inputs_embeds"][row, first : first + P], prefix[row])
        if "position_ids" in read:
            assert read["position_ids"][row, first:].tolist() == list(range(P + n))


@every_family
def test_greedy_equals_a_naive_loop(saved: Callable[[str], Path], family: str) -> None:
    base = load(saved(family))
    examples = examples_of(base)
    prefix = prompts_of(base, len(examples))
    prompts = collate_prompts(examples, base.layout)
    expected = []
    for row, example in enumerate(examples):
        answer: list[int] = []
        while len(answer) < LIMIT:
            with torch.no_grad():
                token = int(naive_scores(base, prefix[row], example.source, [*answer, 0])[-1].argmax())
            if token == base.eos_id:
                break
            answer.append(token)
        expected.append(answer)
    assert greedy(base.model, with_prefix(prompts, prefix), base.layout, LIMIT) == expected
    # Of one token alone, sampling has no choice.
    assert sampled(base.model, with_prefix(prompts, prefix), base.layout, LIMIT, 1, 1.0) == expected
    assert greedy(base.model, prompts, base.layout, LIMIT) != expected


@settings(max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("family", narrowed(FAMILIES, ["t5", "gpt2"]))
def test_verified_answers_are_those_of_greedy(saved: Callable[[str], Path], family: str, data: st.DataObject) -> None:
    base, model, layouts, sources = opened(saved(family))
    layout = data.draw(st.sampled_from(layouts))
    limit = data.draw(st.integers(1, LIMIT))
    rows = data.draw(st.lists(st.integers(0, len(sources) - 1), min_size=1, max_size=4))
    prefix = prompts_of(base, len(rows))[:, : data.draw(st.integers(1, P))]
    prompts = with_prefix(collate_prompts([Example(sources[row], []) for row in rows], layout), prefix)
    expected = greedy(model, prompts, layout, limit)
    targets = []
    for said in expected:
        token = data.draw(st.integers(6, layout.vocab_size - 1))
        choices = golds(said, layout.eos_id, layout.end_ids[1], token, data.draw(st.integers(0, LIMIT)))
        targets.append(data.draw(st.sampled_from(choices)))
    found, verified = answers(model, prompts, targets, layout, limit)
    assert found == expected
    for said, target, yes in zip(expected, targets, verified, strict=True):
        assert yes == (len(said) < len(target) <= limit and target[:-1] == said and target[-1] in layout.end_ids)


@every_family
def test_features_are_of_the_source_alone(saved: Callable[[str], Path], family: str) -> None:
    base = load(saved(family))
    examples = examples_of(base)
    trunk: Any = base.model.get_encoder() if base.encoder_decoder else base.model.base_model
    with torch.no_grad():
        naive = torch.stack([trunk(torch.tensor([e.source]))[0][0].mean(0) for e in examples])
    batch = collate(examples, base.layout)
    others = collate([e._replace(target=[7, 8, 9, 10, base.eos_id]) for e in examples], base.layout)
    base.model.train()
    for one in (batch, others, with_prefix(batch, prompts_of(base, 3)), collate_prompts(examples, base.layout)):
        torch.testing.assert_close(features(base.model, one), naive, rtol=0, atol=1e-5)
