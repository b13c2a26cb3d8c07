"""What kinds count by formula, against the numbers that papers print for models of published size.

A printed number is met where rounding or cutting gives it. Left out, as no formula of their paper gives them: LoRA's
0.35M and 0.77M for GPT-2 (2106.09685, table 3); VeRA's 49.5K, all of its GPT-3, and LoRA's 4.6GB (2310.11454, table 1);
VB-LoRA's ``qv`` rows and Llama 2 (2405.15179, tables 1 and 3: one half and about two times what section 3.4 counts);
bytes that FourierFT's table makes of rounded counts, and for RoBERTa large (2405.03003, table 1).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM, MistralConfig, MistralForCausalLM

from cl_runner.adapters.kind import Kind, Shapes
from cl_runner.adapters.weights import FullWeights
from cl_runner.registry import KINDS

SCALES = {"K": 1e3, "M": 1e6, "KB": 2**10, "MB": 2**20, "GB": 2**30}


def is_printed(count: float, text: str) -> bool:
    """Whether rounding or cutting a number gives what is printed, such as ``0.8M``."""
    digits = text.rstrip("KMGB")
    exact = count / SCALES[text.removeprefix(digits)] * 10 ** len(digits.partition(".")[2])
    return round(float(digits) * 10 ** len(digits.partition(".")[2])) in (math.floor(exact), math.floor(exact + 0.5))


def kind(name: str, **settings: Any) -> Kind:
    cls = KINDS.get(name)
    return cls(cls.Config.model_validate({"kind": name, **settings}))


def square(blocks: int, d: int, names: str) -> Shapes:
    """So many square layers in each block, a letter each."""
    return {f"{block}.{name}": (d, d) for block in range(blocks) for name in names}


def encoder(blocks: int, d: int) -> Shapes:
    """Every linear layer of a BERT, or a GPT-2 whose query, key and value are apart."""
    inner = {"up": (4 * d, d), "down": (d, 4 * d)}
    return square(blocks, d, "qkvo") | {f"{b}.{name}": shape for b in range(blocks) for name, shape in inner.items()}


def llama(blocks: int, d: int, inner: int, names: str = "qkvogud", *, heads: int = 0, keys: int = 0) -> Shapes:
    """Layers of a LLaMA by their letters: g, u, d of the feed-forward block."""
    heads, keys = heads or d, keys or d
    of = {"q": (heads, d), "k": (keys, d), "v": (keys, d), "o": (d, heads), "g": (inner, d), "u": (inner, d)}
    return {f"{block}.{name}": {**of, "d": (d, inner)}[name] for block in range(blocks) for name in names}


def t5_xl() -> Shapes:
    """Of T0-3B what (IA)³ scales: keys, values, and the inner features of feed-forward blocks."""
    found: dict[str, tuple[int, int]] = {}
    for block in range(24):
        found.update({f"{part}.{block}.{n}": (2048, 2048) for part in ("encoder", "decoder", "cross") for n in "kv"})
        found.update({f"{part}.{block}.wo": (2048, 5120) for part in ("encoder", "decoder")})
    return found


BASE, LARGE = square(12, 768, "qv"), square(24, 1024, "qv")  # RoBERTa
MEDIUM, GPT2_LARGE = square(24, 1024, "qv"), square(36, 1280, "qv")  # GPT-2
GPT3, DEBERTA_XXL = square(96, 12288, "qv"), square(48, 1536, "qv")
LLAMA_7B, LLAMA_13B = llama(32, 4096, 11008), llama(40, 5120, 13824)  # LLaMA, Llama 2
ATTENTION_7B, ATTENTION_13B = llama(32, 4096, 11008, "qv"), llama(40, 5120, 13824, "qv")
MISTRAL, GEMMA = llama(32, 4096, 14336, keys=1024), llama(28, 3072, 24576, heads=4096, keys=4096)
LLAMA_32_3B = llama(28, 3072, 8192, keys=1024)
LLAMA_3_8B = llama(32, 4096, 14336, "qkvud", keys=1024)
DEBERTA = encoder(12, 768)  # DeBERTaV3 base

TRAINED: list[tuple[str, dict[str, Any], Shapes, str]] = [
    # LoRA, 2106.09685: table 2 (r 8; DeBERTa XXL 16), table 4 (r 1 and 8).
    ("lora", {"r": 8}, BASE, "0.3M"),
    ("lora", {"r": 8}, LARGE, "0.8M"),
    ("lora", {"r": 16}, DEBERTA_XXL, "4.7M"),
    ("lora", {"r": 1}, GPT3, "4.7M"),
    ("lora", {"r": 8}, GPT3, "37.7M"),
    # LoRA as 2310.11454 prints it: table 1; table 4, of all linear layers.
    ("lora", {"r": 1}, BASE, "36.8K"),
    ("lora", {"r": 16}, BASE, "589.8K"),
    ("lora", {"r": 256}, BASE, "9437.1K"),
    ("lora", {"r": 1}, LARGE, "98.3K"),
    ("lora", {"r": 16}, LARGE, "1572.8K"),
    ("lora", {"r": 256}, LARGE, "25165.8K"),
    ("lora", {"r": 16}, GPT3, "75.5M"),
    ("lora", {"r": 256}, GPT3, "1207.9M"),
    ("lora", {"r": 64}, LLAMA_7B, "159.9M"),
    ("lora", {"r": 64}, LLAMA_13B, "250.3M"),
    # LoRA as 2405.03003 prints it: table 1.
    ("lora", {"r": 4}, BASE, "147K"),
    ("lora", {"r": 8}, BASE, "295K"),
    ("lora", {"r": 4}, LARGE, "393K"),
    ("lora", {"r": 8}, LARGE, "786K"),
    ("lora", {"r": 8}, MEDIUM, "786K"),
    ("lora", {"r": 4}, GPT2_LARGE, "737K"),
    ("lora", {"r": 8}, GPT2_LARGE, "1.47M"),
    ("lora", {"r": 16}, ATTENTION_7B, "8.39M"),
    ("lora", {"r": 64}, ATTENTION_7B, "33.5M"),
    ("lora", {"r": 16}, ATTENTION_13B, "13.1M"),
    ("lora", {"r": 64}, ATTENTION_13B, "52.4M"),
    # VeRA, 2310.11454: table 1; tables 2 and 3 (r 1024, RoBERTa large 256); table 4 (r 1024).
    ("vera", {"r": 1}, BASE, "18.4K"),
    ("vera", {"r": 16}, BASE, "18.8K"),
    ("vera", {"r": 256}, BASE, "24.5K"),
    ("vera", {"r": 1}, LARGE, "49.2K"),
    ("vera", {"r": 256}, LARGE, "61.4K"),
    ("vera", {"r": 1024}, BASE, "0.043M"),
    ("vera", {"r": 256}, LARGE, "0.061M"),
    ("vera", {"r": 1024}, MEDIUM, "0.098M"),
    ("vera", {"r": 1024}, GPT2_LARGE, "0.17M"),
    ("vera", {"r": 1024}, LLAMA_7B, "1.6M"),
    ("vera", {"r": 1024}, LLAMA_13B, "2.4M"),
    # VeRA of all linear layers, 2405.15179: table 1.
    ("vera", {"r": 1024}, encoder(12, 768), "0.157M"),
    ("vera", {"r": 256}, encoder(24, 1024), "0.258M"),
    # FourierFT, 2405.03003: tables 1 to 4.
    ("fourierft", {"frequencies": 200}, BASE, "4.8K"),
    ("fourierft", {"frequencies": 1000}, BASE, "24K"),
    ("fourierft", {"frequencies": 1000}, LARGE, "0.048M"),
    ("fourierft", {"frequencies": 500}, MEDIUM, "24K"),
    ("fourierft", {"frequencies": 1000}, MEDIUM, "0.048M"),
    ("fourierft", {"frequencies": 1000}, GPT2_LARGE, "0.072M"),
    ("fourierft", {"frequencies": 1000}, ATTENTION_7B, "0.064M"),
    ("fourierft", {"frequencies": 1000}, ATTENTION_13B, "0.08M"),
    # (IA)³, 2205.05638: table 4.
    ("ia3", {}, t5_xl(), "540K"),
    # LoRA-XS, 2405.17604: four layers of each block; with r 64, 2405.15179: table 4.
    ("lora-xs", {"r": 16}, square(24, 1024, "qvof"), "24.6K"),
    ("lora-xs", {"r": 25}, square(24, 1024, "qvof"), "60K"),
    ("lora-xs", {"r": 64}, MISTRAL, "0.92M"),
    ("lora-xs", {"r": 64}, GEMMA, "0.80M"),
    # OFT, 2506.19847: table 11.
    ("oft", {"block_size": 32}, llama(28, 1536, 8960, keys=256), "7.89M"),
    ("oft", {"block_size": 32}, llama(28, 3584, 18944, keys=512), "17.55M"),
    # Of the same models, 2505.11235: tables 2, 4 and 5.
    ("lora-xs", {"r": 136}, DEBERTA, "1.33M"),
    ("lora-xs", {"r": 248}, LLAMA_32_3B, "12.1M"),
    ("lora-xs", {"r": 298}, LLAMA_3_8B, "14.2M"),
    ("lora", {"r": 8}, DEBERTA, "1.33M"),
    ("lora", {"r": 8}, LLAMA_32_3B, "12.2M"),
    ("lora", {"r": 8}, LLAMA_3_8B, "14.2M"),
    ("dora", {"r": 8}, DEBERTA, "1.41M"),
    ("dora", {"r": 8}, LLAMA_32_3B, "12.9M"),
    ("dora", {"r": 8}, LLAMA_3_8B, "14.9M"),
    ("oft", {"block_size": 32}, DEBERTA, "1.29M"),
    ("oft", {"block_size": 32}, LLAMA_32_3B, "11.6M"),
]


@pytest.mark.parametrize(("name", "settings", "layers", "printed"), TRAINED)
def test_what_trains_is_as_much_as_papers_print(
    name: str, settings: dict[str, Any], layers: Shapes, printed: str
) -> None:
    count = kind(name, **settings).trained_count(layers)
    assert count is not None and is_printed(count, printed), count


WHOLE_7B, WHOLE_13B = 6_738_415_616, 13_015_864_320


@pytest.mark.parametrize(
    ("name", "r", "layers", "whole", "printed"),
    [
        # Of the model and what trains beside it: 2402.09353, table 1, of LLaMA and Llama 2.
        ("lora", 32, llama(32, 4096, 11008, "qkvud"), WHOLE_7B, "0.83"),
        ("dora", 16, llama(32, 4096, 11008, "qkvud"), WHOLE_7B, "0.43"),
        ("dora", 32, llama(32, 4096, 11008, "qkvud"), WHOLE_7B, "0.84"),
        ("lora", 32, llama(40, 5120, 13824, "qkvud"), WHOLE_13B, "0.67"),
        ("dora", 16, llama(40, 5120, 13824, "qkvud"), WHOLE_13B, "0.35"),
        ("dora", 32, llama(40, 5120, 13824, "qkvud"), WHOLE_13B, "0.68"),
        # HRA, 2405.17484, figure 1.
        ("hra", 16, ATTENTION_7B, WHOLE_7B, "0.062"),
        ("hra", 32, ATTENTION_7B, WHOLE_7B, "0.12"),
    ],
)
def test_percent_as_papers_print_them(name: str, r: int, layers: Shapes, whole: int, printed: str) -> None:
    count = kind(name, r=r).trained_count(layers)
    assert count is not None and f"{100 * count / (whole + count):.{len(printed) - 2}f}" == printed


@pytest.mark.parametrize(
    ("made", "model", "printed"),
    [(MistralForCausalLM, MistralConfig(), 7242), (GemmaForCausalLM, GemmaConfig(), 8538)],
)
def test_all_weights(made: Any, model: Any, printed: int) -> None:
    """2405.15179, table 4: millions; of Gemma the embeddings, which are its head too, count once."""
    with torch.device("meta"):
        counted = FullWeights(made(model), base_again=False).counted()
    full = kind("full")
    count = full.trained_count(counted)
    assert count is not None and round(count / 1e6) == printed and full.stored_count(counted) == count


STORED: list[tuple[str, dict[str, Any], Shapes, str]] = [
    # VB-LoRA, 2405.15179: tables 1, 2 and 4; r 4, vectors of length 256, two for a piece; of all linear layers.
    ("vblora", {"vectors": 90}, encoder(12, 768), "0.027M"),
    ("vblora", {"vectors": 90}, encoder(24, 1024), "0.033M"),
    ("vblora", {"vectors": 256}, encoder(24, 1024), "0.076M"),
    ("vblora", {"vectors": 350}, encoder(36, 1280), "0.13M"),
    ("vblora", {"vectors": 2048}, MISTRAL, "0.65M"),
    ("vblora", {"vectors": 2048}, GEMMA, "0.67M"),
]


@pytest.mark.parametrize(("name", "settings", "layers", "printed"), STORED)
def test_what_is_stored_is_as_much_as_papers_print(
    name: str, settings: dict[str, Any], layers: Shapes, printed: str
) -> None:
    count = kind(name, r=4, vector_length=256, topk=2, **settings).stored_count(layers)
    assert count is not None and is_printed(count, printed), count


@pytest.mark.parametrize(
    ("name", "settings", "layers", "printed"),
    [
        # 2310.11454, table 1.
        ("lora", {"r": 1}, BASE, "144KB"),
        ("lora", {"r": 16}, BASE, "2MB"),
        ("lora", {"r": 256}, BASE, "36MB"),
        ("lora", {"r": 1}, LARGE, "384KB"),
        ("lora", {"r": 16}, LARGE, "6MB"),
        ("lora", {"r": 256}, LARGE, "96MB"),
        ("lora", {"r": 1}, GPT3, "18MB"),
        ("lora", {"r": 16}, GPT3, "288MB"),
        ("vera", {"r": 1}, BASE, "72KB"),
        ("vera", {"r": 16}, BASE, "74KB"),
        ("vera", {"r": 256}, BASE, "96KB"),
        ("vera", {"r": 1}, LARGE, "192KB"),
        ("vera", {"r": 16}, LARGE, "195KB"),
        ("vera", {"r": 256}, LARGE, "240KB"),
        # 2405.03003, table 1.
        ("fourierft", {"frequencies": 200}, BASE, "18.8KB"),
        ("fourierft", {"frequencies": 1000}, BASE, "94KB"),
        ("fourierft", {"frequencies": 1000}, MEDIUM, "188KB"),
        ("fourierft", {"frequencies": 500}, GPT2_LARGE, "141KB"),
        ("fourierft", {"frequencies": 1000}, ATTENTION_7B, "250KB"),
        ("fourierft", {"frequencies": 2000}, ATTENTION_7B, "500KB"),
        ("fourierft", {"frequencies": 1000}, ATTENTION_13B, "312KB"),
        ("fourierft", {"frequencies": 2000}, ATTENTION_13B, "625KB"),
    ],
)
def test_bytes_as_papers_print_them(name: str, settings: dict[str, Any], layers: Shapes, printed: str) -> None:
    count = kind(name, **settings).stored_count(layers)
    assert count is not None and is_printed(4 * count, printed), count


@pytest.mark.parametrize(("vectors", "topk", "piece"), [(90, 2, 1.5), (256, 2, 1.5), (257, 2, 3.0), (90, 3, 2.75)])
def test_vblora_stores_a_bank_and_a_few_numbers_for_each_piece(vectors: int, topk: int, piece: float) -> None:
    """2405.15179, section 3.4: k numbers of vectors, of a byte each or whole, and k − 1 weights; all logits train."""
    made = kind("vblora", r=4, vectors=vectors, vector_length=256, topk=topk)
    pieces = 48 * 4 * 2 * 1024 // 256
    assert made.stored_count(LARGE) == vectors * 256 + pieces * piece
    assert made.trained_count(LARGE) == vectors * 256 + vectors * pieces


def test_every_kind_counts_but_prompts() -> None:
    """Of prompts the method says how many there are and how long: no layer tells."""
    layers = {"0.q": (16, 16), "0.v": (16, 16)}
    small = {"vblora": {"vector_length": 4}, "oft": {"block_size": 4}}
    for name in KINDS.ours:
        made = kind(name, **small.get(name, {}))
        counts = made.trained_count(layers), made.stored_count(layers)
        assert counts == (None, None) if name == "prompts" else None not in counts and min(counts) > 0, name


def test_a_frozen_factor_does_not_train_and_is_stored() -> None:
    class FrozenA(type(kind("lora"))):  # type: ignore[misc]
        trains = ("B",)

    made = FrozenA(kind("lora", r=2).config)
    assert made.trained_count({"q": (5, 7)}) == 2 * 5 and made.stored_count({"q": (5, 7)}) == 2 * (5 + 7)
    auto = kind("lora", r="auto", max_r=3)
    assert auto.trained_count({"q": (5, 7)}) == 3 * (5 + 7), "of the largest rank"
    several = FrozenA(kind("lora", r=2, rank_pattern={"v": 4}).config)
    layers = {"0.q": (5, 7), "0.v": (3, 7)}
    assert several.trained_count(layers) == 2 * 5 + 4 * 3 and several.stored_count(layers) == 2 * 12 + 4 * 10
