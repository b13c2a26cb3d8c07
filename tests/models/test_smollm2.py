"""A real model, where its folder is at hand: what scripts/get_smollm2.sh made."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from cl_runner.config.schema import ModelConfig
from cl_runner.models.base import Base, load_base
from cl_runner.models.encoding import Encoder
from cl_runner.tasks.task import Prompt
from tests.command_line import call, results

REPO = Path(__file__).parents[2]
FOLDER = os.environ.get("CL_RUNNER_SMOLLM2") or str(REPO / "smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("CL_RUNNER_SMOLLM2") and not Path(FOLDER).is_dir(),
        reason="no SmolLM2: scripts/get_smollm2.sh smollm2 in the checkout, or CL_RUNNER_SMOLLM2=FOLDER",
    ),
]


@pytest.fixture(scope="module")
def smollm2() -> Base:
    return load_base(ModelConfig(name=FOLDER), torch.device("cpu"), REPO, chat_template=True)


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
    assert (smollm2.layout.end_ids, smollm2.pad_id, len(tokenizer)) == ((2,), 2, 49152)


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


def test_prompts_in_its_chat_template(smollm2: Base) -> None:
    encoder = Encoder(smollm2.tokenizer, smollm2.layout, chat=smollm2.chat)
    for prompt in (Prompt("Task:TC\nOption: World \n", "Café <b>123</b>", "\nAnswer:"), Prompt("", "  a  ", " ")):
        chat = [{"role": "user", "content": str(prompt)}]
        ids = smollm2.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        example = encoder.encode(prompt, "Science or Technology")
        assert example.source == ids
        assert smollm2.tokenizer.decode(example.target) == "Science or Technology<|im_end|>"
    said = smollm2.tokenizer.decode(ids)
    assert said.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM,")
    assert said.endswith("<|im_start|>user\n  a   <|im_end|>\n<|im_start|>assistant\n")


def test_a_run_on_it(tmp_path: Path) -> None:
    """Two stages; what was verified is what would be generated; gone on with, the same bits."""
    (tmp_path / "two.yaml").write_text("name: two\ntasks: [amazon, agnews]\n")
    sets = ("data.max_train=8", "data.max_test=3", "training.global_batch=4", "training.micro_batch=4",
            "training.lr=2e-3", "eval.max_new_tokens=8")  # fmt: skip
    given = ("train", "--order", "two.yaml", "--preset", "smollm2-q4", "--model", FOLDER, "--method", "seqlora",
             "--data", "synthetic", "--name", "it", *(word for each in sets for word in ("--set", each)))  # fmt: skip
    done = call(*given, cwd=tmp_path)
    assert done.code == 0, done.err
    run = tmp_path / "runs/it"
    before = results(run)
    generated = call("eval", "it", "--set", "eval.mode=generate", "--json", cwd=tmp_path)
    assert generated.json["differing_rows"] == {"amazon": [], "agnews": []}, generated.err
    shutil.rmtree(run / "stages/02-agnews")
    assert call(*given, cwd=tmp_path).code == 0 and results(run) == before
