"""Prompts and labels as token ids, cut to length without losing either end of the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from cl_runner.errors import UserError
from cl_runner.models.base import Layout
from cl_runner.models.batch import Example, Question
from cl_runner.models.chat import ChatTemplate
from cl_runner.models.vocabulary import decoded
from cl_runner.tasks.task import Prompt

_CHUNK = 1024  # texts a call to the tokenizer


class Encoder:
    """Turns prompts and labels into examples of at most ``max_source`` and ``max_target`` tokens.

    The source is the whole prompt string tokenised at once, with the tokenizer's own special tokens around it (T5:
    ``</s>`` behind; LLaMA: ``<s>`` before; never an end token behind a decoder-only prompt). The target is the label
    tokenised by itself and the end token, so that training and evaluation mean the same ids.

    ``truncate="text"`` drops tokens from the end of the prompt's text; ``"tail"`` from the end of the whole string,
    as transformers does; ``"head"`` from its beginning. ``"reference"`` is what the reference code's collator makes of
    it: the first ``max_source`` ids as text, tokenised again and cut by ``"tail"``; of encoder-decoder models alone,
    others raise UserError.

    With a chat template the prompt is one turn of the user in it, and the whole is tokenised at once: the template says
    all special tokens itself. It counts in ``max_source`` and is never cut; ``"tail"`` and ``"head"`` are then those of
    the prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
        max_source: int = 512,
        max_target: int = 50,
        truncate: Literal["text", "tail", "head", "reference"] = "text",
        chat: ChatTemplate | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self.layout = layout
        self.max_source = max_source
        self.max_target = max_target
        self.truncate = truncate
        if truncate == "reference" and not layout.encoder_decoder:
            raise UserError(
                "data.truncate: reference is how the reference code cuts inputs of encoder-decoder models; a "
                "decoder-only one takes tail or text"
            )
        self.before, self.after = self._special_ids() if chat is None else ([], [])
        self._check_positions()

    def encode(self, prompt: Prompt, label: str, cut_target: bool = False) -> Example:
        """One example; see ``encode_many``."""
        return self.encode_many([prompt], [label], cut_target)[0]

    def encode_many(self, prompts: Sequence[Prompt], labels: Sequence[str], cut_target: bool = False) -> list[Example]:
        """Examples of many rows, in order.

        A label of more than ``max_target`` tokens (its end token included) raises UserError naming it, or, with
        ``cut_target``, loses its last tokens and says so in the example. A prompt whose head and tail alone exceed
        ``max_source``, or that has no token at all, raises UserError.
        """
        if len(prompts) != len(labels):
            raise ValueError(f"{len(labels)} labels for {len(prompts)} prompts")
        targets = self._targets(labels, cut_target)
        examples = []
        for prompt, label, (source, truncated) in zip(prompts, labels, self._sources(prompts), strict=True):
            if not source:
                raise UserError(f"an input is empty (its text is {prompt.text!r}); the model needs at least one token")
            target, target_cut = targets[label]
            examples.append(Example(source, target, truncated, target_cut))
        return examples

    def encode_labels(self, labels: Sequence[str]) -> list[list[int]]:
        """Ids of different labels as targets, in order; one that is too long is cut."""
        return [ids for ids, _ in self._targets(labels, cut=True).values()]

    def questions(self, prompts: Sequence[str], continuations: Sequence[Sequence[str]], most: int) -> list[Question]:
        """Prompts as they stand (in no chat template) and their continuations, as ``models.likelihood`` has them.

        A prompt loses its beginning, but for the special tokens, where it and its longest continuation are over
        ``most`` tokens. Raises UserError, by number, for a continuation without a token, and for one that is too long.
        """
        before, after = self._special_ids()
        bare = self._ids(list(prompts))
        found = []
        for number, (prompt, ids, texts) in enumerate(zip(prompts, bare, continuations, strict=True)):
            if self.layout.encoder_decoder:
                said = self._ids(list(texts))
                room = most - len(before) - len(after)
            else:
                said = [each[len(ids) :] for each in self._ids([prompt + text for text in texts])]
                room = most - len(before) - max(len(each) - 1 for each in said)
            if not all(said):
                raise UserError(
                    f"row {number}: {texts[said.index([])]!r} is no token of this model's behind its prompt"
                )
            if room < 1 or (self.layout.encoder_decoder and max(map(len, said)) > most):
                raise UserError(f"row {number}: a choice has {max(map(len, said))} tokens, over the model's {most}")
            source = self._checked(before + ids[-room:] + after)
            found.append(Question(Example(source, [], len(ids) > room), [self._checked(each) for each in said]))
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of answer ids, special tokens left out."""
        return decoded(self.tokenizer, ids)

    def _sources(self, prompts: Sequence[Prompt]) -> Iterator[tuple[list[int], bool]]:
        """Ids of each prompt, and whether it was cut."""
        room = self.max_source - len(self.before) - len(self.after)
        for start in range(0, len(prompts), _CHUNK):
            chunk = self._in_chat(prompts[start : start + _CHUNK])
            for prompt, content in zip(chunk, self._ids([str(prompt) for prompt in chunk]), strict=True):
                truncated = len(content) > room
                if truncated and self.truncate in ("tail", "head") and self.chat is None:
                    content = content[:room] if self.truncate == "tail" else content[-room:]
                elif truncated and self.truncate == "reference":
                    content = self._read_back(content)[:room]
                elif truncated:
                    content = self._with_less_text(prompt, room)
                yield self._checked(self.before + content + self.after), truncated

    def _in_chat(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """The prompts in the chat template, if there is one; what may be cut of them stays the middle part."""
        if self.chat is None:
            return prompts
        if self.truncate in ("tail", "head"):
            prompts = [Prompt("", str(prompt), "") for prompt in prompts]
        return list(self.chat.around(prompts))

    def _targets(self, labels: Sequence[str], cut: bool) -> dict[str, tuple[list[int], bool]]:
        """Ids of each different label with the end token, and whether they were cut."""
        different = list(dict.fromkeys(labels))
        room = self.max_target - 1
        targets = {}
        for start in range(0, len(different), _CHUNK):
            chunk = different[start : start + _CHUNK]
            for label, ids in zip(chunk, self._ids(chunk), strict=True):
                if len(ids) > room and not cut:
                    raise UserError(
                        f"label {_short(label)!r} has {len(ids)} tokens and the end token, over data.max_target "
                        f"{self.max_target}; raise it to {len(ids) + 1}, or set data.long_targets to cut"
                    )
                targets[label] = ([*self._checked(ids[:room]), self.layout.eos_id], len(ids) > room)
        return targets

    def _with_less_text(self, prompt: Prompt, room: int) -> list[int]:
        """The whole string's ids less so many from the end (``head``: the beginning) of the text that ``room`` remain.

        The string is tokenised as one, so that no seam changes an id; tokens that reach into head or tail stay.
        """
        if not self.tokenizer.is_fast:
            return self._with_shorter_text(prompt, room)
        encoded = self._call([str(prompt)], return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"][0]
        offsets: list[tuple[int, int]] = encoded["offset_mapping"][0]
        first, end = len(prompt.head), len(prompt.head) + len(prompt.text)
        text = [i for i, (a, b) in enumerate(offsets) if first <= a < b <= end]
        keep = len(text) - (len(ids) - room)
        if keep < 0:
            raise self._no_room(prompt)
        # A character of several tokens (bytes) goes as a whole.
        if self.truncate == "head":
            first = len(text) - keep
            while 0 < first < len(text) and offsets[text[first - 1]][1] > offsets[text[first]][0]:
                first += 1
            dropped = set(text[:first])
        else:
            while 0 < keep < len(text) and offsets[text[keep - 1]][1] > offsets[text[keep]][0]:
                keep -= 1
            dropped = set(text[keep:])
        return [token for i, token in enumerate(ids) if i not in dropped]

    def _read_back(self, content: list[int]) -> list[int]:
        """What of a string's ids lies within ``max_source``, behind the special ones before it, as text and back.

        The text has no space before punctuation: decoding tidied that up by default, in the transformers of the time.
        """
        ids = content[: self.max_source - len(self.before)]
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return self._ids([self.tokenizer.clean_up_tokenization(text)])[0]

    def _with_shorter_text(self, prompt: Prompt, room: int) -> list[int]:
        """For tokenizers without offsets: the longest beginning (``head``: end) of the text, in characters, that fits.

        By bisection.
        """
        low, high, best = 0, len(prompt.text), None
        while low <= high:
            middle = (low + high) // 2
            text = prompt.text[len(prompt.text) - middle :] if self.truncate == "head" else prompt.text[:middle]
            ids = self._ids([prompt.head + text + prompt.tail])[0]
            if len(ids) <= room:
                best, low = ids, middle + 1
            else:
                high = middle - 1
        if best is None:
            raise self._no_room(prompt)
        return best

    def _no_room(self, prompt: Prompt) -> UserError:
        return UserError(
            f"the prompt around the text is longer than data.max_source {self.max_source} tokens by itself "
            f"({_short(prompt.head + prompt.tail)!r}); raise data.max_source"
            + (" or set data.truncate to tail" if self.truncate not in ("tail", "head") else "")
        )

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._call(texts)["input_ids"]
        return ids

    def _call(self, texts: list[str], **options: Any) -> Any:
        return self.tokenizer(
            texts, add_special_tokens=False, truncation=False, padding=False, return_attention_mask=False, **options
        )

    def _special_ids(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind a text, found by looking. Decoder-only: nothing behind."""
        probe = "a"
        bare: list[int] = self.tokenizer(probe, add_special_tokens=False)["input_ids"]
        full: list[int] = self.tokenizer(probe)["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                after = full[start + len(bare) :] if self.layout.encoder_decoder else []
                return full[:start], after
        raise UserError(
            "the model's tokenizer changes a text's ids when it adds special tokens; such are not supported"
        )

    def _checked(self, ids: list[int]) -> list[int]:
        if ids and max(ids) >= self.layout.vocab_size:
            raise UserError(
                f"the tokenizer gives id {max(ids)}, but the model has {self.layout.vocab_size} embeddings: they do "
                "not belong together"
            )
        return ids

    def _check_positions(self) -> None:
        limit = self.layout.max_positions
        if limit is None:
            return
        if self.layout.encoder_decoder:
            need, what = max(self.max_source, self.max_target), "data.max_source or data.max_target"
        else:
            need, what = self.max_source + self.max_target, "data.max_source + data.max_target"
        if need > limit:
            raise UserError(f"{what} is {need} tokens, but the model has {limit} positions; lower data.max_source")


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:28]} … {text[-28:]}"
