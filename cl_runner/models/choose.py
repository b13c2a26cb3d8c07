"""Answers among a task's labels: greedy decoding along the tree of the labels' tokens.

At every node the answer goes on with the likeliest of the tokens that lead to some label, the end token among them.
Where one token alone does there is nothing to decide, and the model is not asked. A prompt is read once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cl_runner.models.base import Layout
from cl_runner.models.batch import Batch
from cl_runner.models.continuations import read_prompts
from cl_runner.models.forward import evaluating
from cl_runner.models.heads import Head, Show


@dataclass(frozen=True)
class Choice:
    """A node of the tree at which there is something to decide, or a leaf.

    said: the ids up to here; at a leaf a whole label with its end token. then: each token that may follow, in the order
    of ids, and the next node behind it; none at a leaf.
    """

    said: tuple[int, ...]
    then: Mapping[int, Choice]

    @classmethod
    def among(cls, labels: Iterable[Sequence[int]], end_id: int) -> Choice:
        """The tree of labels by their ids, each with an end token, which is where it ends."""
        return cls._behind(sorted({tuple(ids[: list(ids).index(end_id) + 1]) for ids in labels}), 0)

    @classmethod
    def _behind(cls, labels: Sequence[tuple[int, ...]], at: int) -> Choice:
        """The tree of labels, sorted, whose first ``at`` ids are the same."""
        first, last = labels[0], labels[-1]
        if first == last:
            return cls(first, {})
        while first[at] == last[at]:  # none begins with another: its end token is none of that one's
            at += 1
        tokens = dict.fromkeys(label[at] for label in labels)
        then = {token: cls._behind([one for one in labels if one[at] == token], at + 1) for token in tokens}
        return cls(first[:at], then)


@torch.no_grad()
def choose(
    model: nn.Module,
    prompts: Batch,
    labels: Choice,
    layout: Layout,
    show: Show = lambda _: None,
    head: Head | None = None,
) -> list[list[int]]:
    """The label that each of a batch of prompts is answered with, without its end token.

    Args:
        show: is told the batch that the next forward is about, where it is not ``prompts``.
        head: what all these prompts begin with, read by this model as it is; of a decoder-only model.
    """
    at = [labels] * prompts.size
    if labels.then:
        with evaluating(model):
            ask = read_prompts(model, prompts, layout, head)
            while rows := [row for row, node in enumerate(at) if node.then]:
                if len(rows) < prompts.size:
                    show(prompts.slice(rows))
                said = [at[row].said for row in rows]
                _go_on(at, rows, _at_end(ask(rows, said), said))
    return [list(node.said[:-1]) for node in at]


def _go_on(at: list[Choice], rows: Sequence[int], scores: Tensor) -> None:
    """Move rows to the node behind the likeliest token, by the scores (rows, V) of what comes next."""
    together: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        together.setdefault(at[row].said, []).append(number)
    for numbers in together.values():
        node = at[rows[numbers[0]]]
        tokens = list(node.then)
        best = scores[numbers][:, tokens].argmax(-1).tolist()
        for number, which in zip(numbers, best, strict=True):
            at[rows[number]] = node.then[tokens[which]]


def _at_end(scores: Tensor, said: Sequence[Sequence[int]]) -> Tensor:
    """Of scores (b, 1 + t, V) those behind all that each row has said, (b, V)."""
    ends = torch.tensor([len(ids) for ids in said], device=scores.device)
    return scores[torch.arange(len(said), device=scores.device), ends]
