"""Answers among labels are those of transformers' own constrained decoding, whatever is computed once or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from torch import nn

from cl_runner.config.schema import ModelConfig
from cl_runner.models.base import Layout, load_base, neutral_generation
from cl_runner.models.batch import Batch, Example, collate_prompts
from cl_runner.models.choose import Choice, choose
from cl_runner.models.encoding import Encoder
from cl_runner.models.forward import greedy, model_inputs
from cl_runner.models.heads import Head, head_of
from cl_runner.tasks.task import Prompt
from tests.breadth import in_turn, narrowed
from tests.models.test_forward import CPU, FAMILIES
from tests.models.test_heads import EXAMPLES, HEAD, SHARING, known, model_of
from tests.models.test_heads import LAYOUT as CAUSAL_LAYOUT
from tests.models.test_prefix import prompts_of, with_prefix
from tests.models.test_verify import TEXTS, opened

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Labels = Sequence[Sequence[int]]
# First tokens that several share, one label that begins another, one that is forced for three tokens, one alone.
NESTED = [[7], [7, 8], [7, 8, 9, 10], [7, 11, 12, 13], [14, 15, 16], [17]]
CHAINED = [[20, 21, *label] for label in NESTED]


def reference(model: nn.Module, prompts: Batch, labels: Labels, layout: Layout) -> list[list[int]]:
    """What ``generate`` says where after each beginning of a label only what goes on to one is allowed."""
    asked: Any = model
    given = model_inputs(model, prompts)
    given.pop("position_ids", None)
    skip = 1 if layout.encoder_decoder else prompts.input_ids.shape[1] if "input_ids" in given else 0
    ended = [[*label, layout.eos_id] for label in labels]

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        said = ids[skip:].tolist()
        following = {label[len(said)] for label in ended if label[: len(said)] == said and len(label) > len(said)}
        return sorted(following) or [layout.pad_id]

    how = neutral_generation(replace(layout, end_ids=(layout.eos_id,)), max(map(len, ended)))
    with torch.no_grad():
        out = asked.eval().generate(**given, generation_config=how, prefix_allowed_tokens_fn=allowed)
    rows = [row[skip:].tolist() for row in out]
    return [row[: row.index(layout.eos_id)] for row in rows]


def tree(labels: Labels, end: int) -> Choice:
    return Choice.among([[*label, end] for label in labels], end)


def label_sets(vocabulary: int) -> Any:
    """Labels of few different tokens, so that they begin alike, and some of any token."""
    few, any_ = st.integers(6, 8), st.integers(6, vocabulary - 1)
    label = st.lists(few, max_size=4) | st.lists(any_, min_size=1, max_size=3)
    return st.lists(label, min_size=1, max_size=8, unique_by=tuple)


@settings(max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("family", narrowed(FAMILIES, ["t5", "qwen2"]))
def test_as_transformers_decodes_under_the_same_constraint(
    saved: Callable[[str], Path], family: str, data: st.DataObject
) -> None:
    base, model, layouts, sources = opened(saved(family))
    layout = data.draw(st.sampled_from([base.layout, *layouts]))
    labels = data.draw(label_sets(layout.vocab_size) | st.sampled_from([NESTED, CHAINED]))
    labels = [label for label in labels if layout.eos_id not in label] or [[6 + (layout.eos_id == 6)]]
    rows = data.draw(st.lists(st.integers(0, len(sources) - 1), min_size=1, max_size=4))
    prompts = collate_prompts([Example(sources[row], []) for row in rows], layout)
    found = choose(model, prompts, tree(labels, layout.eos_id), layout)
    assert found == reference(model, prompts, labels, layout)
    assert all(answer in [list(label) for label in labels] for answer in found)


@pytest.mark.parametrize(("family", "slides"), in_turn(FAMILIES, [False, True]))
def test_behind_soft_prompts(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str, slides: bool
) -> None:
    """Also where a cache cannot be cut back, and the prompt is read again."""
    base, model, _, sources = opened(saved(family))
    if slides:
        monkeypatch.setattr("cl_runner.models.continuations.can_be_cut", lambda _: False)
    plain = collate_prompts([Example(source, []) for source in sources], base.layout)
    for prompts in (plain, with_prefix(plain, prompts_of(base, len(sources)))):
        free = greedy(model, prompts, base.layout, 4)
        told = next(row for row, ids in enumerate(free) if len(ids) == 4)
        said = free[told]  # labels along what a row says, for it to have something to decide at each token
        own = [
            said,
            *(said[:at] for at in (1, 2, 3)),
            [*said[:2], 6 + (said[2] == 6), 9],
            [*said[:3], 7 + (said[3] == 7)],
        ]
        for labels in (NESTED, CHAINED, [*own, *(label for label in NESTED if label not in own)]):
            shown: list[Batch] = []
            found = choose(model, prompts, tree(labels, base.layout.eos_id), base.layout, shown.append)
            assert found == reference(model, prompts, labels, base.layout)
            assert all(batch.condition.keys() == prompts.condition.keys() for batch in shown)
        assert found[told] == said


@pytest.mark.parametrize("family", [*SHARING, "Mistral", "Gemma 2", "BLOOM"])
def test_behind_a_head(family: str) -> None:
    """Where the family can go on from one."""
    model = model_of(family)
    prompts = known(collate_prompts(EXAMPLES, CAUSAL_LAYOUT))
    with torch.no_grad():
        head = Head.read(model, head_of(torch.tensor([HEAD]))) if family in SHARING else None
    for labels in (NESTED, CHAINED, [[7, 8], [7, 9]]):
        found = choose(model, prompts, tree(labels, CAUSAL_LAYOUT.eos_id), CAUSAL_LAYOUT, head=head)
        assert found == reference(model, replace(prompts, heads=(), lengths=()), labels, CAUSAL_LAYOUT)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_read_once_and_what_is_forced_is_not_asked(saved: Callable[[str], Path], family: str) -> None:
    base, model, _, sources = opened(saved(family))
    prompts = collate_prompts([Example(source, []) for source in sources], base.layout)
    shapes: list[tuple[int, ...]] = []  # of what the first layer of each forward is handed
    stack: Any = model.get_base_model().get_encoder() if base.encoder_decoder else model  # type: ignore[operator]
    first = next(module for module in stack.modules() if isinstance(module, LoraLayer))
    hook = first.register_forward_hook(lambda _m, inputs, _o: shapes.append(tuple(inputs[0].shape[:2])))

    def widths(labels: Labels) -> list[int]:
        shapes.clear()
        choose(model, prompts, tree(labels, base.layout.eos_id), base.layout)
        return [width for _, width in shapes]

    s, both = prompts.input_ids.shape[1], base.encoder_decoder
    assert widths([[7, 8, 9]]) == []  # one label
    assert widths([[7], [8, 9, 10], [11, 9, 10, 12]]) == [s]  # one decision
    assert widths([[6, 7, 9], [6, 8, 9]]) == ([s] if both else [s, 1])  # one, behind what is forced
    assert widths([[7, 6], [7, 8], [7, 6, 9]])[1:] in ([], [1], [1, 2])
    hook.remove()


def test_rows_that_have_ended_are_not_asked_on() -> None:
    """What is shown is what the forward is about."""
    model = model_of("LLaMA 3")
    prompts = collate_prompts(EXAMPLES * 4, CAUSAL_LAYOUT)
    vocabulary = [[token] for token in range(6, 30)]
    first = [said[0] for said in reference(model, prompts, vocabulary, CAUSAL_LAYOUT)]
    assert len(set(first)) > 1, "they all begin alike: no test"
    longer = [[first[0], 5], [first[0], 6], *([token] for token in set(first) - {first[0]})]
    shown: list[Batch] = []
    found = choose(model, prompts, tree(longer, CAUSAL_LAYOUT.eos_id), CAUSAL_LAYOUT, shown.append)
    assert found == reference(model, prompts, longer, CAUSAL_LAYOUT)
    assert [batch.size for batch in shown] == [first.count(first[0])]


def test_the_tree() -> None:
    root = tree(CHAINED, 1)
    assert root.said == (20, 21) and list(root.then) == [7, 14, 17]
    assert list(root.then[7].then) == [1, 8, 11] and root.then[7].then[1].said == (20, 21, 7, 1)
    assert root.then[7].then[11] == Choice((20, 21, 7, 11, 12, 13, 1), {})
    assert tree([[5, 6]], 1) == Choice((5, 6, 1), {})
    assert tree([[5], [5, 1, 6]], 1) == Choice((5, 1), {})  # an answer ends at its first end token
    assert tree([[]], 1) == Choice((1,), {})


@pytest.mark.parametrize("name", ["tiny-t5", "tiny-llama"])
def test_labels_of_a_task_are_encoded_as_its_targets(name: str) -> None:
    base = load_base(ModelConfig(name=name), CPU)
    encoder = Encoder(base.tokenizer, base.layout, 120, 30)
    labels = ["good", "good enough", "very good", "World", "Sci/Tech", "naïve café"]
    targets = [encoder.encode(Prompt("", "x", ""), label).target for label in labels]
    assert encoder.encode_labels(labels) == targets
    prompts = collate_prompts([encoder.encode(Prompt("", text, "\nAnswer:"), "a") for text in TEXTS], base.layout)
    found = choose(base.model, prompts, Choice.among(targets, base.eos_id), base.layout)
    assert found == reference(base.model, prompts, [target[:-1] for target in targets], base.layout)
    assert torch.is_grad_enabled()
    short = Encoder(base.tokenizer, base.layout, 120, 2)
    cut = short.encode_many([Prompt("", "x", "")], ["naïve café"], cut_target=True)[0]
    assert short.encode_labels(["naïve café"]) == [cut.target]
