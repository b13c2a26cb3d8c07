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
from cl_runner.models.forward import logits, token_loss
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

PAD, END, VOCABULARY = 0, 1, 48
LAYOUT = Layout(False, PAD, END, (END,), None, VOCABULARY)
HEAD = [5, 6, 7, 8, 9]
EXAMPLES = [
    Example([*HEAD, 20], [11, END]),
    Example([*HEAD, 21, 22, 23, 24], [12, 13, 14, END]),
    Example([*HEAD, 25, 26], [END]),
]
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": 2}
SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SIZES, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2", {**SIZES, "num_key_value_heads": 2}),
    "gemma": ("Gemma", {**SIZES, "num_key_value_heads": 1, "head_dim": 6}),
    "gpt2": ("GPT2", {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt-neox": ("GPTNeoX", {**SIZES, "max_position_embeddings": 64}),
    "qwen3": ("Qwen3", {**SIZES, "num_key_value_heads": 2, "head_dim": 6}),
    "mistral": ("Mistral", {**SIZES, "num_key_value_heads": 2, "sliding_window": None}),
    "phi": ("Phi", {**SIZES, "num_attention_heads": 3, "max_position_embeddings": 64}),
    "opt": ("OPT", {"hidden_size": 24, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "word_embed_proj_dim": 24, "max_position_embeddings": 64, "dropout": 0.0}),
}  # fmt: skip


def model_of(family: str, **more: Any) -> Any:
    """A random model of a family; everything trains, so that every gradient shows."""
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON, **{**settings, **more})
    made = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model: Any = getattr(transformers, made)(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    model.generation_config = neutral_generation(LAYOUT)
    return model.eval()


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
@pytest.mark.parametrize("family", [*FAMILIES, "llama eager"])
def test_logits_and_gradients(family: str, way: Any, extra: int) -> None:
    model = model_of(family.split()[0], **({"attn_implementation": "eager"} if "eager" in family else {}))
    assert most_packed(model) == int(PACKED * 24)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_answers(family: str) -> None:
    model = model_of(family)
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
    torch.manual_seed(0)
    config = transformers.MistralConfig(**COMMON, **SIZES, num_key_value_heads=2, sliding_window=4)
    model: Any = transformers.MistralForCausalLM(config).eval()
    assert Head.read(model, head_of(torch.tensor([HEAD]))) is None
    assert not goes_on(model) and goes_on(model_of("llama"))


def test_models_that_mask_by_themselves_are_not_packed() -> None:
    neo = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            **COMMON, hidden_size=24, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
        )
    )
    assert not most_packed(neo) and not goes_on(neo)
    falcon = transformers.FalconForCausalLM(
        transformers.FalconConfig(**COMMON, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    )
    assert not most_packed(falcon)


def test_a_model_that_takes_no_positions_is_told_by_its_forward() -> None:
    from cl_runner.models.forward import accepted

    assert all(accepted(model_of(family)) >= NEEDED for family in FAMILIES)
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(**COMMON, hidden_size=24, n_layer=1, n_head=4))
    assert not accepted(bloom) >= NEEDED


def test_common_head() -> None:
    assert common_head([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9]]) == [1, 2]
    assert common_head([[1, 2], [1, 2, 3]]) == [1]  # the shortest keeps one of its own
    assert common_head([[1, 2, 3]]) == [1, 2]
    assert common_head([]) == common_head([[4], [5]]) == common_head([[4], []]) == common_head([[4, 5, 6], []]) == []
    assert common_head([[1, 2, 7], [1, 2, 8]], head=[1, 2, 3]) == [1, 2]  # with what other prompts have in common
    assert common_head([], head=[1, 2]) == [1, 2] and common_head([[1, 2, 3]], head=[]) == []
