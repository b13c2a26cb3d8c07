"""Examples as token ids, and batches of them as padded tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cl_runner.models.base import Layout

IGNORE = -100  # label of a position that is no label token
PREFIX = "prefix"  # the name of soft prompts among a batch's condition
OF_ROWS = ("tasks", "heads", "lengths")  # what a batch has of each row beside its tensors


class Example(NamedTuple):
    """One row as token ids. ``target`` ends with the end token; a row of weight 0 only fills a batch."""

    source: list[int]
    target: list[int]
    truncated: bool = False  # the source lost tokens
    target_cut: bool = False  # the target lost tokens (it still ends with the end token)
    weight: float = 1.0


class Question(NamedTuple):
    """A prompt (an example without a target) and what may be said behind it, as token ids, none of it empty."""

    prompt: Example
    continuations: Sequence[Sequence[int]]


def filler(example: Example) -> Example:
    """A row of weight 0, as short as can be, to fill up a batch without adding to its loss."""
    return Example(example.source[:1], example.target[-1:], weight=0.0)


@dataclass(frozen=True)
class Batch:
    """b rows on one device; s input positions, t label positions.

    Encoder-decoder: ``input_ids`` and ``attention_mask`` (b, s) are the source, right-padded, and ``decoder_input_ids``
    (b, t) the target shifted right; labels begin at column 0. Decoder-only: the input is source and target without its
    last token, left-padded, with ``position_ids`` (b, s) counted from each row's first real token; label column j is
    predicted at input position s - t + j, so labels end at column t - 1. A batch of prompts has t = 0.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor  # (b, t), IGNORE outside label tokens
    token_weights: Tensor  # (b, t) fp32, 0 outside label tokens
    position_ids: Tensor | None = None
    decoder_input_ids: Tensor | None = None
    places: Tensor | None = None  # (b,) of each row in its step's global batch, in training alone; (1, s) of each token
    condition: dict[str, Tensor] = field(default_factory=dict)  # a method's own rows (b, …), sliced with the batch
    tasks: tuple[str, ...] = ()  # of each row, in training alone
    heads: tuple[int, ...] = ()  # how many tokens each row shares with all of its task; none: not known
    lengths: tuple[int, ...] = ()  # input tokens of each row, where heads are known
    behind: int = 0  # tokens that stand before the rows, for all of them, and are not among their ids
    stands_for: Tensor | None = None  # (1, s) how many tokens of rows that count each is: of a part of a batch alone

    @property
    def size(self) -> int:
        """Rows."""
        return int(self.input_ids.shape[0])

    @property
    def label_tokens(self) -> int:
        """Label tokens of weight other than 0. Waits for the device: plan steps with ``len(example.target)``."""
        return int((self.token_weights != 0).sum())

    @property
    def counts(self) -> Tensor:
        """(b, 1), or (1, s) of each token: how many rows it is of. 0 of rows without weight, mere fillers."""
        if self.stands_for is not None:
            return self.stands_for
        if not self.labels.shape[1]:  # prompts
            return torch.ones_like(self.input_ids[:, :1])
        return (self.token_weights != 0).any(1, keepdim=True).long()

    def by_row(self, tokens: Tensor) -> Tensor:
        """Of all tokens end to end, (b·s, d), as OPT's MLP reads them: row by row, (b, s, d). Others as they are."""
        if tokens.dim() != 2 or tokens.shape[0] % self.size:
            return tokens
        s, width = self.attention_mask.shape[1], tokens.shape[0] // self.size
        before = self.condition[PREFIX].shape[1] if PREFIX in self.condition else 0
        known = width in (s + before, self.labels.shape[1])
        return tokens.reshape(self.size, width, -1) if known else tokens

    def slice(self, rows: slice | Tensor | list[int]) -> Batch:
        """The given rows, padding unchanged."""
        numbers = torch.arange(self.size)[rows].tolist() if self.tasks or self.heads else []
        own: dict[str, Any] = {
            name: tuple(getattr(self, name)[i] for i in numbers) for name in OF_ROWS if getattr(self, name)
        }
        return replace(self._each(lambda value: value[rows]), **own)

    def row(self, number: int) -> Batch:
        """One row of a collated batch by itself, without padding unless a method has conditioned it, maybe by position.

        Waits for the device.
        """
        one = self.slice(slice(number, number + 1))
        if one.condition:
            return one
        s, t = int(one.attention_mask.sum()), int((one.labels != IGNORE).sum())
        at_left = one.position_ids is not None  # where padding is
        inputs, labels = (slice(-n, None) if at_left and n else slice(n) for n in (s, t))
        return replace(
            one,
            input_ids=one.input_ids[:, inputs],
            attention_mask=one.attention_mask[:, inputs],
            labels=one.labels[:, labels],
            token_weights=one.token_weights[:, labels],
            position_ids=None if one.position_ids is None else one.position_ids[:, inputs],
            decoder_input_ids=None if one.decoder_input_ids is None else one.decoder_input_ids[:, labels],
        )

    def read_to_the_end(self, head: bool) -> Batch:
        """Decoder-only rows with their last label token too, a column more; for those who look at layers.

        Nothing is predicted from it: the loss is the same. ``head``: label columns for all positions (IGNORE where
        there were none), so that the head's output is computed at each. Encoder-decoder rows are whole as they are.
        """
        if self.position_ids is None:
            return self
        before = self.input_ids.shape[1] - self.labels.shape[1] if head else 0
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, self.labels[:, -1:]], dim=1),
            attention_mask=functional.pad(self.attention_mask, (0, 1), value=1),
            position_ids=torch.cat([self.position_ids, self.position_ids[:, -1:] + 1], dim=1),
            labels=functional.pad(self.labels, (before, 1), value=IGNORE),
            token_weights=functional.pad(self.token_weights, (before, 1)),
            lengths=tuple(length + 1 for length in self.lengths),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, from where a copy to a GPU does not hold up the CPU."""
        return self._each(lambda value: value.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        changed: dict[str, Any] = {n: change(value) for n, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed, condition={name: change(value) for name, value in self.condition.items()})


def collate(
    examples: Sequence[Example],
    layout: Layout,
    device: torch.device | str = "cpu",
    weights: Sequence[float] | None = None,
) -> Batch:
    """Pad examples into a batch with labels. ``weights`` multiplies each row's own weight, one number a row."""
    return _collate(examples, layout, weights).to(device)


