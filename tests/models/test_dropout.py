"""Dropout by row: what falls for a row, whatever stands beside it; how much, and that nothing shows a pattern."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cl_runner.models.batch import IGNORE, Batch, Example, collate
from cl_runner.models.dropout import RowDropout, attention_dropout, drops
from cl_runner.models.forward import logits
from tests.families import FAMILIES
from tests.stages import LAYOUTS, Kind, some_rows, tiny_model

ROWS = some_rows(8).examples
P = 0.25


def batch_of(rows: slice, kind: Kind) -> Batch:
    return replace(collate(ROWS[rows], LAYOUTS[kind]), places=torch.arange(8)[rows])


def dropped(batch: Batch, *widths: int, p: float = P, seed: int = 1, calls: int = 1) -> Tensor:
    """What an nn.Dropout makes of ones (b, s, *widths), at its last call; attention weights where there are heads."""
    dropout = RowDropout()
    dropout.draw(seed)
    dropout.see(batch)
    b, s = batch.input_ids.shape
    ones = torch.ones(b, widths[0], s, s) if len(widths) == 2 else torch.ones(b, s, *widths)
    with dropout.installed():
        for _ in range(calls):
            out: Tensor = nn.Dropout(p)(ones)
    return out


def own_positions(out: Tensor, batch: Batch, row: int) -> Tensor:
    """A row's own part of what came out, without padding; of attention weights both ways."""
    real = batch.attention_mask[row].bool()
    return out[row][:, real][..., real] if out.dim() == 4 else out[row][real]


@pytest.mark.parametrize("widths", [(33,), (4, 0)], ids=["hidden", "attention"])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_rows_own_elements_fall_whatever_stands_beside_it(kind: Kind, widths: tuple[int, ...]) -> None:
    whole = batch_of(slice(0, 8), kind)
    together = dropped(whole, *widths)
    for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
        batch = batch_of(part, kind)
        alone = dropped(batch, *widths)
        for i, row in enumerate(range(8)[part]):
            found, wanted = own_positions(alone, batch, i), own_positions(together, whole, row)
            assert torch.equal(found, wanted)
    assert {batch_of(slice(i, i + 1), kind).input_ids.shape[1] for i in range(8)} != {whole.input_ids.shape[1]}


def test_what_the_models_head_reads_falls_as_at_its_positions() -> None:
    """Of a decoder-only model these are the positions of the labels, the last ones."""
    batch = batch_of(slice(0, 8), "llama")
    t = batch.labels.shape[1]
    assert t < batch.input_ids.shape[1]
    dropout = RowDropout()
    dropout.draw(1)
    dropout.see(batch)
    with dropout.installed():
        found = functional.dropout(torch.ones(8, t, 33), P)
    assert torch.equal(found, dropped(batch, 33)[:, -t:])


def test_each_step_forward_call_row_position_and_feature_falls_by_itself() -> None:
    batch = batch_of(slice(0, 8), "t5")
    masks = [
        dropped(batch, 64, p=0.5, seed=seed, calls=calls).flatten() > 0 for seed in (1, 2, 3) for calls in (1, 2, 3)
    ]
    for one, other in pairwise(masks):
        assert abs(float((one == other).double().mean()) - 0.5) < 0.05
    out = dropped(batch, 64, p=0.5) > 0
    for one, other in ((out[0], out[1]), (out[:, 0], out[:, 1]), (out[..., 0], out[..., 1])):
        assert abs(float((one == other).double().mean()) - 0.5) < 0.2
    dropout = RowDropout()
    dropout.draw(1)
    with dropout.installed():
        forwards = []
        for _ in range(2):
            dropout.see(batch)
            forwards.append(functional.dropout(torch.ones(8, 4, 64), 0.5))
    assert not torch.equal(*forwards)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_as_many_fall_as_are_to_and_what_stays_makes_up_for_them(p: float) -> None:
    """2^20 elements: the share is off by less than five standard errors, overall and along rows and features."""
    dropout = RowDropout()
    dropout.draw(7)
    examples = [ROWS[0]._replace(source=[5] * 256)] * 16
    dropout.see(replace(collate(examples, LAYOUTS["t5"]), places=torch.arange(16)))
    with dropout.installed():
        out = functional.dropout(torch.ones(16, 256, 256), p)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
    kept = (out > 0).double()
    for along in ((0, 1, 2), (0, 1), (1, 2), (0, 2)):
        share = kept.mean(along)
        error = (p * (1 - p) * share.numel() / kept.numel()) ** 0.5
        assert float((share - (1 - p)).abs().max()) < 5 * error
    # No pair of features, and no pair of rows, falls together more than chance has it (1000 pairs: five errors too).
    z = ((kept - (1 - p)) / (p * (1 - p)) ** 0.5).flatten(0, 1)
    for each in (z[:, :48].T, z[:48]):
        products = (each @ each.T) / each.shape[1] ** 0.5
        assert float(products[~torch.eye(48, dtype=torch.bool)].abs().max()) < 5.5


