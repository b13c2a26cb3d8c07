"""An instruct model's own chat template: a prompt as what the user says, behind which the model answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from cl_runner.errors import UserError
from cl_runner.models.tokenizer import first_line
from cl_runner.tasks.task import Prompt

_ASKED, _ANSWERED = "what the user asks", "what is answered"
# The day that a template is told where it writes today's, so that a run asks the same every day; LLaMA's own default.
_DAY = datetime(2024, 7, 26)
_TODAY = "{%- macro strftime_now(format) -%}{{ days.get(format, days['']) }}{%- endmacro %}{{ '' }}"


@dataclass(frozen=True)
class ChatTemplate:
    """What a tokenizer's template writes around one turn of the user, with the beginning of the answer behind it.

    A default system prompt, where the template has one, is the model's own and stays.
    """

    tokenizer: PreTrainedTokenizerBase
    where: str  # which model, for messages
    text: str  # the template itself
    before: str
    after: str
    end_id: int | None  # the token that ends a turn of the model's; None: the template has no special token there

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, encoder_decoder: bool, where: str) -> ChatTemplate:
        """The template of a model, tried once. Raises UserError where there is none, or none that can be used."""
        if encoder_decoder:
            raise UserError(f"data.chat_template: {where} is an encoder-decoder model, which has none; set it to false")
        if not tokenizer.chat_template:
            raise UserError(
                f"data.chat_template: the tokenizer of {where} has none; take an instruct model, or set it to false"
            )
        question, answer = {"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}
        with _running(where):
            text = tokenizer.get_chat_template()
            [asked] = _written(tokenizer, text, [[question]], asking=True)
            [told] = _written(tokenizer, text, [[question, answer]], asking=False)
        if asked.count(_ASKED) != 1:
            raise UserError(f"data.chat_template: the template of {where} does not write once what the user says")
        before, _, after = asked.partition(_ASKED)
        behind = told.rpartition(_ANSWERED)[2] if _ANSWERED in told else ""
        return cls(tokenizer, where, text, before, after, _end_of_turn(tokenizer, behind))

    def around(self, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        """The prompts as the template writes them, its own part in head and tail. Raises UserError.

        Many templates leave out white space at the ends of what the user says; others must leave it as it is.
        """
        chats = [[{"role": "user", "content": str(prompt)}] for prompt in prompts]
        with _running(self.where):
            found = _written(self.tokenizer, self.text, chats, asking=True)
        for prompt, written in zip(prompts, found, strict=True):
            for head, text, tail in (prompt, _stripped(prompt)):
                turn = Prompt(self.before + head, text, tail + self.after)
                if str(turn) == written:
                    yield turn
                    break
            else:
                raise UserError(
                    f"data.chat_template: the template of {self.where} changes what an input says "
                    f"({str(prompt)[:60]!r}); set it to false"
                )


@contextmanager
def _running(where: str) -> Iterator[None]:
    """A template is a program, and may fail in any way. Raises UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(f"data.chat_template: the template of {where} cannot be used ({first_line(error)})") from error


def _written(
    tokenizer: PreTrainedTokenizerBase, template: str, chats: Sequence[Sequence[dict[str, str]]], *, asking: bool
) -> list[str]:
    """Chats as a template writes them; asking: with the beginning of an answer behind."""
    options: dict[str, Any] = {}
    if "strftime_now" in template:
        formats = re.findall(r"strftime_now\(\s*[\"'](.*?)[\"']", template)
        options = {"days": {"": "26 Jul 2024", **{form: _DAY.strftime(form) for form in formats}}}
        template = _TODAY + template
    written: list[str] = tokenizer.apply_chat_template(
        [list(chat) for chat in chats], chat_template=template, tokenize=False, add_generation_prompt=asking, **options
    )
    return written


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, behind: str) -> int | None:
    """The first special token of what stands behind an answer."""
    ids: list[int] = tokenizer(behind, add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((i for i in ids if i in special), None)


def _stripped(prompt: Prompt) -> Prompt:
    """Without white space at its ends, whichever part it is in."""
    whole = str(prompt)
    start = len(whole) - len(whole.lstrip())
    end = max(len(whole.rstrip()), start)
    inner = [min(max(at, start), end) for at in (len(prompt.head), len(prompt.head + prompt.text))]
    return Prompt(*(whole[a:b] for a, b in pairwise([start, *inner, end])))
