"""Tiny random models of four families, what to feed them, and random pairs for their layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from cl_runner.adapters.layers import Layers
from cl_runner.adapters.pairs import Pair
from cl_runner.adapters.peft_folder import save_adapter
from cl_runner.adapters.saved import Saved
from cl_runner.config.schema import AdapterConfig

FAMILIES = ("t5", "llama", "gpt2", "qwen2")
VOCABULARY = 48
TARGETS = {"t5": ["q", "v"], "llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "qwen2": ["q_proj", "v_proj"]}


def base_model(family: str, layers: int = 2, seed: int = 0, **settings: Any) -> Any:
    """A frozen random model, weights wide enough for every layer to show in the logits. Qwen2 has fewer key heads."""
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    decoder = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "t5":
            own = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_heads": 4, "dropout_rate": 0.0, **settings}
            model: Any = transformers.T5ForConditionalGeneration(
                transformers.T5Config(**common, num_layers=layers, decoder_start_token_id=0, **own)
            )
        elif family == "llama":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **{**decoder, **settings}))
        elif family == "qwen2":
            settings = {"num_key_value_heads": 2, **settings}
            model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common, **{**decoder, **settings}))
        else:
            own = {"n_embd": 24, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, **settings}
            model = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(**common, n_layer=layers, n_head=4, n_positions=64, **own)
            )
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
    model.requires_grad_(False)
    return model.eval()


def adapters_of(model: Any, family: str = "t5", *, r: int = 2, alpha: float = 6.0, **more: Any) -> Layers:
    """Adapters around ``model`` itself; no dropout unless told. ``ranks``, ``alphas``: patterns."""
    own = {"dropout": more.pop("dropout", 0.0), "dropout_past": more.pop("dropout_past", False)}
    own |= {"rank_pattern": more.pop("ranks", {}), "alpha_pattern": more.pop("alphas", {})}
    config = AdapterConfig(r=r, alpha=alpha, target_modules=more.pop("targets", None), **own)
    more = {"name_or_path": "some/base", "encoder_decoder": family == "t5", **more}
    return Layers(model, config, **more)


def logits(model: Any, rows: int = 3) -> Tensor:
    """Logits of fixed random input; T5 gets decoder input as well."""
    dice = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, 7), generator=dice)
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            found: Tensor = model(input_ids=ids, decoder_input_ids=ids[:, :4].flip(1), use_cache=False).logits
        else:
            found = model(input_ids=ids, use_cache=False).logits
    return found


def random_pair(
    adapters: Layers, stage: str, *, rank: int | None = None, scale: float | None = None, seed: int = 0,
    size: float = 0.2,
) -> Pair:  # fmt: skip
    """A pair with both factors random, of the adapters' ranks and scales unless told."""
    dice = torch.Generator().manual_seed(1000 + seed)
    ranks = {} if rank else {t: adapters.rank_of(t) for t in adapters.past if adapters.rank_of(t) != adapters.rank}
    scales = {t: adapters.scale_of(t) for t in adapters.past if adapters.scale_of(t) != adapters.scale}
    rank, scale, scales = rank or adapters.rank, *((adapters.scale, scales) if scale is None else (scale, {}))
    A, B = {}, {}
    for target, past in adapters.past.items():
        m, n = past.base.shape
        A[target] = torch.randn(ranks.get(target, rank), n, generator=dice) * size
        B[target] = torch.randn(m, ranks.get(target, rank), generator=dice) * size
    return Pair(stage, rank, scale, A, B, ranks, scales)


def naive_update(pair: Pair, target: str) -> Tensor:
    """s·B A entry by entry of the definition, in fp64."""
    return pair.scales.get(target, pair.scale) * torch.einsum(
        "mr,rn->mn", pair.B[target].double(), pair.A[target].double()
    )


def with_updates(model: Any, updates: Sequence[Mapping[str, Tensor]]) -> Any:
    """A copy of ``model`` in fp64, every update written into its weights; (m, n) each, whatever the layer's layout."""
    changed = copy.deepcopy(model).double()
    for update in updates:
        for target, delta in update.items():
            layer: nn.Module = changed.get_submodule(target)
            transposed = isinstance(layer, transformers.pytorch_utils.Conv1D)
            layer.weight.data += (delta.T if transposed else delta).double()
    return changed


def naive_updates(adapters: Layers, pairs: Sequence[Pair]) -> list[dict[str, Tensor]]:
    return [{target: naive_update(pair, target) for target in adapters.past} for pair in pairs]


def off(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference as a share of the norm."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def saved_as(folder: Path, adapters: Layers, live: Pair | None = None) -> Saved:
    """Save all that the adapters hold, and ``live`` as a pair that is kept."""
    held = adapters.held()
    if live is not None:
        held = replace(held, kept={live.stage: live}, live=live.stage, shown=live)
    return save_adapter(folder, adapters, held)
