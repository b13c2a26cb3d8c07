"""Greedy answers without decoding what is right: the same answers, a fraction of the time.

If at every gold position the arg-max given the gold prefix is the gold token, an end token at the end included, greedy
decoding says exactly the gold label. One teacher-forced pass finds the rows where it does; the others are decoded, from
the same encoder output or the same keys and values of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cl_runner.models.base import Layout, neutral_generation
from cl_runner.models.batch import IGNORE, Batch
from cl_runner.models.forward import accepted, evaluating, generate, greedy, model_inputs, unwrapped
from cl_runner.models.heads import Head, Show, behind_head, can_be_cut, rest_of


class Read(NamedTuple):
    """What is left of a pass over the prompts: what the rest is decoded from, and (b, t, V) scores at gold positions.

    ``reuse`` takes the numbers of the rows to decode, and whom to tell the batch of its forwards, and gives their
    answers; None where nothing can be reused.
    """

    scores: Tensor
    reuse: Callable[[list[int], Show], list[list[int]]] | None


@torch.no_grad()
def answers(
    model: nn.Module,
    prompts: Batch,
    targets: Sequence[Sequence[int]],
    layout: Layout,
    max_new_tokens: int,
    show: Show = lambda _: None,
    head: Head | None = None,
    right: Sequence[bool] | None = None,
) -> tuple[list[list[int]], list[bool]]:
    """What ``greedy`` answers to a batch of prompts, and which answers were verified instead of decoded.

    Args:
        targets: each row's gold ids, the end token last; an empty one is never verified.
        show: is told the batch that the next forward is about, where it is not ``prompts``.
        head: what all these prompts begin with, read by this model as it is; of a decoder-only model.
        right: which rows to take for right, whatever the scores say: for who asks what the rest costs.
    """
    likely = [_can_be_said(target, layout, max_new_tokens) for target in targets]
    if not any(likely):
        return greedy(model, prompts, layout, max_new_tokens), likely
    with evaluating(model):
        bare = unwrapped(model)
        if layout.encoder_decoder:
            read = _encoder_decoder(bare, prompts, targets, layout, max_new_tokens)
        else:
            read = _decoder_only(bare, prompts, targets, layout, max_new_tokens, head)
        right = _says_gold(read.scores, targets, layout) if right is None else right
        said = [yes and sound for yes, sound in zip(right, likely, strict=True)]
        rest = [row for row, yes in enumerate(said) if not yes]
        decoded: list[list[int]] = []
        if rest:
            if read.reuse:
                decoded = read.reuse(rest, show)
            else:
                show(of_rest := prompts.slice(rest))
                decoded = greedy(model, of_rest, layout, max_new_tokens)
    found: list[list[int]] = [list(target[:-1]) for target in targets]
    for row, ids in zip(rest, decoded, strict=True):
        found[row] = ids
    return found, said


def _can_be_said(target: Sequence[int], layout: Layout, max_new_tokens: int) -> bool:
    """Whether greedy decoding could emit these ids: they end once, at their end, and within the limit."""
    ends = [at for at, token in enumerate(target) if token in layout.end_ids]
    return len(target) <= max_new_tokens and ends == [len(target) - 1]


def _says_gold(scores: Tensor, targets: Sequence[Sequence[int]], layout: Layout) -> list[bool]:
    """Whether the arg-max is right at every position of a row; any end token ends an answer."""
    best = scores.argmax(-1)
    labels = padded(targets, IGNORE, best.device)
    ends = torch.tensor(layout.end_ids, device=best.device)
    right = (best == labels) | (torch.isin(labels, ends) & torch.isin(best, ends))
    return [bool(row) for row in (right | (labels == IGNORE)).all(1).tolist()]


def over_prompts(model: nn.Module, prompts: Batch, head: Head | None) -> tuple[dict[str, Any], Tensor, Any]:
    """A decoder-only model's one pass over prompts, behind their head where there is one.

    Returns what it was given, the scores (b, 1, V) of what comes next, and its keys and values.
    """
    if head is None:
        given = model_inputs(model, prompts)
    else:
        given = {**behind_head(rest_of(prompts, head.length)), "past_key_values": head.spread(prompts.size)}
    asked: Any = model
    last = {"logits_to_keep": 1} if "logits_to_keep" in accepted(model) else {}
    out = asked(**given, **last, use_cache=True)
    return given, out.logits[:, -1:], out.past_key_values


def padded(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """Right-padded ids (b, longest)."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value).to(device)


