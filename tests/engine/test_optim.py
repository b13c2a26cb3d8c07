"""``training.optimizer``: each rule against a plain loop, Muon's update against singular values in fp64."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.engine.optim import Muon, ParameterGroup, ordinary_groups, orthogonalised
from cl_runner.engine.process import Place
from cl_runner.methods.protocol import Source, Stage
from cl_runner.methods.seqlora import SeqLoRA
from cl_runner.models.batch import Batch
from cl_runner.training.stage import StageRun
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.stages import Kind, distance, naive_loss, some_rows, tiny_config, tiny_model

LR, DECAY, STEPS = 0.01, 0.1, 2
OWN = some_rows(6)


def by_singular_values(matrix: Tensor) -> Tensor:
    """Newton-Schulz acts on the singular values alone: the polynomial five times over, in fp64."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    S = S / S.norm().clamp(min=1e-7)
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    return U @ torch.diag(S) @ Vh


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4), (1, 6), (6, 1)])
def test_orthogonalised(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalised(1e3 * matrix)
    assert found.dtype == torch.float32 and found.shape == matrix.shape
    torch.testing.assert_close(found.double(), by_singular_values(matrix), atol=1e-5, rtol=1e-4)
    # Near U Vᵀ itself, within what the quintic is known for.
    assert all(0.68 < float(s) < 1.14 for s in torch.linalg.svdvals(found))
    assert torch.equal(orthogonalised(torch.zeros(shape)), torch.zeros(shape))


def test_two_updates_of_muon() -> None:
    dice = torch.Generator().manual_seed(1)
    first, second, weight = (torch.randn(8, 2, generator=dice) for _ in range(3))
    muon = Muon()
    found = [muon.update("w", weight, g, lr=0.1, weight_decay=0.5) for g in (first, second)]
    momenta = [first, 0.95 * first + second]
    for update, g, m in zip(found, (first, second), momenta, strict=True):
        wanted = -0.1 * (2.0 * by_singular_values(g + 0.95 * m) + 0.5 * weight.double())  # √(8 / 2)
        torch.testing.assert_close(update.double(), wanted, atol=1e-5, rtol=1e-4)


def plain_loop(kind: Kind, model: Any, parameters: dict[str, Tensor], optimizer: str) -> dict[str, Tensor]:
    """Two steps over all rows at once: torch's own AdamW and SGD, Muon written out."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)} | {id(model.lm_head.weight)}
    by_muon = {n for n, p in parameters.items() if optimizer == "muon" and p.dim() == 2 and id(p) not in tables}
    rest = [p for n, p in parameters.items() if n not in by_muon]
    make: Any = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    others = make(rest, lr=LR, weight_decay=DECAY) if rest else None
    momenta = {n: torch.zeros_like(parameters[n]) for n in by_muon}
    for _ in range(STEPS):
        found = torch.autograd.grad(naive_loss(model, kind, OWN.examples), list(parameters.values()))
        for (name, p), g in zip(parameters.items(), found, strict=True):
            p.grad = g
            if name in by_muon:
                momenta[name] = 0.95 * momenta[name] + g
                scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                direction = by_singular_values(g + 0.95 * momenta[name]).float()
                p.data = p.data * (1 - LR * DECAY) - LR * scale * direction
        if others is not None:
            others.step()
    return {name: p.detach() for name, p in parameters.items()}


def _trained(place: Place, method: str, kind: Kind, optimizer: str) -> dict[str, Tensor]:
    """All six rows in each of two steps, in micro-batches of two."""
    room, config = order_room(
        place, method, "a", kind, training__lr=LR, training__weight_decay=DECAY, training__global_batch=6,
        training__micro_batch=2, training__epochs=STEPS, training__optimizer=optimizer,
    )  # fmt: skip
    return learn(room, config, 0, OWN).parameters


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_two_steps_of_all_weights(optimizer: str, ranks: int) -> None:
    """A T5 whose head is its embedding; in three micro-batches, on two ranks one of them empty."""
    model = tiny_model("t5").requires_grad_(True)
    wanted = plain_loop("t5", model, dict(model.named_parameters()), optimizer)
    for found in on_ranks(ranks, _trained, "seqft", "t5", optimizer):
        assert distance(found, wanted) < 1e-3
    start = dict(tiny_model("t5").named_parameters())
    assert (
        min(float((wanted[n] - start[n]).norm() / start[n].norm()) for n in start) > 1e-4
    )  # a decoder bias: by little


def test_two_steps_of_a_pair_by_muon() -> None:
    """B of 32 × 2 is scaled by 4; B is zero at the start, so A has no gradient at the first step."""
    [found] = on_ranks(1, _trained, "seqlora", "llama", "muon")
    wanted = on_ranks(1, _pair_by_hand)[0]
    assert distance(found, wanted) < 1e-3


def _pair_by_hand(place: Place) -> dict[str, Tensor]:
    room, config = order_room(place, "seqlora", "a", "llama", training__lr=LR)
    stage = StageRun(room, config, 0)
    room.method.build(stage)
    stage.close()
    return plain_loop("llama", room.adapters.model, dict(room.adapters.parameters()), "muon")


def test_which_parameters_muon_takes() -> None:
    model = tiny_model("llama")
    training = tiny_config(training__optimizer="muon", training__weight_decay=DECAY).training
    matrices, others = ordinary_groups(dict(model.named_parameters()), training, model)
    assert (matrices.rule, others.rule, matrices.weight_decay, others.weight_decay) == ("muon", "adamw", DECAY, DECAY)
    assert len(matrices.parameters) == 2 * 7 and all("proj" in name for name in matrices.parameters)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < set(others.parameters)


def test_a_vector_is_no_matrix_whichever_way_it_lies() -> None:
    parameters = {f"{m}x{n}": torch.nn.Parameter(torch.ones(m, n)) for m, n in ((5, 1), (1, 5), (5, 2))}
    training = tiny_config(training__optimizer="muon").training
    matrices, others = ordinary_groups(parameters, training, torch.nn.Module())
    assert (list(matrices.parameters), list(others.parameters)) == (["5x2"], ["5x1", "1x5"])


class Backwards(SeqLoRA):
    """B by its own rule, A by what ``training.optimizer`` says elsewhere."""

    def parameter_groups(self, stage: Stage) -> list[ParameterGroup]:
        parameters = stage.parameters()
        own = {name: p for name, p in parameters.items() if name.endswith("lora_B")}
        rest = {name: p for name, p in parameters.items() if name not in own}
        return [ParameterGroup(own, rule="whole"), *ordinary_groups(rest, stage.config.training, stage.adapters.model)]

    def whole_step(self, stage: Stage, name: str, gradient: Tensor, lr: float) -> Tensor:
        return torch.full_like(gradient, lr)


def _own_rule(place: Place) -> None:
    room, config = order_room(place, "seqlora", "a", training__lr=LR, training__optimizer="muon")
    room.method = Backwards(room.method.config)
    found = learn(room, config, 0, OWN).parameters  # six rows in batches of four: two steps
    for name, p in found.items():
        assert torch.allclose(p, torch.full_like(p, 2 * LR)) == name.endswith("lora_B")


def test_a_methods_own_rule_stands_beside_muon() -> None:
    on_ranks(1, _own_rule)


class Slow(SeqLoRA):
    """Every hook but the loss takes its time."""

    def begin_task(self, stage: Stage) -> None:
        time.sleep(0.01)

    def training_data(self, stage: Stage, own: Source) -> list[Source]:
        time.sleep(0.02)
        return [own]

    def loss(self, stage: Stage, batch: Batch) -> Tensor:
        time.sleep(0.2)
        return super().loss(stage, batch)

    def penalty(self, stage: Stage) -> Tensor | None:
        time.sleep(0.03)
        return None

    def edit_gradients(self, stage: Stage, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
        time.sleep(0.04)
        return None

    def after_step(self, stage: Stage) -> None:
        time.sleep(0.05)

    def end_task(self, stage: Stage) -> None:
        time.sleep(0.06)


def _timed(place: Place) -> None:
    room, config = order_room(place, "seqlora", "a")
    plain = learn(room, config, 0, OWN).trained.hook_seconds
    room, config = order_room(place, "seqlora", "a")
    room.method = Slow(room.method.config)
    slow = learn(room, config, 0, OWN).trained
    asleep = 0.01 + 0.02 + 0.06 + 2 * (0.03 + 0.04 + 0.05)  # two steps
    assert 0 <= plain < slow.hook_seconds and asleep <= slow.hook_seconds <= slow.seconds
    assert slow.seconds > 3 * 0.2


def test_the_time_of_a_methods_own_hooks_is_told() -> None:
    on_ranks(1, _timed)
