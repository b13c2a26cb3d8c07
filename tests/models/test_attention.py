"""Attention in fp32 where a CPU computes in bf16, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cl_runner.config.schema import ModelConfig
from cl_runner.models.attention import NAME, keep_fp32_on_cpu
from cl_runner.models.base import load_base


@pytest.fixture
def theirs() -> Iterator[Any]:
    """transformers' own function, for a test to change; what is registered is put back."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    keep_fp32_on_cpu()
    ours = functions[NAME]
    yield functions
    functions.register(NAME, ours)


def test_under_bf16_autocast_fp32_is_given_and_elsewhere_what_was_there(theirs: Any) -> None:
    seen: list[Any] = []

    def record(module: Any, *given: Any, **named: Any) -> None:
        values = [*given, *named.values()]
        seen.append([value.dtype if isinstance(value, Tensor) else value for value in values])
        seen.append(torch.is_autocast_enabled("cpu"))

    theirs.register(NAME, record)
    keep_fp32_on_cpu()
    keep_fp32_on_cpu()
    attention: Any = theirs[NAME]
    half, truth = torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        attention(None, half, half.float(), half, truth, scaling=0.5, position_bias=half, dropout=0.0)
    attention(None, half, half, half, None)
    fp32, bf16 = torch.float32, torch.bfloat16
    assert seen == [[fp32, fp32, fp32, torch.bool, 0.5, fp32, 0.0], False, [bf16, bf16, bf16, None], False]


@pytest.mark.parametrize("model", ["tiny-t5", "tiny-llama"])
def test_every_loaded_model_attends_in_fp32(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients that reach what is before it, in the precision that this has."""
    base = load_base(ModelConfig(name=model, attention="sdpa"), torch.device("cpu"))
    products: list[torch.dtype] = []
    product = functional.scaled_dot_product_attention

    def watched(*given: Any, **named: Any) -> Tensor:
        products.append(given[0].dtype)
        return product(*given, **named)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    ids = torch.tensor([[5, 6, 7]])
    embedded = base.model.get_input_embeddings()(ids).detach().requires_grad_()
    more = {"decoder_input_ids": ids} if base.encoder_decoder else {}
    network: Any = base.model
    with torch.autocast("cpu", torch.bfloat16):
        out = network(inputs_embeds=embedded, **more).logits
    (gradient,) = torch.autograd.grad(out.float().square().sum(), embedded)
    assert out.dtype == torch.bfloat16 and products and set(products) == {torch.float32}
    assert gradient.abs().max() > 0
