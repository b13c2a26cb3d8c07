"""What all inputs of a task share, so that an example of it can be asked for, and told from what was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cl_runner.models.batch import Example


WRITING = ""  # in the place of the task, of a row that is to be written: no task has that name


@dataclass
class Frame:
    """What all inputs of a task share, as token ids: before the text, behind it; and the task's labels.

    The frame's beginning asks for an example; the example is then the text, ``between`` and a label.
    """

    before: list[int]
    after: list[int]
    labels: list[list[int]]
    end: int

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Frame:
        """The frame of a task's examples."""
        sources = [example.source for example in examples]
        before = shared_beginning(sources)
        rests = [source[len(before) :] for source in sources]
        after = shared_beginning([rest[::-1] for rest in rests])[::-1]
        labels = dict.fromkeys(tuple(example.target[:-1]) for example in examples)
        return cls(before, after, [list(label) for label in labels], examples[0].target[-1])

    @property
    def between(self) -> list[int]:
        """What stands between text and label: the end of the frame, without an end token."""
        return self.after[:-1] if self.after[-1:] == [self.end] else self.after

    def text(self, source: Sequence[int]) -> list[int]:
        """An input without its frame."""
        return list(source[len(self.before) : len(source) - len(self.after)])

    def to_write(self, example: Example, most: int) -> Example:
        """What the language-model loss learns of an example: to write it, the text cut for ``most`` tokens in all."""
        rest = [*self.between, *example.target]
        text = self.text(example.source)[: max(most - len(rest), 1)]
        return example._replace(source=self.asking(), target=[*text, *rest])

    def asking(self) -> list[int]:
        """The input that asks for an example: the beginning, for a language model to go on from."""
        return [*self.before, *self.after[len(self.between) :]] or [self.end]

    def parsed(self, ids: Sequence[int]) -> tuple[list[int], list[int]] | None:
        """Text and label of what was written, if it is a text, ``between`` once, and one of the labels."""
        ids, between = list(ids), self.between
        for label in sorted(self.labels, key=len, reverse=True):
            tail = [*between, *label]
            text = ids[: len(ids) - len(tail)]
            if text and ids[len(text) :] == tail:
                twice = between and any(text[i : i + len(between)] == between for i in range(len(text)))
                return None if twice else (text, label)
        return None


def shared_beginning(rows: Sequence[list[int]]) -> list[int]:
    """The longest beginning that all rows have."""
    # Of the first and the last in order, for all others lie between.
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(min(rows), max(rows), strict=False))]