def collate_prompts(examples: Sequence[Example], layout: Layout, device: torch.device | str = "cpu") -> Batch:
    """Pad the sources alone, to generate from: t = 0."""
    return _collate([example._replace(target=[]) for example in examples], layout, None).to(device)


def token_batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Row numbers in batches of at most ``most`` tokens, padding included, by length so that there is little of it."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or (len(batches[-1]) + 1) * lengths[row] > most:  # sorted: the newest row is the longest
            batches.append([])
        batches[-1].append(row)
    return batches


def _collate(examples: Sequence[Example], layout: Layout, weights: Sequence[float] | None) -> Batch:
    if weights is not None and len(weights) != len(examples):
        raise ValueError(f"{len(weights)} weights for {len(examples)} examples")
    targets = [example.target for example in examples]
    sources = [example.source for example in examples]
    left = not layout.encoder_decoder
    inputs = sources if layout.encoder_decoder else [s + t[:-1] for s, t in zip(sources, targets, strict=True)]
    input_ids, attention_mask = _pad(inputs, layout.pad_id, left)
    labels, is_label = _pad(targets, IGNORE, left)
    row_weights = torch.tensor([e.weight for e in examples], dtype=torch.float32)
    if weights is not None:
        row_weights = row_weights * torch.tensor(list(weights), dtype=torch.float32)
    token_weights = is_label * row_weights[:, None]
    if layout.encoder_decoder:
        assert layout.decoder_start_id is not None
        shifted, _ = _pad([[layout.decoder_start_id, *t[:-1]] if t else [] for t in targets], layout.pad_id, left)
        return Batch(input_ids, attention_mask, labels, token_weights, decoder_input_ids=shifted)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return Batch(input_ids, attention_mask, labels, token_weights, position_ids=position_ids)


def _pad(rows: Sequence[list[int]], value: int, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of ids as an int64 tensor (b, longest) with its 0/1 mask, padded at the left or the right."""
    width = max((len(row) for row in rows), default=0)
    gaps = [width - len(row) for row in rows]
    ids = [[value] * gap + row if left else row + [value] * gap for row, gap in zip(rows, gaps, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    columns = torch.arange(width)[None, :]
    mask = columns >= width - lengths if left else columns < lengths
    return torch.tensor(ids, dtype=torch.long).view(len(rows), width), mask.long()