def test_gradients_pass_where_nothing_fell() -> None:
    batch = batch_of(slice(0, 8), "t5")
    dropout = RowDropout()
    dropout.see(batch)
    x = torch.randn(8, batch.input_ids.shape[1], 16, requires_grad=True)
    with dropout.installed():
        out = functional.dropout(x, P)
    out.sum().backward()
    assert torch.equal(x.grad, (out != 0).float() / (1 - P))  # type: ignore[arg-type]


def test_a_second_look_drops_what_the_first_did() -> None:
    """Activation checkpointing: the same gradient as with all activations kept, with two dropouts in a block."""
    batch = batch_of(slice(0, 8), "t5")
    x = torch.randn(8, batch.input_ids.shape[1], 16)
    block = nn.Sequential(nn.Linear(16, 16), nn.Dropout(P), nn.Linear(16, 16), nn.Dropout(P))

    def gradient(again: bool) -> Tensor:
        dropout = RowDropout()
        block.zero_grad()
        with dropout.installed():
            dropout.draw(3)
            dropout.see(batch)
            hidden = x
            for _ in range(3):
                if again:
                    hidden = checkpoint(block, hidden, use_reentrant=False, context_fn=dropout.again)
                else:
                    hidden = block(hidden)
            hidden.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in block.parameters()])  # type: ignore[union-attr]

    assert torch.equal(gradient(True), gradient(False))


def test_what_it_does_not_follow_and_what_is_outside_is_torchs_own() -> None:
    batch = batch_of(slice(0, 8), "t5")
    dropout = RowDropout()
    own = functional.dropout
    with dropout.installed():
        dropout.see(batch)
        for shape in ((8, 64), (3, 5, 64)):  # no positions; rows of something else
            torch.manual_seed(5)
            found = functional.dropout(torch.ones(shape), P)
            torch.manual_seed(5)
            assert torch.equal(found, own(torch.ones(shape), P))
        x = torch.ones(8, 4, 64)
        assert functional.dropout(x, P, training=False) is x and torch.equal(functional.dropout(x, 0.0), x)
    assert functional.dropout is own


@pytest.mark.parametrize(("how", "share", "said"), [("sdpa", 0.1, True), ("eager", 0.1, False), ("sdpa", 0.0, False)])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_fused_attention_that_drops_is_said(kind: Kind, how: str, share: float, said: bool) -> None:
    model: Any = tiny_model(kind, dropout=share)
    model.set_attn_implementation(how)
    line = attention_dropout(model)
    assert bool(line) is said
    if said:
        assert line.startswith("dropout of 0.1 inside the attention (sdpa) falls by micro-batch")


@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "setting", "inside"),
    [
        ("T5", "dropout_rate", True),
        ("GPT-2", "attn_pdrop", True),
        ("GPT-2", "resid_pdrop", False),
        ("OPT", "attention_dropout", True),
        ("OPT", "dropout", False),
        ("GPT-NeoX", "attention_dropout", True),
        ("GPT-NeoX", "hidden_dropout", False),
        ("Phi", "resid_pdrop", False),
        ("BLOOM", "hidden_dropout", False),
        ("BLOOM", "attention_dropout", False),
        ("Qwen 3", "attention_dropout", True),
    ],
)
def test_said_exactly_where_rows_fall_otherwise_by_themselves(
    family: str, setting: str, inside: bool, how: str
) -> None:
    """Whatever a family calls its dropout, and wherever it keeps the share."""
    told = FAMILIES[family]
    model = told.model(**{setting: 0.3})
    assert drops(model) and not drops(told.model())
    if family != "BLOOM":  # whose attention is its own
        model.set_attn_implementation(how)
    layout = LAYOUTS["t5" if told.encoder_decoder else "llama"]
    examples = [Example([4 + i % 9 for i in range(n)], [5, 6, 7][: n - 2]) for n in (3, 5, 4)]
    whole = replace(collate(examples, layout), places=torch.arange(3))

    def scores(batch: Batch) -> Tensor:
        dropout = RowDropout()
        dropout.draw(1)
        dropout.see(batch)
        torch.manual_seed(1)
        with dropout.installed(), torch.no_grad():
            return logits(model, batch)

    model.train()
    together, alone = scores(whole), torch.cat([scores(whole.slice([row])) for row in range(3)])
    real = whole.labels != IGNORE
    same = torch.allclose(together[real], alone[real], rtol=1e-4, atol=1e-4)
    assert same == (not attention_dropout(model)) == (how == "eager" or not inside)
    assert not torch.allclose(scores(whole)[real], logits(model.eval(), whole)[real], atol=0.1)
