"""Logits and loss at the label tokens, and greedy answers; the same for encoder-decoder and decoder-only models.

Every function takes the bare model or one wrapped by PEFT.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig

from cl_runner.models.base import Layout, neutral_generation
from cl_runner.models.batch import IGNORE, PREFIX, Batch
from cl_runner.models.dropout import Contexts


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Scores of the next token at every label position, given the gold tokens before it: (b, t, V).

    Aligned with ``batch.labels`` and ``batch.token_weights`` (b, t). Of a decoder-only model the head runs on the
    label positions alone where the architecture allows it.
    """
    t = batch.labels.shape[1]
    if t == 0:
        raise ValueError("a batch of prompts has no label positions")
    inputs = {**model_inputs(model, batch), "use_cache": False}
    if batch.decoder_input_ids is not None:
        # No decoder mask: padding is at the right, where causal attention does not look back from.
        return _scores(model(**inputs, decoder_input_ids=batch.decoder_input_ids))
    if "logits_to_keep" in accepted(model):
        return _scores(model(**inputs, logits_to_keep=t))
    return _scores(model(**inputs))[:, -t:]


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What a model reads of a batch: ids, mask, and positions where it takes them.

    A prefix (``batch.condition["prefix"]``, embeddings (b, p, d)) stands right before each row's first token, padding
    outside of both, so that a row is read as it would be by itself; ids are embedded then.
    """
    prefix, mask = batch.condition.get(PREFIX), batch.attention_mask
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": mask}
    if prefix is not None:
        network: Any = unwrapped(model)
        embedded: Tensor = network.get_input_embeddings()(batch.input_ids)
        before = mask.new_ones(batch.size, prefix.shape[1])
        both, mask = torch.cat([prefix.to(embedded.dtype), embedded], 1), torch.cat([before, mask], 1)
        if batch.position_ids is not None:  # padding is at the left: it goes before the prefix
            places = _padding_first(before.shape[1], batch.attention_mask)
            both, mask = both.gather(1, places[..., None].expand_as(both)), mask.gather(1, places)
        inputs = {"inputs_embeds": both, "attention_mask": mask}
    if batch.position_ids is not None and "position_ids" in accepted(model):  # not where they are a bias or recurrence
        inputs["position_ids"] = batch.position_ids if prefix is None else (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def _padding_first(p: int, mask: Tensor) -> Tensor:
    """Which position of ``prefix + row`` (b, p + s) comes where, for the row's left padding to stand before the prefix.

    Args:
        p: length of the prefix.
        mask: (b, s), of the rows alone.
    """
    gaps = mask.shape[1] - mask.sum(1, keepdim=True)
    columns = torch.arange(p + mask.shape[1], device=mask.device)[None, :]
    return torch.where(columns < gaps, columns + p, torch.where(columns < gaps + p, columns - gaps, columns))


@torch.no_grad()
def features(model: nn.Module, batch: Batch) -> Tensor:
    """What the model makes of each input by itself: the mean of its last hidden states over the source, (b, d) fp32.

    The encoder's for an encoder-decoder model. Labels, a prefix and dropout have no part in it.
    """
    network: Any = unwrapped(model)
    bare = replace(batch, condition={})
    reader = network.base_model if batch.position_ids is not None else network.get_encoder()
    with evaluating(model):
        hidden: Tensor = reader(**model_inputs(model, bare))[0].float()
    weights = source_mask(batch)[..., None].float()
    return (hidden * weights).sum(1) / weights.sum(1)


@torch.no_grad()
def embedded(model: nn.Module, batch: Batch) -> Tensor:
    """The input embeddings of a batch's tokens, (b, s, d) fp32, as the model's first layer is handed them."""
    network: Any = unwrapped(model)
    found: Tensor = network.get_input_embeddings()(batch.input_ids)
    return found.detach().float()  # which asks for a gradient all the same where activations are computed again


def source_mask(batch: Batch) -> Tensor:
    """Which input positions (b, s) are a row's source: no padding, and no label token."""
    source = batch.attention_mask.bool()
    t = batch.labels.shape[1]
    if batch.position_ids is not None and t:
        # Behind a row's source stand its label tokens but the last, each one column after its own label's.
        source = source.clone()
        source[:, source.shape[1] - t + 1 :] &= batch.labels[:, :-1] == IGNORE
    return source


