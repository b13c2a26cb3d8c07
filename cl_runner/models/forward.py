"""Logits and loss at the label tokens, and greedy answers; the same for encoder-decoder and decoder-only models.

Every function takes the bare model or one wrapped by PEFT.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cl_runner.models.base import Layout, neutral_generation
from cl_runner.models.batch import IGNORE, Batch


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Scores of the next token at every label position, given the gold tokens before it: (b, t, V).

    Aligned with ``batch.labels`` and ``batch.token_weights`` (b, t). Of a decoder-only model the head runs on the
    label positions alone where the architecture allows it.
    """
    t = batch.labels.shape[1]
    if t == 0:
        raise ValueError("a batch of prompts has no label positions")
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if batch.decoder_input_ids is not None:
        # No decoder mask: padding is at the right, where causal attention does not look back from.
        return _scores(model(**inputs, decoder_input_ids=batch.decoder_input_ids))
    takes = accepted(model)
    if "position_ids" in takes:  # not where positions are a bias or a recurrence
        inputs["position_ids"] = batch.position_ids
    if "logits_to_keep" in takes:
        return _scores(model(**inputs, logits_to_keep=t))
    return _scores(model(**inputs))[:, -t:]


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
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    # Decoder-only models repeat the prompt, encoder-decoders the start token.
    skip = 1 if layout.encoder_decoder else prompts.input_ids.shape[1]
    with evaluating(model):
        return generate(model, inputs, skip, layout, max_new_tokens)


def generate(
    model: nn.Module, inputs: dict[str, Any], skip: int, layout: Layout, max_new_tokens: int
) -> list[list[int]]:
    """What transformers generates from ``inputs`` by arg-max, less its first ``skip`` ids and all from an end token."""
    asked: Any = model
    out = asked.generate(**inputs, generation_config=neutral_generation(layout, max_new_tokens))
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


def checkpoint_activations(model: nn.Module, on: bool) -> None:
    """Whether the training forwards keep the activations of one block alone, and compute the others again.

    Dropout is the same the second time. The model has to support it (``supports_gradient_checkpointing``).
    """
    inner: Any = unwrapped(model)
    old = not hasattr(inner, "activation_checkpointing_enable")  # its name up to transformers 5.20
    if on:
        enable = inner.gradient_checkpointing_enable if old else inner.activation_checkpointing_enable
        enable({"use_reentrant": False})
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
