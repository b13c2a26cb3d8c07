"""Live terms in the place of a pair: what they add, who sees it, and that nothing of them is left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_runner.adapters.layers import Layers
from cl_runner.adapters.terms import Term
from cl_runner.config.schema import Section
from cl_runner.engine.process import Place
from cl_runner.methods.protocol import Method
from cl_runner.methods.shared.dense import Dense
from cl_runner.training.stage import StageRun
from tests.adapters.families import FAMILIES, adapters_of, base_model, logits, off, random_pair, saved_as, with_updates
from tests.stages import some_rows, tiny_config, tiny_room


def dense(adapters: Layers, stage: str = "one", seed: int = 0) -> dict[str, Tensor]:
    """Random dense terms in the layers; their ΔW."""
    dice = torch.Generator().manual_seed(seed)
    adapters.begin_terms(stage, {target: Dense(*past.base.shape) for target, past in adapters.past.items()})
    for parameter in adapters.parameters().values():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=dice))
    return adapters.live_update()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_term_adds_its_update_to_what_is_folded(family: str) -> None:
    """Conv1D layers (gpt2) too; the pair that was live is out."""
    base = base_model(family)
    adapters = adapters_of(base_model(family), family)
    adapters.fold(random_pair(adapters, "past"))
    adapters.show(random_pair(adapters, "other", seed=2))
    folded = {target: past.sum for target, past in adapters.past.items()}
    update = dense(adapters)
    assert {name.removesuffix(".delta") for name in adapters.parameters()} == set(adapters.past)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in adapters.parameters().values())
    assert sum(p.requires_grad for p in adapters.model.parameters()) == len(adapters.past)
    assert adapters.live == "one" and adapters.groups() == []
    wanted = logits(with_updates(base, [folded, update]))
    assert off(logits(adapters.model), wanted) < 1e-5
    shown = adapters.shown()
    adapters.show(None)
    assert off(logits(adapters.model), logits(with_updates(base, [folded]))) < 1e-5  # type: ignore[list-item]
    adapters.show(shown)
    assert off(logits(adapters.model), wanted) < 1e-5
    adapters.fold_dense("one", adapters.live_update())
    assert adapters.terms is None and off(logits(adapters.model), wanted) < 1e-5
    names = set(dict(adapters.model.named_parameters()))
    adapters.begin("two", torch.Generator())
    assert len(adapters.groups()) > 0 and set(dict(adapters.model.named_parameters())) == names
    assert not any("term" in name or "delta" in name for name in names)
    assert not any(layer._forward_hooks for layer in adapters.layers.values())
    assert adapters.pair().stage == "two" and len(adapters.parameters()) == 2 * len(adapters.past)


class Routed(Term):
    """``w_row · gate · U x`` for the row's weight w, with one gate for all layers."""

    def __init__(self, m: int, n: int, gate: nn.Parameter) -> None:
        super().__init__()
        self.gate = gate
        self.U = nn.Parameter(torch.ones(m, n))

    def forward(self, x: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        weight: Tensor = condition["weight"][:, None, None]
        return weight * self.gate * (x.float() @ self.U.mT)


class Routing(Method):
    """Rows with an even number of real tokens are routed to the term, others not."""

    name, title = "routing", "a method for tests"

    def condition(self, stage: Any, batch: Any, task: str | None) -> dict[str, Tensor]:
        return {"weight": (batch.attention_mask.sum(1) % 2 == 0).float()}


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_term_may_look_at_each_row_and_share_a_parameter(kind: Any) -> None:
    config = tiny_config()
    room = tiny_room(Routing(Section()), config, Place(), kind)
    stage = StageRun(room, config, 0)
    gate = nn.Parameter(torch.tensor(0.1))
    shapes = {target: past.base.shape for target, past in room.adapters.past.items()}
    room.adapters.begin_terms("one", {t: Routed(*shape, gate) for t, shape in shapes.items()}, {"gate": gate})
    assert list(room.adapters.parameters()) == ["gate", *(f"{target}.U" for target in shapes)]
    own = some_rows(8)
    batch = stage.make_batch(own.examples, own.tasks, [1.0] * 8)
    even = batch.condition["weight"].bool()
    assert even.any() and not even.all()

    seen: dict[str, Tensor] = {}
    with torch.no_grad(), stage.observe("outputs", lambda target, rows, _: seen.update({target: rows})):
        routed = stage.forward(batch)
        with_term = dict(seen)
        other = stage.forward(batch, {"gate": torch.tensor(0.0)})
        without_term = dict(seen)
        room.adapters.show(None)
        plain = stage.forward(batch)
    assert torch.equal(routed[~even], plain[~even]) and torch.equal(other, plain)
    assert off(routed[even], plain[even]) > 1e-2
    first = next(iter(shapes))
    assert off(with_term[first][even], without_term[first][even]) > 1e-2  # observed with the term in it

    # Answered row by row as they were computed, also those that are decoded after some were verified.
    room.adapters.begin_terms("one", {t: Routed(*shape, gate) for t, shape in shapes.items()}, {"gate": gate})
    together = stage.generate(own.examples)
    alone = [stage.generate([example])[0] for example in own.examples]
    assert together == alone
    said = [
        example._replace(target=[*map(int, text.split()), 1]) for example, text in zip(own.examples, alone, strict=True)
    ]
    half = [a if i % 2 else b for i, (a, b) in enumerate(zip(said, own.examples, strict=True))]
    assert stage.answer(half) == alone
    stage.close()


def test_kept_terms_are_stored_as_factors_or_as_one_matrix(tmp_path: Path) -> None:
    adapters = adapters_of(base_model("llama"), "llama")
    dense(adapters)
    said = saved_as(tmp_path / "a", adapters)
    assert (said.own, said.pairs, said.dense) == ("terms", (), tuple(adapters.past))
