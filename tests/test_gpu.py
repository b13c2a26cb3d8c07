"""What only a GPU can show: bf16 compute over a bf16 base, and a whole order through DeepSpeed with NCCL.

Skipped where there is no GPU. On a box with one: ``python -m pytest tests/test_gpu.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SMALL = [
    "--set", "data.max_train=64", "--set", "data.max_test=32", "--set", "training.epochs=2",
]  # fmt: skip


def cl_runner(cwd: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "cl_runner", *arguments], cwd=cwd, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of order 1 in bf16."""
    cwd = tmp_path_factory.mktemp("gpu")
    made = json.loads(cl_runner(cwd, "train", "--order", "order1", "--method", "olora", *SMALL, "--json"))
    return cwd / made["run"]


def test_order_trains_in_bf16(run: Path) -> None:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in log} == {"dbpedia", "amazon", "yahoo", "agnews"}
    assert all(row["memory_mb"] > 0 for row in log)
    assert "NVIDIA" in json.loads((run / "environment.json").read_text())["device"]


def test_adapters_are_saved_in_fp32(run: Path) -> None:
    from safetensors.torch import load_file

    saved = load_file(run / "stages" / "04-agnews" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_eval_gives_the_committed_numbers(run: Path) -> None:
    for stage in ("1", "4"):
        found = json.loads(cl_runner(run.parents[1], "eval", str(run), "--stage", stage, "--json"))
        assert found["scores"] == found["committed"]
        assert not any(found["differing_rows"].values())


def test_folded_update_is_applied_within_one_percent_on_a_bf16_base() -> None:
    from cl_runner.adapters.folding import Accumulator

    torch.manual_seed(0)
    layer = torch.nn.Linear(512, 512, bias=False, device="cuda", dtype=torch.bfloat16)
    update = torch.randn(512, 512, device="cuda") * layer.weight.float().std() * 1e-4
    past = Accumulator(layer, transposed=False)
    past.add(update)
    assert torch.linalg.vector_norm(past.applied() - update) < 0.01 * torch.linalg.vector_norm(update)


@pytest.mark.parametrize("method", ["l2p", "progprompt", "lfpt5"])
def test_prompts_train_before_a_bf16_base_and_answer_the_same_again(tmp_path: Path, method: str) -> None:
    short = ["--set", "method.length=8", *(["--set", "method.draws=1"] if method == "lfpt5" else [])]
    made = json.loads(cl_runner(tmp_path, "train", "--order", "order1", "--method", method, *SMALL, *short, "--json"))
    for stage in ("2", "4"):
        found = json.loads(cl_runner(tmp_path, "eval", made["run"], "--stage", stage, "--json"))
        assert found["scores"] == found["committed"]
        assert not any(found["differing_rows"].values())
