"""What a run learned, read from its folder: free subspace, update norms, peak memory, against naive computations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cl_runner.metrics.free_subspace import free_share
from cl_runner.runs.folder import RunDir
from cl_runner.runs.updates import free_subspace, peak_megabytes, update_norm
from tests.command_line import ORDER, SMALL, STAGES, call
from tests.conftest import Finished
from tests.training.test_health import training


def test_free_share() -> None:
    e = np.eye(5, dtype=np.float32)
    assert free_share([e[:2]]) == pytest.approx(3 / 5)
    assert free_share([e[:2], e[1:3], 2 * e[:1]]) == pytest.approx(2 / 5)
    assert free_share([e, e]) == 0.0


def spanned(run: Path) -> list[float]:
    """Percent of input directions that ΔW of all stages so far does not read, by its singular values."""
    found = []
    for index, name in enumerate(STAGES, 1):
        tensors = load_file(run / f"stages/{index:02d}-{name}/adapter/adapter_model.safetensors")
        shares = []
        for key in (key for key in tensors if key.endswith("lora_A.weight")):
            values = torch.linalg.svdvals(tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double())
            shares.append(float((values < 3e-6 * values.max()).double().mean()))
        found.append(100 * sum(shares) / len(shares))
    return found


def test_a_run_of_pairs(finished: Finished) -> None:
    run = RunDir(finished.run)
    assert [free_subspace(run, STAGES[: i + 1]) for i in range(3)] == pytest.approx(spanned(finished.run))
    norms = [training(finished.run, index)["update_norm"] for index in range(3)]
    assert update_norm(run, STAGES) == pytest.approx(sum(norms) / 3)
    rows = [json.loads(line) for line in (finished.run / "log.jsonl").read_text().splitlines()]
    assert peak_megabytes(run) == max(row["memory_mb"] for row in rows)
    assert free_subspace(run, []) is None and update_norm(run, []) is None


def test_pairs_that_fill_the_space_and_updates_without_factors(tmp_path: Path) -> None:
    """Of large pairs the sum is stored, and each stage's own pair beside it; of dense updates the method says it."""
    (tmp_path / "three.yaml").write_text(ORDER)
    for name, sets in (
        ("wide", ("--method", "inclora", "--set", "adapter.r=64")),
        ("dense", ("--method", "coso", "--set", "method.lr=1e-3")),
    ):
        result = call("train", "--order", "three.yaml", *SMALL, *sets, "--name", name, cwd=tmp_path)
        assert result.code == 0, result.err
    wide = RunDir(tmp_path / "runs/wide")
    assert [free_subspace(wide, STAGES[: i + 1]) for i in range(3)] == pytest.approx(
        [100 * (1 - 64 * k / 192) for k in (1, 2, 3)]
    )
    dense = RunDir(tmp_path / "runs/dense")
    logged = [json.loads(line) for line in (dense.path / "log.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in logged] == pytest.approx([1e-3] * len(logged))  # the method's own, not training.lr
    state = load_file(dense.stage_dir(2, STAGES[2]) / "state.safetensors")
    taken = [
        float(torch.linalg.matrix_rank(state[key])) / len(state[key]) for key in state if key.startswith("method.")
    ]
    assert 0 < sum(taken) < len(taken)
    assert free_subspace(dense, STAGES) == pytest.approx(100 * (1 - sum(taken) / len(taken)))
    text = call("compare", "wide", "dense", "--markdown", cwd=tmp_path).out
    assert "‖ΔW‖ | free % | peak MB |" in text
    assert "free" not in call("compare", "wide", "dense", cwd=tmp_path).out  # no room on a terminal
