"""The embedded models as files: small, loadable by plain transformers, and a tokenizer that loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import cl_runner
from cl_runner.tasks import benchmark
from cl_runner.tasks.synthetic import TASKS, sample

FOLDER = Path(cl_runner.__file__).parent / "models" / "embedded"
NAMES = ["tiny-t5", "tiny-llama"]
TOKENIZERS = {name: AutoTokenizer.from_pretrained(FOLDER / name) for name in NAMES}
NASTY = [
    "", " ", "  two  spaces  ", "\n\n\ttabs\r\n", "</s>", "<pad> <s> <unk> <extra_id_0>", "▁ ▁x", "Ġ Ċ", "a</s>b",
    "\x00\x01\x7f", "naïve café", "e\u0301 is not é", "日本語 текст عربى", "🎉 \U0001f469\u200d\U0001f467",
    "\u200b\ufeff\u2028", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "{0} {label} %s $x",
]  # fmt: skip


def load(name: str) -> Any:
    kind = AutoModelForSeq2SeqLM if name == "tiny-t5" else AutoModelForCausalLM
    return kind.from_pretrained(FOLDER / name, dtype=torch.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", NASTY)
def test_round_trip_of_nasty_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_round_trip_of_any_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", NAMES)
def test_labels_go_through_and_are_short(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    for task in TASKS:
        for label in benchmark.get(task).labels or []:
            ids = tokenizer(label, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == label
            assert len(ids) <= len(label.split()), f"{label} is cut into {tokenizer.tokenize(label)}"


@pytest.mark.parametrize("name", NAMES)
def test_a_label_reads_the_same_alone_as_in_the_options(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    prompt = tokenizer(str(benchmark.get("agnews").prompt("x")), add_special_tokens=False)["input_ids"]
    for label in ("World", "Sports", "Business"):
        assert set(tokenizer(label, add_special_tokens=False)["input_ids"]) <= set(prompt)


@pytest.mark.parametrize("name", NAMES)
def test_files(name: str) -> None:
    folder = FOLDER / name
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 6 * 2**20
    with safe_open(weights, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    assert (folder / "README.md").read_text(encoding="utf-8").startswith("---\nlicense:")
    for page in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        text = (folder / page).read_text(encoding="utf-8")
        assert isinstance(json.loads(text), dict)
        assert "/tmp" not in text and "/work" not in text and "/home" not in text


def test_special_tokens() -> None:
    t5, llama = TOKENIZERS["tiny-t5"], TOKENIZERS["tiny-llama"]
    assert t5("x")["input_ids"][-1] == t5.eos_token_id
    assert llama("x")["input_ids"][0] == llama.bos_token_id
    assert llama("x")["input_ids"][-1] != llama.eos_token_id
    assert llama.pad_token_id not in {llama.eos_token_id, llama.bos_token_id, llama.unk_token_id}
    assert llama.padding_side == "left"
    batch = llama(["a", "a b c"], padding=True)["input_ids"]
    assert batch[0][0] == llama.pad_token_id and batch[1][0] == llama.bos_token_id


def test_tiny_t5_answers() -> None:
    model, tokenizer = load("tiny-t5"), TOKENIZERS["tiny-t5"]
    assert next(model.parameters()).dtype == torch.float32
    prompt = tokenizer(str(benchmark.get("agnews").prompt(sample("agnews", "test", 1)[0].text)), return_tensors="pt")
    loss = model(**prompt, labels=tokenizer("Sports", return_tensors="pt")["input_ids"]).loss
    assert torch.isfinite(loss)


def test_tiny_llama_answers_the_same_with_left_padding() -> None:
    model, tokenizer = load("tiny-llama"), TOKENIZERS["tiny-llama"]
    assert next(model.parameters()).dtype == torch.float32
    prompts = [str(benchmark.get("agnews").prompt(row.text)) for row in sample("agnews", "test", 2)]
    with torch.no_grad():
        alone = model(**tokenizer(prompts[0], return_tensors="pt")).logits[0, -1]
        padded = tokenizer([prompts[0], prompts[0] + " " + prompts[1]], padding=True, return_tensors="pt")
        together = model(**padded, position_ids=(padded["attention_mask"].cumsum(1) - 1).clamp(min=0)).logits[0, -1]
    assert torch.isfinite(alone).all()
    torch.testing.assert_close(alone, together, atol=1e-3, rtol=1e-3)


def test_tiny_t5_has_learned_its_auxiliary_task() -> None:
    """The base names the topic of texts that it has not seen: what adapters build on."""
    model, tokenizer = load("tiny-t5"), TOKENIZERS["tiny-t5"]
    rows = sample("pretraining-topic", "test", 54)
    task = benchmark.build({"name": "digest", "kind": "TC", "labels": sorted({row.label for row in rows})[::2]})
    rows = [row for row in rows if row.label in (task.labels or [])]
    right = 0
    for row in rows:
        ids = model.generate(
            **tokenizer(str(task.prompt(row.text)), return_tensors="pt"), max_new_tokens=4, do_sample=False
        )
        right += tokenizer.decode(ids[0], skip_special_tokens=True) == row.label
    assert right >= 0.8 * len(rows), f"{right} of {len(rows)}"
