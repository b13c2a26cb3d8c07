"""Verified answers are greedy answers: gold labels made of what the model says, changed, cut and extended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from torch import nn

from cl_runner.config.schema import ModelConfig
from cl_runner.models.base import Base, Layout, load_base
from cl_runner.models.batch import Batch, Example, collate_prompts
from cl_runner.models.encoding import Encoder
from cl_runner.models.forward import greedy
from cl_runner.models.verify import answers
from cl_runner.tasks.task import Prompt
from tests.breadth import narrowed
from tests.models.test_forward import CPU, FAMILIES, adapted, load

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LIMIT = 8
TEXTS = ("a fox", "Zürich {braces}", "The quick brown fox jumps over the lazy dog, naïve café", "World, Sports, A", "x")


@lru_cache(maxsize=8)
def opened(folder: Path) -> tuple[Base, nn.Module, tuple[Layout, ...], list[list[int]]]:
    """A model under LoRA, layouts whose end token the model itself says (also as padding), and five prompts."""
    base = load(folder)
    model = adapted(base)
    encoder = Encoder(base.tokenizer, base.layout, 70, 30)
    sources = [encoder.encode(Prompt("", text, "\nAnswer:"), "A").source for text in TEXTS]
    prompts = collate_prompts([Example(source, []) for source in sources], base.layout)
    free = greedy(model, prompts, base.layout, LIMIT)
    ends = sorted({token for answer in free for token in answer[1:4]})
    layouts = tuple(
        replace(base.layout, eos_id=end, end_ids=(end, other), pad_id=pad)
        for end, other in zip(ends, [*ends[1:], ends[0]], strict=True)
        for pad in (end, 5)
    )
    return base, model, layouts, sources


def golds(said: list[int], end: int, other: int, token: int, at: int) -> list[list[int]]:
    """Gold ids that are what the model says, or nearly so."""
    at = at % (len(said) + 1)
    changed = [*said[:at], token, *said[at + 1 :]]
    return [
        [*said, end],
        [*changed, end],
        [*said[:at], end],  # a prefix of it: only the end token tells them apart
        [*said, token, end],
        [*said[:at], token, *said[at:], end],
        [*said, other],  # another end token of the model's
        [*said[:at], other, *said[at:], end],  # an end token within: never said whole
        [],  # a label that was cut
    ]


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("family", narrowed(FAMILIES, ["t5", "llama"]))
def test_answers_are_those_of_greedy(saved: Callable[[str], Path], family: str, data: st.DataObject) -> None:
    _, model, layouts, sources = opened(saved(family))
    layout = data.draw(st.sampled_from(layouts))
    limit = data.draw(st.integers(1, LIMIT))
    rows = data.draw(st.lists(st.integers(0, len(sources) - 1), min_size=1, max_size=4))
    prompts = collate_prompts([Example(sources[row], []) for row in rows], layout)
    expected = greedy(model, prompts, layout, limit)
    targets = []
    for said in expected:
        token = data.draw(st.integers(6, layout.vocab_size - 1))
        choices = golds(said, layout.eos_id, layout.end_ids[1], token, data.draw(st.integers(0, LIMIT)))
        targets.append(data.draw(st.sampled_from(choices)))
    found, verified = answers(model, prompts, targets, layout, limit)
    assert found == expected
    for said, target, yes in zip(expected, targets, verified, strict=True):
        assert yes == (len(said) < len(target) <= limit and target[:-1] == said and target[-1] in layout.end_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_right_is_not_decoded_and_no_prompt_is_read_twice(saved: Callable[[str], Path], family: str) -> None:
    base, model, layouts, sources = opened(saved(family))
    layout = layouts[0]
    prompts = collate_prompts([Example(source, []) for source in sources], layout)
    right = [[*said, layout.eos_id] for said in greedy(model, prompts, layout, LIMIT)]
    ended = [row for row, target in enumerate(right) if len(target) <= LIMIT]
    assert ended, "the model says no end at all: no test"
    widths: list[int] = []  # of what the first layer is handed
    first = next(module for module in model.modules() if isinstance(module, LoraLayer))
    hook = first.register_forward_hook(lambda _m, inputs, _o: widths.append(inputs[0].shape[1]))
    shown: list[Batch] = []
    _, verified = answers(model, prompts.slice(ended), [right[i] for i in ended], layout, LIMIT, shown.append)
    assert verified == [True] * len(ended) and not shown
    assert len(widths) <= (1 if base.encoder_decoder else 2)  # the prompt, and the gold ids behind it
    widths.clear()
    answers(model, prompts, [*right[:-1], []], layout, LIMIT, shown.append)
    hook.remove()
    assert [batch.size for batch in shown] == [len(sources) - len([row for row in ended if row != len(sources) - 1])]
    assert widths[0] == prompts.input_ids.shape[1]
    assert max(widths[1:], default=0) < prompts.input_ids.shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_poisoned_generation_config(saved: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """Verification knows nothing of penalties and forced tokens; so nothing of the kind may reach decoding."""
    folder = shutil.copytree(saved(family), tmp_path / "model")
    poison = {"repetition_penalty": 9.0, "min_length": 40, "forced_bos_token_id": 9, "num_beams": 3, "max_length": 2}
    (folder / "generation_config.json").write_text(json.dumps(poison))
    _, clean, layouts, sources = opened(saved(family))
    poisoned = adapted(load(folder))
    layout = layouts[0]
    prompts = collate_prompts([Example(source, []) for source in sources], layout)
    expected = greedy(clean, prompts, layout, LIMIT)
    targets = [[*said, layout.eos_id] for said in expected]
    targets[0] = [*targets[0][:1], layout.eos_id]
    assert answers(poisoned, prompts, targets, layout, LIMIT)[0] == expected


def test_a_label_of_unknown_tokens() -> None:
    """A gold of ``<unk>`` is verified only where the model says ``<unk>``; its text is then what generation gives."""
    base = load_base(ModelConfig(name="tiny-t5"), CPU)
    unknown = base.tokenizer.unk_token_id
    sources = [base.tokenizer(text)["input_ids"] for text in TEXTS]
    prompts = collate_prompts([Example(source, []) for source in sources], base.layout)
    expected = greedy(base.model, prompts, base.layout, LIMIT)
    found, verified = answers(base.model, prompts, [[unknown, base.eos_id]] * len(sources), base.layout, LIMIT)
    assert found == expected and verified == [said == [unknown] for said in expected]


def test_a_cache_that_slid_on_is_not_cut(saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the prompt's keys and values are gone, the row is decoded from its prompt."""
    _, model, layouts, sources = opened(saved("llama"))
    layout = layouts[0]
    prompts = collate_prompts([Example(source, []) for source in sources], layout)
    expected = greedy(model, prompts, layout, LIMIT)
    monkeypatch.setattr("cl_runner.models.verify.can_be_cut", lambda _: False)
    assert answers(model, prompts, [[7, layout.eos_id]] * len(sources), layout, LIMIT)[0] == expected


@pytest.mark.parametrize("name", ["tiny-t5", "tiny-llama"])
def test_real_labels_on_the_embedded_models(name: str) -> None:
    """Tokenised as in a run, half of them what the model says."""
    base = load_base(ModelConfig(name=name), CPU)
    encoder = Encoder(base.tokenizer, base.layout, 120, 30)
    texts = [f"Option: good, bad, world affairs\n{word} and more {word}\nAnswer:" for word in "abcdefgh"]
    plain = [encoder.encode(Prompt("", text, ""), "good") for text in texts]
    prompts = collate_prompts(plain, base.layout)
    expected = greedy(base.model, prompts, base.layout, 50)
    labels: Sequence[str] = [encoder.decode(ids) if i % 2 else "bad" for i, ids in enumerate(expected)]
    examples = encoder.encode_many([Prompt("", t, "") for t in texts], [label or "good" for label in labels], True)
    targets: list[Any] = [[] if example.target_cut else example.target for example in examples]
    found, _ = answers(base.model, prompts, targets, base.layout, 50)
    assert found == expected
    assert torch.is_grad_enabled()
