"""A real model, where its folder is at hand: what scripts/get_smollm2.sh made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cl_runner.config.schema import ModelConfig
from cl_runner.models.base import Base, load_base

FOLDER = os.environ.get("CL_RUNNER_SMOLLM2", "")
pytestmark = pytest.mark.skipif(
    not FOLDER, reason="no SmolLM2: scripts/get_smollm2.sh FOLDER, then CL_RUNNER_SMOLLM2=FOLDER"
)


@pytest.fixture(scope="module")
def smollm2() -> Base:
    return load_base(ModelConfig(name=FOLDER), torch.device("cpu"), Path(__file__).parents[2])


def test_it_is_the_model(smollm2: Base) -> None:
    model, config = smollm2.model, smollm2.model.config
    assert (model.num_parameters(), model.dtype) == (134_515_008, torch.float32)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (30, 576, 9)
    assert (config.num_key_value_heads, config.rope_parameters["rope_theta"]) == (3, 1e5)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = smollm2.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert (smollm2.eos_id, smollm2.pad_id, len(tokenizer)) == (2, 2, 49152)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("a  7", [81, 256, 39]),  # white space before a digit is one piece, since digits go first
    ],
)
def test_ids_are_those_of_the_published_tokenizer(smollm2: Base, text: str, ids: list[int]) -> None:
    assert smollm2.tokenizer(text)["input_ids"] == ids


def test_it_knows_the_capital_of_france(smollm2: Base) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = smollm2.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        answer = smollm2.model.generate(**asked, max_new_tokens=20)[0, asked["input_ids"].shape[1] :]
    assert smollm2.tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
