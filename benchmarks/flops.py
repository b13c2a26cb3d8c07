"""Floating-point operations of a model, counted from its shape, and what share of the GPU's peak that is.

A matrix of P entries costs 2 P a token forward. Backward through the activations costs 2 P more; the gradient of the
matrix itself would cost another 2 P, but a frozen matrix has none: a LoRA step does **4 P** a token, full training 6 P.
Both are reported, since both are called MFU elsewhere. Attention's own products (scores, and values weighted by them)
have no weights: 4 · width · queries · keys forward for the two, twice that backward, in either convention; a causal
layer is counted at half of it. The adapters (under 1 %), norms and embeddings' look-up are left out, and tokens are the
real ones, without padding: a padded batch shows as a lower share.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PEAK = 989e12  # bf16 dense, of an H100 SXM and of an H200, as NVIDIA states it


@dataclass(frozen=True)
class Flops:
    """Operations of a forward: in matrices, and in attention's weightless products."""

    matrices: float = 0.0
    attention: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.matrices + other.matrices, self.attention + other.attention)

    @property
    def frozen(self) -> float:
        """Of a training step whose matrices are frozen."""
        return 2 * self.matrices + 3 * self.attention

    @property
    def full(self) -> float:
        """Of a training step that trains them."""
        return 3 * self.matrices + 3 * self.attention


def forward(config: Any, source: int, target: int) -> Flops:
    """Of one row of a transformers T5 or LLaMA config: so many input tokens, so many label tokens."""
    return t5(config, source, target) if config.is_encoder_decoder else llama(config, source + target - 1, target)


def t5(config: Any, source: int, target: int) -> Flops:
    """Encoder over the source; decoder over the target, its cross-attention reading keys and values of the source."""
    d, inner = config.d_model, config.num_heads * config.d_kv
    feed = d * config.d_ff * (3 if config.is_gated_act else 2)
    layers, decoders = config.num_layers, config.num_decoder_layers
    encoder = layers * (4 * d * inner + feed) * source
    decoder = decoders * (4 * d * inner + feed) * target  # self-attention and feed-forward
    cross = decoders * (2 * d * inner * target + 2 * d * inner * source)
    head = d * config.vocab_size * target
    seen = layers * source**2 + decoders * (target**2 / 2 + target * source)
    return Flops(2.0 * (encoder + decoder + cross + head), 4.0 * inner * seen)


def llama(config: Any, tokens: int, scored: int) -> Flops:
    """Decoder over all tokens; the head over the scored ones alone, as we compute it."""
    d = config.hidden_size
    width = d // config.num_attention_heads
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    block = 2 * d * queries + 2 * d * keys + 3 * d * config.intermediate_size
    matrices = config.num_hidden_layers * block * tokens + d * config.vocab_size * scored
    return Flops(2.0 * matrices, 4.0 * queries * config.num_hidden_layers * tokens**2 / 2)


def total(config: Any, rows: Iterable[tuple[int, int]]) -> Flops:
    """Of many rows, each (input tokens, label tokens)."""
    return sum((forward(config, source, target) for source, target in rows), Flops())
