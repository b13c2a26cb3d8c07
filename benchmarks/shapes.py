"""Models of a published size without their weights, and rows of a published length without their texts.

Weights are random, drawn straight on the device. Random weights never answer right, so the model is rigged: embeddings
are enlarged until a token's own dominates the residual stream, and the head's rows for a short chain of tokens are the
embeddings of the tokens before them. Greedy decoding then says that chain after any prompt, whatever the layers in
between compute (they compute all of it). Gold labels are the chain for 80 % of the rows and another label of the same
length for the rest: about as many answers are right as on the benchmark.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from benchmarks.world import World, make
from cl_runner.config.schema import RunConfig
from cl_runner.models.base import Base, Layout, neutral_generation
from cl_runner.models.batch import Example
from cl_runner.tasks import benchmark

SHAPES: dict[str, dict[str, Any]] = {
    "tiny-shape": {
        "vocab_size": 512, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
    },
    "t5-base": {
        "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12,
    },
    "t5-large": {
        "vocab_size": 32128, "d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16,
    },
    "tiny-llama-shape": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    },
    "llama-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
}  # fmt: skip

END, START = 1, 0
LAST = 5  # the last token of a decoder-only prompt
ANSWER = (10, 11, 12, END)
OTHER = (20, 11, 12, END)
RIGHT = 0.8

# Rows of the benchmark: train, test.
ROWS = {"dbpedia": (14000, 7600), "amazon": (5000, 7600), "yahoo": (10000, 7600), "agnews": (4000, 7600)}
# Log-normal fit of words a text: mean and deviation of the logarithm, from samples of the benchmark's own files.
# There was none of yahoo at hand: amazon's stands in for it.
WORDS = {"dbpedia": (3.81, 0.51), "amazon": (4.25, 0.58), "yahoo": (4.25, 0.58), "agnews": (3.65, 0.24)}
TOKENS_A_WORD = 1.3  # an estimate, for English under a vocabulary of 32,000 pieces
LONGEST = 512


def random_base(shape: str, device: str) -> Base:
    """A rigged model of a shape: bf16 on a GPU, fp32 on the CPU."""
    values = SHAPES[shape]
    common = {"pad_token_id": 0, "eos_token_id": END}
    encoder_decoder = "d_model" in values
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model: Any = (
                T5ForConditionalGeneration(T5Config(**values, **common, decoder_start_token_id=START, dropout_rate=0.1))
                if encoder_decoder
                else LlamaForCausalLM(LlamaConfig(**values, **common, bos_token_id=2, max_position_embeddings=2048))
            )
            _rig(model, first=START if encoder_decoder else LAST)
    finally:
        torch.set_default_dtype(usual)
    model.requires_grad_(False)
    model.eval()
    start = START if encoder_decoder else None
    layout = Layout(encoder_decoder, 0, END, (END,), start, values["vocab_size"])
    model.generation_config = neutral_generation(layout)
    return Base(model, None, layout, shape, "random weights")


@torch.no_grad()
def _rig(model: Any, first: int) -> None:
    """Make greedy decoding say ``ANSWER``."""
    embeddings = model.get_input_embeddings().weight
    embeddings.normal_(std=10.0)
    head = nn.Linear(embeddings.shape[1], embeddings.shape[0], bias=False)
    head.weight.normal_(std=0.1)
    for before, after in zip((first, *ANSWER), ANSWER, strict=False):
        head.weight[after] = embeddings[before] / 10
    model.lm_head = head


class Ids:
    """Stands in for an encoder: ids are their own text."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def random_world(shape: str, device: str, positions: int, *, batch: int, micro: int, lr: float = 1e-6) -> World:
    """A world of that shape: LoRA r 8 on query and value, bf16 on a GPU.

    The rate is small so that the model stays rigged; a step costs the same at any rate.
    """
    config = RunConfig.model_validate(
        {
            "adapter": {"r": 8, "alpha": 32, "dropout": 0.1},
            "training": {"lr": lr, "global_batch": batch, "micro_batch": micro},
            "eval": {"max_new_tokens": 50},
        }
    )
    return make(random_base(shape, device), Ids(), config, device, device == "cuda", positions)


def source_lengths(task: str, count: int, data_dir: Path | None, seed: int = 0) -> list[int]:
    """Input tokens of so many rows: words of the prompt and of the text, times 1.3, cut at 512."""
    dice = random.Random(f"{task}/{seed}")
    known = benchmark.get(task)
    prompt = len(str(known.prompt("")).split())
    file = data_dir / known.kind / task / "train.json" if data_dir else None
    if file is not None and file.exists():
        words = [len(row["sentence"].split()) for row in json.loads(file.read_text())]
        drawn = [float(dice.choice(words)) for _ in range(count)]
    else:
        mean, deviation = WORDS[task]
        drawn = [dice.lognormvariate(mean, deviation) for _ in range(count)]
    return [min(LONGEST, round(TOKENS_A_WORD * (prompt + words))) for words in drawn]


def rows(
    base: Base, tasks: Sequence[str], count: int, data_dir: Path | None = None, right: float = 1.0, seed: int = 0
) -> list[Example]:
    """``count`` rows of each task; a share of ``right`` of them has the label that the model says."""
    found = []
    for task in tasks:
        dice = random.Random(f"rows/{task}/{seed}")
        for length in source_lengths(task, count, data_dir, seed):
            ids = dice.choices(range(30, base.layout.vocab_size), k=length - 1)
            last = END if base.encoder_decoder else LAST
            found.append(Example([*ids, last], list(ANSWER if dice.random() < right else OTHER)))
    return found


def longest_rows(count: int) -> list[Example]:
    """Rows as long as any may be: what memory has to suffice for."""
    return [Example([30] * LONGEST, list(ANSWER)) for _ in range(count)]
