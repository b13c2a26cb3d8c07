"""How likely given continuations of a prompt are, as multiple-choice benchmarks ask it.

What a continuation is, token by token, is as in lm-evaluation-harness: of a decoder-only model what the prompt and it
together are tokenised to, less the prompt's tokens; of an encoder-decoder model it is tokenised by itself. No end token
is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cl_runner.models.base import Layout
from cl_runner.models.batch import IGNORE, Batch
from cl_runner.models.continuations import read_prompts
from cl_runner.models.forward import evaluating
from cl_runner.models.heads import Head, Show
from cl_runner.models.verify import padded


class Likelihood(NamedTuple):
    """Natural logarithm of a continuation's probability; whether greedy decoding would say it."""

    log: float
    greedy: bool


@torch.no_grad()
def likelihoods(
    model: nn.Module,
    prompts: Batch,
    continuations: Sequence[Sequence[Sequence[int]]],
    layout: Layout,
    show: Show = lambda _: None,
    head: Head | None = None,
) -> list[list[Likelihood]]:
    """Of each of a batch of prompts its continuations' likelihoods, in fp32, in their order. A prompt is read once.

    Continuations that differ in their last token alone (letters) take one look.

    Args:
        continuations: of each prompt, as token ids; none is empty.
        show: is told the batch that the next forward is about, where it is not ``prompts``.
        head: what all these prompts begin with, read by this model as it is; of a decoder-only model.
    """
    found = [[Likelihood(0.0, True)] * len(each) for each in continuations]
    looks = [_by_beginning(each) for each in continuations]
    with evaluating(model):
        ask = read_prompts(model, prompts, layout, head)
        for number in range(max(map(len, looks), default=0)):
            rows = [row for row, each in enumerate(looks) if len(each) > number]
            if len(rows) < prompts.size:
                show(prompts.slice(rows))
            beginnings = [list(looks[row])[number] for row in rows]
            scores = ask(rows, beginnings)
            of = [(row, which) for row, said in zip(rows, beginnings, strict=True) for which in looks[row][said]]
            places = [rows.index(row) for row, _ in of]
            for (row, which), likely in zip(
                of, _likely(scores, places, [continuations[r][w] for r, w in of]), strict=True
            ):
                found[row][which] = likely
    return found


def _by_beginning(continuations: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """All ids but the last → the continuations that have them, by number."""
    found: dict[tuple[int, ...], list[int]] = {}
    for number, ids in enumerate(continuations):
        found.setdefault(tuple(ids[:-1]), []).append(number)
    return found


def _likely(scores: Tensor, places: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Likelihood]:
    """Of each continuation, from the scores (b, 1 + t, V) at its place among the rows."""
    ids = padded(continuations, IGNORE, scores.device)  # (n, m)
    real = ids != IGNORE
    at = torch.tensor(places, device=scores.device)[:, None]
    position = torch.arange(ids.shape[1], device=scores.device)[None, :]
    logs = scores.float().log_softmax(-1)[at, position, ids.clamp(min=0)]
    greedy = (scores.argmax(-1)[at, position] == ids) | ~real
    sums = logs.where(real, 0).double().sum(1).tolist()
    return [Likelihood(log, bool(said)) for log, said in zip(sums, greedy.all(1).tolist(), strict=True)]