def token_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each label token in fp32: scores (b, t, V), labels (b, t) → (b, t), 0 outside label tokens."""
    flat = functional.cross_entropy(
        scores.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return flat.view_as(labels)


@torch.no_grad()
def greedy(model: nn.Module, prompts: Batch, layout: Layout, max_new_tokens: int) -> list[list[int]]:
    """The model's answers to a batch of prompts (``collate_prompts``) by arg-max, without the end token.

    An answer of ``max_new_tokens`` ids was cut there. Dropout is off meanwhile.
    """
    with evaluating(model):
        return _from_prompts(model, prompts, layout, neutral_generation(layout, max_new_tokens))


@torch.no_grad()
def sampled(
    model: nn.Module, prompts: Batch, layout: Layout, max_new_tokens: int, top_k: int, repetition_penalty: float
) -> list[list[int]]:
    """Answers drawn from torch's own generator, each token among the ``top_k`` likeliest; otherwise as ``greedy``.

    ``repetition_penalty`` divides the score of what was said before (1 is none; 1909.05858).
    """
    how = neutral_generation(layout, max_new_tokens)
    how.update(do_sample=True, top_k=top_k, repetition_penalty=repetition_penalty)
    with evaluating(model), warnings.catch_warnings():
        # Embeddings before the answer cannot have been said before: that is as it should be.
        warnings.filterwarnings("ignore", message="Passing `repetition_penalty` with `inputs_embeds`")
        return _from_prompts(model, prompts, layout, how)


def _from_prompts(model: nn.Module, prompts: Batch, layout: Layout, how: GenerationConfig) -> list[list[int]]:
    inputs = model_inputs(model, prompts)
    inputs.pop("position_ids", None)  # generation counts them itself, by the mask
    # Decoder-only models repeat the prompt where it is ids, encoder-decoders the start token.
    skip = 1 if layout.encoder_decoder else prompts.input_ids.shape[1] if "input_ids" in inputs else 0
    return generate(model, inputs, skip, layout, how)


def generate(
    model: nn.Module, inputs: dict[str, Any], skip: int, layout: Layout, how: GenerationConfig
) -> list[list[int]]:
    """What transformers generates from ``inputs``, less its first ``skip`` ids and all from an end token."""
    asked: Any = model
    out = asked.generate(**inputs, generation_config=how)
    return [_until_end(row, layout.end_ids) for row in out[:, skip:].tolist()]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule is as it was, also where some trained and some did not."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def checkpoint_activations(model: nn.Module, on: bool, contexts: Contexts | None = None) -> None:
    """Whether the training forwards keep the activations of one block alone, and compute the others again.

    Dropout is the same the second time: torch's own, or, through ``contexts`` (of a block's first forward and of its
    second), one by row. The model has to support it (``supports_gradient_checkpointing``).
    """
    inner: Any = unwrapped(model)
    old = not hasattr(inner, "activation_checkpointing_enable")  # its name up to transformers 5.20
    if on:
        enable = inner.gradient_checkpointing_enable if old else inner.activation_checkpointing_enable
        enable({"use_reentrant": False, **({"context_fn": contexts} if contexts else {})})
    elif any(getattr(module, "gradient_checkpointing", False) for module in inner.modules()):
        disable = inner.gradient_checkpointing_disable if old else inner.activation_checkpointing_disable
        disable()


def _until_end(ids: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    ends = [at for at, token in enumerate(ids) if token in end_ids]
    return list(ids[: ends[0]] if ends else ids)


def _scores(output: Any) -> Tensor:
    scores: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return scores


def accepted(model: nn.Module) -> frozenset[str]:
    """Names of what the forward of a model takes."""
    return _parameters(type(unwrapped(model)).forward)


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's wrapper."""
    inner: Any = model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else model


@lru_cache(maxsize=64)
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