def _encoder_decoder(
    model: nn.Module, prompts: Batch, targets: Sequence[Sequence[int]], layout: Layout, max_new_tokens: int
) -> Read:
    """Gold scores by one pass over the source; its encoder output is what the rest is decoded from."""
    from transformers.modeling_outputs import BaseModelOutput

    asked: Any = model
    given = model_inputs(model, prompts)
    mask: Tensor = given["attention_mask"]
    seen: Tensor = asked.get_encoder()(**given)[0]
    start = [[layout.decoder_start_id or 0, *target[:-1]] for target in targets]
    scores: Tensor = asked(
        encoder_outputs=BaseModelOutput(last_hidden_state=seen),
        attention_mask=mask,
        decoder_input_ids=padded(start, layout.pad_id, seen.device),  # causal: what stands behind is not looked at
        use_cache=False,
    ).logits

    def decode(rows: list[int], show: Show) -> list[list[int]]:
        show(prompts.slice(rows))
        longest = int(mask[rows].sum(1).max())
        read = {
            "encoder_outputs": BaseModelOutput(last_hidden_state=seen[rows, :longest]),
            "attention_mask": mask[rows, :longest],
        }
        return generate(model, read, 1, layout, neutral_generation(layout, max_new_tokens))

    return Read(scores, decode)


def _decoder_only(
    model: nn.Module,
    prompts: Batch,
    targets: Sequence[Sequence[int]],
    layout: Layout,
    max_new_tokens: int,
    head: Head | None,
) -> Read:
    """Gold scores by a pass over the prompts and one over the targets behind them.

    The prompt's keys and values are what the rest is decoded from, where they can be cut back to the prompt.
    """
    asked: Any = model
    takes = accepted(model)
    given, first, cache = over_prompts(model, prompts, head)
    mask: Tensor = given["attention_mask"]
    s = mask.shape[1]
    behind = padded([target[:-1] for target in targets], layout.pad_id, first.device)
    scores = first
    if behind.shape[1]:
        more: dict[str, Any] = {
            "input_ids": behind,
            "attention_mask": torch.cat([mask, torch.ones_like(behind)], 1),
            "past_key_values": cache,
            "use_cache": True,
        }
        if "position_ids" in takes:
            positions: Tensor = given["position_ids"]
            more["position_ids"] = positions[:, -1:] + 1 + torch.arange(behind.shape[1], device=first.device)
        scores = torch.cat([first, asked(**more).logits], 1)
    if not can_be_cut(cache):
        return Read(scores, None)

    def decode(rows: list[int], show: Show) -> list[list[int]]:
        if behind.shape[1]:
            cache.crop(-behind.shape[1])
        token = first[rows].argmax(-1)  # (rows, 1): what greedy says first is known
        goes_on = [at for at, one in enumerate(token[:, 0].tolist()) if one not in layout.end_ids]
        answers: list[list[int]] = [[] for _ in rows]
        if goes_on and max_new_tokens > 1:
            index = torch.tensor(rows, device=first.device)[goes_on]
            cache.batch_select_indices(index)
            show(prompts.slice(index.tolist()))  # not those whose answer has ended
            seen = mask[index]  # for ids, which are counted and not looked at: their keys and values are there
            read = {
                "input_ids": torch.cat([seen, token[goes_on]], 1),
                "attention_mask": torch.cat([seen, torch.ones_like(token[goes_on])], 1),
                "past_key_values": cache,
            }
            rest = generate(model, read, s + 1, layout, neutral_generation(layout, max_new_tokens - 1))
        else:
            rest = [[] for _ in goes_on]
        for at, ids in zip(goes_on, rest, strict=True):
            answers[at] = [int(token[at, 0]), *ids]
        return answers

    return Read(scores, decode)
