"""adapter.r=auto: the rank by the gradient's spectrum, against the gradient of the weights themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_runner.engine.process import Place
from cl_runner.methods.inclora import IncLoRA
from cl_runner.training.options.auto_rank import choose_rank, smallest_rank, spectrum
from tests.breadth import in_turn, narrowed
from tests.command_line import NANO, ORDER, call
from tests.distributed import on_ranks
from tests.stages import Kind, naive_loss, open_stage, some_rows, tiny_config, tiny_model, tiny_room
from tests.training.test_health import training


def chosen(place: Place, kind: Kind, energy: float, most: int = 16) -> tuple[int, int]:
    """The rank, and the rows of a live A."""
    config = tiny_config(adapter__r="auto", adapter__energy=energy, adapter__max_r=most)
    stage = open_stage(tiny_room(IncLoRA(IncLoRA.Config()), config, place, kind), config)
    rank = choose_rank(stage, some_rows(20))
    rows = {len(p) for name, p in stage.parameters().items() if name.endswith("lora_A")}
    columns = {p.shape[1] for name, p in stage.parameters().items() if name.endswith("lora_B")}
    assert rows == columns == {rank} and stage.adapters.scale == pytest.approx(4.0 / rank)
    stage.close()
    return rank, len(rows)


def spectra_of(kind: Kind) -> list[list[float]]:
    """Squared singular values of each weight's own gradient, largest first."""
    model = tiny_model(kind)
    names = ("q", "v") if kind == "t5" else ("q_proj", "v_proj")
    weights = [m.weight for name, m in model.named_modules() if name.rpartition(".")[2] in names]
    for weight in weights:
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(naive_loss(model, kind, some_rows(20).examples), weights)
    return [torch.linalg.svdvals(g.double()).square().tolist() for g in gradients]


@pytest.mark.parametrize(("kind", "ranks"), in_turn(["t5", "llama"], [1, 2]))
def test_rank_holds_the_energy_of_the_weights_own_gradient(kind: Kind, ranks: int) -> None:
    spectra = spectra_of(kind)
    total = sum(map(sum, spectra))
    for energy in (0.5, 0.9, 0.99):
        naive = next(r for r in range(1, 33) if sum(sum(s[:r]) for s in spectra) >= energy * total)
        assert [found[0] for found in on_ranks(ranks, chosen, kind, energy)] == [min(naive, 16)] * ranks


def seen(place: Place, kind: Kind, k: int) -> tuple[list[float], float]:
    config = tiny_config(adapter__r="auto", adapter__max_r=16)
    stage = open_stage(tiny_room(IncLoRA(IncLoRA.Config()), config, place, kind), config)
    squares, rest = spectrum(stage, some_rows(20), k)
    scale = config.adapter.alpha / (2 * k)
    stage.close()
    return [float(square) / scale**2 for square in squares], rest / scale**2


@pytest.mark.parametrize("kind", narrowed(["t5", "llama"], ["llama"]))
def test_the_spectrum_of_layers_wider_than_the_probe(kind: Kind) -> None:
    """Of 32 inputs (of 16 outputs, some of llama's) 12 random directions are looked along, and 12 others."""
    spectra, k = spectra_of(kind), 12
    leading = [sum(s[i] for s in spectra if i < len(s)) for i in range(k)]
    total = sum(map(sum, spectra))
    for squares, rest in (on_ranks(1, seen, kind, k)[0], on_ranks(2, seen, kind, k)[1]):
        assert squares[:4] == pytest.approx(leading[:4], rel=0.02, abs=1e-3 * total)
        assert all(ours <= theirs * (1 + 1e-4) for ours, theirs in zip(squares, leading, strict=True))
        assert 0.9 * sum(leading) < sum(squares)  # a projection: never more than there is, and not much less
        assert sum(squares) + rest == pytest.approx(total, rel=0.05) and rest > 0
    for energy in (0.5, 0.8, 0.95, 0.99):
        naive = next(r for r in range(1, 33) if sum(sum(s[:r]) for s in spectra) >= energy * total)
        assert on_ranks(1, chosen, kind, energy, 6)[0][0] in (min(naive, 6), min(naive + 1, 6))  # a projection


def test_smallest_rank() -> None:
    squares = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert [smallest_rank(squares, 0.0, share, 9) for share in (0.1, 0.4, 0.41, 0.9, 0.91, 1.0)] == [1, 1, 2, 3, 4, 4]
    assert smallest_rank(squares, 0.0, 1.0, 2) == 2
    assert [smallest_rank(squares, 10.0, share, 9) for share in (0.2, 0.35, 0.5, 0.51)] == [1, 2, 4, 9]
    assert smallest_rank(torch.zeros(4), 0.0, 0.9, 9) == 1  # no gradient at all


def run(cwd: Path, *more: str) -> Any:
    cwd.mkdir(exist_ok=True)
    (cwd / "three.yaml").write_text(ORDER)
    return call("train", "--order", "three.yaml", *NANO, "--set", "adapter.r=auto", *more, cwd=cwd)


@pytest.mark.parametrize("method", narrowed(["olora", "pertask"], ["pertask"]))
def test_a_run_with_a_rank_for_each_stage(tmp_path: Path, method: str) -> None:
    """Ranks differ, are said, and every stage answers again as it did."""
    sets = ("--method", method, "--set", "adapter.energy=0.97", "--set", "adapter.max_r=48", "--name", "it")
    result = run(tmp_path, *sets)
    assert result.code == 0, result.err
    ranks = [training(tmp_path / "runs/it", index)["rank"] for index in range(3)]
    assert len(set(ranks)) > 1 and max(ranks) < 48, ranks
    said = [line for line in result.err.splitlines() if "by the spectrum" in line]
    assert [f"rank {rank}," in line for rank, line in zip(ranks, said, strict=True)] == [True] * 3
    for stage in ("1", "2", "3"):
        again = call("eval", "it", "--stage", stage, "--json", cwd=tmp_path)
        assert again.code == 0, again.err
        found = json.loads(again.out)
        assert not any(found["differing_rows"].values()) and found["scores"] == found["committed"], (stage, found)


def test_refused_where_one_pair_serves_all_stages(tmp_path: Path) -> None:
    result = run(tmp_path, "--method", "seqlora")
    assert result.code == 2
    assert result.line == "cl-runner: adapter.r=auto: seqlora needs the same rank at every stage; set a number"
    assert "adapter.r must be a whole number, 1 or more, or auto" in run(tmp_path, "--set", "adapter.r=0").line
