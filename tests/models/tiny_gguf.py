"""A tiny random LLaMA as a GGUF file, written as llama.cpp's converter writes one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.tiny_models import _llama

# What llama.cpp calls the weights of a block.
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def model_and_tokenizer(tied: bool = False) -> tuple[Any, Any]:
    torch.manual_seed(11)
    model, tokenizer = _llama()
    for parameter in model.parameters():  # norms too: ones would hide a norm that is not read
        nn.init.uniform_(parameter, -0.3, 0.3)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model, tokenizer


def halves_side_by_side(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k as llama.cpp has them: of each head, the two that rotate together stand together."""
    size = rows.shape[0] // heads
    order = [h * size + half * (size // 2) + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def tensors_of(model: Any) -> dict[str, Tensor]:
    """Name in the file → weight."""
    weights, config = {name: p.detach() for name, p in model.named_parameters()}, model.config
    found = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    if "lm_head.weight" in weights:
        found["output.weight"] = weights["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        for name, ours in BLOCK.items():
            value = weights[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name)
            found[f"blk.{layer}.{name}.weight"] = halves_side_by_side(value, heads) if heads else value
    return found


def write(
    file: Path, model: Any, tokenizer: Any, kind: str = "F32", pre: str | None = "gpt-2", without: str = "", **more: Any
) -> Path:
    """The model as a file: matrices of the ``kind``; ``more``: keys of the metadata, or tensors, beside."""
    import gguf

    quantised = getattr(gguf.GGMLQuantizationType, kind)
    config, parts = model.config, json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = {token["content"] for token in parts["added_tokens"]}
    out = gguf.GGUFWriter(file, "llama")
    out.add_name("tiny")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(5000.0)
    out.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    if pre:
        out.add_tokenizer_pre(pre)
    out.add_token_list(vocab)
    out.add_token_types([3 if token in special else 1 for token in vocab])
    out.add_token_merges([" ".join(pair) for pair in parts["model"]["merges"]])
    out.add_bos_token_id(tokenizer.bos_token_id)
    out.add_eos_token_id(tokenizer.eos_token_id)
    out.add_add_bos_token(True)
    out.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for key, value in more.items():
        if isinstance(value, str):
            out.add_string(key, value)
    values = tensors_of(model) | {key: value for key, value in more.items() if isinstance(value, Tensor)}
    for name, value in values.items():
        if name != without:
            plain = value.ndim == 1 or kind == "F32"
            data = value.numpy() if plain else gguf.quants.quantize(value.numpy(), quantised)
            out.add_tensor(name, data, raw_dtype=None if plain else quantised)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file
