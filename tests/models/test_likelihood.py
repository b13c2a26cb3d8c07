"""Likelihoods of continuations against one choice at a time: one row, no cache, no padding, the whole softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cl_runner.errors import UserError
from cl_runner.models.base import Base
from cl_runner.models.batch import Batch, Question, collate_prompts
from cl_runner.models.encoding import Encoder
from cl_runner.models.forward import model_inputs
from cl_runner.models.heads import Head, head_of
from cl_runner.models.likelihood import likelihoods
from tests.breadth import in_turn
from tests.models.test_forward import FAMILIES
from tests.models.test_heads import EXAMPLES, HEAD, SHARING, known, model_of
from tests.models.test_heads import LAYOUT as CAUSAL_LAYOUT
from tests.models.test_prefix import prompts_of, with_prefix
from tests.models.test_verify import opened

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROMPTS = ["Which is a colour?\nA. red\nB. a dog\nAnswer:", "naïve café, Zürich\nAnswer:", "x\nAnswer:"]
LETTERS = [[" A", " B"], [" A", " B", " C", " D"], [" A", " B"]]
TEXTS = [[" red", " a dog"], [" red", " red dogs", " a fox jumps", " Zürich"], [" the quick brown fox", " x"]]


def naive(model: nn.Module, base: Base, prompt: Batch, ids: Sequence[int]) -> tuple[float, bool]:
    """Of one prompt by itself: log p token by token, and whether each is the arg-max."""
    asked: Any = model
    logs, greedy = 0.0, True
    for at, token in enumerate(ids):
        said = list(ids[:at])
        given = model_inputs(model, prompt)
        if base.encoder_decoder:
            start = torch.tensor([[base.layout.decoder_start_id or 0, *said]])
            scores = asked(**given, decoder_input_ids=start, use_cache=False).logits[0, -1]
        else:
            behind = torch.tensor([said], dtype=torch.long)
            if "inputs_embeds" in given:
                embedded = asked.get_input_embeddings()(behind)
                read = {"inputs_embeds": torch.cat([given["inputs_embeds"], embedded], 1)}
            else:
                read = {"input_ids": torch.cat([given["input_ids"], behind], 1)}
            scores = asked(**read, use_cache=False).logits[0, -1]
        shares = scores.double().exp() / scores.double().exp().sum()
        logs += float(shares[token].log())
        greedy &= int(scores.argmax()) == token
    return logs, greedy


def check(model: nn.Module, base: Base, questions: Sequence[Question], prompts: Batch, alone: Sequence[Batch]) -> None:
    shown: list[Batch] = []
    continuations = [question.continuations for question in questions]
    found = likelihoods(model, prompts, continuations, base.layout, shown.append)
    assert [len(row) for row in found] == [len(each) for each in continuations]
    with torch.no_grad():
        for row, of, prompt in zip(found, continuations, alone, strict=True):
            expected = [naive(model, base, prompt, ids) for ids in of]
            assert [each.log for each in row] == pytest.approx([log for log, _ in expected], abs=2e-4)
            assert [each.greedy for each in row] == [greedy for _, greedy in expected]
    assert all(batch.condition.keys() == prompts.condition.keys() for batch in shown)


@pytest.mark.parametrize(("family", "slides"), in_turn(FAMILIES, [False, True]))
def test_as_one_choice_at_a_time(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str, slides: bool
) -> None:
    """Letters and texts, rows of different numbers of choices, behind soft prompts too, and without a cache to cut."""
    base, model, _, _ = opened(saved(family))
    if slides:
        monkeypatch.setattr("cl_runner.models.continuations.can_be_cut", lambda _: False)
    for continuations in (LETTERS, TEXTS):
        questions = Encoder(base.tokenizer, base.layout, 70, 30).questions(PROMPTS, continuations, 100)
        examples = [question.prompt for question in questions]
        plain = collate_prompts(examples, base.layout)
        alone = [collate_prompts([example], base.layout) for example in examples]
        check(model, base, questions, plain, alone)
        soft = prompts_of(base, len(examples))
        prefixed = with_prefix(plain, soft)
        check(model, base, questions, prefixed, [with_prefix(each, soft[k : k + 1]) for k, each in enumerate(alone)])


@pytest.mark.parametrize("family", SHARING)
def test_behind_a_head(family: str) -> None:
    model = model_of(family)
    prompts = known(collate_prompts(EXAMPLES, CAUSAL_LAYOUT))
    with torch.no_grad():
        head = Head.read(model, head_of(torch.tensor([HEAD])))
    continuations = [[[7], [8, 9], [8, 10, 11]] for _ in EXAMPLES]
    found = likelihoods(model, prompts, continuations, CAUSAL_LAYOUT, head=head)
    whole = likelihoods(model, collate_prompts(EXAMPLES, CAUSAL_LAYOUT), continuations, CAUSAL_LAYOUT)
    for row, other in zip(found, whole, strict=True):
        assert [each.log for each in row] == pytest.approx([each.log for each in other], abs=2e-4)


def test_what_greedy_decoding_says_is_greedy(saved: Callable[[str], Path]) -> None:
    base, model, _, _ = opened(saved("llama"))
    questions = Encoder(base.tokenizer, base.layout, 70, 30).questions(PROMPTS[:1], LETTERS[:1], 100)
    prompts = collate_prompts([questions[0].prompt], base.layout)
    first = int(model(prompts.input_ids).logits[0, -1].argmax())
    [found] = likelihoods(model, prompts, [[[first], [first + 1]]], base.layout)
    assert [each.greedy for each in found] == [True, False] and found[0].log > found[1].log


@pytest.mark.parametrize("family", FAMILIES)
def test_letters_take_one_look_at_a_prompt(saved: Callable[[str], Path], family: str) -> None:
    base, model, _, _ = opened(saved(family))
    questions = Encoder(base.tokenizer, base.layout, 70, 30).questions(PROMPTS, LETTERS, 100)
    prompts = collate_prompts([question.prompt for question in questions], base.layout)
    calls: list[int] = []
    asked: Any = model
    hook = asked.get_base_model().register_forward_hook(lambda *_: calls.append(1))
    likelihoods(model, prompts, [[[7], [8], [9]]] * 3, base.layout)
    hook.remove()
    assert len(calls) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_continuations_are_tokenised_as_the_harness_does(saved: Callable[[str], Path], family: str) -> None:
    base, *_ = opened(saved(family))
    encoder = Encoder(base.tokenizer, base.layout, 70, 30)
    for question, prompt, texts in zip(encoder.questions(PROMPTS, TEXTS, 100), PROMPTS, TEXTS, strict=True):
        context = base.tokenizer(prompt)["input_ids"]
        assert question.prompt.source == context and not question.prompt.target
        for ids, text in zip(question.continuations, texts, strict=True):
            if base.encoder_decoder:
                assert list(ids) == base.tokenizer(text, add_special_tokens=False)["input_ids"]
            else:
                assert [*context, *ids] == base.tokenizer(prompt + text)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_is_too_long_loses_its_beginning(saved: Callable[[str], Path], family: str) -> None:
    base, *_ = opened(saved(family))
    encoder = Encoder(base.tokenizer, base.layout, 70, 30)
    [whole], [cut] = (encoder.questions(PROMPTS[:1], TEXTS[:1], most) for most in (1000, 12))
    begins, ends = len(encoder.before), len(encoder.after)
    assert cut.prompt.truncated and not whole.prompt.truncated
    longest = max(len(ids) for ids in cut.continuations)
    assert len(cut.prompt.source) + (0 if base.encoder_decoder else longest - 1) == 12
    assert cut.prompt.source[:begins] == whole.prompt.source[:begins]
    rest = len(cut.prompt.source) - begins
    assert cut.prompt.source[begins:] == whole.prompt.source[-rest:] and ends <= rest
    with pytest.raises(UserError, match=r"^row 0: a choice has \d+ tokens, over the model's 3$"):
        encoder.questions(PROMPTS[:1], [[" the quick brown fox jumps over", " x"]], 3)
